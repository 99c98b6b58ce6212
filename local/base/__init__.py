"""What several rooms need: the console, files, metrics."""
