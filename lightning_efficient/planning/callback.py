"""The callback of the short runs: warm up, time some batches, then look at what they save."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_efficient import telemetry
from lightning_efficient.core.freed_memory import return_freed_memory
from lightning_efficient.core.memory_meter import MemoryMeter
from lightning_efficient.monitoring.memory import nested_tensors
from lightning_efficient.planning.batches import batch_size
from lightning_efficient.planning.facts import Sample
from lightning_efficient.planning.saved_bytes import LayerAccount
from lightning_efficient.planning.yardstick import Yardstick

__all__ = ["StepWatch"]

_MOST = 300  # batches that are timed
_AFTER_SAVE = 4  # batches that a save may slow down


class StepWatch(pl.Callback):
    """Measures a run and ends it.

    It stands first among the callbacks: a batch reaches from its start to that of the next, whatever is done between.

    Args:
        meter: Of memory, started before the model was made.
        warm_up: Batches that are not timed.
        batches: That are timed, at least.
        seconds: How long to time, if that is more.
        detail: Whether, after that, one of each is looked at layer by layer.
        saves: Where to save checkpoints; None: none.
    """

    reads_gradients = False  # it counts their bytes, and takes what is there

    def __init__(
        self,
        *,
        meter: MemoryMeter,
        warm_up: int,
        batches: int,
        seconds: float,
        detail: bool = False,
        saves: Path | None = None,
    ) -> None:
        self._meter, self._warm_up, self._timed = meter, warm_up, batches
        self._seconds, self._sizes, self._detail, self._saves = seconds, 1, detail, saves
        self._number = 0  # batches that have ended
        self._marks: dict[str, tuple[float, float]] = {}
        self._size, self._last = 0, 0.0
        self._yardstick = Yardstick()
        self._looking: LayerAccount | None = None
        self._counting = contextlib.ExitStack()
        self._update_meter: MemoryMeter | None = None
        self._saved_behind: list[int] = []
        self.samples: list[Sample] = []
        self.saved: dict[int, int] = {}
        self.account: LayerAccount | None = None
        self.peak = self.update_peak = self.gradients = self.save_peak = 0
        self.saved_to: Path | None = None
        self.save_seconds = 0.0
        self.values: dict[str, float] = {}

    def set_sizes(self, sizes: int) -> None:
        """So many different batches come by turns: each is seen before it is timed."""
        self._sizes = max(sizes, 1)
        self._warm_up = max(self._warm_up, self._sizes)

    def set_meter(self, meter: MemoryMeter) -> None:
        """Of the device on which the run turns out to be."""
        self._meter = meter

    @property
    def save_bytes(self) -> int:
        """Of the last checkpoint; after the fit, for it may be written behind it."""
        return self.saved_to.stat().st_size if self.saved_to is not None and self.saved_to.is_file() else 0

    @property
    def yardstick(self) -> tuple[float, float]:
        """Seconds of a fixed piece of work before and after the batches, by the clock and of the processors."""
        return self._yardstick.seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for scheduler in trainer.lr_scheduler_configs:
            scheduler.strict = False  # there is no validation, whose metrics it may follow

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self._finish(trainer)
        self._size = batch_size(batch)
        if self._number == self._warm_up:
            self._plan_length(trainer)
        end = self._warm_up + self._timed
        if self._number == end:
            self.peak = self._meter.peak_bytes()
        if self._number in (self._warm_up, end) and trainer.strategy.root_device.type == "cpu":
            self._yardstick.measure()
        if self._detail and end <= self._number < end + self._sizes:
            self._looking = LayerAccount(pl_module)
            self._counting.enter_context(self._looking.counting(nested_tensors(batch)))
        self._mark(trainer, "begin")

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        held = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, held)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._counting.close()
        if "backward" not in self._marks:
            self._mark(trainer, "backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark(trainer, "update")
        if self._looking is not None:
            return_freed_memory()  # what the C library keeps of forward is no memory that the update needs
            self._update_meter = MemoryMeter(trainer.strategy.root_device)
            self._update_meter.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counting.close()
        if self._looking is not None:
            if self.account is None or self._size >= max(self.saved):
                self.account = self._looking
            self.saved[self._size] = self._looking.saved_bytes
            self._looking = None
        if self._update_meter is not None:
            self.update_peak = max(self.update_peak, self._update_meter.peak_bytes())
            self._update_meter = None
        self._mark(trainer, "end")
        self._number += 1
        done = self._number - self._warm_up
        if self._saves is not None and not self._detail and done in (self._timed // 3, 2 * self._timed // 3):
            self._saved_behind.append(len(self.samples))
            self._save(trainer, self._saves)
        # One more than is asked for: its start is the end of the last one that counts.
        if self._number > self._warm_up + self._timed + (self._sizes if self._detail else 0):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counting.close()
        self.peak = self.peak or self._meter.peak_bytes()
        self.values = telemetry.measurements(trainer)
        if self._saves is not None and self._detail:
            began = time.perf_counter()
            self._save(trainer, self._saves)
            self.save_seconds = time.perf_counter() - began
        elif self._saved_behind:
            self.save_seconds = self._cost_of_saves()

    def _plan_length(self, trainer: pl.Trainer) -> None:
        """As many as the time allows and the run has, and all sizes equally often."""
        if self._last > 0:
            self._timed = max(self._timed, min(_MOST, round(self._seconds / self._last)))
        left = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches - self._warm_up - self._sizes - 1
        self._timed = int(max(1, min(self._timed, left)))
        if self._timed >= self._sizes:
            self._timed -= self._timed % self._sizes

    def _cost_of_saves(self) -> float:
        """Of one: what it and the batches behind it took beyond what such batches take."""
        if not self.samples:
            return 0.0
        usual = {
            size: statistics.median(sample.wall for sample in self.samples if sample.size == size)
            for size in {sample.size for sample in self.samples}
        }
        beyond = 0.0
        for place in self._saved_behind:
            beyond += sum(sample.wall - usual[sample.size] for sample in self.samples[place : place + _AFTER_SAVE])
        return max(0.0, beyond / len(self._saved_behind))

    def _mark(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._marks[name] = time.perf_counter(), time.process_time()

    def _finish(self, trainer: pl.Trainer) -> None:
        """The batch before has ended, with whatever others did behind its end."""
        if "end" in self._marks:
            self._mark(trainer, "next")
            begin, end = self._marks["begin"], self._marks["next"]
            backward = self._marks.get("backward", end)
            update = self._marks.get("update", backward)
            self._last = end[0] - begin[0]
            if self._warm_up < self._number <= self._warm_up + self._timed:
                parts = (backward[0] - begin[0], update[0] - backward[0], end[0] - update[0])
                self.samples.append(Sample(self._size, self._last, end[1] - begin[1], *parts))
        self._marks = {}

    def _save(self, trainer: pl.Trainer, folder: Path) -> None:
        path = folder / f"probe{self._number}.ckpt"
        meter = MemoryMeter(trainer.strategy.root_device)
        meter.start()
        trainer.save_checkpoint(path)
        self.save_peak = meter.peak_bytes()
        self.saved_to = path
