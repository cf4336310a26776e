"""What was run, when, with which versions, and with what outcome: ``docs/compatibility.json``."""

from __future__ import annotations

import datetime
import fcntl
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import lightning
import torch

from tests.matrix.running import Outcome

__all__ = ["PATH", "Record", "load", "note", "versions"]

PATH = Path(__file__).parents[2] / "docs" / "compatibility.json"

Record = dict[str, dict[str, str]]
"""From a cell's name to its ``state``, ``reason`` (if it has one), ``date`` and ``versions``."""


def versions() -> str:
    """That a run depends on."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, Lightning {lightning.__version__}"


def load(path: Path = PATH) -> Record:
    """Empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def note(outcomes: Mapping[str, Outcome], path: Path = PATH, order: list[str] | None = None) -> None:
    """Add to the file, to which other processes may add too.

    Args:
        outcomes: By name.
        path: Of the file.
        order: In which names come; those that are not among them are removed.
    """
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = load(path)
        for name, outcome in outcomes.items():
            record[name] = {
                "state": outcome.state,
                **({"reason": outcome.reason} if outcome.reason else {}),
                "date": datetime.date.today().isoformat(),
                "versions": versions(),
            }
        if order is not None:
            record = {name: record[name] for name in order if name in record}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)
