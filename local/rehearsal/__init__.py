"""How the bundle is tried before Kaggle does it: as Kaggle mounts it, offline, through all that may go wrong."""
