"""How to train: one TOML file per recipe, and what its settings mean."""
