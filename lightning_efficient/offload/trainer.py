"""What a run allows: whether it can be offloaded at all, and when its updates can take place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_efficient import compat
from lightning_efficient.coordination import members
from lightning_efficient.offload.placement import KINDS, Kind
from lightning_efficient.offload.session import OffloadSession
from lightning_efficient.offload.settings import ScheduleChoice, Settings
from lightning_efficient.offload.updates.clipping import clip_norm_, clip_value_
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.subset_step import SubsetStepError, check_parameter_by_parameter

__all__ = ["Schedule", "accumulates", "allowed_settings", "check_run", "choose_schedule", "clip_everywhere"]

Schedule = Literal["after_backward", "in_backward", "under_forward", "delayed"]
_WITH_GRADIENTS = ("on_before_optimizer_step", "on_after_backward", "on_before_zero_grad")  # hooks that find them


def check_run(trainer: pl.Trainer, optimizers: Sequence[Optimizer], settings: Settings, strategy: str) -> None:
    """Whether the user's rules fit his model, and nothing else of the run updates its parameters in another way.

    Args:
        trainer: Of the run.
        optimizers: Whose state is to be elsewhere.
        settings: Of the user.
        strategy: Its class, for messages.

    Raises:
        MisconfigurationException: Saying what does not fit.
    """
    module = trainer.lightning_module
    names = [name for name, _ in module.named_parameters()]
    if unused := settings.rules.unused(names):
        raise MisconfigurationException(
            f"place[{unused[0]!r}] is no kind of tensor ({', '.join(KINDS)}), and fits no parameter of "
            f"{type(module).__name__}. Its parameters have names like {', '.join(map(repr, names[:3]))}; a pattern "
            "may be the end of a name, and contain '*'."
        )
    for member in members(trainer):
        if getattr(member, "optimizer_in_backward", False):
            raise MisconfigurationException(
                f"{type(member).__name__}(optimizer_in_backward=True) and {strategy} both run the optimizer's updates. "
                "Leave optimizer_in_backward out: OffloadStrategy updates in backward where it can."
            )
    for optimizer in optimizers:
        try:
            check_parameter_by_parameter(optimizer)
        except SubsetStepError as error:
            raise MisconfigurationException(f"{strategy}: {error}") from error


def choose_schedule(trainer: pl.Trainer, wanted: ScheduleChoice) -> tuple[Schedule, str]:
    """The schedule of a run, and why.

    Raises:
        MisconfigurationException: If the one that is wanted cannot be.
    """
    never_later = _needs_the_update_at_once(trainer)
    never_earlier = never_later or _needs_all_gradients(trainer)
    if wanted == "auto":
        if never_later:
            return "after_backward", never_later
        if never_earlier:
            return "under_forward", never_earlier
        return "in_backward", "nothing needs all gradients together"
    if wanted == "in_backward" and never_earlier:
        raise MisconfigurationException(
            f"schedule='in_backward' updates each parameter as soon as its gradient is there, which cannot be: "
            f"{never_earlier}. Use schedule='auto'."
        )
    if wanted in ("under_forward", "delayed") and never_later:
        when = "forward" if wanted == "under_forward" else "backward"
        raise MisconfigurationException(
            f"schedule='{wanted}' updates parameters in the next {when}, which cannot be: {never_later}. Use "
            "schedule='auto'."
        )
    return wanted, "as asked for"


def _needs_the_update_at_once(trainer: pl.Trainer) -> str:
    """Why updates cannot wait for the next step; empty if they can."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return "the LightningModule optimizes manually"
    if judge := _judge(trainer):
        return f"{judge} looks at gradients first, and may do the batch again"
    if compat.step_is_compiled(module):
        return "the training step is compiled as a whole, and does not show when it uses which weights"
    if is_overridden("optimizer_zero_grad", module):
        return "optimizer_zero_grad is overridden, and may want the gradients of earlier steps"
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return "the gradient scaler decides about each step"
    return ""


