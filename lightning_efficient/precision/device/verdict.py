"""What is decided of a product: from what is known of it, by the rules of ``signs.py``, ``nodes.py``, ``status.py``."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from torch import Tensor

from lightning_efficient.precision.device.rows import (
    DOUBT,
    FLAG,
    IN_A_ROW,
    RETRY_RATE,
    RETURN_AFTER,
    ROWS,
    load_node,
    operand_row,
    product_row,
    store_node,
)
from lightning_efficient.precision.nodes import OPERANDS, Node, Role
from lightning_efficient.precision.signs import Limits, Measured, Probe, quantization_error, shared_exponent
from lightning_efficient.precision.status import ReturnPolicy, Run

__all__ = ["Seen", "decide"]


@dataclass(frozen=True)
class Seen:
    """A product that was computed, and where what is seen of it lies.

    Attributes:
        first: Row of the table at which its node begins.
        role: Which of its products.
        slots: Of its operands and of its result, among what was measured.
        numels: Of its operands.
        probed: Rows of the block that was computed exactly; 0: none was.
        learning: All is in high bits, and healthy.
        fixed: Limits are given, not learnt.
        protect: Whether signs of failure are looked for.
    """

    first: int
    role: Role
    slots: tuple[int, int, int]
    numels: tuple[int, int]
    probed: int = 0
    learning: bool = False
    fixed: bool = False
    protect: bool = True

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of its operands and its own."""
        one, other = OPERANDS[self.role]
        return operand_row(self.first, one), operand_row(self.first, other), product_row(self.first, self.role)


def decide(state: Tensor, measured: Tensor, probes: Tensor, seen: Seen) -> None:
    """Bring the rows of a product up to date, and set its flag if it has to be computed again in high bits.

    Args:
        state: The table, float64 ``[rows, WIDTH]``.
        measured: int64 ``[slots, SLOT]``, see ``forms.py``.
        probes: float32 ``[SIDE, 2]``.
        seen: The product.
    """
    run = Run()
    run.high_in_a_row = int(state[0, IN_A_ROW])
    policy = ReturnPolicy(int(state[0, RETURN_AFTER]), float(state[0, RETRY_RATE]))
    node = Node("", "", policy, Limits() if seen.fixed else None)
    rows = slice(seen.first, seen.first + ROWS)
    load_node(state[rows], node)
    one, other = (
        _measured(measured[slot].tolist(), numel) for slot, numel in zip(seen.slots[:2], seen.numels, strict=True)
    )
    result, probe = _of_sample(measured[seen.slots[2]].tolist()), _probe(probes, seen.probed)
    status = node.products[seen.role].status
    forward = product_row(seen.first, "forward")
    doubted = bool(state[forward, DOUBT])
    low = False
    if seen.learning:
        if one.finite and other.finite:
            node.learn(seen.role, one, other, result.exponent, probe)
        status.computed_high(run)
    elif (doubted and seen.role != "forward") or not status.allows_low(run):
        status.computed_high(run)
    else:
        reason = _sign(node, seen, one, other, result, probe)
        low = not reason
        if low:
            status.computed_low()
        else:
            status.failed(reason, run)
    products = slice(product_row(seen.first, "forward"), rows.stop)
    flags = state[products, FLAG].clone()
    state[rows] = store_node(node).to(state.device)
    state[products, FLAG] = flags
    state[seen.rows[2], FLAG] = float(not low)
    if seen.role == "forward" and not seen.learning:
        doubted = doubted or not low
    state[forward, DOUBT] = float(doubted)
    state[0, IN_A_ROW] = run.high_in_a_row


def _sign(node: Node, seen: Seen, one: Measured, other: Measured, result: Measured, probe: Probe | None) -> str:
    if not seen.protect:
        return "" if one.finite and other.finite else "values that are not finite"
    return node.sign_of_operands(seen.role, one, other) or node.sign_of_result(seen.role, result, probe)


def _measured(slot: list[int], numel: int) -> Measured:
    largest = _float(slot[0])
    if not math.isfinite(largest):
        return Measured(None, finite=False)
    over, under, some, before, after = slot[1:6]
    return Measured(
        shared_exponent(largest, 8) if some else None,
        overflow=over / numel,
        underflow=under / some if some else 0.0,
        all_zero=not some,
        error=quantization_error(before, after),
    )


def _of_sample(slot: list[int]) -> Measured:
    largest = _float(slot[0])
    if not math.isfinite(largest):
        return Measured(None, finite=False)
    return Measured(shared_exponent(largest, 8), all_zero=largest == 0)


def _probe(probes: Tensor, rows: int) -> Probe | None:
    off, size = probes[:rows].double().sum(0).tolist()
    return Probe(math.sqrt(off), math.sqrt(size)) if rows else None


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
