"""Grow-and-unshare as a Lightning callback: when to switch, and what the Trainer must know about it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_efficient import compat, telemetry
from lightning_efficient.coordination import Offloader, ParameterChange, announce, announce_before, find
from lightning_efficient.growth.attachment import ModuleAttachment
from lightning_efficient.growth.checks import check_layers_still_equal
from lightning_efficient.growth.form import (
    FORM_KEY,
    FORMAT,
    check_format,
    check_same_run,
    reorder_optimizer_states,
    write_form,
)
from lightning_efficient.growth.learning_rate import LearningRateScale
from lightning_efficient.growth.loading import build_growing
from lightning_efficient.growth.moments import StateMode
from lightning_efficient.growth.progress import Progress, Switch
from lightning_efficient.growth.settings import Mode, Settings, check_count, parse_width
from lightning_efficient.growth.sharing import MeanGradient, SharingPattern
from lightning_efficient.growth.trainer import (
    check_optimizers_kept,
    refuse_combinations,
    refuse_optimizers,
    reported_loss,
)
from lightning_efficient.growth.triggers import Triggers
from lightning_efficient.growth.verify import WidthCheck
from lightning_efficient.run_length import length_is_a_default, total_steps

__all__ = ["GrowAndUnshareCallback"]


class GrowAndUnshareCallback(Callback):
    """Train a smaller form of the model first, then copy its weights into the full model and go on, in one run.

    The first form has fewer layers (``mode="stack"``, ``"interleave"``, ``"middle"``), layers that share weights
    (``mode="share"``), or a fraction of the width (``width=``). Optimizer object, learning-rate schedule, scaler,
    averaged models and checkpoints go on through each switch.

    Args:
        layers: Glob pattern(s) of the repeated layers, e.g. ``"blocks.*"``; None finds the longest run of structurally
            equal siblings.
        mode: How the full model arises. None: ``"stack"``, or only width growth where ``width`` is given.
        stages: ``[{depth: 2, until: 0.25}, {depth: 4, until: 0.5}, {depth: 8}]``, with ``unit`` for ``depth`` where
            ``mode="share"``, and an optional ``lr_scale``. Stages without ``until`` share the first half of the run
            evenly (a tenth where ``mode="share"``). None: a quarter of the layers to 25 % of the run, half of them to
            50 %.
        unit: For ``mode="share"``: how many layers the shared unit has.
        sharing: ``"cycle"`` repeats a unit of ``unit`` layers, ``"sequence"`` shares each ``unit`` consecutive layers,
            ``"all"`` has one set of weights.
        until: For ``mode="share"``: when to unshare. A step (int), a fraction of the run (float) or a mapping of
            ``step``, ``fraction``, ``loss_below``, ``plateau`` (steps), ``correlation_below``; the first to hold wins,
            and there is always a cap (10 % of the run if none is given).
        unshare: ``"together"``, or ``"by_correlation"``: split each group where its gradients stop to correlate.
        width: ``{factor: 2, until: 0.2}``: begin with a half (third, ...) of the width. The narrow model is built by
            the module's own constructor from its saved hyperparameters; see the card for ``arguments``, ``build``,
            ``readout`` and ``sections``.
        optimizer_state: ``"copy"`` carries moments over, ``"reset"`` starts those of the repeated layers afresh.
        gradient: What a shared parameter receives: the ``"mean"`` of its layers' gradients [Yang 2021] or the
            ``"sum"``.
        monitor: A metric logged by the module for ``loss_below`` and ``plateau``; None: the training loss, smoothed.
        check_every_n_steps: How often loss conditions are read (on a GPU each reading waits for the device).
        correlation_every_n_steps: How often gradient correlations are read.
        lr_scale: Factor on the learning rates before the last phase.
        rewarm_steps: Steps over which the learning rate climbs back linearly after each switch.
        offload_on_switch: Turn the strategy's offload on when the full model begins.

    Raises:
        ValueError: If an argument is out of range, or does not fit the model (in ``setup``).
        MisconfigurationException: In ``setup``, for a strategy or another callback that cannot follow.
    """

    def __init__(
        self,
        *,
        layers: str | list[str] | None = None,
        mode: Mode | None = None,
        stages: list[dict[str, Any]] | None = None,
        unit: int | None = None,
        sharing: SharingPattern = "cycle",
        until: int | float | dict[str, Any] | None = None,
        unshare: Literal["together", "by_correlation"] = "together",
        width: dict[str, Any] | None = None,
        optimizer_state: StateMode = "copy",
        gradient: Literal["mean", "sum"] = "mean",
        monitor: str | None = None,
        check_every_n_steps: int = 10,
        correlation_every_n_steps: int = 50,
        lr_scale: float = 1.0,
        rewarm_steps: int = 0,
        offload_on_switch: bool = False,
    ) -> None:
        if mode is None and width is None:
            mode = "stack"
        for name, count in (
            ("check_every_n_steps", check_every_n_steps),
            ("correlation_every_n_steps", correlation_every_n_steps),
        ):
            check_count(name, count, least=1)
        self.settings = Settings(
            layers=layers,
            mode=mode,
            stages=stages,
            unit=unit,
            sharing=sharing,
            until=until,
            unshare=unshare,
            width=parse_width(width),
            optimizer_state=optimizer_state,
            gradient=gradient,
            lr_scale=lr_scale,
            rewarm_steps=rewarm_steps,
        )
        self.offload_on_switch = offload_on_switch
        self._triggers = Triggers(
            monitor, check_every_n_steps, correlation_every_n_steps, by_groups=unshare == "by_correlation"
        )
        self._attachment = ModuleAttachment()
        self._mean = MeanGradient()
        self._learning_rate = LearningRateScale()
        self._progress: Progress | None = None
        self._width_check: WidthCheck | None = None
        self._loaded: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self._progress = None
        self._step = 0
        self._stepped = 0  # batches that ended in an optimizer step
        self._global_step = 0
        self._at_boundary = True
        self._switch_seconds = 0.0
        self._events: list[telemetry.Event] = []
        self._triggers.reset()

    # -- the model takes its first form ---------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._progress is not None and self._progress.growing.module is not pl_module:
            self._reset()
        if stage == "fit":
            refuse_combinations(trainer, self.settings, offload_on_switch=self.offload_on_switch)
            if self._progress is None:
                if type(pl_module).configure_model is not pl.LightningModule.configure_model:
                    with trainer.strategy.tensor_init_context():
                        pl_module.configure_model()
                progress = self._prepare(pl_module)
                progress.growing.restore(progress.phases[0].leaders, progress.growing.width)
        self._attachment.wrap(
            pl_module,
            on_load=lambda checkpoint: self._take_form_of(trainer, pl_module, checkpoint),
            on_save=self._write_form,
            growing=lambda: self._progress.growing if self._progress else None,
        )

    def _prepare(self, pl_module: pl.LightningModule) -> Progress:
        growing = build_growing(pl_module, self.settings.layers, self.settings.mode, self.settings.width)
        self._progress = Progress(growing, self.settings, self._triggers)
        if self.settings.width:
            self._width_check = WidthCheck(growing)
        return self._progress

    def _take_form_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before weights are loaded: give the module the form that it had when they were saved."""
        state = checkpoint.get(FORM_KEY)
        fitting = trainer.state.fn == "fit"
        if not state:
            if fitting:
                raise MisconfigurationException(
                    "This checkpoint was not written with GrowAndUnshareCallback, so it is not known which phase its "
                    "weights belong to. Resume from a checkpoint of a run with this callback, or leave the callback "
                    "out to go on with the full model."
                )
            if self._progress is not None:
                self._progress.growing.restore((), "wide")
            return
        progress = self._progress or self._prepare(pl_module)
        check_same_run(state, progress, fitting=fitting)
        growing = progress.growing
        growing.mirror(compat.averaged_models(trainer))
        growing.restore(state["leaders"], state["width"])
        self._loaded = checkpoint if fitting else None

    def _write_form(self, checkpoint: dict[str, Any]) -> None:
        if self._progress is not None:
            checkpoint[FORM_KEY] = write_form(self._progress)

    # -- fit ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = self._grown()
        refuse_optimizers(trainer, progress)
        if progress.growing.arrangement:
            check_layers_still_equal(progress.growing.arrangement)
        progress.growing.before_change = partial(announce_before, trainer)
        progress.growing.plan_optimizers(trainer.optimizers, self._attachment.names)
        progress.growing.mirror(compat.averaged_models(trainer))
        if self._loaded is not None:
            reorder_optimizer_states(
                self._loaded, self._loaded["callbacks"][self.state_key]["optimizer_names"], progress.growing
            )
            self._loaded = None
        self._attach_mean_gradient()
        if progress.scales_learning_rate:
            self._learning_rate.attach(trainer.optimizers, lambda: progress.learning_rate_factor(self._step))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = self._grown()
        self._at_boundary = True
        self._stepped = self._stepped if trainer.global_step else 0
        self._step = self._steps(trainer)
        progress.begin(self._step)
        self._offload_if_complete(trainer)
        total = None if progress.complete else total_steps(trainer)
        self._triggers.start(
            progress.phases,
            self.settings.width,
            total,
            self._step,
            trial=bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
        )
        telemetry.log(trainer, self.measurements(), force=True)
        if total is not None and length_is_a_default(trainer) and progress.uses_fractions:
            rank_zero_warn(
                "GrowAndUnshareCallback counts in fractions of the run, and the Trainer was given no length: "
                f"Lightning plans 1000 epochs, {total:g} steps. Set max_steps or max_epochs, or give `until` in steps."
            )
        telemetry.introduce(trainer, self)

    def start_line(self, trainer: pl.Trainer) -> str:
        """With which form training begins, and when that changes."""
        progress = self._grown()
        if progress.complete:
            return "GrowAndUnshareCallback: the model has grown, nothing is to come"
        growing, begins = progress.growing, "goes on" if self._step else "begins"
        only_shares = self.settings.mode == "share" and growing.width == "wide"
        gain = "less of gradients and optimizer state" if only_shares else "cheaper steps"
        form = f"{progress.form()} ({growing.parameters_text()}) for {gain}"
        plan = self._triggers.plan_text(self._step)
        return f"GrowAndUnshareCallback {begins} with {form}{f'; {plan}' if plan else ''}"

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        progress = self._grown()
        self._global_step = trainer.global_step
        self._step = self._steps(trainer)
        if self._at_boundary:
            check_optimizers_kept(trainer, progress.growing.optimizers())
            began, before = time.perf_counter(), len(self._events)
            for switch in progress.advance(self._step):
                self._after_switch(trainer, switch)
            if len(self._events) > before:
                self._switch_seconds += time.perf_counter() - began
        arrangement = progress.growing.arrangement
        if arrangement and self._triggers.correlation_due(progress.phase, self._step):
            self._triggers.watch(arrangement)
        if self._width_check and progress.growing.width == "narrow":
            self._width_check.listen()

    @property
    def reads_gradients(self) -> bool:
        """Whether a condition compares gradients, or a check needs all weights to be of one step when they are there.

        Asked by strategies that would update parameters in backward, or put gradients elsewhere.
        """
        phases = self._grown().phases
        compares = any(phase.until is not None and phase.until.correlation_below is not None for phase in phases)
        return compares or self.settings.width is not None

    @property
    def scales_learning_rate(self) -> bool:
        """Whether learning rates are multiplied right before the optimizer's step.

        Asked by strategies that would update parameters before that, in backward.
        """
        return self._grown().scales_learning_rate

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._triggers.unwatch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._width_check and self._grown().growing.width == "narrow":
            self._width_check.verify()
        self._width_check = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._triggers.unwatch()
        self._at_boundary = trainer.global_step > self._global_step
        self._stepped += self._at_boundary
        self._step = self._steps(trainer)
        phase = self._grown().phase
        mean = partial(trainer.strategy.reduce, reduce_op="mean")
        if self._triggers.needs_loss(phase):
            loss = reported_loss(trainer, pl_module, outputs, self._triggers.monitor)
            self._triggers.read_loss(loss if isinstance(loss, Tensor) else None, self._step, mean)
        self._triggers.judge_correlation(phase, mean)
        if telemetry.due(trainer):  # counting bytes walks over all parameters
            telemetry.log(trainer, self.measurements())

    def _after_switch(self, trainer: pl.Trainer, switch: Switch) -> None:
        if isinstance(trainer.strategy, DDPStrategy):
            compat.rewrap_ddp(trainer.strategy)
        self._attach_mean_gradient()
        self._events.append(telemetry.Event(compat.log_step(trainer), "growth", switch.text))
        telemetry.say(trainer, f"GrowAndUnshareCallback at step {self._step}: {switch.text}")
        change = switch.change
        announce(trainer, ParameterChange(change.added, change.removed, change.replaced, reason=switch.text))
        self._offload_if_complete(trainer)
        telemetry.log(trainer, self.measurements(), force=True)

    def _offload_if_complete(self, trainer: pl.Trainer) -> None:
        """The full model has begun, now or before the run was resumed."""
        if self._grown().complete and self.offload_on_switch and (offloader := find(trainer, Offloader)):
            offloader.enable_offload(trainer)

    # -- the end ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._grown().complete and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"Training ended with {self._grown().form()}, before the full model began: it stopped earlier than "
                "`until` allows for. Load its checkpoints with `lightning_efficient.load_grown`."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)  # Lightning tears callbacks down only where a fit ends well
        growing = self._progress.growing if self._progress else None
        if growing and len(growing.leaders) < growing.full_depth and isinstance(exception, IndexError | KeyError):
            exception.add_note(
                f"The model ran with {len(growing.leaders)} of its {growing.full_depth} repeated layers when this "
                "happened. Its forward must iterate over the layers that are there (`for layer in self.layers`), not "
                "over a number of layers; or use mode='share', which keeps all layers."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def _let_go(self, pl_module: pl.LightningModule) -> None:
        self._triggers.unwatch()
        self._mean.remove()
        self._learning_rate.remove()
        self._attachment.unwrap(pl_module)
        if self._width_check:
            self._width_check.close()
        self._loaded = None

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._progress is None:
            return {}
        return {
            "format": FORMAT,
            "stepped": self._stepped,
            "optimizer_names": self._progress.growing.optimizer_names(),
            "events": [[event.step, event.text] for event in self._events],
            **self._progress.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        check_format(state_dict)
        self._grown().load_state_dict(state_dict)
        self._stepped = state_dict["stepped"]
        self._events = [telemetry.Event(step, "growth", text) for step, text in state_dict["events"]]

    # -- telemetry ----------------------------------------------------------------------------------------------

    def measurements(self) -> Mapping[str, float]:
        """Phase, depth and what the parameters that are live now cost, plus the triggers' values."""
        return self._progress.measurements(self._step) if self._progress else {}

    def balance(self) -> telemetry.Balance:
        """What switches took; what smaller forms saved shows in the times of their batches."""
        progress = self._progress
        return telemetry.Balance(
            technique="growth",
            cost_ms=1e3 * self._switch_seconds,
            time="Took: the switches.",
            memory="Memory saved: nothing at the peak, which the last phase sets; before it, there were fewer "
            "parameters and gradients, and less optimizer state.",
            verdict=f"It came to {progress.form()}."
            if progress and progress.complete
            else "The full model has not begun.",
        )

    def events(self) -> Sequence[telemetry.Event]:
        """Every switch, with its reason."""
        return tuple(self._events)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _grown(self) -> Progress:
        if self._progress is None:
            raise MisconfigurationException("GrowAndUnshareCallback was used before its `setup` ran.")
        return self._progress

    def _attach_mean_gradient(self) -> None:
        arrangement = self._grown().growing.arrangement
        if self.settings.gradient == "mean" and arrangement:
            self._mean.attach(arrangement)

    def _steps(self, trainer: pl.Trainer) -> int:
        """Optimizer steps of the run; with several optimizers, batches in which any of them stepped."""
        return trainer.global_step if len(trainer.optimizers) <= 1 else self._stepped
