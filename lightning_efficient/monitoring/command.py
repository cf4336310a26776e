"""``python -m lightning_efficient report RUN [RUN ...]``: runs side by side, from what they left on the disk."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_efficient.monitoring.comparison import Comparison
from lightning_efficient.monitoring.page import page
from lightning_efficient.monitoring.runs import RunError, read_run
from lightning_efficient.monitoring.sheet import markdown, terminal

__all__ = ["main", "write_comparison"]

_NARROWEST, _WIDEST = 60, 120
_PAGE, _TEXT, _PICTURE = _PAGES = ("comparison.html", "comparison.md", "comparison.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write the pages.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit status; errors of the user end the process with status 2.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-efficient report",
        description="Runs side by side, the first one as the baseline: a table here, and comparison.html (one file, to "
        "be sent to anyone) and comparison.md in a folder.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, where EfficiencyMonitor or a logger wrote"
    )
    parser.add_argument("--out", type=Path, help="folder for the pages; else the one that the runs have in common")
    parser.add_argument(
        "--metric", help="by which time is told; else the baseline's first validation metric, or of a test, or a loss"
    )
    options = parser.parse_args(arguments)
    runs = [run for run in options.runs if Path(run).name not in _PAGES]  # of an earlier time: ``runs/*`` has them too
    try:
        comparison = Comparison([read_run(run) for run in runs or options.runs], options.metric)
    except RunError as error:
        parser.error(str(error))
    out = options.out or Path(os.path.commonpath([run.path.resolve() for run in comparison.runs]))
    columns = shutil.get_terminal_size((100, 24)).columns
    print(terminal(comparison, min(max(columns, _NARROWEST), _WIDEST)))
    try:
        written = write_comparison(out, comparison)
    except OSError as error:
        parser.error(f"The pages cannot be written to {out}: {error}. Give another folder with --out.")
    print(f"\nReport: {written}")
    return 0


def write_comparison(folder: str | Path, comparison: Comparison) -> Path:
    """Write ``comparison.html``, ``comparison.md`` and its picture ``comparison.png`` into ``folder``.

    Returns:
        The path of the page.
    """
    from lightning_efficient.monitoring.panels import draw  # imports matplotlib

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    panels = comparison.panels()
    if panels:  # the marks would be numbers without words
        draw([replace(panel, marks=()) for panel in panels], target / _PICTURE)
    text = markdown(comparison, _PICTURE if panels else "", _PAGE)
    (target / _TEXT).write_text(text, encoding="utf-8")
    written = target / _PAGE
    written.write_text(page(comparison), encoding="utf-8")
    return written
