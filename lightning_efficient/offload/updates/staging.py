"""Records on their way: buffers of bounded size into which they are read ahead, and written back from."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from lightning_efficient.core.buffers import BufferPool, HostBuffer
from lightning_efficient.offload.tiers.tier import Pending, Record, Tier

__all__ = ["Lease", "Placed", "Staging"]


@dataclass(frozen=True, eq=False)
class Placed:
    """A record and the tier it is in."""

    tier: Tier
    record: Record


@dataclass(frozen=True, eq=False)
class Lease:
    """A record's bytes in memory, for whoever works on them.

    Attributes:
        placed: The record; None while it has no place yet.
        data: uint8 ``[nbytes]``.
        buffer: That ``data`` lies in; None on a device.
    """

    placed: Placed | None
    data: Tensor
    buffer: HostBuffer | None


class Staging:
    """Reads records ahead in the order in which they will be asked for, within a cap, and writes them back.

    Two threads wait where the caller would: one for room to read into, one for writes to end. What is asked for out of
    order is read at once, if need be into the room of what was read ahead the furthest.

    Attributes:
        waited_seconds: That callers waited for bytes, for room, or for writes to end.
        hits: Records that had been asked for ahead of their use.
        misses: Records that had not.

    Args:
        cap_bytes: Memory of all buffers together.
        pinned: Whether buffers are locked for copies from a GPU.
    """

    def __init__(self, cap_bytes: int, *, pinned: bool = False) -> None:
        self._pool = BufferPool(cap_bytes, pinned=pinned, most=1 << 16)
        self._queue: deque[Placed] = deque()
        self._ready: OrderedDict[Placed, tuple[Lease, Pending]] = OrderedDict()
        self._returning: deque[tuple[HostBuffer, Pending, bool]] = deque()  # and whether somebody must hear of an error
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self.waited_seconds, self.hits, self.misses = 0.0, 0, 0
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"offload-{name}", daemon=True)
            for name, work in (("ahead", self._read_ahead), ("behind", self._give_back))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def held_bytes(self) -> int:
        """Memory of all buffers."""
        return self._pool.held_bytes

    def resize(self, cap_bytes: int) -> None:
        """Another cap, where nothing is on its way: records may be larger than before."""
        with self._changed:
            self._pool.cap_bytes = cap_bytes
            if self._pool.held_bytes > cap_bytes:
                self._pool.clear()

    def expect(self, records: Iterable[Placed]) -> None:
        """These are asked for next, in this order, each once; what was expected before is not any more."""
        with self._changed:
            self._queue = deque(placed for placed in records if placed not in self._ready)
            self._changed.notify_all()

    def read(self, placed: Placed) -> Lease:
        """The bytes of a record, for the caller alone until it gives them to :meth:`write` or :meth:`drop`.

        Raises:
            TierError: If they cannot be read.
            MemoryError: If they do not fit under the cap even alone.
        """
        begin = time.perf_counter()
        with self._changed:
            found = self._ready.pop(placed, None)
            if found is None and placed in self._queue:
                self._queue.remove(placed)
        if found is None:
            self.misses += 1
            buffer = self._room(placed.record.nbytes)
            lease = Lease(placed, buffer.tensor[: placed.record.nbytes], buffer)
            pending = placed.tier.read(placed.record, lease.data)
        else:
            self.hits += 1
            lease, pending = found
        try:
            pending.wait()
        except Exception:
            self._put_back(_buffer(lease))
            raise
        except BaseException:  # an interrupt: what is being read into is nobody's yet
            self._return_later(lease, pending)
            raise
        self.waited_seconds += time.perf_counter() - begin
        return lease

    def room(self, nbytes: int) -> Lease:
        """Memory for a record that has no place yet.

        Raises:
            MemoryError: If it does not fit under the cap even alone.
        """
        buffer = self._room(nbytes)
        return Lease(None, buffer.tensor[:nbytes], buffer)

    def write(self, lease: Lease, placed: Placed | None = None) -> None:
        """Begin to write the bytes to their record (or to ``placed``), and take the memory back when that is done."""
        target = placed or lease.placed
        if target is None:
            raise ValueError("This lease has no record; name one.")
        try:
            pending = target.tier.write(target.record, lease.data)
        except BaseException:
            self.drop(lease)
            raise
        with self._changed:
            self._returning.append((_buffer(lease), pending, True))
            self._changed.notify_all()

    def drop(self, lease: Lease) -> None:
        """The bytes are not needed any more, and were not changed."""
        self._put_back(_buffer(lease))

    def forget(self) -> None:
        """What was read ahead is not what is in the records any more."""
        with self._changed:
            self._queue.clear()
            while self._ready:
                self._forget_last()
            self._changed.notify_all()

    def flush(self) -> None:
        """Until all writes have ended.

        Raises:
            TierError: If one failed.
        """
        begin = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._returning or self._error is not None)
        self.waited_seconds += time.perf_counter() - begin
        self._raise()

    def close(self) -> None:
        """End the threads; what is being written is waited for, what was read ahead is forgotten."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        while self._ready:
            self._forget_last()
        self._pool.clear()

    def _room(self, nbytes: int) -> HostBuffer:
        if not self._pool.fits(nbytes):
            raise MemoryError(
                f"A record of {nbytes:,} bytes does not fit into the {self._pool.cap_bytes:,} bytes for records on "
                "their way. Give `staging` more, or place this parameter elsewhere."
            )
        begin = time.perf_counter()
        with self._changed:
            while True:
                self._raise()
                buffer = self._take(nbytes, needed=True)
                if buffer is not None:
                    break
                if self._ready:  # the one needed last makes room, and is read again later
                    self._queue.appendleft(self._forget_last())
                else:
                    self._changed.wait()
        self.waited_seconds += time.perf_counter() - begin
        return buffer

    def _take(self, nbytes: int, *, needed: bool) -> HostBuffer | None:
        """A buffer; None while there is no room, or no memory.

        Raises:
            MemoryError: If it is ``needed``, there is no memory, and nothing is about to be given back.
        """
        for again in (False, True):
            try:
                return self._pool.try_take(nbytes)
            except (OSError, MemoryError) as error:
                if not again:
                    self._pool.clear()  # what lies there unused
                elif needed and not (self._ready or self._returning):
                    raise MemoryError(
                        f"There is no memory for {nbytes:,} bytes of optimizer state on their way ({error}); staging "
                        f"may take {self._pool.cap_bytes:,} bytes, beside memory_budget, and has {self.held_bytes:,}. "
                        "Give memory_budget less, so that more stays free."
                    ) from error
        return None

    def _forget_last(self) -> Placed:
        """Of what was read ahead; returns its place. The caller has the lock, which who reads ahead needs."""
        placed, (lease, pending) = self._ready.popitem()
        try:
            _settle(pending)
        except BaseException:
            self._return_later(lease, pending)
            raise
        self._pool.give_back(_buffer(lease))
        return placed

    def _return_later(self, lease: Lease, pending: Pending) -> None:
        """When its read has ended, which nobody waits for."""
        with self._changed:
            self._returning.append((_buffer(lease), pending, False))
            self._changed.notify_all()

    def _put_back(self, buffer: HostBuffer) -> None:
        with self._changed:
            self._pool.give_back(buffer)
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                buffer = None
                while not self._closed:
                    if self._queue:
                        buffer = self._take(self._queue[0].record.nbytes, needed=False)
                        if buffer is not None:
                            break
                    self._changed.wait()
                if buffer is None:
                    return
                placed = self._queue.popleft()
                lease = Lease(placed, buffer.tensor[: placed.record.nbytes], buffer)
                self._ready[placed] = lease, placed.tier.read(placed.record, lease.data)

    def _give_back(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._returning or self._closed)
                if not self._returning:
                    return
                buffer, pending, must_hear = self._returning[0]
            error = _settle(pending)
            with self._changed:
                self._error = self._error or (error if must_hear else None)
                self._returning.popleft()
                self._pool.give_back(buffer)
                self._changed.notify_all()

    def _guarded(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _buffer(lease: Lease) -> HostBuffer:
    if lease.buffer is None:
        raise ValueError("This lease is on a device, and not of this staging.")
    return lease.buffer


def _settle(pending: Pending) -> Exception | None:
    """Wait for the end, whichever it is; an interrupt is not one."""
    try:
        pending.wait()
    except Exception as error:
        return error
    return None
