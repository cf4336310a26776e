"""When to measure, what to log and when to report: :class:`EfficiencyMonitor`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_efficient import compat, telemetry
from lightning_efficient.monitoring.balance import is_balance
from lightning_efficient.monitoring.batches import MeanLoss, batch_amount
from lightning_efficient.monitoring.facts import machine_facts, timing_notes
from lightning_efficient.monitoring.layout import tensorboard_layout
from lightning_efficient.monitoring.probe import Probe
from lightning_efficient.monitoring.record import PER_STEP, RunRecord
from lightning_efficient.monitoring.report import EventRow, RunReport, own_folder, write_report
from lightning_efficient.monitoring.timing import StepTimer
from lightning_efficient.monitoring.units import technique_of

__all__ = ["EfficiencyMonitor"]

_log = logging.getLogger(__name__)
_LOGGED = (
    "step_ms",
    "step_cpu_ms",
    "data_wait_ms",
    "tokens_per_s",
    "samples_per_s",
    "peak_memory_bytes",
    "peak_host_memory_bytes",
    "parameters",
    "gradient_bytes",
    "optimizer_state_bytes",
)
_LATEST = ("parameters", "trainable_parameters", "parameter_bytes")


class EfficiencyMonitor(pl.Callback):
    """Measures time, memory and throughput of ``Trainer.fit``, and writes a report of the run at its end.

    It logs ``efficiency/*`` to the loggers of the Trainer, collects what the techniques of this suite measure, lays
    out TensorBoard's custom-scalars page, and writes ``efficiency_report.md`` with plots and
    ``efficiency_report.json``. Only rank 0 measures. It never waits for the device but to read the loss it logs.

    Args:
        every_n_steps: Interval of logging in optimizer steps; None takes the Trainer's ``log_every_n_steps``.
        report: Whether to write the report.
        report_dir: Folder of the report, in which an earlier one is overwritten. None takes the folder of this run at
            its first logger, or the Trainer's ``default_root_dir``, and a new ``version_N`` in it where another run's
            report lies there; it writes nothing under ``fast_dev_run``.
        tokens_per_batch: Tokens in one batch of one rank; None counts them in the batch.

    Raises:
        ValueError: If a number is not positive.
    """

    reads_gradients = False  # it counts their bytes, and takes what is there

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        report: bool = True,
        report_dir: str | Path | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("tokens_per_batch", tokens_per_batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; give a positive whole number, or None for the default.")
        self._every_n_steps = every_n_steps
        self._report = report
        self._report_dir = report_dir
        self._tokens_per_batch = tokens_per_batch
        self._stage = ""
        self._folder: str | None = None
        self._record = RunRecord()
        self._probe: Probe | None = None
        self._timer: StepTimer | None = None  # there is one from on_train_start to the report, on rank 0
        self._loss = MeanLoss()
        self._title = ""
        self._facts: dict[str, str] = {}
        self._interrupted = ""
        self._sampling = False  # whether the optimizer step in progress will be recorded
        self._step = self._recorded_step = -1  # of the last batch, and of the last one whose slow values were taken
        self._global_step = 0
        self._layout: dict[str, dict[str, list[object]]] = {}

    def run_report(self) -> RunReport:
        """What was measured so far, or in the last fit (on rank 0; empty elsewhere)."""
        notes = timing_notes(self._record.batch_unit) + (self._probe.notes if self._probe is not None else [])
        return self._record.report(self._title, self._facts, notes, self._interrupted)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit, and start to watch memory."""
        self._stage = stage
        if stage != "fit":
            return
        self._record, self._loss = RunRecord(), MeanLoss()
        self._timer, self._interrupted, self._layout = None, "", {}
        self._folder = self._report_folder(trainer)
        self._probe = Probe(trainer.strategy.root_device) if trainer.is_global_zero else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the stop-watch: every state is restored by now, whatever the strategy."""
        if trainer.is_global_zero:
            self._title = f"Efficiency report: {type(pl_module).__name__}"
            self._facts = machine_facts(trainer.strategy.root_device) | telemetry.run_facts(trainer, pl_module)
            self._global_step = trainer.global_step
            self._step = self._recorded_step = -1
            self._timer = StepTimer()
            earlier = [balance.measurements() for balance in telemetry.balances(trainer)]
            self._record.start(self._timer, {tag: value for values in earlier for tag, value in values.items()})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start of the timed span."""
        if self._timer is not None:
            self._sampling = self._recorded_step < 0 or self._due(trainer)
            self._timer.batch_start()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """All activations are alive: a moment to look at memory."""
        self._sample()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """All gradients are alive: another one."""
        self._sample(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End of the timed span; at the interval, take the slower measurements and log."""
        if self._timer is None:
            return
        time = self._timer.batch_end()
        amount, unit = batch_amount(batch) if self._tokens_per_batch is None else (self._tokens_per_batch, "tokens")
        if not self._record.batches:
            self._record.batch_unit = unit
        self._step = compat.log_step(trainer)
        self._record.batch(self._step, time, amount, trainer.global_step - self._global_step)
        self._global_step = trainer.global_step
        self._loss.add(outputs)
        # Manual optimization may go past Lightning's hooks: then the gradients are looked at here.
        self._sample(None if self._probe is not None and self._probe.has_gradients else pl_module)
        if self._sampling and not compat.accumulating(trainer):
            values = self._measure(trainer, pl_module)
            if self._due(trainer):
                telemetry.log(trainer, values, force=True)
                self._lay_out(trainer, values)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no training time."""
        if self._timer is not None:
            self._timer.validation_start()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation's metrics, beside the training time that it took to get there."""
        if self._timer is not None:
            self._timer.validation_end()
            for name, value in compat.validation_metrics(trainer).items():
                self._record.add_metric(name, compat.log_step(trainer), value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure for the last time, before the teardown moves the model."""
        if self._timer is not None:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report, once the techniques are done with what they do at the end."""
        if self._timer is None:
            return
        self._timer = None
        # What still grew belongs to the run (a last checkpoint); what shrank was let go of by the teardown.
        self._collect(trainer, only_larger=True)
        try:
            self._write(trainer)
        except OSError as error:
            rank_zero_warn(f"The efficiency report could not be written to {self._folder!r}: {error}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Report what there is; the exception that ended the run stays the one that the user sees."""
        if self._timer is None:
            return
        self._interrupted = type(exception).__name__
        try:
            self._finish(trainer, pl_module)
            self._write(trainer)
        except Exception:
            _log.warning("The efficiency report of the interrupted run could not be written.", exc_info=True)
        self._timer = None

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, for a resumed run to go on from."""
        return self._record.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; validating or testing one leaves the record of the last fit as it is."""
        if self._stage in ("", "fit"):
            self._record.load_state_dict(state_dict)

    def _due(self, trainer: pl.Trainer) -> bool:
        if self._every_n_steps is None:
            return compat.should_log(trainer)
        return (compat.log_step(trainer) + 1) % self._every_n_steps == 0

    def _sample(self, module: pl.LightningModule | None = None) -> None:
        if self._timer is not None and self._probe is not None and (self._sampling or self._probe.needs_samples):
            self._probe.sample()
            if module is not None and self._sampling:
                self._probe.sample_gradients(module)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Take and record every measurement of this step; returns those that are logged."""
        if self._probe is None:
            return {}
        record, self._recorded_step = self._record, max(self._step, 0)
        window = record.window()
        values = window | self._probe.measure(module, trainer.optimizers)
        for name, value in values.items():
            if name not in PER_STEP:  # the record has these of each step
                record.add(f"efficiency/{name}", self._recorded_step, value)
        if (loss := self._loss.take()) is not None:
            record.add_metric("train_loss", self._recorded_step, loss)
        record.raise_to(self._probe.largest)
        record.latest.update({name: values[name] for name in _LATEST})
        self._collect(trainer)
        balance = {tag: series.last for tag, series in record.series.items() if is_balance(tag)}
        own = {f"efficiency/{name}": values[name] for name in _LOGGED if name in values}
        return own | {tag: value for tag, value in balance.items() if value is not None}

    def _lay_out(self, trainer: pl.Trainer, logged: Mapping[str, float]) -> None:
        others = (tag for tag in self._record.series if technique_of(tag) != "efficiency")
        layout = tensorboard_layout([*logged, *others])
        if layout != self._layout:  # TensorBoard takes the last; some tags come late, as when low bits have been learnt
            self._layout = layout
            telemetry.lay_out(trainer, layout)

    def _collect(self, trainer: pl.Trainer, *, only_larger: bool = False) -> None:
        """Ask the techniques for their measurements and events."""
        for tag, value in telemetry.measurements(trainer).items():
            self._record.add(tag, max(self._recorded_step, 0), value, only_larger=only_larger)
        for balance in telemetry.balances(trainer):
            self._record.add_balance(balance, max(self._recorded_step, 0), only_larger=only_larger)
        rows = (EventRow(event.step, event.technique, event.text) for event in telemetry.events(trainer))
        self._record.events.update(dict.fromkeys(rows))

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._timer is not None:
            self._timer.stop()
            if self._interrupted or self._recorded_step < self._step:
                self._measure(trainer, module)

    def _write(self, trainer: pl.Trainer) -> None:
        if self._folder is not None:
            report, folder = self.run_report(), Path(self._folder)
            path = write_report(folder if self._report_dir is not None else own_folder(folder, report), report)
            telemetry.say(trainer, f"EfficiencyMonitor wrote {path}")

    def _report_folder(self, trainer: pl.Trainer) -> str | None:
        """Where the report goes, or None; all ranks must ask, since Lightning broadcasts its log folder."""
        if not self._report:
            return None
        folder = None if self._report_dir is None else str(self._report_dir)
        if folder is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = _folder_of_run(trainer)
        if folder is not None and "://" in folder:
            rank_zero_warn(
                f"The efficiency report cannot be written to {folder!r}, which is no local folder: give "
                "EfficiencyMonitor a local `report_dir`, or report=False."
            )
            return None
        return folder


def _folder_of_run(trainer: pl.Trainer) -> str:
    """Where the first logger has its files of this run; of most, Lightning knows the folder of all runs only."""
    folder = trainer.log_dir or trainer.default_root_dir
    logger = trainer.logger
    if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return folder
    # As ModelCheckpoint does. Only rank 0 of some loggers knows its version.
    version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
    parts = [str(part) for part in (logger.name, version) if isinstance(part, (str, int))]
    return trainer.strategy.broadcast(os.path.join(folder, *parts))
