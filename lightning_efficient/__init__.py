"""Cheaper and safer training for PyTorch Lightning, without touching your LightningModule."""

from lightning_efficient.growth import GrowAndUnshareCallback, load_grown

__all__ = ["GrowAndUnshareCallback", "load_grown"]
__version__ = "0.1.0.dev0"
