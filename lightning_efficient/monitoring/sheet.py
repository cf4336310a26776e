"""A comparison as text: a table for a terminal, and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from lightning_efficient.monitoring.balance import trades
from lightning_efficient.monitoring.comparison import Comparison, Row
from lightning_efficient.monitoring.markdown import balance_section, table
from lightning_efficient.monitoring.words import run_words, technique_words, unaccounted_words

__all__ = ["markdown", "terminal"]

_LONG_NAME = 14  # characters; where one is longer, letters stand for the names


def terminal(comparison: Comparison, width: int = 100) -> str:
    """For a terminal that is ``width`` characters wide."""
    labels = _labels(comparison)
    lines = []
    if labels != comparison.names:
        for label, name in zip(labels, comparison.names, strict=True):
            lines += textwrap.wrap(f"{label} = {name}", width, subsequent_indent="    ")
        lines.append("")
    lines += _grid(labels, [_with_labels(row, comparison, labels) for row in comparison.rows()], width)
    if left_out := comparison.left_out():
        lines += ["", *textwrap.wrap(left_out, width)]
    for place, run in enumerate(comparison.runs):
        found = trades(run.report)
        if found or place:
            lines += ["", f"{labels[place]}:"]
        words = run_words(comparison, place, labels) if place else []
        lines += textwrap.wrap(" ".join(words), width, initial_indent="  ", subsequent_indent="  ")
        said = [f"{trade.technique}: {technique_words(trade)}" for trade in found]
        said += [unaccounted_words(comparison.baseline.report, run.report, labels[0])] if place and found else []
        for text in filter(None, said):
            lines += textwrap.wrap(text, width, initial_indent="  - ", subsequent_indent="    ")
        if run.report.events:
            lines += ["", f"What the techniques of {labels[place]} did:"]
            lines += [
                _short(f"  step {event.step:>5}  {event.technique}: {event.text}", width) for event in run.report.events
            ]
    for warning in comparison.warnings():
        lines += ["", *textwrap.wrap(warning, width)]
    return "\n".join(lines)


def markdown(comparison: Comparison, plot: str = "", page: str = "") -> str:
    """For a file.

    Args:
        comparison: What it is of.
        plot: Name of a picture beside it.
        page: Name of the page beside it.
    """
    names = list(comparison.names)
    parts = [f"# {comparison.title}"]
    parts += [f"**{warning}**" for warning in comparison.warnings()]
    parts += [" ".join(run_words(comparison, place, names)) for place in range(1, len(names))]
    if page:
        parts.append(f"[The same as a page, with curves that tell their values]({page})")
    rows = [(row.label, *map(_cell, row.cells, row.changes)) for row in comparison.rows()]
    parts += ["## Side by side", table(["", *names], rows), comparison.left_out()]
    parts += [f"![The metric, the training loss, memory and the time of batches]({plot})"] if plot else []
    for place, run in enumerate(comparison.runs):
        parts += _of_run(comparison, place) if len(names) > 1 else balance_section(run.report)
    differ, same = comparison.facts()
    if differ and len(names) > 1:
        parts += ["## What differs", table(["", *names], [(name, *cells) for name, cells in differ.items()])]
    if same:
        parts += ["## The same in all runs", table(("", ""), same.items())]
    notes = comparison.notes()
    parts += ["## How it was measured", "\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_run(comparison: Comparison, place: int) -> Iterator[str]:
    name, report = comparison.names[place], comparison.runs[place].report
    section = balance_section(report)
    if section:
        yield section[0] + f": {name}"
        yield from section[1:]
        yield "\n".join(f"- {trade.technique}: {technique_words(trade)}" for trade in trades(report))
        yield unaccounted_words(comparison.baseline.report, report, comparison.names[0]) if place else ""
    if report.events:
        yield f"## What happened: {name}"
        yield table(("Step", "From", "What"), [(f"{e.step:,}", e.technique, e.text) for e in report.events])


def _labels(comparison: Comparison) -> tuple[str, ...]:
    if max(map(len, comparison.names)) <= _LONG_NAME:
        return comparison.names
    return tuple(chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(comparison.names)))


def _with_labels(row: Row, comparison: Comparison, labels: Sequence[str]) -> tuple[str, ...]:
    label = row.label.replace(f"to {comparison.names[0]}'s", f"to {labels[0]}'s")
    return (label, *map(_cell, row.cells, row.changes))


def _cell(value: str, change: str) -> str:
    return f"{value} ({change})" if change else value


def _grid(labels: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """The table; with many runs in blocks, each as wide as fits, and each with the first run."""
    lines = [("", *labels), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(labels) + 1)]
    room = max(1, (width - widths[0] - widths[1] - 2) // (max(widths[2:], default=0) + 2))
    for start in range(2, len(labels) + 1 if len(labels) > 1 else 3, room):
        columns = [0, 1, *range(start, min(start + room, len(labels) + 1))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(line[column].rjust(widths[column]) for column in columns[1:])])
            for line in lines
        ]
        if start > 2:
            yield ""
        yield text[0].rstrip()
        yield "-" * len(text[0])
        yield from (line.rstrip() for line in text[1:])


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 4].rstrip()} ..."
