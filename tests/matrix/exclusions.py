"""Settings that exclude each other, where the techniques themselves go together; each is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers.fitting import fit
from tests.helpers.models import CompiledModel, ShardedModel, SilentModel
from tests.helpers.summaries import DDP
from tests.matrix.cells import PLACES
from tests.matrix.running import in_processes, refusal
from tests.technique_settings import TechniqueSetting, demo_model

__all__ = ["EXCLUSIONS", "Exclusion", "refused", "said"]

_ASYNC = "lightning_efficient.AsyncCheckpointIO"
_ACTIVATIONS = "lightning_efficient.ActivationCompressionPlugin"
_OFFLOAD = "lightning_efficient.OffloadStrategy"
_PRECISION = "lightning_efficient.RollbackPrecision"
_FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy"
_GROWTH = "lightning_efficient.GrowAndUnshareCallback"


@dataclass(frozen=True)
class Exclusion:
    """Settings that are not for one Trainer.

    Attributes:
        name: What it is recorded under: the settings, as a user writes them.
        yaml: As in :class:`~tests.technique_settings.TechniqueSetting`.
        place: Where.
        model: Makes it.
        step_compiled: Whether the whole LightningModule is compiled.
        trainer: Arguments of the Trainer.
    """

    name: str
    yaml: Mapping[str, Any]
    place: str = "one device"
    model: type = SilentModel
    step_compiled: bool = False
    trainer: Mapping[str, Any] = field(default_factory=dict)


def _callback(path: str, **arguments: Any) -> dict[str, Any]:
    return {"callbacks": [{"class_path": path, "init_args": arguments}]}


def _plugin(path: str, **arguments: Any) -> dict[str, Any]:
    return {"plugins": [{"class_path": path, "init_args": arguments}]}


def _strategy(path: str, **arguments: Any) -> dict[str, Any]:
    return {"strategy": {"class_path": path, "init_args": arguments}}


_IN_BACKWARD = _callback(_ASYNC, optimizer_in_backward=True)
_GUARD: dict[str, Any] = {"factor": 3.0, "window": 8}
_GUARD_ALONE = _GUARD | {"snapshots": 0}
_DISK = {"optimizer_state": "disk"}
_PLACE = "`OffloadStrategy(place={{'{}': 'disk'}})`"

EXCLUSIONS = [
    Exclusion(
        f"`ActivationCompressionPlugin` and {_PLACE.format('activation')}",
        _callback(_ACTIVATIONS, bits=4) | _strategy(_OFFLOAD, place={"activation": "disk"}),
    ),
    Exclusion(
        "`ActivationCompressionPlugin(adaptive=...)` and a compiled network",
        _callback(_ACTIVATIONS, adaptive={"every": 4, "target": 0.1}),
        model=CompiledModel,
    ),
    Exclusion(
        "`ActivationCompressionPlugin(memory_budget=...)` and a compiled network",
        _callback(_ACTIVATIONS, memory_budget=0.5),
        model=CompiledModel,
    ),
    Exclusion(
        "`AsyncCheckpointIO(optimizer_in_backward=True)` and `OffloadStrategy`",
        _IN_BACKWARD | _strategy(_OFFLOAD, place=_DISK),
    ),
    Exclusion(
        "`AsyncCheckpointIO(optimizer_in_backward=True)` and `RollbackPrecision(spike_guard=...)`",
        _IN_BACKWARD | _plugin(_PRECISION, spike_guard=_GUARD),
    ),
    Exclusion("`AsyncCheckpointIO(optimizer_in_backward=True)` and several ranks", _IN_BACKWARD, place="DDP"),
    Exclusion(
        "`AsyncCheckpointIO(optimizer_in_backward=True)` and `gradient_clip_val`",
        _IN_BACKWARD,
        trainer={"gradient_clip_val": 1.0},
    ),
    Exclusion(
        f"{_PLACE.format('parameter')} and a `LightningModule` that is compiled as a whole",
        _strategy(_OFFLOAD, place={"parameter": "disk"}),
        step_compiled=True,
    ),
    Exclusion(
        "`OffloadStrategy(schedule='delayed')` and a `LightningModule` that is compiled as a whole",
        _strategy(_OFFLOAD, place=_DISK, schedule="delayed"),
        step_compiled=True,
    ),
    Exclusion(
        "`OffloadStrategy` and `RollbackPrecision(spike_guard=...)`, without `AsyncCheckpointIO(in_memory=1)`",
        _strategy(_OFFLOAD, place=_DISK) | _plugin(_PRECISION, spike_guard=_GUARD),
    ),
    Exclusion(
        "`OffloadDDPStrategy` and `RollbackPrecision(spike_guard=...)` that goes back to snapshots",
        _strategy("lightning_efficient.OffloadDDPStrategy", place=_DISK) | _plugin(_PRECISION, spike_guard=_GUARD),
        place="DDP",
    ),
    Exclusion(
        "`OffloadStrategy(schedule='delayed')` and `RollbackPrecision(spike_guard=...)`",
        _strategy(_OFFLOAD, place=_DISK, schedule="delayed") | _plugin(_PRECISION, spike_guard=_GUARD_ALONE),
    ),
    Exclusion(
        f"{_PLACE.format('gradient')} and `RollbackPrecision(spike_guard=...)`",
        _strategy(_OFFLOAD, place={"gradient": "disk"}) | _plugin(_PRECISION, spike_guard=_GUARD_ALONE),
    ),
    Exclusion(
        "`OffloadStrategy(batch_feedback=True)` and `RollbackPrecision(spike_guard=...)`",
        _strategy(_OFFLOAD, place=_DISK, batch_feedback=True) | _plugin(_PRECISION, spike_guard=_GUARD_ALONE),
    ),
    Exclusion(
        "`AsyncCheckpointIO` and FSDP2 with checkpoints that are folders",
        _callback(_ASYNC) | _strategy(_FSDP2),
        place="FSDP2",
        model=ShardedModel,
    ),
    Exclusion(
        "`AsyncCheckpointIO(resume='auto')` and FSDP2",
        _callback(_ASYNC, resume="auto") | _strategy(_FSDP2, save_distributed_checkpoint=False),
        place="FSDP2",
        model=ShardedModel,
    ),
    Exclusion(
        "`GrowAndUnshareCallback(offload_on_switch=True)` without a strategy that offloads",
        _callback(_GROWTH, mode="share", unit=2, until=5, offload_on_switch=True),
    ),
]


def refused(exclusion: Exclusion, folder: Path) -> str:
    """The message; empty if it is not refused before the first batch."""
    results = set(in_processes(exclusion.place, said, folder, exclusion.name, folder))
    return results.pop() if len(results) == 1 else ""


def said(rank: int, name: str, root: Path) -> str:
    """Likewise, in this process."""
    [one] = [exclusion for exclusion in EXCLUSIONS if exclusion.name == name]
    ranks = PLACES[one.place]
    on_ranks = {ranks: one.yaml["strategy"]} if ranks and "strategy" in one.yaml else {}
    setting = TechniqueSetting(name=name, yaml=one.yaml, on_ranks=on_ranks)
    arguments = {**one.trainer, **(DDP if ranks else {})}

    def train(**more: Any) -> None:
        module = demo_model(one.model)
        compiled = torch.compile(module, backend="eager") if one.step_compiled else None
        fit(setting, build=setting.build(ranks=ranks), module=module, compiled=compiled, root=root, **arguments, **more)

    return refusal(train)
