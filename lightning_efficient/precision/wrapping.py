"""A precision plugin around another, which does all that this one does not say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["WrappingPrecision"]


class WrappingPrecision(Precision):
    """Hands everything to another.

    Attributes:
        inner: That one.

    Args:
        inner: It.
    """

    def __init__(self, inner: Precision) -> None:
        super().__init__()
        self.inner = inner
        self.precision = inner.precision

    @property
    def scaler(self) -> Any:
        """Of the loss, if the inner one has any; ``Trainer.scaler`` asks."""
        return getattr(self.inner, "scaler", None)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        connected: tuple[nn.Module, list[Optimizer], list[Any]]
        connected = self.inner.connect(model, optimizers, lr_schedulers)
        return connected

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self.inner.convert_module(module)

    def tensor_init_context(self) -> Any:
        return self.inner.tensor_init_context()

    def module_init_context(self) -> Any:
        return self.inner.module_init_context()

    def forward_context(self) -> Any:
        return self.inner.forward_context()

    def train_step_context(self) -> Any:
        return self.inner.train_step_context()

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.inner.backward(tensor, model, optimizer, *args, **kwargs)

    def val_step_context(self) -> Any:
        return self.inner.val_step_context()

    def test_step_context(self) -> Any:
        return self.inner.test_step_context()

    def predict_step_context(self) -> Any:
        return self.inner.predict_step_context()

    def convert_input(self, data: Any) -> Any:
        return self.inner.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self.inner.convert_output(data)

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        return self.inner.pre_backward(tensor, module)

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        return self.inner.post_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        return self.inner.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def main_params(self, optimizer: Optimizer) -> Any:
        return self.inner.main_params(optimizer)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        self.inner.unscale_gradients(optimizer)

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.inner.clip_gradients(optimizer, *args, **kwargs)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        self.inner.clip_grad_by_value(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self.inner.clip_grad_by_norm(optimizer, clip_val)

    def teardown(self) -> None:
        self.inner.teardown()
