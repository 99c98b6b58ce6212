"""How a package becomes one script, and runs become one folder of weights."""
