"""Train a smaller form of a model first, then copy its weights into the full model and go on."""

from lightning_efficient.growth.callback import GrowAndUnshareCallback
from lightning_efficient.growth.loading import load_grown

__all__ = ["GrowAndUnshareCallback", "load_grown"]
