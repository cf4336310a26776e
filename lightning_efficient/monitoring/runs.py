"""A run as it lies on the disk: its own report, or else what its loggers wrote."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_efficient.monitoring.balance import is_balance
from lightning_efficient.monitoring.report import REPORT_JSON, RunReport, read_report
from lightning_efficient.monitoring.series import Point, quantile
from lightning_efficient.monitoring.units import technique_of

__all__ = ["Run", "RunError", "read_run"]

_EVENTS = "events.out.tfevents*"
_CSV = "metrics.csv"
_OURS = ("efficiency", "growth", "checkpoint", "activations", "offload", "precision")
_NO_NUMBERS = ("epoch", "hp_metric")  # Lightning logs these, whether the run has anything to say or not
_MOST_NAMED = 8


class RunError(ValueError):
    """A folder is not a run that can be reported, and why."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What it is called.
        path: Its folder, as it was given.
        report: What is known of it.
        source: Where that is from, if it is not the run's own report; else empty.
    """

    name: str
    path: Path
    report: RunReport
    source: str = ""


def read_run(path: str | Path, name: str | None = None) -> Run:
    """The run in the folder ``path``.

    Args:
        path: The folder with ``efficiency_report.json``, or where a logger wrote; or that file itself.
        name: What to call it; None: as its folder, or as the one above a ``version_0``.

    Raises:
        RunError: If there is no run, or what there is cannot be read.
    """
    given = Path(path)
    if not given.exists():
        raise RunError(
            f"{path} does not exist. Give the folder of a run, where its logger and EfficiencyMonitor wrote."
        )
    folder = given if given.is_dir() else given.parent
    name = name or _name(folder)
    if given.is_file() and given.suffix != ".json":
        raise RunError(f"{path} is a file. Give the folder of a run, or its {REPORT_JSON}.")
    if given.is_file() or (folder / REPORT_JSON).is_file():
        return Run(name, folder, _own_report(given if given.is_file() else folder / REPORT_JSON))
    if any(folder.glob(_EVENTS)):
        return _from_logs(name, folder, "TensorBoard's event files", _read_events(folder))
    if (folder / _CSV).is_file():
        return _from_logs(name, folder, _CSV, _read_csv(folder / _CSV))
    raise RunError(_not_a_run(folder))


def _own_report(file: Path) -> RunReport:
    try:
        return read_report(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{file} cannot be read: {error}. It was cut off, or is no JSON; move it away, and the run's logs are read "
            "instead."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is JSON, but not the report of a run: {error!r}.") from error
    except ValueError as error:
        raise RunError(f"{file} cannot be read. {error}") from error


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("version_") else folder.name


def _not_a_run(folder: Path) -> str:
    below = {file.parent for pattern in (REPORT_JSON, _EVENTS, _CSV) for file in folder.rglob(pattern)}
    if not below:
        return (
            f"{folder} is not a run: it has neither {REPORT_JSON}, nor a TensorBoard event file, nor {_CSV}. Add "
            "EfficiencyMonitor() to the Trainer's callbacks, or give the folder where its logger wrote."
        )
    named = ", ".join(str(run) for run in sorted(below)[:_MOST_NAMED])
    more = f" and {len(below) - _MOST_NAMED} more" if len(below) > _MOST_NAMED else ""
    return f"{folder} is not a run, but has some in it: {named}{more}. Give one of these, or several."


def _from_logs(name: str, folder: Path, source: str, logged: Mapping[str, Sequence[Point]]) -> Run:
    logged = {tag: points for tag, points in logged.items() if tag not in _NO_NUMBERS}
    if not logged:
        raise RunError(f"{folder} holds {source} without a single number. The run ended before anything was logged.")
    techniques = {*_OURS, *(technique_of(tag) for tag in logged if is_balance(tag))}
    series = {tag: points for tag, points in logged.items() if technique_of(tag) in techniques}
    metrics = {tag: points for tag, points in logged.items() if tag not in series}
    last = {tag: points[-1].value for tag, points in series.items()}
    steps = max(point.step for points in logged.values() for point in points) + 1.0
    totals = {"optimizer_steps": steps}
    for name_, total in (("step_ms", "step_ms_median"), ("step_cpu_ms", "step_cpu_ms_median")):
        if points := series.get(f"efficiency/{name_}"):
            totals[total] = quantile([point.value for point in points], 0.5)
    for name_ in ("peak_memory_bytes", "gradient_bytes", "optimizer_state_bytes"):
        if points := series.get(f"efficiency/{name_}"):
            totals[name_] = max(point.value for point in points)
    if "efficiency/parameters" in last:
        totals["parameters"] = last["efficiency/parameters"]
    if any(tag.endswith("_total_ms") for tag in series):
        totals["batches"] = steps  # so a balance is per step, as far as it was logged
    unit = "tokens" if "efficiency/tokens_per_s" in series else "samples"
    notes = [f"{name} left no report; its figures are what {source} hold, and so may be incomplete."]
    if source != _CSV:
        notes.append(f"Times of {name} are those at which it logged, validation included.")
    else:
        notes.append(f"{source} tells no times.")
    return Run(name, folder, RunReport(f"Logs of {name}", {}, totals, metrics, series, (), notes, (), unit), source)


def _read_events(folder: Path) -> dict[str, tuple[Point, ...]]:
    # TensorBoard is slow to import, and most runs have a report of their own.
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        SCALARS,
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    logged = {tag: events.Scalars(tag) for tag in events.Tags()[SCALARS]}
    start = min((one.wall_time for values in logged.values() for one in values), default=0.0)
    return {
        tag: tuple(Point(one.step, one.wall_time - start, math.nan, one.value) for one in values)
        for tag, values in logged.items()
    }


def _read_csv(file: Path) -> dict[str, tuple[Point, ...]]:
    logged: dict[str, list[Point]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            step = row.pop("step", "") or ""
            for tag, value in row.items():
                try:
                    point = Point(int(step), math.nan, math.nan, float(value))
                except (TypeError, ValueError):  # most rows have most columns empty
                    continue
                logged.setdefault(tag, []).append(point)
    return {tag: tuple(points) for tag, points in logged.items()}
