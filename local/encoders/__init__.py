"""`--encoder SPEC`: find the weights, load them, describe the encoder as the manifest does."""
