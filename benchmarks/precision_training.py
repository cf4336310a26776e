"""Training steps under a precision plugin, called as the Trainer calls it, and no more of Lightning than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.precision import RollbackPrecision

__all__ = ["Counts", "Training", "counted", "plain", "rollback"]


class _Whole(pl.LightningModule):
    """What the plugin is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Training:
    """A model, its optimizer and a precision plugin.

    Args:
        model: To train.
        optimizer: Of its parameters.
        precision: Any plugin.
        clip: Norm that gradients are clipped to.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision, clip: float | None = None) -> None:
        self.model, self.optimizer, self.precision, self.clip = model, optimizer, precision, clip
        self._module = _Whole(model)
        trainer = self._module.trainer = pl.Trainer(
            accelerator="gpu" if next(model.parameters()).is_cuda else "cpu", devices=1, plugins=[precision],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.strategy.connect(self._module)
        precision.connect(self._module, [optimizer], [])

    def step(self, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        """Forward, backward, clipping, update; returns the loss."""
        precision, optimizer = self.precision, self.optimizer
        with precision.train_step_context():
            value = precision.pre_backward(loss(self.model), self._module)
        precision.backward(value, self._module, optimizer)
        precision.post_backward(value, self._module)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)  # Lightning's does not take fused optimizers
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()


class Counts(dict[str, int]):
    """Operations of all products since pre-learning: ``low``, ``high``, ``retries``."""

    @property
    def low_share(self) -> float:
        """Of all products."""
        tried = self["low"] + self["high"]
        return self["low"] / tried if tried else 0.0

    @property
    def retry_share(self) -> float:
        """Of those that were tried in low bits."""
        tried = self["low"] + self["retries"]
        return self["retries"] / tried if tried else 0.0

    def since(self, before: Counts) -> Counts:
        """What came after."""
        return Counts({key: value - before[key] for key, value in self.items()})


def counted(nodes: dict[str, Node]) -> Counts:
    """All that was computed so far."""
    statuses = [node.products[role].status for node in nodes.values() for role in ROLES]
    return Counts({name: sum(getattr(status, name) for status in statuses) for name in ("low", "high", "retries")})


def plain(kind: Literal["bf16", "fp32"]) -> Precision:
    """What Lightning has."""
    return MixedPrecision("bf16-mixed", "cpu") if kind == "bf16" else Precision()


def rollback(
    high: Literal["bf16", "fp32"], *, protect: bool = True, only_if_faster: bool = False, **arguments: Any
) -> RollbackPrecision:
    """The plugin; all operations are in low bits, also those of tasks that are too small to gain by it."""
    return RollbackPrecision(high=high, protect=protect, only_if_faster=only_if_faster, **arguments)
