"""Cheaper and safer training for PyTorch Lightning, without touching your LightningModule.

Each public name is imported when it is first asked for, so that a technique costs nothing where it is not used.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import StrategyRegistry

if TYPE_CHECKING:
    from lightning_efficient.activation_compression import ActivationCompressionPlugin
    from lightning_efficient.checkpointing import AsyncCheckpointIO
    from lightning_efficient.core.resumable import ResumableDataLoader
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
    "ResumableDataLoader",
    "RollbackPrecision",
    "load_grown",
]
__version__ = "0.1.0"

_HOMES = {
    "ActivationCompressionPlugin": "activation_compression",
    "AsyncCheckpointIO": "checkpointing",
    "EfficiencyMonitor": "monitoring",
    "GrowAndUnshareCallback": "growth",
    "OffloadDDPStrategy": "offload",
    "OffloadFSDP2Strategy": "offload",
    "OffloadStrategy": "offload",
    "ResumableDataLoader": "core.resumable",
    "RollbackPrecision": "precision",
    "load_grown": "growth",
}


def __getattr__(name: str) -> Any:
    """A public name, from where it lives (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # so that it is asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _make(name: str, **arguments: Any) -> Any:
    return __getattr__(name)(**arguments)


for _string, _class, _description in (
    ("offload", "OffloadStrategy", "Device, host memory and disk as one memory"),
    ("offload_ddp", "OffloadDDPStrategy", "DDP with optimizer state divided, on device, host memory and disk"),
    ("offload_fsdp2", "OffloadFSDP2Strategy", "FSDP2 with optimizer state on device, host memory and disk"),
):
    if _string not in StrategyRegistry:  # a reloaded module registers nothing twice
        StrategyRegistry.register(_string, partial(_make, _class), description=_description)
