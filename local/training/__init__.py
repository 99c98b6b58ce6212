"""How an encoder learns: what it sees, under which head, how it is judged, and how nothing of that is lost."""
