"""How good the planner's predictions are: each against a run of its own.

For each training the planner does what ``python -m lightning_efficient plan`` does; then plain training and several
combinations are run in processes of their own, on the training's own loader, and held against what was predicted for
them. Times are compared at the speed of the machine that a fixed piece of work shows before and after, for a shared
machine is half as fast again a minute later.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Options, Result, Table
from lightning_efficient.core.units import human_bytes
from lightning_efficient.planning.plan import RunFailed, Shop, check, make_plan

__all__ = ["Row", "plan_errors", "run"]

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("activations-4bit",),
    ("offload-state",),
    ("activations-4bit", "offload-state"),
    ("activations-4bit", "offload-all"),
    ("activations-lossless", "offload-state"),
    ("activations-4bit", "int8"),
    ("activations-4bit", "offload-state", "int8"),
)


@dataclass(frozen=True)
class Row:
    """One combination of one training.

    Attributes:
        training: Its name.
        techniques: Their keys.
        peak: Bytes, measured.
        predicted_peak: Bytes.
        wall: Seconds of a batch, measured, at the speed of the machine in the profile.
        predicted_wall: Seconds.
        cpu: Likewise, of the process.
        predicted_cpu: Seconds.
    """

    training: str
    techniques: str
    peak: int
    predicted_peak: int
    wall: float
    predicted_wall: float
    cpu: float
    predicted_cpu: float

    @property
    def peak_error(self) -> float:
        """Over what was measured."""
        return abs(self.predicted_peak / self.peak - 1)

    @property
    def wall_error(self) -> float:
        """Over what was measured."""
        return abs(self.predicted_wall / self.wall - 1)

    @property
    def cpu_error(self) -> float:
        """Over what was measured."""
        return abs(self.predicted_cpu / self.cpu - 1)


def _language_model(layers: int, width: int, context: int, rows: int) -> dict[str, Any]:
    model = {"layers": layers, "width": width, "heads": max(2, width // 64), "context": context}
    data = {"context": context, "batch_size": rows, "train_bytes": 4 << 20, "validation_bytes": 8192}
    return {
        "model": {"class_path": "lightning_efficient.demos.ByteLanguageModel", "init_args": model},
        "data": {"class_path": "lightning_efficient.demos.StdlibDataModule", "init_args": data},
    }


def _trainings(quick: bool) -> dict[str, dict[str, Any]]:
    model = "benchmarks.plan_models"
    lengths = _language_model(*((2, 32, 64, 4) if quick else (4, 128, 384, 8)))
    data = {"longest": 64, "batch_size": 4, "batches": 12} if quick else {"longest": 384}
    lengths["data"] = {"class_path": f"{model}.Lengths", "init_args": data}
    if quick:
        return {"different lengths": lengths}
    return {
        "byte LM, 0.9 M parameters": _language_model(4, 128, 128, 16),
        "byte LM, 6.4 M parameters": _language_model(8, 256, 128, 8),
        "byte LM, 25 M parameters": _language_model(8, 512, 128, 2),
        "network of convolutions": {
            "model": {"class_path": f"{model}.ConvNet"},
            "data": {"class_path": f"{model}.Images"},
        },
        "different lengths": lengths,
    }


def plan_errors(folder: Path, *, quick: bool, device: str = "cpu") -> tuple[list[Row], float, float, list[str]]:
    """Predict and run.

    Args:
        folder: For what the runs write; below the present one.
        quick: One small training, and few combinations.
        device: ``cpu`` or ``cuda``.

    Returns:
        The rows, the largest error of a peak, the largest of a time (of the process where that is all there is; with an
        offload, which waits for a disk, by the clock), and which combinations could not be run, and why.
    """
    rows, failed = list[Row](), list[str]()
    for number, (name, config) in enumerate(_trainings(quick).items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        trainer = {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "max_steps": 2000}
        file = place / "config.yaml"
        trainer |= {"max_epochs": 2000, "enable_checkpointing": False}  # type: ignore[assignment]
        file.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": trainer, **config}), encoding="utf-8")
        found, without = _rows(name, file, place, COMBINATIONS[:2] if quick else COMBINATIONS, quick)
        rows += found
        failed += without
    return rows, max(row.peak_error for row in rows), max(time_error(row) for row in rows), failed


def time_error(row: Row) -> float:
    """By the clock where a disk is waited for, else of the process: the clock of a shared machine counts others too."""
    return row.wall_error if "offload" in row.techniques else row.cpu_error


def _rows(
    name: str, config: Path, place: Path, combinations: Sequence[tuple[str, ...]], quick: bool
) -> tuple[list[Row], list[str]]:
    def say(text: str) -> None:
        print(f"{name}  {text}", flush=True)

    shop = Shop([str(config)], place / "runs", batches=4 if quick else 12, seconds=0.5 if quick else 3.0, say=say)
    began = time.monotonic()
    plan = make_plan(shop, only={key for keys in combinations for key in keys})
    say(f"planned in {time.monotonic() - began:.0f} s")
    rows, failed = list[Row](), list[str]()
    for keys in combinations:
        if not all(key in plan.alone for key in keys):
            why = next(plan.not_tried.get(key, "not tried") for key in keys if key not in plan.alone)
            failed.append(f"{name}, {' + '.join(keys)}: {why}")
            continue
        candidate = plan.candidate(keys)
        try:
            peak, seconds = check(shop, candidate, plan.profile)
        except RunFailed as error:
            say(f"{candidate.name}: {error}")
            failed.append(f"{name}, {candidate.name}: {error}")
            continue
        expected = candidate.prediction
        beside = plan.profile.waits(expected.step.wall)
        row = Row(
            name, candidate.name, peak, expected.peak, seconds.wall, expected.step.wall + beside, seconds.cpu,
            expected.step.cpu + beside,
        )  # fmt: skip
        say(f"{row.techniques}: peak {row.peak_error:.1%}, wall {row.wall_error:.1%}, CPU {row.cpu_error:.1%} off")
        rows.append(row)
    return rows, failed


def table(rows: Sequence[Row]) -> Table:
    """For a person."""
    lines = [
        (
            row.training, row.techniques, human_bytes(row.predicted_peak), human_bytes(row.peak),
            f"{row.predicted_peak / row.peak - 1:+.1%}", f"{row.predicted_wall * 1e3:.0f}", f"{row.wall * 1e3:.0f}",
            f"{row.predicted_wall / row.wall - 1:+.1%}", f"{row.predicted_cpu / row.cpu - 1:+.1%}",
        )
        for row in rows
    ]  # fmt: skip
    header = (
        "training", "techniques", "peak, predicted", "peak, measured", "difference", "wall time of a batch, predicted "
        "(ms)", "measured (ms)", "difference", "difference of the CPU time",
    )  # fmt: skip
    errors = [[row.peak_error for row in rows], [time_error(row) for row in rows]]
    middle = [f"{statistics.median(each):.1%}" for each in errors]
    note = f"Medians of the errors: {middle[0]} of the peak, {middle[1]} of the time."
    return Table("Predicted and measured", header, lines, note)


def _of_predictions(rows: Sequence[Row]) -> str:
    """The largest errors of combinations that were never run before."""
    known = {"activations-4bit + int8", "activations-4bit + offload-all"}
    pure = [row for row in rows if " + " in row.techniques and row.techniques not in known]
    if not pure:
        return "none"
    return (
        f"{max(row.peak_error for row in pure):.1%} of the peak, {max(time_error(row) for row in pure):.1%} of the time"
    )


def run(options: Options) -> Result:
    """The benchmark."""
    with tempfile.TemporaryDirectory(prefix=".bench-plan-", dir=Path.cwd()) as folder:
        rows, peak, seconds, failed = plan_errors(Path(folder), quick=options.quick, device=options.device)
    raw = {"rows": [asdict(row) for row in rows], "failed": failed}
    notes = (
        *(f"Could not be run: {each}." for each in failed),
        "The planner profiles plain training, tries each technique alone and two pairs (activations-4bit with int8, "
        "and with offload-all), and predicts the rest; each row is then a run of its own. The errors of the last line "
        f"are the largest of all rows; of those that the planner had not run: {_of_predictions(rows)}.",
        "Times are compared at the machine's speed in the profile, as a fixed piece of work before and after the steps "
        "shows it. The error of a time is that of the process's CPU time; with an offload, which waits for a disk, "
        "that of the wall time.",
    )
    checked = f"{len(rows)}/{len(rows) + len(failed)}"
    figures: dict[str, float | str] = {"plan_peak_error": peak, "plan_time_error": seconds, "plan_checked": checked}
    return Result("plan", figures, [table(rows)], raw, notes)
