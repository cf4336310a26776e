"""A tier in the memory of the host, or of a chosen NUMA node of it, within a budget."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from torch import Tensor

from lightning_efficient.core.buffers import round_up
from lightning_efficient.core.units import parse_bytes
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.tiers.host_copy import Copy, Traffic
from lightning_efficient.offload.tiers.host_slabs import Slab, Slabs
from lightning_efficient.offload.tiers.mapped_memory import MappedMemory
from lightning_efficient.offload.tiers.record_slots import RecordSlots, Slot
from lightning_efficient.offload.tiers.tier import Pending, Record, Tier, TierError, check_data, check_sizes

__all__ = ["HostTier", "keeps_versions"]


class HostTier:
    """Keeps records in slabs of exactly their sizes, in whole pages; see :class:`~.tier.Tier`.

    A versioned record has room in the budget for two copies; the second is taken when the record is first written after
    a commit. What is mapped is the record itself; a record that is written while an older version of it is mapped takes
    a third one, if the budget has room for it. One that is not versioned has one copy; what somebody has mapped of it
    stays as it is, in memory that is not of the budget while he uses it. Data on a GPU is copied on its current stream,
    without blocking if the tier is ``pinned``; data of the host by the caller.

    Attributes:
        name: For messages.
        written: What was copied there.
        read_back: What was copied from there.

    Args:
        budget_bytes: Memory of all records together; bytes, or a text such as ``"6GiB"``.
        pinned: Lock it for copies from and to a GPU.
        numa_node: That it is taken from; None: the nearest.
        name: See above; by default ``host``, or ``numa:N``.

    Raises:
        TierError: If there is no such node, or it may not be chosen.
        ValueError: If the budget is no amount of memory.
    """

    def __init__(
        self,
        budget_bytes: int | str,
        *,
        pinned: bool = False,
        numa_node: int | None = None,
        name: str | None = None,
    ) -> None:
        budget = parse_bytes(budget_bytes, "budget_bytes")
        if numa_node is not None:
            numa.check_node(numa_node)
        self.name = name or ("host" if numa_node is None else f"numa:{numa_node}")
        self._slabs = slabs = Slabs(self.name, budget, pinned, numa_node)
        self._slots: RecordSlots[Slab] = RecordSlots(self.name, slabs.take, slabs.give_back, outlasts=False)
        self.written, self.read_back = Traffic(), Traffic()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    @property
    def budget_bytes(self) -> int:
        """Memory that all records together may take."""
        return self._slabs.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        """Of the budget, for all records, whether they have taken it yet or not."""
        return self._slabs.reserved_bytes

    @property
    def taken_bytes(self) -> int:
        """Of memory; a record takes it when it is first written."""
        return self._slabs.taken_bytes

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        """See :meth:`.Tier.reserve`; the budget must have room for two copies of each if ``versioned``."""
        check_sizes(sizes)
        copies = 2 if versioned else 1
        self._check_open()
        with self._lock:
            self._slabs.check(copies * sum(map(round_up, sizes)))
            records = [Record(size, versioned) for size in sizes]
            for record in records:
                self._slots.add(record, [self._slabs.take(record.nbytes) for _ in range(copies)])
        return records

    def prepare(self, nbytes: int) -> None:
        """Whether there is room for so much more, in whole pages; memory is taken when it is used.

        Raises:
            TierError: If there is not.
        """
        self._check_open()
        with self._lock:
            self._slabs.check(nbytes)

    def release(self, records: Sequence[Record]) -> None:
        """See :meth:`.Tier.release`."""
        self._check_open()
        with self._lock:
            self._slots.remove(records)

    def write(self, record: Record, data: Tensor) -> Pending:
        """See :meth:`.Tier.write`; ``data`` may be on a GPU.

        Raises:
            TierError: If a mapped version of a versioned record leaves no room in the budget, or there is not that much
                memory.
            ValueError: If ``data`` is not that of the record.
        """
        check_data(record, data)
        self._check_open()
        with self._lock:
            place, slot = self._slots.to_write(record, None if record.versioned else self._slabs.take_unchecked)
            slot.whole = False
            memory = slot.extent.memory()
            copy, before = Copy(), place.last
            place.last = copy
        copy.run(memory.tensor[: record.nbytes], data, before, self.written, fills=slot)
        return copy

    def read(self, record: Record, into: Tensor) -> Pending:
        """See :meth:`.Tier.read`; ``into`` may be on a GPU.

        Raises:
            TierError: If nothing was written there, or the write failed.
            ValueError: If ``into`` is not that of the record.
        """
        check_data(record, into)
        self._check_open()
        with self._lock:
            place, slot = self._slots.to_read(record)
            copy, before = Copy(), place.last
            place.last = copy
        copy.run(into, slot.extent.memory().tensor[: record.nbytes], before, self.read_back)
        self._check_whole(slot)
        return copy

    def mapped(self, record: Record) -> Tensor:
        """See :meth:`.Tier.mapped`; writing to it would change the record."""
        self._check_open()
        with self._lock:
            place, slot = self._slots.to_read(record)
            buffer = slot.extent.memory()
            memory = MappedMemory(buffer.address, record.nbytes, buffer)
            self._slots.map(slot, memory)
            last = place.last
        if last is not None:
            last.wait()
        self._check_whole(slot)
        return memory.tensor()

    def memory(self, record: Record) -> Tensor:
        """The bytes of a record, uint8 ``[record.nbytes]``, to be changed where they are.

        Those that somebody has mapped stay as they are, in memory that is not of the budget while he uses them.

        Raises:
            TierError: If nothing was written there, or the write failed.
            ValueError: If it is versioned.
        """
        self._check_open()
        with self._lock:
            place, slot, before = self._slots.to_change(record, self._slabs.take_unchecked)
            if place.last is not None:
                place.last.wait()
            source = slot if before is None else before
            self._check_whole(source)
            tensor = slot.extent.memory().tensor[: record.nbytes]
            if before is not None:
                tensor.copy_(before.extent.memory().tensor[: record.nbytes])
                slot.whole = True
        return tensor

    def keep(self, record: Record) -> Tensor:
        """See :meth:`.Tier.keep`."""
        return self.mapped(record)

    def commit(self) -> None:
        """See :meth:`.Tier.commit`.

        Raises:
            TierError: If a write has failed since the last one: go back, or write the record again.
        """
        self._check_open()
        with self._lock:
            self._settle()
            for _, slot in self._slots.accepted():
                self._check_whole(slot)
            self._slots.commit()

    def close(self) -> None:
        """See :meth:`.Tier.close`; memory that is mapped stays for as long as it is used. May be called again."""
        if os.getpid() == self._process:
            with self._lock:
                self._settle()
                self._closed = True
                self._slots.clear()

    def _settle(self) -> None:
        for place in self._slots:
            if place.last is not None:
                place.last.wait()

    def _check_open(self) -> None:
        if os.getpid() != self._process:  # its memory is not in a fork
            raise TierError(
                f"The {self.name} tier belongs to another process, which this one was forked from. Use it there only."
            )
        if self._closed:
            raise TierError(f"The {self.name} tier is closed. Make a new one.")

    def _check_whole(self, slot: Slot[Slab]) -> None:
        if not slot.whole:
            raise TierError(f"A record of the {self.name} tier is not whole: its last write failed. Write it again.")


def keeps_versions(tier: Tier) -> bool:
    """Whether its records are worth a second copy: what is in memory is gone with the process, or as it is now."""
    return not isinstance(tier, HostTier)
