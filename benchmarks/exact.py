"""Whether offloading changes nothing: whole runs of a Trainer, bit for bit, for what goes elsewhere and when."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.harness import Options, Table
from lightning_efficient import OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

__all__ = ["Exact", "exact_runs"]

PLACES: dict[str, tuple[str, ...]] = {
    "optimizer state": ("optimizer_state",),
    "state, gradients": ("optimizer_state", "gradient"),
    "state, parameters": ("optimizer_state", "parameter"),
    "state, gradients, parameters, activations": ("optimizer_state", "gradient", "parameter", "activation"),
}
SCHEDULES = ("in_backward", "under_forward", "after_backward")


@dataclass(frozen=True)
class Exact:
    """What the comparison came to.

    Attributes:
        equal: Whether all weights and all optimizer state were.
        clipped: The part of the steps of the clipped runs that were clipped.
        table: For a person.
    """

    equal: bool
    clipped: float
    table: Table


class _Norms(pl.Callback):
    """The norm of all gradients in each step, before they are clipped."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.found.append(float(torch.stack(norms).norm()))


@dataclass(frozen=True)
class _Run:
    weights: dict[str, Tensor]
    state: dict[int, dict[str, Tensor]]
    moved_bytes: float  # to and from the disk, a step


def exact_runs(folder: Path, options: Options) -> Exact:
    """Train the same model alone, and with each placement and schedule, with and without clipping.

    Args:
        folder: For the disk tier.
        options: Of the benchmark.
    """
    steps = 6 if options.quick else 50
    norms = _Norms()
    plain: dict[float | None, _Run] = {None: _trained(steps, None, "auto", norms)}
    clip = statistics.median(norms.found)
    norms.found.clear()
    plain[clip] = _trained(steps, clip, "auto", norms)
    clipped = sum(norm > clip for norm in norms.found) / len(norms.found)
    rows, equal = [], True
    for name, kinds in PLACES.items():
        place = dict.fromkeys(kinds, "disk")
        for limit in (None, clip):
            for schedule in SCHEDULES[1 if limit else 0 :]:  # clipping needs all gradients
                strategy = OffloadStrategy(
                    offload_dir=folder,
                    place=place,
                    schedule=schedule,  # type: ignore[arg-type]
                    staging="8MiB" if "activation" in kinds else "512KiB",  # less than all that is on the disk
                )
                run = _trained(steps, limit, strategy)
                found = _same(plain[limit].weights, run.weights), _same(plain[limit].state, run.state)
                equal &= all(found) and run.moved_bytes > 0
                words = ["yes" if one else "no" for one in found]
                rows.append((name, schedule, f"{clipped if limit else 0:.0%}", f"{run.moved_bytes / 1e6:.1f}", *words))
                print("exact  " + "  ".join(rows[-1]), flush=True)
    header = ("on the disk", "schedule", "steps clipped", "moved a step (MB)", "weights bit-equal", "state bit-equal")
    note = "Byte language model, in a Trainer, against AdamW alone on the same batches. 'State' is the optimizer's."
    return Exact(equal, clipped, Table(f"{steps} steps, with and without offloading", header, rows, note))


def _trained(steps: int, clip: float | None, strategy: OffloadStrategy | str, *callbacks: pl.Callback) -> _Run:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        callbacks=list(callbacks),
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = ByteLanguageModel(layers=2, width=64, heads=4, context=64, learning_rate=1e-3, warmup_steps=4)
    trainer.fit(model, StdlibDataModule(context=64, batch_size=32, train_bytes=65 * 32 * steps))
    measured = strategy.measurements() if isinstance(strategy, OffloadStrategy) else {}
    moved = sum(measured.get(f"offload/total_disk_{way}_bytes", math.nan) for way in ("read", "written")) / steps
    return _Run(model.state_dict(), trainer.optimizers[0].state_dict()["state"], moved)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)
