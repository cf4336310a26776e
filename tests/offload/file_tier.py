"""A tier over a file, whose transfers run in a thread of its own and can be held up."""

from __future__ import annotations

import ctypes
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.tier import Pending, Record, TierError

__all__ = ["FileTier"]


class _Job:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ended = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error
        self._work = lambda: None
        self._ended.set()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        return self._ended.is_set()


class FileTier:
    """Keeps records one behind the other in a file without a name, and never uses room again.

    Attributes:
        reserved: Records that have not been given back.
        capacity_bytes: Of all records at a time.
        open: Transfers run while it is set.
        reads: Records that were asked for, in order.
        writes: Records that were asked to be written, in order.
        fail: Transfers fail while it is true.
    """

    name = "file"

    def __init__(self, capacity_bytes: int = 1 << 40) -> None:
        self._descriptor = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
        self._places: dict[Record, int] = {}
        self._end = 0
        self._written: set[Record] = set()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.capacity_bytes = capacity_bytes
        self.reserved: set[Record] = set()
        self.reads: list[Record] = []
        self.writes: list[Record] = []
        self.fail = False
        self.open = threading.Event()
        self.open.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        if sum(sizes) + sum(record.nbytes for record in self.reserved) > self.capacity_bytes:
            raise TierError(28, "the file is full")
        records = [Record(size, versioned) for size in sizes]
        for record in records:
            self._places[record] = self._end
            self._end += record.nbytes
        self.reserved.update(records)
        return records

    def release(self, records: Sequence[Record]) -> None:
        for record in records:
            self.reserved.remove(record)

    def write(self, record: Record, data: Tensor) -> Pending:
        assert record in self.reserved
        self._check(record, data)
        self.writes.append(record)
        self._written.add(record)
        return self._ask(lambda: self._transfer(os.pwritev, record, data))

    def read(self, record: Record, into: Tensor) -> Pending:
        assert record in self.reserved
        self._check(record, into)
        if record not in self._written:
            raise TierError(5, "nothing was written there")
        self.reads.append(record)
        return self._ask(lambda: self._transfer(os.preadv, record, into))

    def mapped(self, record: Record) -> Tensor:
        into = torch.empty(record.nbytes, dtype=torch.uint8)
        self.read(record, into).wait()
        return into

    def keep(self, record: Record) -> Tensor:
        return self.mapped(record)

    def commit(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Until everything has ended."""
        self._ask(lambda: None).wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        os.close(self._descriptor)

    def _check(self, record: Record, data: Tensor) -> None:
        assert data.dtype == torch.uint8
        assert data.shape == (record.nbytes,)
        assert data.is_contiguous()

    def _ask(self, work: Callable[[], None]) -> _Job:
        job = _Job(work)
        self._jobs.put(job)
        return job

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], record: Record, data: Tensor) -> None:
        if self.fail:
            raise TierError(5, "the disk is dying")
        # Not by numpy(), which makes memory that torch cannot resize any more of it.
        view, place = memoryview((ctypes.c_char * data.nbytes).from_address(data.data_ptr())), self._places[record]
        while view:
            count = call(self._descriptor, [view], place)
            view, place = view[count:], place + count

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.open.wait()
            job.run()
