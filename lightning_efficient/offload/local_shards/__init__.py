"""Parameters that are sharded over ranks (FSDP2): each rank keeps and moves the optimizer state of its own shards."""