def _judge(trainer: pl.Trainer) -> str:
    """Who decides whether a batch counts when its gradients are there; empty if nobody does."""
    judges = (member for member in members(trainer) if getattr(member, "judges_batches", False))
    return next((f"{type(judge).__name__}(spike_guard=...)" for judge in judges), "")


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether several batches add to the gradients of a step, now or later."""
    scheduled = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return trainer.accumulate_grad_batches > 1 or scheduled


def allowed_settings(
    trainer: pl.Trainer, settings: Settings, device: torch.device, needed: Mapping[Kind, str] | None = None
) -> Settings:
    """The settings, with that left where it is used which this run needs there.

    Args:
        trainer: Of the run.
        settings: Of the user.
        device: On which it computes.
        needed: What else it needs there, and why.

    Raises:
        MisconfigurationException: If a rule of the user moves it.
    """
    needed = dict(needed or {})
    if why := reads_gradients(trainer):
        needed["gradient"] = f"gradients leave as soon as they are there, and {why}"
    if compat.step_is_compiled(trainer.lightning_module):
        needed["parameter"] = "parameters that are elsewhere cannot be fetched within a compiled training step"
    if keeper := next((m for m in members(trainer) if getattr(m, "keeps_saved_tensors", False)), None):
        needed["activation"] = f"{type(keeper).__name__} decides itself how what backward needs is kept"
    here = ("device", "host") if device.type == "cpu" else ("device",)
    for kind, reason in needed.items():
        for rule, tier in settings.place.items():
            if rule.split(":", 1)[0] == kind and tier not in here:
                raise MisconfigurationException(f"place[{rule!r}]={tier!r} cannot be: {reason}. Leave this rule out.")
    return replace(settings, place={**dict.fromkeys(needed, "device"), **settings.place}, stays=frozenset(needed))


def reads_gradients(trainer: pl.Trainer) -> str:
    """Why gradients must be with their parameters when backward has ended; empty if nobody looks at them."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return "the LightningModule optimizes manually"
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
        return "the gradient scaler unscales gradients"
    if judge := _judge(trainer):
        return f"{judge} looks at their norm"
    for hook in ("configure_gradient_clipping", *_WITH_GRADIENTS, "optimizer_step"):
        if is_overridden(hook, module):
            return f"the LightningModule has its own {hook}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in _WITH_GRADIENTS:
            if getattr(type(callback), hook) is not getattr(pl.Callback, hook) and getattr(
                callback, "reads_gradients", True
            ):
                return f"{type(callback).__name__} has {hook}"
    return ""


def _needs_all_gradients(trainer: pl.Trainer) -> str:
    """Why updates cannot begin before backward has ended; empty if they can."""
    if trainer.gradient_clip_val:
        return "gradients are clipped"
    for member in members(trainer):
        if getattr(member, "scales_learning_rate", False):
            return f"{type(member).__name__} scales the learning rate right before the optimizer's step"
    return reads_gradients(trainer)


def clip_everywhere(plugin: Precision, session: Callable[[], OffloadSession | None]) -> Callable[[], None]:
    """Let ``plugin`` clip gradients that are not with their parameters too.

    Args:
        plugin: Changed on the instance only.
        session: Asked at each clipping where they are.

    Returns:
        What undoes it.
    """
    by_norm, by_value = plugin.clip_grad_by_norm, plugin.clip_grad_by_value

    def store() -> GradientStore | None:
        running = session()
        return running.gradients if running is not None else None

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        gradients = store()
        if gradients is None:
            by_norm(optimizer, clip_val)
        elif clip_val > 0:
            clip_norm_(plugin.main_params(optimizer), float(clip_val), gradients)

    def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
        gradients = store()
        if gradients is None:
            by_value(optimizer, clip_val)
        elif clip_val > 0:
            clip_value_(plugin.main_params(optimizer), float(clip_val), gradients)

    plugin.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
    plugin.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]

    def undo() -> None:
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            plugin.__dict__.pop(name, None)

    return undo
