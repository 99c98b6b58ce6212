"""Labelled observations: from a competition's tables to splits, and the cache of their embeddings."""
