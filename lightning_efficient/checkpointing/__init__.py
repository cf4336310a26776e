"""Checkpoints that are copied while training goes on, and written in the background; see the card, README.md."""

from lightning_efficient.checkpointing.checkpoint_io import AsyncCheckpointIO, CheckpointSaveError
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify

__all__ = ["AsyncCheckpointIO", "CheckpointDamagedError", "CheckpointSaveError", "verify"]
