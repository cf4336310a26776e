"""Back to the last good snapshot, and through the batches since then in high bits.

A part of ``precision.py``. Schedulers stand where they stand: each batch is replayed with the learning rate, the random
numbers and the counters that it had. What those batches have logged, and what metrics made of them, stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_efficient import compat_replay
from lightning_efficient.coordination import KeptState, SnapshotSource, StateHolder, find
from lightning_efficient.core.random_state import restore_random_state
from lightning_efficient.precision.replay import KeptStep, set_group_options
from lightning_efficient.precision.ring import KeptBatch, Ring
from lightning_efficient.precision.spikes import SpikeGuard
from lightning_efficient.precision.trainer import others_keep_states

__all__ = ["Kept", "Rollback"]

_NEVER = 1 << 60  # a step


@dataclass
class Kept:
    """All that a batch may change, as it was before.

    Attributes:
        batch: Which.
        step: What the pass changes.
        logs: Undoes what it logs.
        bits: Goes back to what was known of the network.
    """

    batch: KeptBatch
    step: KeptStep
    logs: Callable[[], None]
    bits: Callable[[], None]

    def back(self) -> None:
        """As before the batch."""
        self.step.back()
        self.logs()
        self.bits()
        self.batch.count()


class Rollback:
    """Of one fit.

    Args:
        trainer: That trains.
        settings: How far back one can go.
        agree: The largest of the integers that the ranks give.
    """

    def __init__(self, trainer: pl.Trainer, settings: SpikeGuard, agree: Callable[[int], int]) -> None:
        self._trainer, self._agree = trainer, agree
        # Optimizer state that is elsewhere is not among what a ring copies; a checkpoint IO's snapshots have all.
        self.ring = Ring(settings, takes=find(trainer, StateHolder) is None)
        self._source = find(trainer, SnapshotSource) if others_keep_states(trainer) else None

    def add(self, batch: KeptBatch) -> None:
        """A batch begins."""
        elsewhere = self._elsewhere()
        self.ring.add(batch, self._modules(), self._trainer.optimizers, elsewhere.step if elsewhere else None)

    def go_back(self, kept: Kept, run: compat_replay.RunBatch) -> int | None:
        """Restore a snapshot and do the batches since again, up to the one in progress.

        Args:
            kept: Of that one, and gone back to; afterwards it is what the replay has led to.
            run: Does a batch, with the optimizer's step.

        Returns:
            The step of the snapshot; None if there is none that would make a difference.
        """
        found = self._choose()
        if found is None:
            return None
        step, restore, batches = found
        source = find(self._trainer, SnapshotSource)
        if source is not None:
            source.discard_after(step)  # what it still copies is copied when this returns
        self.ring.discard_after(step)
        restore()
        for average, _ in compat_replay.with_averages(self._trainer):
            average.load_state_dict(average.state_dict() | {"latest_update_step": step})
        for batch in batches:
            self._replay(batch, run)
        now = kept.batch
        now.count()
        set_group_options(self._trainer.optimizers, now.options)
        kept.logs()
        kept.bits()
        kept.step.keep_replayed(now.random, adds=not now.begins)
        return step

    def _replay(self, batch: KeptBatch, run: compat_replay.RunBatch) -> None:
        trainer = self._trainer
        batch.replayed = True
        batch.count()
        set_group_options(trainer.optimizers, batch.options)
        if not batch.skipped:
            restore_random_state(batch.random)
            run(trainer.optimizers[0], batch.batch_idx, batch.arguments)
        elif batch.stepped:
            compat_replay.step_with_what_is_there(trainer, batch.batch_idx)
        for average, _ in compat_replay.with_averages(trainer):
            data = next(iter(batch.arguments.values()))
            average.on_train_batch_end(trainer, trainer.lightning_module, {}, data, batch.batch_idx)

    def _choose(self) -> tuple[int, Callable[[], None], list[KeptBatch]] | None:
        """The oldest snapshot from which there is something to replay that was not replayed before."""
        backs: dict[int, Callable[[], None]] = {one.step: one.back for one in self.ring.snapshots}
        elsewhere = self._elsewhere()
        steps = {*backs, elsewhere.step} if elsewhere is not None else {*backs}
        since = {step: self.ring.since(step) for step in steps}
        able = [step for step, batches in since.items() if any(not batch.replayed for batch in batches)]
        step = self._agree(min(able, default=_NEVER))
        if self._agree(int(step not in able)):
            return None
        if elsewhere is None or step != elsewhere.step:
            return step, backs[step], since[step]
        try:
            checkpoint = elsewhere.load()
        except LookupError:  # a newer one has just taken its place; only a run of one rank has any
            return self._choose()
        return step, partial(self._put_back, checkpoint), since[step]

    def _elsewhere(self) -> KeptState | None:
        return self._source.last_good() if self._source is not None else None

    def _put_back(self, checkpoint: dict[str, Any]) -> None:
        trainer = self._trainer
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=trainer.lightning_module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        trainer.lightning_module.zero_grad()
        for _, model in compat_replay.with_averages(trainer):
            averaged = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
            model.load_state_dict(averaged | checkpoint.get("averaging_state", {}))

    def _modules(self) -> list[nn.Module]:
        return [self._trainer.lightning_module, *(model for _, model in compat_replay.with_averages(self._trainer))]
