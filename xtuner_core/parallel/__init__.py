"""Device mesh and FSDP2 sharding, applied from outside."""
