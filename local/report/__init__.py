"""The report of a run: evidence (read it) → figures (compute all of metrics.json) → page (show it, and add nothing)."""
