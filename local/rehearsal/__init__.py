"""Rehearse the bundle: mounted as on Kaggle, offline, and with the problems that may occur there."""
