"""Tensors that are not in use for a while: their memory is given up meanwhile, and they stay the same objects.

(Source: Zhang et al. 2019, "Efficient Memory Management for GPU-based Deep Learning Systems", section 4: swap out when
not in use, and in before the next access.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.core.saved_tensors import is_plain
from lightning_efficient.core.torch_internals import bytes_of
from lightning_efficient.offload.tiers.carriers import carrier_for
from lightning_efficient.offload.tiers.tier import Tier, TierError

__all__ = ["Swapped"]


class Swapped:
    """Swaps the memory of tensors out to a tier and back, beside whatever else goes on.

    All views of that memory are without it meanwhile, and nobody may use or save them; version counts stay as they are.
    Memory that torch cannot resize (of numpy, of a file, shared with other processes) and tensors that are no plain
    views of memory stay where they are.

    Attributes:
        nbytes: Of the memory that is swapped, each storage once.
        stayed_bytes: Of the tensors that stay.

    Args:
        tensors: Their memory is theirs alone.
        tier: Where to. It stays the caller's.
        staging_bytes: Pinned memory through which a GPU's bytes go to a tier that it does not write to itself.

    Raises:
        TierError: If the tier has not that much room.
        ValueError: If tensors of a device cannot be moved.
    """

    def __init__(self, tensors: Iterable[Tensor], tier: Tier, *, staging_bytes: int = 64 << 20) -> None:
        self.stayed_bytes = 0
        storages: dict[int, UntypedStorage] = {}
        for tensor in tensors:
            if is_plain(tensor) and tensor.untyped_storage().resizable():
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage
            else:
                self.stayed_bytes += tensor.numel() * tensor.dtype.itemsize
        memory = [storage for storage in storages.values() if storage.nbytes()]
        self.nbytes = sum(storage.nbytes() for storage in memory)
        self._tier = tier
        kinds = {storage.device.type for storage in memory}
        self._carriers = {kind: carrier_for(torch.device(kind), staging_bytes) for kind in kinds}
        records = tier.reserve([storage.nbytes() for storage in memory], versioned=False)
        self._places = list(zip(memory, records, strict=True))
        self._task: _Task | None = None
        self._staying = threading.Event()  # set: what has not been given up yet is needed again
        self._released = False

    @property
    def away_bytes(self) -> int:
        """Of the memory that has been given up by now."""
        return sum(record.nbytes for storage, record in self._places if not storage.nbytes())

    def out(self) -> None:
        """Begin to write, and give up each piece of memory when it is written; again after new values came.

        Raises:
            TierError: If what was begun before failed.
            RuntimeError: If it has been closed.
        """
        if self._released:
            raise RuntimeError("These tensors are swapped no more: close() has been called.")
        self.wait()
        self._staying.clear()
        self._begin(self._leave)

    def back(self) -> None:
        """Begin to bring everything back; what has not left yet stays."""
        self._staying.set()
        before = self._task
        self._begin(lambda: self._come(before))

    def wait(self) -> None:
        """Until what was begun is done: after :meth:`back`, whatever this thread computes finds the tensors there.

        Raises:
            TierError: If it failed. What could not be written is still in memory; :meth:`back` may be tried again.
        """
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def close(self) -> None:
        """Bring everything back, and give the room in the tier back.

        Raises:
            TierError: If it could not be read; the room stays.
        """
        if not self._released:
            with contextlib.suppress(TierError):  # of writing: then it is still in memory
                self.wait()
            self.back()
            self.wait()
            self._tier.release([record for _, record in self._places])
            self._released = True

    def _begin(self, work: Callable[[], None]) -> None:
        self._task = _Task(work, {storage.device for storage, _ in self._places})

    def _leave(self) -> None:
        leaving = []
        for storage, record in self._places:
            if storage.nbytes() and not self._staying.is_set():
                carrier = self._carriers[storage.device.type]
                leaving.append((storage, carrier.send(self._tier, record, bytes_of(storage))))
        try:
            for storage, one in leaving:
                one.settle()
                if not self._staying.is_set():
                    storage.resize_(0)
        finally:
            for carrier in self._carriers.values():
                with contextlib.suppress(TierError):  # which has been raised
                    carrier.flush()

    def _come(self, before: _Task | None) -> None:
        if before is not None:
            with contextlib.suppress(TierError):  # of writing: then it is still in memory
                before.result()
        coming = []
        failed: TierError | None = None
        for storage, record in self._places:
            if not storage.nbytes():
                storage.resize_(record.nbytes)
                carrier = self._carriers[storage.device.type]
                try:
                    coming.append((storage, carrier.fetch(self._tier, record, storage.device, bytes_of(storage))))
                except TierError as error:
                    storage.resize_(0)  # it is still away
                    failed = error
        for storage, arriving in coming:
            try:
                arriving.wait()
            except TierError as error:
                storage.resize_(0)
                failed = error
        if failed is not None:
            raise failed


class _Task:
    """Work in a thread of its own, for the streams that are current now."""

    def __init__(self, work: Callable[[], None], devices: Iterable[torch.device]) -> None:
        self._work = work
        self._streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="offload-swap", daemon=True)
        self._thread.start()

    def result(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                for stream in self._streams:
                    stack.enter_context(torch.cuda.stream(stream))
                self._work()
        except BaseException as error:
            self._error = error
