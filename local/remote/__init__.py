"""Train on Kaggle's GPUs: send the kit, run it there, and bring the run folder back."""
