"""Steps that the host takes for parameters of a device, in a thread of its own, while the device goes on.

A unit's gradients come to the host, its optimizer state is there already, and its new values go back: of the way
between the two that is a gradient and a value, where state that is stepped on the device takes all of it, twice. (Ren
et al. 2021, "ZeRO-Offload", 4; Lian et al. 2025, "SuperOffload".) The copies of the units behind it run meanwhile.

A compiler that is at work in another thread while a unit is stepped lets some optimizers round as compiled code does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import not_compiling
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.updates.crossing import Crossing, Mark
from lightning_efficient.offload.updates.gradients import GradientClaim
from lightning_efficient.offload.updates.host_job import HostJob, Keep
from lightning_efficient.offload.updates.host_staging import HostStaging
from lightning_efficient.offload.updates.subset_step import tell_after, tell_before
from lightning_efficient.offload.updates.units import Unit

__all__ = ["HostSteps"]


class HostSteps:
    """Takes units one after another, in the order in which they were begun.

    All but the stepping is for one thread at a time, whose current stream computes.

    Attributes:
        waited_seconds: That callers waited for steps, or for room.
        busy_seconds: That the host stepped, transfers of the state of a disk included.
        failed: Whether a step has failed, and that was raised; no other can follow.

    Args:
        crossing: Between the device and the host.
        staging: Has the state on the host.
        master_weights: See :class:`~.engine.UpdateEngine`.
        in_flight_bytes: Pinned memory for gradients and values on their way; a single unit may need more.
    """

    def __init__(self, crossing: Crossing, staging: HostStaging, *, master_weights: bool, in_flight_bytes: int) -> None:
        self.waited_seconds, self.busy_seconds = 0.0, 0.0
        self.failed = False
        self._crossing, self._staging = crossing, staging
        self._master_weights, self._most = master_weights, in_flight_bytes
        self._jobs: dict[Unit, HostJob] = {}  # begun and not joined
        self._known: dict[Tensor, tuple[int, Tensor]] = {}  # version and bits of a value that is on the host too
        self._sent: dict[Unit, Mark] = {}  # when the last values had left the memory that they are stepped in
        self._changed = threading.Condition()
        self._queue: deque[HostJob] = deque()
        self._copying_bytes = 0
        self._failed: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="offload-host-step", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether a unit has been begun, and not been joined."""
        return bool(self._jobs)

    def begin(
        self,
        unit: Unit,
        group: Mapping[str, Any],
        gradients: Sequence[Tensor | GradientClaim | None],
        keep: Keep,
        stream: ParameterStream | None,
    ) -> None:
        """Let the host step ``unit``, whose state is elsewhere; :meth:`join` before anybody reads its parameters.

        Args:
            unit: Must not be under way.
            group: Its hyperparameters, as they are now.
            gradients: One for each of its parameters, which must stay as they are until then.
            keep: Puts the new state into the unit's record; called in the thread.
            stream: Has the parameters that are not on the device.

        Raises:
            BaseException: What an earlier step ended with, or why nothing can be copied to the host; see :meth:`join`.
            RuntimeError: If that was raised before.
        """
        if self._failed is not None:
            self._raise(self._failed)
        if all(gradient is None for gradient in gradients):
            return
        job = HostJob(unit, gradients, self._crossing, self._staging, keep, in_full=self._master_weights)
        job.previous, job.stream = self._sent.pop(unit, None), stream
        with torch.inference_mode(False), torch.no_grad(), not_compiling():
            tell_before(unit.optimizer, group, job.changing)
            job.pack(group, self._known)
        self._jobs[unit] = job
        with self._changed:
            self._queue.append(job)
            failed = self._failed = self._failed or self._guarded_copies()
            self._changed.notify_all()  # also if it failed: the thread is to take what is queued off again
        if failed is not None:
            self._raise(failed)

    def relieve(self) -> None:
        """Until little of the device's memory is held by what waits for its way to the host."""
        self._wait(lambda: sum(job.nbytes for job in self._queue if job.arrived is None) <= self._most)

    def join(self, units: Iterable[Unit] | None = None) -> None:
        """What is computed from now on finds the new values of these, or of all, and the optimizers their state.

        Raises:
            BaseException: What a step ended with; then weights may be half new, and nothing is under way any more.
        """
        for unit in list(self._jobs if units is None else units):
            job = self._jobs.get(unit)
            if job is None:
                continue
            with not_compiling():
                self._wait(lambda job=job: job.done)  # type: ignore[misc]
            if self._failed is not None:
                self._raise(self._failed)
            del self._jobs[unit]
            with torch.inference_mode(False), torch.no_grad(), not_compiling():
                self._known.update(job.deliver())
                if job.sent is not None:
                    self._sent[unit] = job.sent
                tell_after(unit.optimizer, job.group, job.changing)

    def settle(self) -> None:
        """Nothing is under way, and no memory is read any more; what is on the host may be changed by others."""
        self.join()
        self._crossing.settle()
        self._known.clear()
        self._sent.clear()

    def close(self) -> None:
        """End the thread, when it has done what was begun."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._jobs.clear()
        self._known.clear()
        self._crossing.settle()

    def _raise(self, failed: BaseException) -> None:
        self._jobs.clear()
        if self.failed:
            raise RuntimeError("An update on the host has failed, so that no other can follow.") from failed
        self.failed = True
        raise failed

    def _wait(self, until: Callable[[], bool]) -> None:
        begin = time.perf_counter()
        with self._changed:
            while not self._changed.wait_for(lambda: until() or self._failed is not None, timeout=1.0):
                if not self._thread.is_alive():
                    self._failed = RuntimeError(
                        "The thread that updates parameters on the host has ended before its work was done; weights "
                        "may be half new. Go on from the last checkpoint."
                    )
        self.waited_seconds += time.perf_counter() - begin

    def _copy_ahead(self) -> None:
        """Begin the copies to the host, as far as there is room; the lock is held."""
        for job in self._queue:
            if job.arrived is None:
                if self._copying_bytes and self._copying_bytes + job.nbytes > self._most:
                    return
                job.fetch()
                self._copying_bytes += job.nbytes

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._queue[0]
            error: BaseException | None = None
            try:
                if self._failed is None:
                    with self._changed:
                        self._copy_ahead()
                    job.wait()
                    begin = time.perf_counter()
                    with torch.no_grad():
                        job.step()
                    self.busy_seconds += time.perf_counter() - begin
            except BaseException as raised:
                error = raised
            with self._changed:
                self._queue.popleft()
                self._copying_bytes -= job.nbytes if job.arrived is not None else 0
                self._failed = self._failed or error
                job.done = True
                if self._failed is None:
                    self._failed = self._guarded_copies()
                self._changed.notify_all()
            del job  # nothing is kept alive while there is nothing to do

    def _guarded_copies(self) -> BaseException | None:
        try:
            self._copy_ahead()
        except BaseException as error:
            return error
        return None
