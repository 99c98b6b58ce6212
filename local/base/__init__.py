"""What several rooms need: the console, files, metrics, the versions of Kaggle's image."""
