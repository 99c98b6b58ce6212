"""Drawn fungi, and drawn competitions in FungiCLEF's layout: data for the demo, the tests and full-size runs."""
