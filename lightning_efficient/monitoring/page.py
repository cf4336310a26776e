"""A comparison as one page of HTML that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lightning_efficient.monitoring.balance import Trade, batch_ms, trades
from lightning_efficient.monitoring.comparison import Comparison
from lightning_efficient.monitoring.style import STYLE
from lightning_efficient.monitoring.svg import LOOKS, chart
from lightning_efficient.monitoring.units import human
from lightning_efficient.monitoring.words import run_words, technique_words, unaccounted_words

__all__ = ["page"]

_TRADES = ("", "took", "saved", "net", "memory saved", "memory held")


def page(comparison: Comparison) -> str:
    """The whole page."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(comparison.title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(comparison.title)}</h1>",
        _legend(comparison),
        *_said(comparison),
        "<h2>Side by side</h2>",
        _side_by_side(comparison),
        _left_out(comparison),
        *_charts(comparison),
        *_balances(comparison),
        *_events(comparison),
        *_facts(comparison),
        _notes(comparison),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _chip(place: int, name: str) -> str:
    return f'<span class="chip c{place % LOOKS}"><i></i><b>{_letter(place)}</b> {_breakable(name)}</span>'


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def _breakable(name: str) -> str:
    """The name, which may be long and without a space, with places where a line may end."""
    text = escape(name)
    for sign in "+/_":
        text = text.replace(sign, f"{sign}<wbr>")
    return text


def _legend(comparison: Comparison) -> str:
    chips = "".join(f"<li>{_chip(place, name)}</li>" for place, name in enumerate(comparison.names))
    return f'<ul class="legend">{chips}</ul>'


def _said(comparison: Comparison) -> Iterator[str]:
    letters = [_letter(place) for place in range(len(comparison.runs))]
    for warning in comparison.warnings():
        yield f"<p><b>{escape(warning)}</b></p>"
    for place in range(1, len(comparison.runs)):
        words = escape(" ".join(run_words(comparison, place, letters)))
        yield f"<p>{words}</p>" if words else ""


def _side_by_side(comparison: Comparison) -> str:
    head = ["", *(f'<b class="c{place % LOOKS}">{_letter(place)}</b>' for place in range(len(comparison.runs)))]
    rows = []
    for row in comparison.rows():
        label = row.label.replace(f"to {comparison.names[0]}'s", "to A's")
        cells = [
            f"{_measured(cell)} <small>{escape(change.replace('x ', '× '))}</small>" if change else _measured(cell)
            for cell, change in zip(row.cells, row.changes, strict=True)
        ]
        rows.append([_breakable(label), *cells])
    return _table(head, rows)


def _left_out(comparison: Comparison) -> str:
    words = comparison.left_out()
    return f"<p><small>{escape(words)}</small></p>" if words else ""


def _charts(comparison: Comparison) -> Iterator[str]:
    panels = comparison.panels()
    if not panels:
        return
    figures = [f"<figure><figcaption>{escape(panel.title)}</figcaption>{chart(panel)}</figure>" for panel in panels]
    yield f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'
    if any(panel.marks for panel in panels):
        yield "<p><small>A dotted line is something that happened, as listed below.</small></p>"


def _balances(comparison: Comparison) -> Iterator[str]:
    runs = [(place, trades(run.report)) for place, run in enumerate(comparison.runs)]
    if not any(found for _, found in runs):
        return
    yield "<h2>What each technique cost and saved</h2>"
    yield from _bars(comparison)
    for place, found in runs:
        if not found:
            continue
        report = comparison.runs[place].report
        if len(comparison.runs) > 1:
            yield f"<h3>{_chip(place, comparison.names[place])}</h3>"
        yield _table(_TRADES, [[escape(trade.technique), *map(_measured, trade.cells())] for trade in found], "trades")
        yield (
            "<p><small>Times are means per batch, the net in percent of the batch without the technique; memory is the "
            "most of the run; – was not measured.</small></p>"
        )
        yield "<dl>" + "".join(_technique(trade) for trade in found) + "</dl>"
        rest = unaccounted_words(comparison.baseline.report, report, _letter(0)) if place else ""
        yield f"<p>{escape(rest)}</p>" if rest else ""


def _measured(cell: str) -> str:
    return '<small title="not measured">–</small>' if cell == "not measured" else escape(cell)


def _technique(trade: Trade) -> str:
    how = " ".join(part for part in (trade.words.time, trade.words.memory) if part)
    small = f" <small>{_with_code(how)}</small>" if how else ""
    return f"<dt>{escape(trade.technique)}</dt><dd>{escape(technique_words(trade))}{small}</dd>"


def _with_code(text: str) -> str:
    """What a text has in backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _bars(comparison: Comparison) -> Iterator[str]:
    """Where the time of a mean batch goes, one bar for each run."""
    longest = max((ms for run in comparison.runs if math.isfinite(ms := batch_ms(run.report))), default=0.0)
    bars = [_bar(comparison, place, longest) for place in range(len(comparison.runs))]
    if longest and any(bars):
        yield '<p class="lead">Where the mean batch of each run goes:</p>' + "".join(bars)


def _bar(comparison: Comparison, place: int, longest: float) -> str:
    report = comparison.runs[place].report
    whole = batch_ms(report)
    if not math.isfinite(whole):
        return ""
    costs = [(trade.technique, trade.cost_ms) for trade in trades(report) if trade.cost_ms > 0]
    training = whole - sum(cost for _, cost in costs)
    parts, keys = [], []
    for number, (name, ms) in enumerate(
        [("training, and what no clock sees" if costs else "training", training), *costs]
    ):
        words = escape(f"{name} {human(ms, 'ms')}")
        parts.append(
            f'<i class="s{number % LOOKS}" style="width:{100 * max(ms, 0.0) / longest:.2f}%" title="{words}"></i>'
        )
        keys.append(f'<span><i class="s{number % LOOKS}"></i>{words}</span>')
    name = f'<b class="c{place % LOOKS}">{_letter(place)}</b> {human(whole, "ms")}'
    return f'<div class="bar"><p>{name}</p><div>{"".join(parts)}</div><p class="keys">{"".join(keys)}</p></div>'


def _events(comparison: Comparison) -> Iterator[str]:
    for place, run in enumerate(comparison.runs):
        if run.report.events:
            rows = [[f"{event.step:,}", escape(event.technique), escape(event.text)] for event in run.report.events]
            name = f" {_chip(place, comparison.names[place])}" if len(comparison.runs) > 1 else ""
            yield f"<h2>What happened</h2><h3>{name}</h3>{_table(('step', 'from', 'what'), rows, 'events')}"


def _facts(comparison: Comparison) -> Iterator[str]:
    differ, same = comparison.facts()
    if differ and len(comparison.runs) > 1:
        head = ["", *map(_letter, range(len(comparison.runs)))]
        rows = [[escape(name), *map(escape, cells)] for name, cells in differ.items()]
        yield f"<h2>What differs between the runs</h2>{_table(head, rows, 'words')}"
    if same:
        rows = [[escape(name), escape(value)] for name, value in same.items()]
        yield f"<details><summary>The same in all runs</summary>{_table(('', ''), rows, 'words')}</details>"


def _notes(comparison: Comparison) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes())
    return f"<details><summary>How it was measured</summary><ul>{notes}</ul></details>" if notes else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """Its cells are HTML already; of the ``kind`` ``figures``, ``trades``, ``words`` or ``events``."""
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f'<tr><th class="label">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for label, *cells in rows
    )
    header = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table class="{kind}">{header}<tbody>{body}</tbody></table></div>'
