"""What a spike guard has seen and done, and for how long it stays on its guard."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

__all__ = ["Incidents"]

_REMEMBERED = 100


class Incidents:
    """Of one run.

    Attributes:
        counts: ``spikes``; of those ``healed`` in high bits, ``healed_from_snapshot``, ``skipped``, or ``confirmed``:
            gradients that are as large in high bits; ``rollbacks`` to a snapshot; ``scale_retries`` with a smaller
            loss scale.
        skipped: The last batches that were left out: ``epoch``, ``batch``, ``step`` and ``reason``.
        lines: The last incidents, each with the logged step and a sentence.
        skipped_in_a_row: Batches.

    Args:
        window: Batches within which another spike counts as the same trouble.
    """

    def __init__(self, window: int) -> None:
        self.counts: Counter[str] = Counter()
        self.skipped: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self.lines: deque[tuple[int, str]] = deque(maxlen=_REMEMBERED)
        self.skipped_in_a_row = 0
        self._window = window
        self._hold = self._hold_next = 0
        self._healthy = window

    def begin(self) -> bool:
        """A batch begins; returns whether it stays in high bits, for few bits have caused spikes again and again."""
        high, self._hold = self._hold > 0, max(0, self._hold - 1)
        return high

    def was_healthy(self) -> None:
        """A batch was, in the end."""
        self._healthy += 1
        self.skipped_in_a_row = 0

    def was_healed(self) -> None:
        """High bits did it: the second time within a window the next batch stays in them, then two, and so on."""
        self._hold_next = min(max(1, 2 * self._hold_next), self._window) if self._healthy < self._window else 0
        self._hold, self._healthy = self._hold_next, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text."""
        return {
            "counts": dict(self.counts), "skipped": [dict(one) for one in self.skipped],
            "lines": [list(line) for line in self.lines], "skipped_in_a_row": self.skipped_in_a_row,
            "hold": self._hold, "hold_next": self._hold_next, "healthy": self._healthy,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        self.counts = Counter(state["counts"])
        self.skipped = deque((dict(one) for one in state["skipped"]), maxlen=_REMEMBERED)
        self.lines = deque(((step, text) for step, text in state["lines"]), maxlen=_REMEMBERED)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._hold, self._hold_next, self._healthy = state["hold"], state["hold_next"], state["healthy"]
