"""The last batches, and the last snapshots of the training that they came after: so far back one can go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import tensor_version
from lightning_efficient.precision.replay import Snapshot
from lightning_efficient.precision.spikes import SpikeGuard

__all__ = ["KeptBatch", "Ring"]


@dataclass
class KeptBatch:
    """A batch, and all that it needs to be computed again as it was.

    Attributes:
        arguments: Of ``training_step``: references, no copies.
        batch_idx: In its epoch.
        step: Optimizer steps before it.
        begins: Whether gradients are cleared for it; else it adds to those of the one before.
        random: Of all generators.
        options: Of the optimizers' groups.
        count: Lets the loops have counted as they had when it came.
        tensors: Of it, and how often they had been changed in place.
        skipped: Whether it took no part in training.
        stepped: Whether the optimizer stepped nevertheless, with what batches before it had left.
        replayed: Whether its part was computed in high bits, from a snapshot.
    """

    arguments: Mapping[str, Any]
    batch_idx: int
    step: int
    begins: bool
    random: dict[str, Any]
    options: list[list[dict[str, Any]]]
    count: Callable[[], None]
    tensors: list[tuple[Tensor, int]]
    skipped: bool = False
    stepped: bool = False
    replayed: bool = False

    def changed(self) -> bool:
        """Whether it is not what it was: ``training_step`` has changed it, or a loader that uses memory again."""
        return any(tensor_version(tensor) != version for tensor, version in self.tensors)


class Ring:
    """Of one fit.

    Attributes:
        snapshots: Oldest first.
        needed_bytes: Of one, when the last was due.

    Args:
        settings: How many, and how often.
        takes: Whether it takes any; else it keeps the batches for those that somebody else has.
    """

    def __init__(self, settings: SpikeGuard, *, takes: bool = True) -> None:
        self.snapshots: deque[Snapshot] = deque()
        self._settings, self._takes = settings, takes
        self._batches: deque[KeptBatch] = deque()
        self.needed_bytes = 0

    @property
    def nbytes(self) -> int:
        """Of all snapshots."""
        return self.needed_bytes * len(self.snapshots)

    @property
    def most(self) -> int:
        """Snapshots that there is memory for."""
        most = self._settings.snapshots
        while most and most * self.needed_bytes > self._settings.cap_bytes:
            most -= 1
        return most

    def forget(self) -> None:
        """Nothing of this can be gone back to any more."""
        self.snapshots.clear()
        self._batches.clear()

    def add(
        self, batch: KeptBatch, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], elsewhere: int | None
    ) -> None:
        """A batch begins; a snapshot is taken before it, if one is due.

        Args:
            batch: Which.
            modules: What a snapshot is of.
            optimizers: Likewise.
            elsewhere: Step of the newest snapshot that somebody else keeps; None: there is none.
        """
        if self._batches and list(map(len, batch.options)) != list(map(len, self._batches[-1].options)):
            self.forget()
        if self.snapshots and not self.snapshots[-1].fits(optimizers):
            self.forget()
        if self._takes and self._settings.snapshots and batch.begins and self._is_due(batch.step, elsewhere):
            self._take(batch.step, modules, optimizers)
        self._batches.append(batch)
        self._trim(elsewhere)

    def since(self, step: int) -> list[KeptBatch]:
        """The batches from this optimizer step on, the current one left out; empty if not all of them are there."""
        first = [n for n, batch in enumerate(self._batches) if batch.step == step and batch.begins]
        batches = list(self._batches)[first[0] : -1] if first else []
        return [] if any(batch.changed() for batch in batches if not batch.skipped) else batches

    def discard_after(self, step: int) -> None:
        """Forget the snapshots of later steps: the training went back."""
        while self.snapshots and self.snapshots[-1].step > step:
            self.snapshots.pop()

    def _is_due(self, step: int, elsewhere: int | None) -> bool:
        known = [snapshot.step for snapshot in self.snapshots]
        if elsewhere is not None and any(batch.step == elsewhere for batch in self._batches):
            known.append(elsewhere)
        return not known or step - max(known) >= self._settings.snapshot_every

    def _take(self, step: int, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self.needed_bytes = Snapshot.nbytes(modules, optimizers)
        most = self.most
        within = None
        while len(self.snapshots) > max(most - 1, 0):
            within = self.snapshots.popleft()
        if most:
            self.snapshots.append(Snapshot(step, modules, optimizers, within))

    def _trim(self, elsewhere: int | None) -> None:
        """Batches before which there is no snapshot; and those for which one has to go back too far."""
        steps = (self._settings.snapshots + 1) * self._settings.snapshot_every
        oldest = self._batches[-1].step - steps
        while self.snapshots and self.snapshots[0].step < oldest:
            self.snapshots.popleft()
        kept = [snapshot.step for snapshot in self.snapshots] + ([elsewhere] if elsewhere is not None else [])
        first = max(min(kept, default=self._batches[-1].step), oldest)
        while len(self._batches) > 1 and self._batches[0].step < first:
            self._batches.popleft()
