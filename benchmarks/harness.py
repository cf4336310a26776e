"""What every benchmark shares: options, tables, result files."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_efficient.monitoring.facts import machine_facts

__all__ = ["Options", "Result", "Table", "spread", "write_results"]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    quick: bool
    device: str
    seeds: tuple[int, ...]
    threads: int
    out: Path


@dataclass(frozen=True)
class Table:
    """Rows for a person, with a sentence on what they show."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        lines += [f"| {' | '.join(self.header)} |", f"|{'---|' * len(self.header)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome.

    Attributes:
        name: Of the benchmark.
        figures: Key to value, for the last line.
        tables: For a person.
        raw: Everything measured, for the JSON file.
        notes: How it was measured.
    """

    name: str
    figures: Mapping[str, float | str]
    tables: Sequence[Table]
    raw: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def last_line(self) -> str:
        """``NAME key=value key=value ...``"""
        return " ".join([self.name, *(f"{key}={_short(value)}" for key, value in self.figures.items())])

    def markdown(self) -> str:
        """Tables and notes."""
        parts = [f"# Benchmark: {self.name}", "", *(table.markdown() for table in self.tables)]
        return "\n".join([*parts, *(f"- {note}" for note in self.notes), ""])


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Median and range: ``0.61 (0.58 to 0.66)``; a value that is None was never reached."""
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f"not reached by {len(values) - len(reached)} of {len(values)}"
    return f"{statistics.median(reached):.{digits}f} ({min(reached):.{digits}f} to {max(reached):.{digits}f})"


def worst_case_median(values: Sequence[float | None]) -> float:
    """The median, where a value that was never reached counts as infinite."""
    return statistics.median(math.inf if value is None else value for value in values)


def write_results(result: Result, options: Options) -> list[Path]:
    """Write ``<name>_<hardware>.md`` and ``.json``; a quick run is marked in its file name."""
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(torch.device(options.device)) | {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "threads": str(options.threads),
    }
    hardware = "cpu" if options.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    stem = f"{result.name}_{hardware}-{platform.machine()}" + ("_quick" if options.quick else "")
    markdown = options.out / f"{stem}.md"
    table = "\n".join(["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""])
    markdown.write_text(f"{result.markdown()}{table}\n```text\n{result.last_line()}\n```\n", encoding="utf-8")
    data = options.out / f"{stem}.json"
    data.write_text(
        json.dumps({"facts": facts, "figures": dict(result.figures), "raw": result.raw}, indent=1, allow_nan=True),
        encoding="utf-8",
    )
    return [markdown, data]
