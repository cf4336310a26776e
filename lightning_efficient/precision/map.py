"""Which operation computes in how many bits, and why: as rows, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_efficient.precision.nodes import OPERANDS, ROLES, Node, Role

__all__ = ["PrecisionMap", "precision_map"]

_COLUMNS = ("operation", "product", "bits", "low", "high", "retries", "last reason")


class PrecisionMap(list[dict[str, Any]]):
    """Rows with ``operation``, ``product``, ``bits``, ``low``, ``high``, ``retries`` and ``last reason``.

    ``low`` and ``high`` count products; of what is not covered calls, in what is compiled the graphs that have some,
    with the reason why it is not. Printed, and at the end of a cell of a notebook, it is a table.
    """

    def __str__(self) -> str:
        rows = [_COLUMNS, *(tuple(str(row[column]) for column in _COLUMNS) for row in self)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    __repr__ = __str__


def precision_map(
    nodes: Mapping[str, Node], low: str, skipped: Mapping[str, int], reasons: Mapping[str, str]
) -> PrecisionMap:
    """Of ``nodes``, whose low format is ``low``, and of what is not covered: how often that was called, and why."""
    rows = PrecisionMap(
        {
            "operation": name, "product": role.replace("_", "-"), "bits": _bits(node, role, low),
            "low": node.products[role].status.low, "high": node.products[role].status.high,
            "retries": node.products[role].status.retries, "last reason": node.products[role].status.reason,
        }
        for name, node in nodes.items()
        for role in ROLES
    )  # fmt: skip
    for name, count in sorted(skipped.items()):
        rows.append(
            {"operation": name, "product": "all", "bits": "high, not covered", "low": 0, "high": count, "retries": 0,
             "last reason": reasons[name]}
        )  # fmt: skip
    return rows


def _bits(node: Node, role: Role, low: str) -> str:
    if not node.learning.done:
        return "high, learning"
    if node.stays_high(role):
        return f"high, {node.why_high or 'low would take longer'}"
    if any(not bits.few for bits in (node.bits.get(which) for which in OPERANDS[role]) if bits is not None):
        return f"bf16, {low} errs too much"
    status = node.products[role].status
    if not status.low + status.high:
        return "not computed yet"
    return "high, held" if node.products[role].status.held else low
