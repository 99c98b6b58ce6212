"""The measured tables of RESULTS.md: accuracy, speed, five published systems, Omniglot."""
