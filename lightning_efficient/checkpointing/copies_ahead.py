"""Copies that begin before the step is over: of layers whose update is complete while others still update.

With the optimizer's steps in backward, the last layer is updated first, and its copy runs beside the backward of the
layers before it. Whether the state that the save then asks for is the one that was copied is checked before it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from lightning_efficient.checkpointing.copy_plan import CopyPlan, Planner, storage_checksum
from lightning_efficient.checkpointing.skeleton import Skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.torch_internals import storage_key

__all__ = ["CopiesAhead"]

_PLACE = "between an update in backward and the save"


class CopiesAhead:
    """The copies for a save that is expected after the step in progress.

    Attributes:
        taken_bytes: That the last save found copied.

    Args:
        planner: Knows the tensors of the last save.
        start: Called with work for the thread that copies.
        discard: Called with a snapshot that no save has come for.
    """

    def __init__(
        self, planner: Planner, start: Callable[[Callable[[], None]], None], discard: Callable[[Snapshot], None]
    ) -> None:
        self.taken_bytes = 0
        self._planner = planner
        self._start = start
        self._discard = discard
        self._snapshot: Snapshot | None = None
        self._plan: CopyPlan | None = None

    def begin(self, snapshot: Snapshot, plan: CopyPlan) -> None:
        """Expect a save of the step of ``snapshot``, of which nothing is offered yet."""
        self._snapshot, self._plan = snapshot, plan

    def updated(self, tensors: Iterable[Tensor]) -> None:
        """These are what they will be at the save, after the step in progress."""
        snapshot, plan = self._snapshot, self._plan
        if snapshot is None or plan is None:
            return
        sources, watched = {}, {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage_key(storage)
            number = plan.numbers.get(key)
            if number is not None and key not in plan.shared and key not in self._planner.volatile:
                sources[number], watched[number] = storage, tensor
        snapshot.offer(sources, watched)
        if self._planner.calibrated((plan.keys[number] for number in sources), _PLACE):
            self._start(snapshot.copy)
        else:  # to be compared with what other code makes of it: not copied only after that
            snapshot.wait(sources)

    def take(self, skeleton: Skeleton, plan: CopyPlan, step: int) -> Snapshot | None:
        """The snapshot begun for this save, if what is in it is what is to be saved.

        The first time it is not taken but compared: what other code changes after the update is not copied ahead again.
        """
        snapshot, self._snapshot = self._snapshot, None
        self.taken_bytes = 0
        if snapshot is None:
            return None
        if snapshot.step != step or plan is not self._plan or snapshot.torn or not snapshot.unchanged():
            self._discard(snapshot)
            return None
        if not self._planner.calibrated((plan.keys[number] for number in snapshot.offered), _PLACE):
            self._compare(snapshot, skeleton, plan)
            self._discard(snapshot)
            return None
        self.taken_bytes = sum(plan.layout.records[number].nbytes for number in snapshot.offered)
        return snapshot

    def drop(self) -> None:
        """No save will come for what has begun."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            self._discard(snapshot)

    def _compare(self, snapshot: Snapshot, skeleton: Skeleton, plan: CopyPlan) -> None:
        numbers = snapshot.offered
        for number in numbers:
            if snapshot.checksum(number) != storage_checksum(skeleton.storages[number]):
                self._planner.volatile.add(plan.keys[number])
        self._planner.note_calibrated((plan.keys[number] for number in numbers), _PLACE)
