"""When a node computes in low bits: counters of what it did, and the rule by which it comes back.

A sign of failure makes a node compute again in high bits, and those behind it compute in high bits too; at each of them
it is decided whether from there on low bits are allowed again. They are once high bits have been repeated often enough,
or if a node's operations in low bits have rarely had to be retried. (The counters are those of Narihira's status
counter; that the wait doubles while failures go on is the back-off of dynamic loss scaling, as in Kuchaiev et al. 2018,
"OpenSeq2Seq".)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DECAY", "LONGEST", "SIGNS", "ReturnPolicy", "Run", "Status"]

SIGNS = (
    "not finite", "all sampled values are zero", "overflow", "underflow", "quantization error",
    "shared exponent varies", "further apart", "computed exactly", "",
)  # fmt: skip
"""What a reason says, in few words; the last one: something else."""

DECAY = 0.98  # of the counters, for each operation: about fifty of them are remembered
LONGEST = 2  # times ``return_after``: so that what has healed comes back within some tens of steps


@dataclass(frozen=True)
class ReturnPolicy:
    """When low bits are allowed again.

    Attributes:
        return_after: Operations in high bits, one after another, behind which they are.
        retry_rate: Retries among all operations in low bits, under which they are at once.
    """

    return_after: int = 20
    retry_rate: float = 0.05


class Run:
    """Where a pass through the graph stands: how many operations in a row were in high bits since a sign of failure.

    Attributes:
        high_in_a_row: That many; 0: low bits are allowed.
    """

    def __init__(self) -> None:
        self.high_in_a_row = 0


class Status:
    """What one node did, and whether it may compute in low bits.

    Attributes:
        high: Operations in high bits, ever; also those that were recomputed.
        low: Operations in low bits that showed no sign of failure.
        retries: Operations in low bits that did.
        reason: The last sign; empty if there was none.
        signs: How often each of :data:`SIGNS` was that.

    Args:
        policy: Of all nodes.
    """

    def __init__(self, policy: ReturnPolicy) -> None:
        self._policy = policy
        self.high = self.low = self.retries = 0
        self.reason = ""
        self.signs = [0] * len(SIGNS)
        self._recent_low = self._recent_retries = 0.0
        self._wait = policy.return_after
        self._left = 0  # operations in high bits that this node, which failed too often, has still to wait for
        self._good = 0  # operations in low bits since the last retry

    @property
    def retry_rate(self) -> float:
        """Of the last operations in low bits, the part that had to be retried."""
        tried = self._recent_low + self._recent_retries
        return self._recent_retries / tried if tried else 0.0

    @property
    def held(self) -> bool:
        """Whether it stays in high bits, whatever the others do."""
        return self._left > 0

    def allows_low(self, run: Run) -> bool:
        """Whether the next operation is in low bits; if so, from here on all are that may."""
        if self.held:
            return False
        if run.high_in_a_row:
            often = run.high_in_a_row >= self._policy.return_after
            if not (often or self.retry_rate < self._policy.retry_rate):
                return False
            run.high_in_a_row = 0
        return True

    def computed_low(self) -> None:
        """One in low bits, without a sign of failure."""
        self.low += 1
        self._good += 1
        self._recent_low, self._recent_retries = self._recent_low * DECAY + 1, self._recent_retries * DECAY
        if self._good >= self._wait:
            self._wait = self._policy.return_after

    def computed_high(self, run: Run) -> None:
        """One in high bits."""
        self.high += 1
        self._left = max(0, self._left - 1)
        if run.high_in_a_row:
            run.high_in_a_row += 1

    def failed(self, reason: str, run: Run) -> None:
        """One in low bits showed a sign of failure, and was computed again in high bits."""
        self.high += 1
        self.retries += 1
        self.reason = reason
        self.saw(reason)
        self._recent_low, self._recent_retries = self._recent_low * DECAY, self._recent_retries * DECAY + 1
        if self.retry_rate >= self._policy.retry_rate:
            again = self._good < self._wait and self.retries > 1
            longest = LONGEST * self._policy.return_after
            self._wait = min(2 * self._wait, longest) if again else self._policy.return_after
            self._left = self._wait
        self._good = 0
        run.high_in_a_row = 1

    def saw(self, reason: str, times: int = 1) -> None:
        """Count a sign of failure."""
        self.signs[next(place for place, sign in enumerate(SIGNS) if sign in reason)] += times

    def agreed(self) -> list[float]:
        """What ranks agree on: the largest number of each."""
        return [
            self.high, -self._recent_low, self._recent_retries, self.retries, self.low, self._wait, self._left,
            -self._good, *self.signs,
        ]  # fmt: skip

    def agree(self, values: list[float]) -> None:
        """What :meth:`agreed` returned, the largest of all ranks."""
        high, low, retries, *counts = values
        self._recent_low, self._recent_retries = -low, retries
        self.high, (self.retries, self.low, self._wait, self._left) = int(high), map(int, counts[:4])
        self._good = int(-counts[4])
        self.signs = list(map(int, counts[5:]))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            name.lstrip("_"): [*value] if isinstance(value, list) else value
            for name, value in self.__dict__.items()
            if name != "_policy"
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        for name in self.__dict__:
            if name != "_policy":
                value = state[name.lstrip("_")]
                setattr(self, name, [*value] if isinstance(value, list) else value)
