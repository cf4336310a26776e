"""Everything between "save this" and a file that is there: framework-free."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.barrier import UpdateBarrier, owned_tensors
from lightning_efficient.checkpointing.skeleton import Skeleton, take_skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot, note_of, storage_checksum
from lightning_efficient.checkpointing.streaming import write_streaming
from lightning_efficient.checkpointing.writer import BackgroundWriter, Failure, Written
from lightning_efficient.core.buffers import BufferPool, HostBuffer
from lightning_efficient.core.torch_internals import storage_key

__all__ = ["CheckpointEngine", "WhenBusy"]

WhenBusy = Literal["wait", "eager"]

_SPARE_BYTES = 1 << 20  # what a state may grow by, outside its tensors, without a new buffer


@dataclass
class Saved:
    """What a save cost the training thread.

    Attributes:
        seconds: In all.
        copied_bytes: Copied at once.
        later_bytes: Left to be copied while training goes on.
    """

    seconds: float
    copied_bytes: int
    later_bytes: int


class CheckpointEngine:
    """Takes snapshots and has them written, within a cap of memory.

    The first snapshot from a place in the program is copied at once, and looked at again before the next update: a
    tensor that changed without an optimizer (weights that user code clamps, for one) is copied at once from then on.

    Args:
        memory_cap: Bytes of all buffers; None: no cap.
        in_memory: How many snapshots stay in memory after they are written.
        when_busy: What a save does while all buffers are in use: ``"wait"`` for one, or copy at once into memory past
            the cap (``"eager"``).
        verify: Whether to compare the checksum of each tensor before its copy with that of the copy.
        attempts: How often a file is tried.
        retry_seconds: Between two tries.

    Attributes:
        barrier: To be attached while training.
        volatile: Tensors that changed without an optimizer, by :func:`storage_key`.
    """

    def __init__(
        self,
        *,
        memory_cap: int | None,
        in_memory: int = 0,
        when_busy: WhenBusy = "wait",
        verify: bool = False,
        attempts: int = 1,
        retry_seconds: float = 1.0,
    ) -> None:
        self.pool = BufferPool(memory_cap, most=2 + in_memory)
        self.barrier = UpdateBarrier(self._note_stall)
        self.volatile: set[tuple[int, int]] = set()
        self.stalled_seconds = 0.0
        self.last_stall = 0.0
        self._in_memory = in_memory
        self._when_busy = when_busy
        self._verify = verify
        self._writer = BackgroundWriter(self._free, attempts=attempts, retry_seconds=retry_seconds)
        self._known_places: set[str] = set()
        self._layout: tuple[tuple[tuple[int, int], ...], StorageLayout] | None = None
        self._recent: deque[Snapshot] = deque()

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: Mapping[str, Any],
        path: Path,
        step: int,
        *,
        owners: Sequence[Optimizer] = (),
        place: str = "",
        first: Sequence[Tensor] = (),
    ) -> Saved:
        """Take a snapshot that will become ``path``.

        Args:
            checkpoint: The state; its tensors may change as soon as this returns, but for those of ``owners``, which
                may change in their next step.
            path: Of the file; its directory exists.
            step: Of the run.
            owners: Optimizers whose every update passes the barrier.
            place: Where in the program this is, if ``owners`` are given.
            first: Tensors that are to be copied before the others, in this order: those that change first.

        Raises:
            pickle.PicklingError: As ``torch.save``.
        """
        begin = time.perf_counter()
        self.settle()
        skeleton = take_skeleton(checkpoint)
        layout = self._lay_out(skeleton, first)
        needed = layout.end + len(skeleton.pickled) + layout.directory_nbytes + _SPARE_BYTES
        if not self.pool.fits(needed) and self._when_busy == "wait":
            self._writer.wait()
            write_streaming(skeleton, layout, path, note_of(step))
            return Saved(time.perf_counter() - begin, layout.end, 0)
        owned = self._owned(skeleton, owners)
        calibrating = bool(owned) and place not in self._known_places
        if calibrating:
            self._calibrate(skeleton, owned, place)
        later = {} if calibrating else owned
        expected = {n: storage_checksum(skeleton.storages[n]) for n in owned} if self._verify else None
        buffer = self._take_buffer(needed)
        try:
            snapshot = Snapshot(skeleton, layout, buffer, step, watched=later, expected=expected)
            snapshot.copy([number for number in layout.records if number not in later])
        except BaseException:
            self.pool.give_back(buffer)
            raise
        if later:
            self.barrier.protect(snapshot, skeleton.numbers)
        self._writer.save(snapshot, path)  # the buffer is the writer's from now on
        later_bytes = sum(layout.records[number].nbytes for number in later)
        return Saved(time.perf_counter() - begin, layout.end - later_bytes, later_bytes)

    def prepare(self, module: nn.Module, owners: Sequence[Optimizer]) -> None:
        """Have memory for a checkpoint of these ready before the first is asked for, in the background.

        Args:
            module: With its buffers.
            owners: With their state, after the first step.
        """
        tensors = [*module.state_dict().values(), *(tensor for owner in owners for tensor in owned_tensors(owner))]
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        sizes = {storage_key(storage): storage.nbytes() for storage in storages}
        nbytes = sum(sizes.values()) + 512 * len(sizes) + 2 * _SPARE_BYTES  # with headers and the pickle
        if self.pool.fits(nbytes):
            self._writer.prepare(lambda: self.pool.prepare(nbytes))

    def save_now(self, checkpoint: Mapping[str, Any], path: Path, step: int) -> None:
        """Write ``path`` before this returns, whatever else is going on; safe inside a signal handler.

        Raises:
            OSError: As the system says.
        """
        skeleton = take_skeleton(checkpoint)
        layout = StorageLayout([(n, storage.nbytes()) for n, storage in enumerate(skeleton.storages)])
        write_streaming(skeleton, layout, path, note_of(step))

    def remove(self, path: Path) -> None:
        """See :meth:`BackgroundWriter.remove`."""
        self._writer.remove(path)

    def link(self, target: Path, link: Path) -> None:
        """See :meth:`BackgroundWriter.link`."""
        self._writer.link(target, link)

    def settle(self) -> float:
        """Finish all copies: to be called where weights may change without an optimizer.

        Returns:
            Seconds that it took.
        """
        return self.barrier.wait()

    def drain(self, path: Path | None = None) -> None:
        """Return when everything asked for (with ``path``) is done."""
        if path is None:
            self.settle()
        self._writer.wait(path)

    def pending(self, path: Path | None = None) -> bool:
        """Whether something is still to be done (with ``path``)."""
        return self._writer.pending(path)

    def take_written(self) -> list[Written]:
        """See :meth:`BackgroundWriter.take_written`."""
        return self._writer.take_written()

    def take_failures(self) -> list[Failure]:
        """See :meth:`BackgroundWriter.take_failures`."""
        return self._writer.take_failures()

    def forget_places(self) -> None:
        """The tensors are others now: find out anew which of them change without an optimizer."""
        self._known_places.clear()
        self.volatile.clear()

    def close(self) -> None:
        """Finish everything, end the threads, and let go of what is not kept in memory on purpose."""
        self.settle()
        self._writer.close()
        self.barrier.detach()
        self.barrier.before_next_update = None
        self.pool.clear()

    # -- what stays in memory ----------------------------------------------------------------------------------------

    def last_good(self) -> Snapshot | None:
        """The newest snapshot in memory that is complete, or None."""
        return self._recent[-1] if self._recent else None

    def discard_after(self, step: int) -> None:
        """Forget the snapshots in memory of later steps."""
        while self._recent and self._recent[-1].step > step:
            self.pool.give_back(self._recent.pop().buffer)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _lay_out(self, skeleton: Skeleton, first: Sequence[Tensor]) -> StorageLayout:
        """In the order of the file, which is that of the copies."""
        rank = {storage_key(tensor.untyped_storage()): place for place, tensor in enumerate(first)}
        numbers = list(range(len(skeleton.storages)))
        if rank:
            numbers.sort(key=lambda n: rank.get(storage_key(skeleton.storages[n]), len(rank)))
        places = tuple((number, skeleton.storages[number].nbytes()) for number in numbers)
        if self._layout is None or self._layout[0] != places:
            self._layout = places, StorageLayout(places)
        return self._layout[1]

    def _owned(self, skeleton: Skeleton, owners: Sequence[Optimizer]) -> dict[int, Tensor]:
        """The tensors that can be copied later, by number of their storage."""
        if not owners:
            return {}
        owned: dict[int, Tensor] = {}
        numbers, volatile = skeleton.numbers, self.volatile
        for optimizer in owners:
            for tensor in owned_tensors(optimizer):
                if tensor.is_cpu:
                    key = storage_key(tensor.untyped_storage())
                    number = numbers.get(key)
                    if number is not None and key not in volatile:
                        owned[number] = tensor
        return owned

    def _calibrate(self, skeleton: Skeleton, owned: Mapping[int, Tensor], place: str) -> None:
        storages = {storage_key(skeleton.storages[number]): skeleton.storages[number] for number in owned}
        before = {key: storage_checksum(storage) for key, storage in storages.items()}

        def compare() -> None:
            self.volatile |= {key for key, storage in storages.items() if storage_checksum(storage) != before[key]}
            self._known_places.add(place)

        self.barrier.before_next_update = compare

    def _take_buffer(self, nbytes: int) -> HostBuffer:
        buffer = self.pool.try_take(nbytes)
        if buffer is None and self._when_busy == "eager":
            buffer = HostBuffer(nbytes)
        if buffer is None:
            self._writer.wait()
            buffer = self.pool.try_take(nbytes)
        while buffer is None and self._recent:  # what is kept in memory leaves no room under the cap
            self._evict_oldest()
            buffer = self.pool.try_take(nbytes)
        return buffer or self.pool.take(nbytes)

    def _free(self, snapshot: Snapshot) -> None:
        """In the writer's thread, when ``snapshot`` needs not be written any more."""
        snapshot.release_sources()
        if snapshot.sealed and self._in_memory:
            self._recent.append(snapshot)
            if len(self._recent) > self._in_memory:
                self._evict_oldest()
        else:
            self.pool.give_back(snapshot.buffer)

    def _evict_oldest(self) -> None:
        with contextlib.suppress(IndexError):  # another thread was faster
            self.pool.give_back(self._recent.popleft().buffer)

    def _note_stall(self, seconds: float) -> None:
        self.last_stall = seconds
        self.stalled_seconds += seconds
