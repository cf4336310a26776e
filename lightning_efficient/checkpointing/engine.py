"""Everything between "save this" and a file that is there: framework-free."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.barrier import UpdateBarrier, owned_tensors
from lightning_efficient.checkpointing.copies_ahead import CopiesAhead
from lightning_efficient.checkpointing.copy_plan import CopyPlan, Planner, storage_checksum
from lightning_efficient.checkpointing.device_copies import DeviceCopies
from lightning_efficient.checkpointing.skeleton import Skeleton, take_skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot, note_of
from lightning_efficient.checkpointing.staging import DeviceStaging, Staging
from lightning_efficient.checkpointing.streaming import write_streaming
from lightning_efficient.checkpointing.writer import BackgroundWriter, Failure, Written
from lightning_efficient.core.buffers import BufferPool, HostBuffer
from lightning_efficient.core.torch_internals import spread_of, storage_key

__all__ = ["CheckpointEngine", "WhenBusy"]

WhenBusy = Literal["wait", "skip", "eager"]

_SPARE_BYTES = 1 << 20  # what a state may grow by, outside its tensors, without a new buffer
_RECORDS_BYTES = 4096  # beside the pickle: the small records, the end, and what a save may be longer than the last


@dataclass
class Saved:
    """What a save cost the training thread.

    Attributes:
        seconds: In all.
        copied_bytes: Copied at once.
        later_bytes: Left to be copied while training goes on.
        ahead_bytes: Copied, or begun to be, before the step was over.
        skipped: Whether nothing will be written, for all memory is in use.
    """

    seconds: float
    copied_bytes: int = 0
    later_bytes: int = 0
    ahead_bytes: int = 0
    skipped: bool = False


class CheckpointEngine:
    """Takes snapshots and has them written, within a cap of memory.

    Args:
        memory_cap: Bytes of all buffers; None: no cap.
        in_memory: How many snapshots stay in memory after they are written.
        when_busy: What a save does while all buffers are in use: ``"wait"`` for one, ``"skip"`` this save, or copy at
            once into memory past the cap (``"eager"``).
        verify: Whether to compare the checksum of each tensor before its copy with that of the copy.
        staging: See :class:`DeviceStaging`.
        attempts: How often a file is tried.
        retry_seconds: Between two tries.

    Attributes:
        barrier: To be attached while training.
        planner: Knows which tensors are copied at once.
        ahead: Copies that begin before the save.
    """

    def __init__(
        self,
        *,
        memory_cap: int | None,
        in_memory: int = 0,
        when_busy: WhenBusy = "wait",
        verify: bool = False,
        staging: Staging = "auto",
        attempts: int = 1,
        retry_seconds: float = 1.0,
    ) -> None:
        self.pool = BufferPool(memory_cap, most=2 + in_memory, spare_bytes=_SPARE_BYTES)
        self.barrier = UpdateBarrier(self._note_stall)
        self.planner = Planner()
        self.staging = DeviceStaging(staging)
        self.last_stall = 0.0
        self._stalled_seconds = 0.0
        self._stalled_since_save = 0.0
        self._stall_tells = False  # whether the last save was copied as most are
        self._copies = DeviceCopies()
        self._in_memory = in_memory
        self._when_busy = when_busy
        self._verify = verify
        self._writer = BackgroundWriter(self._free, attempts=attempts, retry_seconds=retry_seconds)
        self.ahead = CopiesAhead(self.planner, self._writer.prepare, self._discard)
        self._rest_nbytes: int | None = None  # of the files, beside storages and directory
        self._recent: deque[Snapshot] = deque()
        self._coming: set[Snapshot] = set()  # to be among the recent ones when they are written
        self._choosing = threading.Lock()

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: Mapping[str, Any],
        path: Path,
        step: int,
        *,
        owners: Sequence[Optimizer] = (),
        place: str = "",
        at_once: bool = False,
        first: Callable[[], Iterable[Tensor]] = tuple,
    ) -> Saved:
        """Take a snapshot that will become ``path``.

        Args:
            checkpoint: The state; its tensors may change as soon as this returns, but for those of ``owners``, which
                may change in their next step.
            path: Of the file; its directory exists.
            step: Of the run.
            owners: Optimizers whose every update passes the barrier.
            place: Where in the program this is, if ``owners`` are given.
            at_once: Whether nothing may be copied later, for weights may change by other hands first.
            first: Returns tensors that are to be copied before the others, in this order: those that change first.

        Raises:
            pickle.PicklingError: As ``torch.save``.
        """
        begin = time.perf_counter()
        self.barrier.wait()
        self._note_stall_of_last_save()
        skeleton = take_skeleton(checkpoint)
        known = self.planner.last
        plan = self.planner.plan(skeleton, owners, first)
        if self._rest_nbytes is None or plan is not known:
            self._rest_nbytes = len(skeleton.pickled) + _RECORDS_BYTES
        snapshot = self.ahead.take(skeleton, plan, step)
        if snapshot is None:
            self.pool.pinned |= plan.on_gpu
            needed = self._needed(plan)
            if not self.pool.fits(needed) and self._when_busy != "eager":
                self._save_streaming(skeleton, plan, path, step)
                return Saved(time.perf_counter() - begin, plan.layout.end)
            buffer = self._take_buffer(needed, may_skip=bool(owners) and not at_once and self._writer.pending())
            if buffer is None:
                self._writer.skip(path)
                return Saved(time.perf_counter() - begin, skipped=True)
            snapshot = self._new_snapshot(plan, buffer, step)
        try:
            later = self._begin(snapshot, skeleton, plan, None if at_once else place)
        except BaseException:
            self._discard(snapshot)
            raise
        if self._in_memory:
            with self._choosing:
                self._coming.add(snapshot)
        self._writer.save(snapshot, path)  # the buffer is the writer's from now on
        later_bytes = sum(plan.layout.records[number].nbytes for number in later)
        copied_bytes = plan.layout.end - later_bytes - self.ahead.taken_bytes
        return Saved(time.perf_counter() - begin, copied_bytes, later_bytes, self.ahead.taken_bytes)

    def _begin(self, snapshot: Snapshot, skeleton: Skeleton, plan: CopyPlan, place: str | None) -> set[int]:
        """Copy what must be copied at once (without a ``place``, all), and protect the rest; returns the rest."""
        ahead, records = snapshot.offered, plan.layout.records
        snapshot.describe = lambda: skeleton.pickled
        if self._verify:
            snapshot.expected = {number: storage_checksum(skeleton.storages[number]) for number in plan.keys}
        allowed, inspected = set[int](), set[int]()
        if place is not None:
            allowed, inspected = self.planner.later(plan, place), self.planner.to_calibrate(plan, place)
        later = allowed - ahead
        if place is not None and inspected:
            storages = {plan.keys[number]: skeleton.storages[number] for number in inspected}
            tensors_of = [skeleton.tensors[number] for number in inspected]
            self.barrier.before_updates = self.planner.calibrate(storages, tensors_of, place)
        self._stall_tells = bool(later) and not inspected
        begun = later | ahead & allowed
        at_once = {number: skeleton.storages[number] for number in records if number not in later | ahead}
        wanted = {number: skeleton.storages[number] for number in records if number in later}
        tensors = {number: tensor for number in later if (tensor := skeleton.tensors[number]) is not None}
        if plan.on_gpu and (staged := self.staging.stage(at_once | wanted)):
            begun -= staged.keys()
            at_once = {number: source for number, source in at_once.items() if number not in staged}
            tensors = {number: tensor for number, tensor in tensors.items() if number not in staged}
            wanted |= staged  # type: ignore[arg-type]
        snapshot.offer(at_once)
        snapshot.wait([*at_once, *(ahead - allowed)])
        snapshot.offer(wanted, tensors)
        self.barrier.protect(snapshot, {plan.keys[number]: number for number in begun})
        return later

    def expect_save(self, step: int) -> None:
        """A save will be asked for after ``step``, the one in progress: what it finishes first may be copied first.

        Followed by :meth:`CopiesAhead.updated`.
        """
        self.ahead.drop()
        plan = self.planner.last
        if plan is None or not plan.keys or self._verify:
            return
        buffer = self.pool.try_take(self._needed(plan))
        if buffer is not None:
            self.ahead.begin(self._new_snapshot(plan, buffer, step), plan)

    def prepare(self, module: nn.Module, owners: Sequence[Optimizer]) -> None:
        """Have memory for a checkpoint of these ready before the first is asked for, in the background.

        Args:
            module: With its buffers.
            owners: With their state, after the first step.
        """
        if any(spread_of(parameter) is not None for parameter in module.parameters()):
            return  # how large it is when it has been put together is seen then
        tensors = [*module.state_dict().values(), *(tensor for owner in owners for tensor in owned_tensors(owner))]
        plain = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.layout is torch.strided]
        storages = [tensor.untyped_storage() for tensor in plain]
        sizes = {storage_key(storage): storage.nbytes() for storage in storages}
        nbytes = sum(sizes.values()) + 512 * len(sizes) + _SPARE_BYTES  # with headers and the pickle
        self.pool.pinned |= any(storage.is_cuda for storage in storages)
        if self.pool.fits(nbytes):
            self._writer.prepare(lambda: self.pool.prepare(nbytes))

    def save_now(self, checkpoint: Mapping[str, Any], path: Path, step: int) -> None:
        """Write ``path`` before this returns, whatever else is going on; safe inside a signal handler.

        Raises:
            OSError: As the system says.
        """
        skeleton = take_skeleton(checkpoint)
        if skeleton.on_gpu:  # a handler may have come while another stream was the current one
            for device in {storage.device for storage in skeleton.storages if storage.is_cuda}:
                torch.cuda.synchronize(device)
        layout = StorageLayout([(n, storage.nbytes()) for n, storage in enumerate(skeleton.storages)])
        write_streaming(skeleton, layout, path, note_of(step))
        self._writer.on_saved(path, step)

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
        self.ahead.drop()
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
        self.planner.forget()

    def close(self) -> None:
        """Finish everything, end the threads, and let go of what is not kept in memory on purpose."""
        self.settle()
        self._writer.close()
        self.barrier.detach()
        self.barrier.before_updates = None
        self.pool.clear()

    # -- what stays in memory ----------------------------------------------------------------------------------------

    def last_good(self) -> Snapshot | None:
        """The newest snapshot in memory that is complete, or None."""
        return self._recent[-1] if self._recent else None

    def forget_recent(self) -> None:
        """Forget all snapshots in memory."""
        self.discard_after(-1)

    def discard_after(self, step: int) -> None:
        """Forget the snapshots in memory of later steps; those that are being written become files, and no more."""
        with self._choosing:
            self._coming = {snapshot for snapshot in self._coming if snapshot.step <= step}
            while self._recent and self._recent[-1].step > step:
                self.pool.give_back(self._recent.pop().retire())

    # -- inside ------------------------------------------------------------------------------------------------------

    def _new_snapshot(self, plan: CopyPlan, buffer: HostBuffer, step: int) -> Snapshot:
        return Snapshot(plan.layout, buffer, step, self._copies if plan.on_gpu else None)

    def _needed(self, plan: CopyPlan) -> int:
        return plan.layout.end + plan.layout.directory_nbytes + (self._rest_nbytes or 0)

    def _save_streaming(self, skeleton: Skeleton, plan: CopyPlan, path: Path, step: int) -> None:
        """Of a state that is larger than all memory for copies; the writer hears how it went."""
        self._writer.wait()
        self._writer.save_at_once(lambda: write_streaming(skeleton, plan.layout, path, note_of(step)), path, step)

    def _take_buffer(self, nbytes: int, may_skip: bool) -> HostBuffer | None:
        buffer = self.pool.try_take(nbytes)
        if buffer is None and may_skip and self._when_busy == "skip":
            return None
        if buffer is None and self._when_busy == "eager":
            return self.pool.new(nbytes)
        if buffer is None:
            self._writer.wait()
            buffer = self.pool.try_take(nbytes)
        while buffer is None and self._recent:  # what is kept in memory leaves no room under the cap
            self._evict_oldest()
            buffer = self.pool.try_take(nbytes)
        return buffer or self.pool.take(nbytes)

    def _discard(self, snapshot: Snapshot) -> None:
        snapshot.cancel()
        self.pool.give_back(snapshot.lent)

    def _free(self, snapshot: Snapshot) -> None:
        """In the writer's thread, when ``snapshot`` needs not be written any more."""
        plan = self.planner.last
        if snapshot.torn and plan is not None and plan.layout is snapshot.layout:  # not again
            self.planner.volatile.update(plan.keys[number] for number in snapshot.torn if number in plan.keys)
        if snapshot.sealed:
            rest = snapshot.archive.nbytes - snapshot.layout.end - snapshot.layout.directory_nbytes
            self._rest_nbytes = max(self._rest_nbytes or 0, rest + _RECORDS_BYTES)
        snapshot.release_sources()
        with self._choosing:
            keep = snapshot.sealed and snapshot in self._coming
            self._coming.discard(snapshot)
            if keep:
                self._recent.append(snapshot)
        if not keep:
            self.pool.give_back(snapshot.lent)
        elif len(self._recent) > self._in_memory:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        with contextlib.suppress(IndexError):  # another thread was faster
            self.pool.give_back(self._recent.popleft().retire())

    def follow(self, on_saved: Callable[[Path, int], None], on_removed: Callable[[Path], None]) -> None:
        """Tell of each file that has become durable, and of each that has been removed, in the writer's thread."""
        self._writer.on_saved, self._writer.on_removed = on_saved, on_removed

    @property
    def stalled_seconds(self) -> float:
        """That updates have waited for copies, on the host and, up to the last save, on the device."""
        return self._stalled_seconds

    def _note_stall(self, seconds: float) -> None:
        self.last_stall = seconds
        self._stalled_seconds += seconds
        self._stalled_since_save += seconds

    def _note_stall_of_last_save(self) -> None:
        on_device = self._copies.take_stalled_seconds()
        self._stalled_seconds += on_device
        if self._stall_tells and self.staging.chosen == "host":
            self.staging.note_stall(self._stalled_since_save + on_device)
        self._stalled_since_save = 0.0
