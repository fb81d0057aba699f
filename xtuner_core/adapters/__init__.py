"""Parameter-efficient methods, applied before sharding."""
