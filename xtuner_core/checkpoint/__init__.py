"""Training checkpoints, and the Hugging Face folder that every other tool reads."""
