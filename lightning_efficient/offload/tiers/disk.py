"""A tier on a solid-state drive: one file, read and written past the page cache while the caller computes.

Versioned records are whole at any moment, also after ``kill -9``: they are written to the slot that is not accepted,
and a commit accepts all new slots at once (``spill_header.py``). By default nothing waits for the disk: the bytes are
scratch data of a running process, and what was given to the system survives the process, but not a loss of power.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_efficient.core.buffers import PAGE, BufferPool
from lightning_efficient.core.units import parse_bytes
from lightning_efficient.offload.tiers.direct_file import DirectFile, SystemCalls
from lightning_efficient.offload.tiers.disk_work import ReadRecord, WriteRecord, check_whole
from lightning_efficient.offload.tiers.extents import Extent, Extents
from lightning_efficient.offload.tiers.lane import Lane, Transfer, again
from lightning_efficient.offload.tiers.mapped_memory import FileMapping
from lightning_efficient.offload.tiers.record_slots import RecordSlots
from lightning_efficient.offload.tiers.spill_file import SpillFile, sweep
from lightning_efficient.offload.tiers.spill_header import ROOT_BYTES, Accepted, SpillHeader
from lightning_efficient.offload.tiers.tier import Pending, Record, TierError, check_data, check_sizes

__all__ = ["DiskStatistics", "DiskTier"]


@dataclass(frozen=True)
class DiskStatistics:
    """What a disk tier has done.

    Attributes:
        read_bytes: Of records that were read.
        written_bytes: Of records that were written.
        read_seconds: In which at least one read was being carried out; bytes by seconds is the bandwidth.
        write_seconds: In which at least one write was.
        waited_seconds: That callers waited: for the end of transfers, or because too much was under way.
        file_bytes: Of the file.
        direct: Whether the page cache is passed by.
    """

    read_bytes: int
    written_bytes: int
    read_seconds: float
    write_seconds: float
    waited_seconds: float
    file_bytes: int
    direct: bool


class DiskTier:
    """Keeps records in a file of its own, which is gone when the process ends well; see :class:`~.tier.Tier`.

    What a killed process left in the folder is removed at the start of the next tier there. Each record is read and
    written as a whole by one thread, page-aligned memory (``core.buffers.HostBuffer``) without a copy, and its CRC-32
    is checked at each read. After a write has failed, the tier accepts no more: what was committed can be read.

    What somebody writes to memory that :meth:`mapped` returns is only there (see :class:`.FileMapping`), and the record
    stays as it is. Its CRC-32 is not checked. A record that is written while an older version of it is mapped takes
    more room in the file, until the mapping ends.

    Attributes:
        name: For messages.
        path: The file.
        in_memory: Whether the folder is in a file system that itself takes memory (tmpfs), so that nothing is saved.

    Args:
        directory: Made if it is missing; on a local disk.
        buffer_bytes: Memory of the tier's own, for data that is not page-aligned; bytes, or a text such as ``"32MiB"``.
        in_flight_bytes: What may be asked for and not be done, in each direction; who asks for more waits.
        readers: Records that are read at a time.
        writers: Records that are written at a time.
        durable: Each commit waits for the disk, so that what is committed survives a loss of power too.
        name: See above.
        system: What it asks of the system; for tests.

    Raises:
        TierError: If no file can be made there.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        buffer_bytes: int | str = 32 << 20,
        in_flight_bytes: int | str = 256 << 20,
        readers: int = 2,
        writers: int = 2,
        durable: bool = False,
        name: str = "disk",
        system: SystemCalls | None = None,
    ) -> None:
        for argument, threads in (("readers", readers), ("writers", writers)):
            if not 1 <= threads <= 64:
                raise ValueError(f"{argument}={threads!r}; between 1 and 64 records can be moved at a time.")
        users = readers + writers + 1  # the last one writes the header
        staged = max(parse_bytes(buffer_bytes, "buffer_bytes") // users // PAGE, 1) * PAGE
        in_flight = parse_bytes(in_flight_bytes, "in_flight_bytes")
        self.name = name
        self._process = os.getpid()
        folder = Path(directory).absolute()
        sweep(folder)
        spill = SpillFile(folder)
        self.path = spill.path
        self.in_memory = spill.in_memory
        pool = BufferPool(users * staged, most=users)
        self._file = DirectFile(spill.descriptor, spill.path, pool, staged, system or SystemCalls())
        try:
            self._file.grow(ROOT_BYTES)
            space = Extents(self._file)
            self._header = SpillHeader(self._file, space, durable=durable)
        except BaseException:
            spill.remove()
            self._file.close()
            raise
        self._space = space
        self._slots: RecordSlots[Extent] = RecordSlots(
            name, lambda size: space.take([size])[0], space.give_back, outlasts=True
        )
        self._writing = threading.RLock()  # of what changes which bytes are the newest, and so of the space
        self._lock = threading.Lock()  # of the slots, for moments only: reads need not wait for a commit
        self._failed: TierError | None = None
        self._reads = Lane("read", threads=readers, in_flight_bytes=in_flight)
        self._writes = Lane("write", threads=writers, in_flight_bytes=in_flight)
        lanes = (self._reads, self._writes)
        self._end = weakref.finalize(self, _shut_down, os.getpid(), lanes, self._file, spill)

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        """See :meth:`.Tier.reserve`; the room is allocated on the disk now, twice if ``versioned``."""
        check_sizes(sizes)
        self._check_open()
        with self._writing:
            if versioned:
                self._header.make_room(len(self._slots) + len(sizes))
            slots = 2 if versioned else 1
            extents = self._space.take([size for _ in range(slots) for size in sizes])
            records = [Record(size, versioned) for size in sizes]
            with self._lock:
                for index, record in enumerate(records):
                    self._slots.add(record, extents[index :: len(records)])
        return records

    def prepare(self, nbytes: int) -> None:
        """Allocate room on the disk that records will need, so that it is not missing when they are reserved.

        Args:
            nbytes: Of the records; of those that are versioned twice.

        Raises:
            TierError: If there is not that much room.
        """
        self._check_open()
        with self._writing:
            self._space.prepare(nbytes)

    def release(self, records: Sequence[Record]) -> None:
        """See :meth:`.Tier.release`; the room is for other records of this tier."""
        self._check_open()
        with self._writing, self._lock:
            self._slots.remove(records)

    def write(self, record: Record, data: Tensor) -> Pending:
        """See :meth:`.Tier.write`; waits while too much is under way.

        Raises:
            TierError: If an earlier write has failed, or there is no room beside a mapped version of the record.
            ValueError: If ``data`` is not that of the record, or not in the memory of the host.
        """
        self._check_data(record, data)
        self._check_open()
        with self._writing:
            self._check_failed()
            self._writes.admit(record.nbytes)
            try:
                with self._lock:
                    place, slot = self._slots.to_write(record)
                    work = WriteRecord(self._file, slot, data)
                    place.last = transfer = self._writes.begin(record.nbytes, work, place.last)
            except BaseException:
                self._writes.withdraw(record.nbytes)
                raise
        return transfer

    def read(self, record: Record, into: Tensor) -> Pending:
        """See :meth:`.Tier.read`; waits while too much is under way.

        Raises:
            TierError: If nothing was written there. A damaged record is found by the returned transfer's ``wait``.
            ValueError: If ``into`` is not that of the record, or not in the memory of the host.
        """
        self._check_data(record, into)
        self._check_open()
        self._reads.admit(record.nbytes)
        try:
            with self._lock:
                place, slot = self._slots.to_read(record)
                work = ReadRecord(self._file, slot, into)
                place.last = transfer = self._reads.begin(record.nbytes, work, place.last)
        except BaseException:
            self._reads.withdraw(record.nbytes)
            raise
        return transfer

    def mapped(self, record: Record) -> Tensor:
        """See :meth:`.Tier.mapped` and :func:`.drop_pages`; waits for the record's own transfers only."""
        return self._map(record, shared=False)

    def keep(self, record: Record) -> Tensor:
        """See :meth:`.Tier.keep`; room on the disk is taken until nobody uses the tensor."""
        return self._map(record, shared=True)

    def _map(self, record: Record, *, shared: bool) -> Tensor:
        self._check_open()
        with self._lock:
            place, slot = self._slots.to_read(record)
            memory = FileMapping(self._file, slot.extent.offset, record.nbytes, shared=shared)
            self._slots.map(slot, memory)
            last = place.last
        if isinstance(last, Transfer):
            last.settle()
        check_whole(self._file, slot)
        return memory.tensor()

    def commit(self) -> None:
        """See :meth:`.Tier.commit`.

        Raises:
            TierError: If any write has failed since the tier was made, or the header cannot be written: what was
                accepted before still is.
        """
        self._check_open()
        with self._writing:
            self._writes.drain()
            self._check_failed()
            if self._slots.changed:
                try:
                    self._header.write(
                        Accepted(slot.extent.offset, record.nbytes, slot.crc) for record, slot in self._slots.accepted()
                    )
                except TierError as error:
                    self._failed = error
                    raise
            if not self._file.direct:
                self._file.forget()
            with self._lock:
                self._slots.commit()

    def statistics(self) -> DiskStatistics:
        """What it has done until now."""
        reads, writes = self._reads.counts, self._writes.counts
        return DiskStatistics(
            read_bytes=reads.moved_bytes,
            written_bytes=writes.moved_bytes,
            read_seconds=reads.busy_seconds,
            write_seconds=writes.busy_seconds,
            waited_seconds=reads.waited_seconds + writes.waited_seconds,
            file_bytes=self._file.nbytes,
            direct=self._file.direct,
        )

    def close(self) -> None:
        """See :meth:`.Tier.close`; the file is gone. May be called again; in a fork it does nothing."""
        self._end()

    def _check_open(self) -> None:
        if os.getpid() != self._process:  # before any lock, which a thread of the parent may have held at the fork
            raise TierError(
                f"The {self.name} tier belongs to another process, which this one was forked from. Use it there only."
            )
        if not self._end.alive:
            raise TierError(f"The {self.name} tier is closed. Make a new one.")

    def _check_failed(self) -> None:
        failed = self._failed or self._writes.failed
        if failed is not None:
            raise again(failed) from failed

    def _check_data(self, record: Record, data: Tensor) -> None:
        check_data(record, data)
        if data.device.type != "cpu":
            raise ValueError(
                f"The {self.name} tier moves memory of the host, not of {data.device}. Copy the tensor to a "
                "page-aligned buffer of the host first."
            )


def _shut_down(process: int, lanes: Sequence[Lane], file: DirectFile, spill: SpillFile) -> None:
    """At the end of the tier or of the process, whichever is first; a fork leaves everything to its parent."""
    if os.getpid() == process:
        for lane in lanes:
            lane.close()
        spill.remove()
        file.close()
