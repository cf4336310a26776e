"""Cheaper and safer training for PyTorch Lightning, without touching your LightningModule."""

from lightning_efficient.activation_compression import ActivationCompressionPlugin
from lightning_efficient.checkpointing import AsyncCheckpointIO
from lightning_efficient.growth import GrowAndUnshareCallback, load_grown
from lightning_efficient.monitoring import EfficiencyMonitor
from lightning_efficient.offload import OffloadDDPStrategy, OffloadFSDP2Strategy, OffloadStrategy
from lightning_efficient.precision import RollbackPrecision

__all__ = [
    "ActivationCompressionPlugin",
    "AsyncCheckpointIO",
    "EfficiencyMonitor",
    "GrowAndUnshareCallback",
    "OffloadDDPStrategy",
    "OffloadFSDP2Strategy",
    "OffloadStrategy",
    "RollbackPrecision",
    "load_grown",
]
__version__ = "0.1.0.dev0"
