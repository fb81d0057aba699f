"""The training engine: data, models, parallelism, adapters, optimizer, checkpoints and the loop."""
