"""What is asked of the Trainer, and changed in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import gathered

__all__ = ["around_training_steps", "momentum_of"]


def around_training_steps(
    trainer: pl.Trainer, context: Callable[[], AbstractContextManager[None]]
) -> Callable[[], None]:
    """Let the forward of each training step be within a context.

    Args:
        trainer: Its precision plugin is changed, on the instance only.
        context: Makes one for each step; it is within the plugin's own.

    Returns:
        What undoes it.
    """
    plugin = trainer.precision_plugin
    own = plugin.train_step_context

    @contextlib.contextmanager
    def train_step_context() -> Iterator[None]:
        with own(), context():
            yield

    before = {name: value for name, value in vars(plugin).items() if name == "train_step_context"}
    plugin.__dict__["train_step_context"] = train_step_context

    def restore() -> None:
        plugin.__dict__.pop("train_step_context", None)
        plugin.__dict__.update(before)

    return restore


def momentum_of(trainer: pl.Trainer) -> Callable[[Tensor], Tensor | None]:
    """What gives the mean magnitude of a weight's momentum, on the scale of one batch's gradient; None: it has none."""
    module = trainer.lightning_module
    names = {id(weight): name for name, weight in module.named_parameters()}
    buffers = {
        names[id(weight)]: state["momentum_buffer"]
        for optimizer in trainer.optimizers
        for weight, state in optimizer.state.items()
        if id(weight) in names and isinstance(state.get("momentum_buffer"), Tensor)
    }
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # errors of accumulated batches are independent: their sum grows with the root of the number
    factor = (scaler.get_scale() if scaler is not None else 1.0) / math.sqrt(trainer.accumulate_grad_batches)

    def mean_momentum(weight: Tensor) -> Tensor | None:
        name = names.get(id(weight)) or _name_in(module, weight) if buffers else ""
        return _mean_magnitude(buffers[name]) * factor if name in buffers else None

    return mean_momentum


def _mean_magnitude(values: Tensor) -> Tensor:
    return gathered(values.abs().sum() / values.numel())


def _name_in(module: nn.Module, weight: Tensor) -> str:
    """Of a parameter that is there only while the forward of its module goes on, as FSDP2 has them; or empty."""
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter is weight:
                return f"{prefix}.{name}" if prefix else name
    return ""
