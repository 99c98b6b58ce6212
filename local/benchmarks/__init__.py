"""What the README measures: accuracy, speed, five published systems, Omniglot."""
