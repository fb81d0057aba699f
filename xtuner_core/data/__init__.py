"""From files to packed, memory-mapped training batches."""
