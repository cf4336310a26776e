"""Training in few bits that heals itself (see README.md)."""

from lightning_efficient.precision.precision import RollbackPrecision

__all__ = ["RollbackPrecision"]
