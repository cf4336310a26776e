"""The table of all nodes on a device: what ``nodes.py`` and ``status.py`` know of a product, as one row of numbers.

Row 0 is of the pass through the graph and of the rule of return; each node has six: its tensors input, weight and
gradient, then its products forward, grad_input and grad_weight. All are float64, so that a counter, an exponent and a
limit are what they are in Python, to the last digit.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.precision.nodes import OPERANDS, ROLES, Node, Product, Role
from lightning_efficient.precision.signs import HISTORY, Tracker
from lightning_efficient.precision.status import DECAY, LONGEST, ReturnPolicy, Run

__all__ = ["ROWS", "WIDTH", "Reason", "load_node", "operand_row", "product_row", "reason_of", "run_row", "store_node"]

WIDTH = 48
"""Of a row."""
ROWS = 6
"""Of a node."""
TENSORS = ("input", "weight", "gradient")

# A tracker: how many exponents there are, they (the newest last), limits.
COUNT, EXPONENTS, OVERFLOW, UNDERFLOW, ERROR, RANGE = 0, 1, 9, 10, 11, 12
# A product.
HIGH, LOW, RETRIES, RECENT_LOW, RECENT_RETRIES, WAIT, LEFT, GOOD = range(8)
REASON, VALUE, LIMIT, FLAG, DISTANCES, ALLOWED, PROBE, RESULT = 8, 9, 10, 11, 12, 21, 22, 23
DOUBT, SIZES = 36, 37  # of the forward product: whether it was in high bits in this step
# Row 0.
IN_A_ROW, RETURN_AFTER, RETRY_RATE, RECENT, LONGEST_WAIT = range(5)

NOT_FINITE, ZERO, OVER, UNDER, OFF, VARIES, APART, PROBED = range(1, 9)
"""Signs; with :data:`OPERAND` times whose it is: of no tensor, the first operand, the second, the result."""
OPERAND = 16


_TEXTS = {
    NOT_FINITE: "values that are not finite",
    ZERO: "all sampled values are zero",
    OVER: "overflow of {value:.1%} (limit {limit:.1%})",
    UNDER: "underflow of {value:.1%} (limit {limit:.1%})",
    OFF: "quantization error {value:.3f} (limit {limit:.3f})",
    VARIES: "shared exponent varies by {value:g} (limit {limit:g})",
    APART: "exponents of the operands are {value:g} further apart than usual",
    PROBED: "{value:.2f} off where it was computed exactly (limit {limit:.2f})",
}
"""As ``signs.py`` and ``nodes.py`` say it."""


@dataclass(frozen=True)
class Reason:
    """A sign of failure as a row has it.

    Attributes:
        code: Which, and of which tensor; 0: none.
        value: What was measured.
        limit: Beyond which it is a sign.
    """

    code: float = 0.0
    value: float = 0.0
    limit: float = 0.0

    def text(self, role: Role) -> str:
        """For people; empty if there was none."""
        if not self.code:
            return ""
        whose, sign = divmod(int(self.code), OPERAND)
        what = _TEXTS[sign].format(value=self.value, limit=self.limit)
        return f"{('', *OPERANDS[role], 'result')[whose]}: {what}" if whose else what

    @classmethod
    def of(cls, text: str, role: Role) -> Reason:
        """What :meth:`text` made this of, to the digits that it has."""
        names = ("", *OPERANDS[role], "result")
        name, colon, what = text.partition(": ")
        whose = names.index(name) if colon and name in names else 0
        for sign, template in _TEXTS.items():
            parts = re.split(r"\{(value|limit):[^}]*\}", template)
            pattern = "".join(f"(?P<{part}>.+)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
            if found := re.fullmatch(pattern, what if whose else text):
                return cls(
                    OPERAND * whose + sign, **{key: _number(digits) for key, digits in found.groupdict().items()}
                )
        return cls()


def _number(digits: str) -> float:
    return float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)


def operand_row(first: int, which: str) -> int:
    """Of a tensor of the node whose rows begin at ``first``."""
    return first + TENSORS.index(which)


def product_row(first: int, role: Role) -> int:
    """Likewise of a product."""
    return first + len(TENSORS) + ROLES.index(role)


def run_row(policy: ReturnPolicy, run: Run) -> Tensor:
    """Row 0."""
    row = torch.zeros(WIDTH, dtype=torch.float64)
    row[: LONGEST_WAIT + 1] = torch.tensor(
        [run.high_in_a_row, policy.return_after, policy.retry_rate, DECAY, LONGEST * policy.return_after],
        dtype=torch.float64,
    )
    return row


def store_node(node: Node) -> Tensor:
    """Its rows ``[ROWS, WIDTH]``."""
    rows = [[0.0] * WIDTH for _ in range(ROWS)]
    for which in TENSORS:
        _store_tracker(rows[operand_row(0, which)], 0, node.tensors[which])
    for role in ROLES:
        product, row = node.products[role], rows[product_row(0, role)]
        status = product.status.state_dict()
        row[HIGH : GOOD + 1] = [
            status[name] for name in ("high", "low", "retries", "recent_low", "recent_retries", "wait", "left", "good")
        ]
        reason = Reason.of(status["reason"], role)
        row[REASON : LIMIT + 1] = [reason.code, reason.value, reason.limit]
        _store_history(row, DISTANCES, product.distances)
        _store_history(row, SIZES, product.sizes)
        row[ALLOWED], row[PROBE] = product.allowed, product.error
        _store_tracker(row, RESULT, product.result)
    return torch.tensor(rows, dtype=torch.float64)


def load_node(rows: Tensor, node: Node) -> None:
    """Make ``node`` what its rows say."""
    numbers = rows.tolist()
    for which in TENSORS:
        _load_tracker(numbers[operand_row(0, which)], 0, node.tensors[which])
    for role in ROLES:
        load_product(numbers[product_row(0, role)], role, node.products[role])


def load_product(row: list[float], role: Role, product: Product) -> None:
    """Likewise one product."""
    high, low, retries, recent_low, recent_retries, wait, left, good = row[HIGH : GOOD + 1]
    product.status.load_state_dict({
        "high": int(high), "low": int(low), "retries": int(retries), "reason": reason_of(row, role),
        "recent_low": recent_low, "recent_retries": recent_retries, "wait": int(wait), "left": int(left),
        "good": int(good), "signs": product.status.signs,
    })  # fmt: skip
    product.distances = deque(map(int, _history(row, DISTANCES)), maxlen=HISTORY)
    product.sizes = _history(row, SIZES)
    product.allowed, product.error = row[ALLOWED], row[PROBE]
    _load_tracker(row, RESULT, product.result)


def reason_of(row: list[float], role: Role) -> str:
    """The last one of a product; empty if there was none."""
    return Reason(*row[REASON : LIMIT + 1]).text(role)


def _store_tracker(row: list[float], at: int, tracker: Tracker) -> None:
    state = tracker.state_dict()
    _store_history(row, at, state["exponents"])
    limits = tracker.limits
    row[at + OVERFLOW : at + RANGE + 1] = [limits.overflow, limits.underflow, limits.error, limits.exponent_range]


def _load_tracker(row: list[float], at: int, tracker: Tracker) -> None:
    overflow, underflow, error, spread = row[at + OVERFLOW : at + RANGE + 1]
    tracker.load_state_dict({
        "exponents": [int(number) for number in _history(row, at)],
        "limits": {"overflow": overflow, "underflow": underflow, "error": error, "exponent_range": spread},
    })  # fmt: skip


def _store_history(row: list[float], at: int, numbers: Sequence[float]) -> None:
    row[at + COUNT] = len(numbers)
    row[at + EXPONENTS + HISTORY - len(numbers) : at + EXPONENTS + HISTORY] = list(numbers)


def _history(row: list[float], at: int) -> deque[float]:
    count = int(row[at + COUNT])
    numbers = row[at + EXPONENTS + HISTORY - count : at + EXPONENTS + HISTORY]
    return deque(numbers, maxlen=HISTORY)
