"""Records on their way to and from a device: what :class:`~.staging.Staging` is for the host, with copies on streams.

The host never waits here but for a disk: reads ahead and writes behind are ordered with the computation by events, and
a record that is read again so soon that the disk has not been given it yet is waited for.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.carriers import Arriving, Leaving, carrier_for
from lightning_efficient.offload.updates.staging import Lease, Placed

__all__ = ["DeviceStaging"]


class DeviceStaging:
    """Brings records into memory of a device ahead of their use, within a cap, and writes them back.

    For one thread, whose current stream computes.

    Attributes:
        waited_seconds: That the host waited for bytes or room.
        hits: Records that had been asked for ahead of their use.
        misses: Records that had not.

    Args:
        cap_bytes: Memory of the device for records, and as much pinned memory of the host.
        device: Where they are used.
    """

    def __init__(self, cap_bytes: int, device: torch.device) -> None:
        self._cap_bytes = cap_bytes
        self._device = device
        self._carrier = carrier_for(device, cap_bytes)
        self._queue: deque[Placed] = deque()
        self._ahead: OrderedDict[Placed, Arriving] = OrderedDict()
        self._leaving: deque[tuple[Leaving, Tensor]] = deque()
        self._held = 0  # bytes that are ahead, lent, or leaving
        self.waited_seconds, self.hits, self.misses = 0.0, 0, 0

    @property
    def held_bytes(self) -> int:
        """Memory of the device for records."""
        return self._held

    def expect(self, records: Iterable[Placed]) -> None:
        """These are asked for next, in this order, each once; what was expected before is not any more."""
        self._queue = deque(placed for placed in records if placed not in self._ahead)
        self._fill()

    def read(self, placed: Placed) -> Lease:
        """The bytes of a record, for the caller alone until it gives them to :meth:`write` or :meth:`drop`.

        Raises:
            TierError: If they cannot be read.
            MemoryError: If they do not fit under the cap even alone.
        """
        begin = time.perf_counter()
        arriving = self._ahead.pop(placed, None)
        if arriving is None:
            self.misses += 1
            if placed in self._queue:
                self._queue.remove(placed)
            self._make_room(placed.record.nbytes)
            arriving = self._carrier.fetch(placed.tier, placed.record, self._device)
        else:
            self.hits += 1
        arriving.wait()
        self.waited_seconds += time.perf_counter() - begin
        data = arriving.data
        if data is None:
            raise RuntimeError("A record was let go while it was read.")
        self._fill()
        return Lease(placed, data, None)

    def room(self, nbytes: int) -> Lease:
        """Memory for a record that has no place yet.

        Raises:
            MemoryError: If it does not fit under the cap even alone.
        """
        self._make_room(nbytes)
        return Lease(None, torch.empty(nbytes, dtype=torch.uint8, device=self._device), None)

    def write(self, lease: Lease, placed: Placed | None = None) -> None:
        """Begin to write the bytes to their record (or to ``placed``), and let the memory go when that is done."""
        target = placed or lease.placed
        if target is None:
            raise ValueError("This lease has no record; name one.")
        leaving = self._carrier.send(target.tier, target.record, lease.data)
        self._leaving.append((leaving, lease.data))
        self._fill()

    def drop(self, lease: Lease) -> None:
        """The bytes are not needed any more, and were not changed."""
        self._held -= lease.data.numel()

    def forget(self) -> None:
        """What was read ahead is not what is in the records any more."""
        self._queue.clear()
        while self._ahead:
            placed, arriving = self._ahead.popitem()
            arriving.wait()
            self._held -= placed.record.nbytes

    def flush(self) -> None:
        """Until all writes have ended.

        Raises:
            TierError: If one failed.
        """
        begin = time.perf_counter()
        self._carrier.flush()
        while self._leaving:
            self._let_go()
        self.waited_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """What is being written is waited for, what was read ahead is forgotten."""
        self.forget()
        self.flush()

    def _fill(self) -> None:
        """Ask for what comes next, as far as there is room."""
        self._carrier.advance()
        while self._leaving and self._leaving[0][0].gone:
            self._let_go()
        while self._queue and self._held + self._queue[0].record.nbytes <= self._cap_bytes:
            placed = self._queue.popleft()
            self._held += placed.record.nbytes
            self._ahead[placed] = self._carrier.fetch(placed.tier, placed.record, self._device)

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self._cap_bytes:
            raise MemoryError(
                f"A record of {nbytes:,} bytes does not fit into the {self._cap_bytes:,} bytes for records on their "
                "way. Give `staging` more, or place this parameter elsewhere."
            )
        while self._held + nbytes > self._cap_bytes:
            if self._leaving:
                self._let_go()
            elif self._ahead:  # the one needed last makes room, and is read again later
                placed, arriving = self._ahead.popitem()
                arriving.wait()
                self._held -= placed.record.nbytes
                self._queue.appendleft(placed)
            else:
                break  # what is lent: an update has its record, and room for another form of it
        self._held += nbytes

    def _let_go(self) -> None:
        leaving, data = self._leaving.popleft()
        leaving.hand_over()
        leaving.let_go()
        self._held -= data.numel()
