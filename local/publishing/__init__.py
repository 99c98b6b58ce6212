"""How the bundle goes to Kaggle and comes back with a score, by Kaggle's own client."""
