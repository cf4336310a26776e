"""Device, host memory and disk as one memory."""

from lightning_efficient.offload.strategy import OffloadStrategy

__all__ = ["OffloadStrategy"]
