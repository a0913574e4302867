"""Configuration, the training loop, checkpoints."""
