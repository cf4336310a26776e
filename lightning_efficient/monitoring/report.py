"""The report of one run: plain data, and its three forms on disk (Markdown with plots, JSON)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import technique_of

__all__ = ["REPORT_JSON", "BalanceWords", "EventRow", "RunReport", "own_folder", "read_report", "write_report"]

REPORT_JSON = "efficiency_report.json"
_FORMAT = 1
_OWN = "efficiency"


class EventRow(NamedTuple):
    """Something that happened once in the run; the plain-data twin of :class:`lightning_efficient.telemetry.Event`."""

    step: int
    technique: str
    text: str


class BalanceWords(NamedTuple):
    """What the figures of :mod:`.balance` say of a technique, in words; the twin of :class:`.telemetry.Balance`."""

    technique: str
    time: str
    memory: str
    verdict: str


@dataclass(frozen=True)
class RunReport:
    """Everything that was measured of one run, as plain data.

    Attributes:
        title: What ran, in a few words.
        facts: Versions, hardware, trainer and model, in the order in which they are shown.
        totals: Tag to the value over the whole run, units as in the tags' endings.
        metrics: ``train_loss`` and each validation metric by its logged name.
        series: Tag ``<technique>/<quantity>_<unit>`` to its points.
        events: What happened once, oldest first.
        notes: How it was measured, one sentence each.
        balances: Of each technique that says what it cost and saved, how it knows.
        batch_unit: What the throughput counts: ``tokens`` or ``samples``.
        resumed: How many times the run was continued from a checkpoint.
        interrupted: What ended it early, or the empty string.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    series: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    events: Sequence[EventRow] = ()
    notes: Sequence[str] = ()
    balances: Sequence[BalanceWords] = ()
    batch_unit: str = "samples"
    resumed: int = 0
    interrupted: str = ""

    @property
    def techniques(self) -> tuple[str, ...]:
        """Those who measured or reported something, the monitor itself left out."""
        names = [technique_of(tag) for tag in self.series] + [event.technique for event in self.events]
        return tuple(name for name in dict.fromkeys(names) if name != _OWN)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; what is not finite becomes "NaN", "Infinity" or "-Infinity"."""
        return {
            "format": _FORMAT,
            "title": self.title,
            "facts": dict(self.facts),
            "totals": {tag: _to_json(value) for tag, value in self.totals.items()},
            "metrics": {name: _columns(points) for name, points in self.metrics.items()},
            "series": {tag: _columns(points) for tag, points in self.series.items()},
            "events": [list(event) for event in self.events],
            "notes": list(self.notes),
            "balances": [list(words) for words in self.balances],
            "batch_unit": self.batch_unit,
            "resumed": self.resumed,
            "interrupted": self.interrupted,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RunReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: If ``state`` has a format that this version does not know.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"The report has format {state.get('format')!r}; this version reads format {_FORMAT}. "
                "Read it with the version of lightning_efficient that wrote it."
            )
        return cls(
            title=state["title"],
            facts=dict(state["facts"]),
            totals={tag: _from_json(value) for tag, value in state["totals"].items()},
            metrics={name: _points(columns) for name, columns in state["metrics"].items()},
            series={tag: _points(columns) for tag, columns in state["series"].items()},
            events=tuple(EventRow(*event) for event in state["events"]),
            notes=tuple(state["notes"]),
            balances=tuple(BalanceWords(*words) for words in state.get("balances", ())),  # older ones have none
            batch_unit=state["batch_unit"],
            resumed=state["resumed"],
            interrupted=state["interrupted"],
        )


def write_report(path: str | Path, report: RunReport) -> Path:
    """Write ``efficiency_report.md``, ``efficiency_report.json`` and the plots into the folder ``path``.

    Files of these names are overwritten.

    Returns:
        The path of the Markdown file.
    """
    # Drawing is needed once, at the end of a run: whoever never reports does not pay for importing matplotlib.
    from lightning_efficient.monitoring.markdown import render
    from lightning_efficient.monitoring.plots import save_plots

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_JSON).write_text(json.dumps(report.to_dict(), allow_nan=False), encoding="utf-8")
    plots = save_plots(report, folder)
    target = folder / "efficiency_report.md"
    target.write_text(render(report, plots), encoding="utf-8")
    return target


def read_report(path: str | Path) -> RunReport:
    """The report in the folder ``path``, or in the JSON file ``path``."""
    source = Path(path)
    if source.is_dir():
        source = source / REPORT_JSON
    return RunReport.from_dict(json.loads(source.read_text(encoding="utf-8")))


def own_folder(base: Path, report: RunReport) -> Path:
    """Where ``report`` takes no other run's place: ``base``, or a new ``version_N`` in it where a report lies there.

    A resumed run takes the place of what its earlier parts reported.
    """
    if not (base / REPORT_JSON).exists():
        return base
    if report.resumed:
        for folder in (base, *sorted(base.glob("version_*"))):
            if _holds_an_earlier_part(folder, report):
                return folder
    number = next(number for number in count(1) if not (base / f"version_{number}").exists())
    return base / f"version_{number}"


def _holds_an_earlier_part(folder: Path, report: RunReport) -> bool:
    """Whether the report in ``folder`` begins with the same batch, of which no two runs have the clocks in common."""
    begin = tuple(report.series.get(f"{_OWN}/step_ms", ())[:1])
    try:
        return begin != () and begin == tuple(read_report(folder).series.get(f"{_OWN}/step_ms", ())[:1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it cannot be read
        return False


def _columns(points: Sequence[Point]) -> dict[str, list[float | str]]:
    return {name: [_to_json(point[index]) for point in points] for index, name in enumerate(Point._fields)}


def _points(columns: Mapping[str, Sequence[float | str | None]]) -> tuple[Point, ...]:
    rows = zip(*(columns[name] for name in Point._fields), strict=True)
    return tuple(Point(int(step or 0), *map(_from_json, rest)) for step, *rest in rows)


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(value: float | str | None) -> float:
    return math.nan if value is None else float(value)  # older reports have None for all that is not finite
