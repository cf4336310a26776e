"""What updates that come one step late do to the loss: the same runs, exact and late, over several seeds."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import lightning.pytorch as pl

from benchmarks.harness import Options, Table, spread
from lightning_efficient import OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule

__all__ = ["late_losses"]


RATES = (1e-3, 2e-4)
"""Learning rates: one that is about as high as this model bears, and one of small steps."""


def late_losses(folder: Path, options: Options) -> tuple[Table, dict[str, list[float]], list[float]]:
    """Train a small language model with clipping, exactly (``under_forward``) and with late updates.

    Args:
        folder: For what goes to the disk.
        options: Of the benchmark.

    Returns:
        The table; the losses by schedule and rate, one for each seed; and for each rate the difference of the means in
        its standard errors.
    """
    steps, after = (12, 4) if options.quick else (300, 40)
    rows, found, gaps = [], {}, []
    for rate in RATES:
        exact, late = (
            [_final_loss(folder, schedule, rate, seed, steps, after) for seed in options.seeds]
            for schedule in ("under_forward", "delayed")
        )
        found[f"exact, {rate:g}"], found[f"late, {rate:g}"] = exact, late
        differences = [one - other for one, other in zip(late, exact, strict=True)]
        gaps.append(_gap(late, exact))
        rows.append((f"{rate:g}", "under_forward (exact)", spread(exact, 4), "-", "-"))
        rows.append((f"{rate:g}", "delayed", spread(late, 4), spread(differences, 4), f"{gaps[-1]:+.1f}"))
        print("late updates  " + "  ".join(rows[-2]) + "\nlate updates  " + "  ".join(rows[-1]), flush=True)
    table = Table(
        f"Loss with late updates: byte language model, {steps} steps, clipped, {len(options.seeds)} seeds",
        ("learning rate", "schedule", "final validation loss", "difference", "in standard errors"),
        rows,
        f"The first {after} steps of both are exact. Differences are between runs of the same seed; the standard error "
        "is that of the difference of the means, from the spread over the seeds.",
    )
    return table, found, gaps


def _gap(late: list[float], exact: list[float]) -> float:
    if len(late) < 2:
        return 0.0
    error = math.sqrt((statistics.variance(late) + statistics.variance(exact)) / len(late))
    return (statistics.fmean(late) - statistics.fmean(exact)) / error if error else 0.0


def _final_loss(folder: Path, schedule: str, rate: float, seed: int, steps: int, after: int) -> float:
    pl.seed_everything(seed, verbose=False)
    place = {"optimizer_state": "disk"}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=OffloadStrategy(offload_dir=folder, place=place, schedule=schedule, delay_after=after),  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=0.5,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = ByteLanguageModel(layers=2, width=64, heads=4, context=64, learning_rate=rate, warmup_steps=20)
    trainer.fit(model, StdlibDataModule(context=64, batch_size=16, seed=seed, validation_bytes=65536))
    return float(trainer.callback_metrics["val_loss"])
