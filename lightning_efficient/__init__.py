"""Cheaper and safer training for PyTorch Lightning, without touching your LightningModule."""

__version__ = "0.1.0.dev0"
