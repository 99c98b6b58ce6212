"""Train an encoder: batches, head and losses, evaluation, checkpoints, and the run that training leaves."""
