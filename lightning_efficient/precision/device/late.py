"""What the host knows of a table on a device, without waiting for the device: what it was a step ago."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Copies", "Copy"]


@dataclass(frozen=True)
class Copy:
    """Of a table.

    Attributes:
        table: float64 ``[rows, WIDTH]``, in the host's memory, and there once ``ready`` is.
        launched: For each product, by its row, how many decisions had been launched by then.
        ready: Nothing to wait for where the table is the host's.
    """

    table: Tensor
    launched: Mapping[int, int]
    ready: torch.cuda.Event | None

    def wait(self) -> None:
        """Until it is there."""
        if self.ready is not None:
            self.ready.synchronize()


class Copies:
    """Two of them: one under way, one that is read.

    Which one is read depends on the number of steps alone, never on how fast the device was, so that a run can be
    repeated: the host waits for a copy that it asked for a whole step ago, and so runs at most a step ahead.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._last: Copy | None = None
        self._number = 0

    def take(self, table: Tensor, launched: Mapping[int, int]) -> Copy | None:
        """Begin a copy; the one before it is returned, None the first time."""
        before = self._last
        self._last = self._begin(table, launched)
        if before is not None:
            before.wait()
        return before

    @property
    def under_way(self) -> Copy | None:
        """The one that was begun last."""
        return self._last

    def _begin(self, table: Tensor, launched: Mapping[int, int]) -> Copy:
        if not table.is_cuda:
            return Copy(table.clone(), dict(launched), None)
        self._number += 1
        buffer = self._buffers[self._number % 2]
        if buffer is None or buffer.shape != table.shape:
            buffer = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._buffers[self._number % 2] = buffer
        with torch.cuda.device(table.device):
            buffer.copy_(table, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return Copy(buffer, dict(launched), event)
