"""Grow-and-unshare as a Lightning callback: when to switch, and what the Trainer must know about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_efficient import compat, telemetry
from lightning_efficient.coordination import Offloader, ParameterChange, announce, find
from lightning_efficient.core.named_state import reorder_state
from lightning_efficient.growth.attachment import ModuleAttachment
from lightning_efficient.growth.engine import Change, GrowingModule
from lightning_efficient.growth.learning_rate import LearningRateScale
from lightning_efficient.growth.loading import build_growing, describe
from lightning_efficient.growth.moments import StateMode, unsupported_optimizer
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.settings import Mode, Phase, check_stages, make_phases, parse_width
from lightning_efficient.growth.sharing import MeanGradient, SharingPattern, split_groups
from lightning_efficient.growth.triggers import Triggers
from lightning_efficient.growth.verify import WidthCheck

__all__ = ["GrowAndUnshareCallback"]

FORMAT = 1


class GrowAndUnshareCallback(Callback):
    """Train a smaller form of the model first, then copy its weights into the full model and go on, in one run.

    The first form has fewer layers (``mode="stack"``, ``"interleave"``, ``"middle"``), layers that share weights
    (``mode="share"``), or a fraction of the width (``width=``). Optimizer object, learning-rate schedule, scaler,
    averaged models and checkpoints go on through each switch.

    Args:
        layers: Glob pattern(s) of the repeated layers, e.g. ``"blocks.*"``; None finds the longest run of structurally
            equal siblings.
        mode: How the full model arises. None: ``"stack"``, or only width growth where ``width`` is given.
        stages: ``[{depth: 2, until: 0.125}, {depth: 4, until: 0.3}, {depth: 8}]``, with ``unit`` for ``depth`` where
            ``mode="share"``, and an optional ``lr_scale``. None: a quarter of the layers to 12.5 % of the run, half of
            them to 30 % [Gong et al. 2019].
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
        optimizer_state: ``"copy"`` carries moments over, ``"reset"`` starts those of the changed layers afresh.
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
        check_stages(mode, stages, unit, until)
        for name, value, allowed in (
            ("sharing", sharing, ("cycle", "sequence", "all")),
            ("unshare", unshare, ("together", "by_correlation")),
            ("optimizer_state", optimizer_state, ("copy", "reset")),
            ("gradient", gradient, ("mean", "sum")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {list(allowed)}.")
        for name, count, least in (
            ("check_every_n_steps", check_every_n_steps, 1),
            ("correlation_every_n_steps", correlation_every_n_steps, 1),
            ("rewarm_steps", rewarm_steps, 0),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name}={count!r}: expected a whole number, at least {least}.")
        if not lr_scale > 0:
            raise ValueError(f"lr_scale={lr_scale!r}: expected a factor above 0.")
        if unshare == "by_correlation" and mode != "share":
            raise ValueError(f"unshare='by_correlation' is for mode='share', not for mode={mode!r}.")
        self.layers = layers
        self.mode = mode
        self.stages = stages
        self.unit = unit
        self.sharing: SharingPattern = sharing
        self.until = until
        self.unshare = unshare
        self.width = parse_width(width)
        self.optimizer_state: StateMode = optimizer_state
        self.gradient = gradient
        self.lr_scale = lr_scale
        self.rewarm_steps = rewarm_steps
        self.offload_on_switch = offload_on_switch
        self._triggers = Triggers(
            monitor, check_every_n_steps, correlation_every_n_steps, by_groups=unshare == "by_correlation"
        )
        self._attachment = ModuleAttachment()
        self._mean = MeanGradient()
        self._learning_rate = LearningRateScale(self._lr_factor)
        self._growing: GrowingModule | None = None
        self._width_check: WidthCheck | None = None
        self._phases: list[Phase] = []
        self._loaded: dict[str, Any] | None = None
        self._reset()

    def _reset(self) -> None:
        self._phase = 0
        self._step = 0
        self._last_switch: int | None = None
        self._at_boundary = True
        self._events: list[telemetry.Event] = []
        self._triggers.reset()

    # -- the model takes its first form ---------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._growing is not None and self._growing.module is not pl_module:
            self._growing = None
            self._reset()
        if stage == "fit":
            self._refuse(trainer)
            if self._growing is None:
                self._build(trainer, pl_module)
        self._attachment.wrap(
            pl_module,
            on_load=lambda checkpoint: self._take_form_of(trainer, pl_module, checkpoint),
            growing=lambda: self._growing,
        )

    def _refuse(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup or not strategy.lightning_restore_optimizer:
            raise MisconfigurationException(
                f"GrowAndUnshareCallback cannot change parameters that {type(strategy).__name__} shards. Run the first "
                "phases with strategy='auto' or 'ddp', then build the full model from their checkpoint with "
                "`lightning_efficient.load_grown(..., grown=True)` and train it with this strategy."
            )
        if self.offload_on_switch and find(trainer, Offloader) is None:
            raise MisconfigurationException(
                f"offload_on_switch=True needs a strategy whose offload can be turned on, and "
                f"{type(strategy).__name__} has none. Use strategy='offload', or leave offload_on_switch out."
            )
        if self.width and (callbacks := compat.averaging_callbacks(trainer)):
            raise MisconfigurationException(
                f"Width growth cannot widen the averaged model of {type(callbacks[0]).__name__}. Start to average "
                "after the growth in a second run, or use depth growth."
            )

    def _build(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if type(pl_module).configure_model is not pl.LightningModule.configure_model:
            with trainer.strategy.tensor_init_context():
                pl_module.configure_model()
        self._growing = build_growing(pl_module, self.layers, self.mode, self.width)
        self._phases = make_phases(
            self.mode,
            self.stages,
            unit=self.unit,
            sharing=self.sharing,
            until=self.until,
            lr_scale=self.lr_scale,
            full_depth=self._growing.full_depth,
        )
        self._growing.restore(self._phases[0].leaders, self._growing.width)
        if self.width:
            self._width_check = WidthCheck(self._growing)

    def _take_form_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before weights are loaded: give the module the form that it had when they were saved."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        fitting = trainer.state.fn == "fit"
        if not state:
            if fitting and (len(self._phases) > 1 or self.width):
                raise MisconfigurationException(
                    "This checkpoint was not written with GrowAndUnshareCallback, so it is not known which phase its "
                    "weights belong to. Resume from a checkpoint of a run with this callback, or leave the callback "
                    "out to go on with the full model."
                )
            if self._growing is not None:
                self._growing.restore((), "wide")
            return
        if self._growing is None:
            self._growing = build_growing(pl_module, self.layers, self.mode, self.width)
        if (found := describe(self._growing)["stacks"]) != state["stacks"]:
            raise MisconfigurationException(
                f"The checkpoint grew the layers {state['stacks']}, this module has {found}. "
                "Use the `layers` that the run was started with."
            )
        self._growing.mirror(compat.averaged_models(trainer))
        self._growing.restore(state["leaders"], state["width"])
        self._loaded = checkpoint if fitting else None

    # -- fit ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        growing = self._growing_module()
        for optimizer in trainer.optimizers:
            if reason := unsupported_optimizer(optimizer):
                raise MisconfigurationException(
                    f"GrowAndUnshareCallback cannot follow {type(optimizer).__name__}: it {reason}. Use an optimizer "
                    "that updates parameter by parameter, such as AdamW or SGD."
                )
        if growing.arrangement:
            growing.arrangement.check_layers_still_equal()
        growing.plan_optimizers(trainer.optimizers, self._attachment.names)
        growing.mirror(compat.averaged_models(trainer))
        self._restore_optimizer_order()
        self._mean_gradient()
        if self._scales_learning_rate:
            self._learning_rate.attach(trainer.optimizers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_boundary = True
        # Not earlier: asking for the length of the run builds the loaders, and Lightning then forgets to restore them.
        self._triggers.start(self._phases, self.width, self._total_steps(trainer))
        telemetry.log(trainer, self.measurements(), force=True)
        if len(self._phases) > 1 or self._growing_module().twin:
            rank_zero_info(f"GrowAndUnshareCallback: training begins with {self._form()}; {self._triggers.plan_text()}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = self._steps(trainer)
        if self._at_boundary:
            self._switch_where_due(trainer, pl_module)
        arrangement = self._growing_module().arrangement
        if arrangement and self._triggers.correlation_due(self._phase, self._step):
            self._triggers.watch(arrangement)
        if self._width_check and self._growing_module().width == "narrow":
            self._width_check.listen()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._triggers.unwatch()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._width_check and self._growing_module().width == "narrow":
            self._width_check.verify()
        self._width_check = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._triggers.unwatch()
        before, self._step = self._step, self._steps(trainer)
        self._at_boundary = self._step > before
        mean = partial(trainer.strategy.reduce, reduce_op="mean")
        if self._triggers.needs_loss(self._phase):
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, Tensor) and pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # Lightning reports the share of the accumulated loss
            if self._triggers.monitor:
                loss = trainer.callback_metrics.get(self._triggers.monitor)
            self._triggers.read_loss(loss if isinstance(loss, Tensor) else None, self._step, mean)
        self._triggers.judge_correlation(self._phase, mean)
        telemetry.log(trainer, self.measurements())

    def _switch_where_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        growing = self._growing_module()
        if self.unshare == "by_correlation":
            self._split_groups(trainer, pl_module)
        while self._phase < len(self._phases) - 1:
            reason = self._triggers.due(self._phase, self._step)
            if reason is None:
                break
            self._phase += 1
            leaders = self._phases[self._phase].leaders
            operator = DEPTH_OPERATORS.get(self.mode or "")
            self._grow_layers(
                trainer, leaders, operator(len(growing.leaders), len(leaders)) if operator else leaders, reason
            )
        if growing.twin and growing.width == "narrow":
            reason = self._triggers.width_due(self._step)
            if reason is not None:
                before = self._form()
                pl_module.zero_grad(set_to_none=True)
                self._after_switch(trainer, growing.grow_width(state=self.optimizer_state), before, reason)

    def _split_groups(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a reading of the gradients' correlation: split groups between layers that disagree."""
        until = self._phases[self._phase].until
        if not self._triggers.correlations or until is None or until.correlation_below is None:
            return
        present = self._growing_module().leaders
        leaders = split_groups(present, self._triggers.correlations, until.correlation_below)
        if leaders != present:
            if len(set(leaders)) == len(leaders):
                self._phase = len(self._phases) - 1
            self._grow_layers(trainer, leaders, leaders, f"gradients correlated less than {until.correlation_below:g}")

    def _grow_layers(self, trainer: pl.Trainer, leaders: Sequence[int], source: Sequence[int], reason: str) -> None:
        growing = self._growing_module()
        before = self._form()
        growing.module.zero_grad(set_to_none=True)  # these gradients belong to the update that has been made
        change = growing.grow_layers(
            leaders, source, state=self.optimizer_state, summed_gradient=self.gradient == "sum"
        )
        self._after_switch(trainer, change, before, reason)

    def _after_switch(self, trainer: pl.Trainer, change: Change, before: str, reason: str) -> None:
        growing = self._growing_module()
        if isinstance(trainer.strategy, DDPStrategy):
            compat.rewrap_ddp(trainer.strategy)
        self._mean_gradient()
        self._last_switch = self._step
        self._triggers.restart(self._step)
        text = f"{before} -> {self._form()}: {reason}"
        self._events.append(telemetry.Event(compat.log_step(trainer), "growth", text))
        rank_zero_info(f"GrowAndUnshareCallback at step {self._step}: {text}")
        announce(trainer, ParameterChange(change.added, change.removed, change.replaced, reason=text))
        complete = self._phase == len(self._phases) - 1 and growing.width == "wide"
        if complete and self.offload_on_switch and (offloader := find(trainer, Offloader)):
            offloader.enable_offload(trainer)
        telemetry.log(trainer, self.measurements(), force=True)

    # -- the end ------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._triggers.unwatch()
        growing = self._growing
        if growing and len(growing.leaders) < growing.full_depth and isinstance(exception, IndexError | KeyError):
            rank_zero_warn(
                f"The model ran with {len(growing.leaders)} of its {growing.full_depth} repeated layers when this "
                "happened. Its forward must iterate over the layers that are there (`for layer in self.layers`), not "
                "over a number of layers; or use mode='share', which keeps all layers."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._triggers.unwatch()
        self._mean.remove()
        self._learning_rate.remove()
        self._attachment.unwrap(pl_module)
        if self._width_check:
            self._width_check.close()
        self._loaded = None

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._growing is None:
            return {}
        return {
            "format": FORMAT,
            **describe(self._growing),
            "mode": self.mode,
            "width_settings": self._width_settings(),
            "phase": self._phase,
            "last_switch": self._last_switch,
            "optimizer_names": self._growing.optimizer_names(),
            "events": [[event.step, event.text] for event in self._events],
            "triggers": self._triggers.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["format"] > FORMAT:
            raise MisconfigurationException(
                f"The checkpoint's growth state has format {state_dict['format']}; this version reads up to {FORMAT}. "
                "Use the version of lightning_efficient that wrote it, or a newer one."
            )
        self._phase = state_dict["phase"]
        self._last_switch = state_dict["last_switch"]
        self._events = [telemetry.Event(step, "growth", text) for step, text in state_dict["events"]]
        self._triggers.load_state_dict(state_dict["triggers"])

    def _restore_optimizer_order(self) -> None:
        """Optimizer state is saved by position; put it into the present order, by name, before it is loaded."""
        if self._loaded is None:
            return
        saved = self._loaded["callbacks"][self.state_key]["optimizer_names"]
        present = self._growing_module().optimizer_names()
        states = self._loaded.get("optimizer_states", [])
        self._loaded["optimizer_states"] = [
            reorder_state(state, before, now) for state, before, now in zip(states, saved, present, strict=True)
        ]
        self._loaded = None

    # -- telemetry ----------------------------------------------------------------------------------------------

    def measurements(self) -> Mapping[str, float]:
        """Phase, depth and what the parameters that are live now cost, plus the triggers' values."""
        if self._growing is None:
            return {}
        growing = self._growing
        values = {f"growth/{name}": value for name, value in growing.sizes().items()}
        values["growth/phase"] = float(self._phase + (growing.twin is not None and growing.width == "wide"))
        if growing.leaders:
            values["growth/depth"] = float(len(growing.leaders))
        if self.mode == "share":
            values["growth/distinct_layers"] = float(len(set(growing.leaders)))
        if self._scales_learning_rate:
            values["growth/lr_scale"] = self._lr_factor()
        return values | self._triggers.measurements()

    def events(self) -> Sequence[telemetry.Event]:
        """Every switch, with its reason."""
        return tuple(self._events)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _growing_module(self) -> GrowingModule:
        if self._growing is None:
            raise MisconfigurationException("GrowAndUnshareCallback was used before its `setup` ran.")
        return self._growing

    def _form(self) -> str:
        growing = self._growing_module()
        layers = str(Phase(growing.leaders, None)) if growing.leaders else ""
        width = f"width 1/{growing.twin.factor}" if growing.twin and growing.width == "narrow" else ""
        return ", ".join(part for part in (layers, width) if part) or "full width"

    def _mean_gradient(self) -> None:
        arrangement = self._growing_module().arrangement
        if self.gradient == "mean" and arrangement:
            self._mean.attach(arrangement)

    @property
    def _scales_learning_rate(self) -> bool:
        return self.rewarm_steps > 0 or any(phase.lr_scale != 1.0 for phase in self._phases)

    def _lr_factor(self) -> float:
        factor = self._phases[self._phase].lr_scale if self._phases else 1.0
        if self.rewarm_steps and self._last_switch is not None:
            factor *= min(1.0, (self._step - self._last_switch + 1) / self.rewarm_steps)
        return factor

    def _width_settings(self) -> dict[str, Any] | None:
        if self.width is None:
            return None
        return {
            "factor": self.width.factor,
            "arguments": dict(self.width.arguments) if self.width.arguments else None,
            "readout": self.width.readout,
            "sections": dict(self.width.sections) if self.width.sections else None,
        }

    @staticmethod
    def _steps(trainer: pl.Trainer) -> int:
        """Optimizer steps of the run; steps of several optimizers in one batch count once."""
        return trainer.global_step // max(1, len(trainer.optimizers))

    def _total_steps(self, trainer: pl.Trainer) -> float:
        needs_length = [p.until for p in self._phases if p.until] + ([self.width.until] if self.width else [])
        if all(until.fraction is None for until in needs_length):
            return math.inf
        total = float(trainer.estimated_stepping_batches)
        if trainer.max_steps > 0 and total >= trainer.max_steps:
            total = trainer.max_steps / max(1, len(trainer.optimizers))
        return total
