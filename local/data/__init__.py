"""Labelled observations: read from a competition's tables, split, and embedded once."""
