"""How long the demo takes to plain's final loss, with everything on: ``configs/all.yaml`` against ``base.yaml``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Table, spread, worst_case_median
from benchmarks.together_runs import context, fit, settings
from lightning_efficient.monitoring.comparison import time_to
from lightning_efficient.monitoring.report import RunReport, read_report
from lightning_efficient.monitoring.series import Point

__all__ = ["Losses", "measured_losses", "ratio"]

EVERY = 50  # steps between two checkpoints, on both
ARMS = ("plain", "the suite")
CLOCKS: Mapping[str, Callable[[Point], float]] = {
    "cpu": lambda point: point.cpu_seconds,
    "wall": lambda point: point.seconds,
}


@dataclass(frozen=True)
class Losses:
    """What the runs came to.

    Attributes:
        ratios: By clock, for each seed: time to plain's final loss over plain's time; None: not reached.
        finals: By arm, for each seed: validation loss at the end.
        table: For a person.
    """

    ratios: Mapping[str, list[float | None]]
    finals: Mapping[str, list[float]]
    table: Table

    @property
    def median(self) -> float:
        """Of the ratios of processor time."""
        return worst_case_median(self.ratios["cpu"])


def measured_losses(folder: Path, options: Options) -> Losses:
    """Train the demo, plain and with the suite one behind the other, each seed the other way round.

    Args:
        folder: For everything.
        options: Of the benchmark.
    """
    reports: dict[str, list[RunReport]] = {name: [] for name in ARMS}
    seeds = options.seeds[:1] if options.quick else options.seeds
    for number, seed in enumerate(seeds):
        for name in ARMS if number % 2 == 0 else reversed(ARMS):
            place = folder / f"{name}, seed {seed}"
            process = context().Process(target=_train, args=(place, name, seed, options.quick, options.threads))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"The run in {place} ended with exit code {process.exitcode}.")
            report = read_report(next(place.rglob("efficiency_report.json")))
            reports[name].append(report)
            loss, seconds = _final(report).value, report.totals["train_cpu_seconds"]
            print(f"losses  seed {seed}  {name:<10} val loss {loss:.4f}  {seconds:.1f} s", flush=True)
    ratios = {
        name: [ratio(_losses(one), _losses(other), clock) for one, other in zip(*reports.values(), strict=True)]
        for name, clock in CLOCKS.items()
    }
    finals = {name: [_final(report).value for report in found] for name, found in reports.items()}
    rows = []
    for name, found in reports.items():
        plain = reports[ARMS[0]]
        columns = [spread(finals[name])]
        for total in ("train_cpu_seconds", "train_seconds", "peak_memory_bytes"):
            pairs = zip(found, plain, strict=True)
            columns.append(spread([one.totals[total] / base.totals[total] for one, base in pairs], 2))
        columns += [spread(ratios[clock], 2) if name != ARMS[0] else "1" for clock in CLOCKS]
        rows.append((name, *columns))
    header = (
        "", "final validation loss (nats)", "CPU time / plain", "time / plain", "peak memory / plain",
        "CPU time to plain's final loss / plain", "time to it / plain",
    )  # fmt: skip
    note = (
        f"Checkpoints every {EVERY} steps on both. Times are of training: without validation, with what checkpoints "
        "take of the process, its threads included. Time to a loss is interpolated between two validations. The model "
        "is small: what fits stays in memory uncompressed, and narrow layers go to 8 bits only where the processor "
        "gains by it."
    )
    return Losses(ratios, finals, Table(f"The demo, {len(seeds)} seeds", header, rows, note))


def ratio(plain: list[Point], suite: list[Point], clock: Callable[[Point], float]) -> float | None:
    """Time until ``suite`` reaches the last value of ``plain``, over plain's whole time; None: it does not."""
    reached = time_to(suite, plain[-1].value, clock)
    return None if reached is None else reached / clock(plain[-1])


def _losses(report: RunReport) -> list[Point]:
    return list(report.metrics["val_loss"])


def _final(report: RunReport) -> Point:
    return _losses(report)[-1]


def _train(folder: Path, name: str, seed: int, quick: bool, threads: int) -> None:
    trainer: dict[str, Any] = (
        {"limit_train_batches": 24, "val_check_interval": 6} if quick else {"val_check_interval": 25}
    )
    overlays = () if name == ARMS[0] else ("all",)
    whole = settings(folder, overlays=overlays, trainer=trainer, changes={"StdlibDataModule": {"seed": seed}})
    if name == ARMS[0]:
        saves = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": EVERY, "save_last": "link"}
        checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saves}
        whole["trainer"]["callbacks"].append(checkpoint)
    fit(folder, whole | {"seed_everything": seed}, threads=threads)


def difference(losses: Losses) -> float:
    """Of the final losses, seed by seed: the median of the suite's less plain's."""
    pairs = zip(losses.finals[ARMS[1]], losses.finals[ARMS[0]], strict=True)
    return statistics.median(one - other for one, other in pairs)
