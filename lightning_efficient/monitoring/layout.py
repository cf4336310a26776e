"""Which tags belong in one chart: for TensorBoard's custom-scalars page and for the plots of the report."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning_efficient.monitoring.balance import is_balance
from lightning_efficient.monitoring.units import label_of, technique_of, unit_of

__all__ = ["chart_groups", "tensorboard_layout"]

_UNIT_TITLES = {"bytes": "memory (bytes)", "GB/s": "bandwidth (GB/s)", "ms": "time (ms)", "s": "time (s)"}
_BYTES_TITLES = {"peak": "peak memory (bytes)", "total": "total (bytes)"}  # by the first word of a label
_TAGS_PER_CHART = 5


def chart_groups(tags: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Technique to chart title to the tags of that chart, in the order of ``tags``.

    Bytes share a chart (peaks and totals have others, for they dwarf what they are made of), and so do bandwidths and
    times of one unit, and so does one quantity of all layers; what a technique cost and saved has charts of its own,
    and every other quantity has its own scale and thus its own chart. A chart holds at most five tags.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for tag in dict.fromkeys(tags):
        charts = groups.setdefault(technique_of(tag), {})
        base = _UNIT_TITLES.get(unit_of(tag), label_of(tag))
        if is_balance(tag):
            base = f"cost and gain ({unit_of(tag)})"
        elif quantity := _by_layer(tag):
            base = f"{label_of(quantity)} by layer"
        elif unit_of(tag) == "bytes":
            base = _BYTES_TITLES.get(label_of(tag).partition(" ")[0], base)
        title = base
        number = 1
        while len(charts.get(title, ())) >= _TAGS_PER_CHART:
            number += 1
            title = f"{base}, {number}"
        charts.setdefault(title, []).append(tag)
    return groups


def tensorboard_layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The argument of ``SummaryWriter.add_custom_scalars`` that shows ``tags`` by technique.

    TensorBoard reads each tag as a regular expression that must match from its first character, hence the escapes. One
    quantity of all layers is one chart, also of those that come later.
    """
    layout: dict[str, dict[str, list[object]]] = {}
    for technique, charts in chart_groups(tags).items():
        shown = layout[technique] = {}
        for title, members in charts.items():
            if quantity := _by_layer(members[0]):
                shown[f"{label_of(quantity)} by layer"] = ["Multiline", [re.escape(f"{quantity}/")]]
            else:
                shown[title] = ["Multiline", [f"{re.escape(tag)}$" for tag in members]]
    return layout


def _by_layer(tag: str) -> str:
    """``a/bits`` of ``a/bits/blocks.0/linear``; of ``a/bits``, and any other that is not of one layer, nothing."""
    quantity = "/".join(tag.split("/")[:2])
    return quantity if quantity != tag else ""
