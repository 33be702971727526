"""Other people's checkpoints, as our models."""
