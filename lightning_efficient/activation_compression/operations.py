"""Which operation saves a tensor: what it may lose depends on what its gradient is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["FLOORS", "CurrentOperation", "Kind", "kind_of"]

Kind = Literal["linear", "normalization", "activation", "attention", "loss", "dropout", "pooling", "other"]

FLOORS: Mapping[Kind, int] = {
    "linear": 1,
    "normalization": 2,
    "activation": 4,
    "attention": 4,
    "dropout": 4,
    "pooling": 4,
    "other": 4,
    "loss": 8,
}
"""Fewest bits for what an operation saves.

An error in the input of a linear operation enters only the gradient of its weight, and on average not even that. In
the other operations it enters the gradient of their input, and so all layers before, with a bias where they are not
linear; in normalizations least, whose statistics are exact.
"""

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "linear": (
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    ),
    "normalization": ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "native_layer_norm"),
    "activation": (
        "relu", "relu_", "relu6", "gelu", "silu", "elu", "selu", "leaky_relu", "mish", "softplus", "sigmoid", "tanh",
        "hardswish", "hardtanh", "hardsigmoid", "logsigmoid", "prelu", "celu", "glu", "threshold",
    ),
    "attention": ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax"),
    "loss": (
        "cross_entropy", "nll_loss", "log_softmax", "binary_cross_entropy", "binary_cross_entropy_with_logits",
        "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "ctc_loss", "gaussian_nll_loss", "logsumexp",
    ),
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    "pooling": (
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    ),
}  # fmt: skip
_KINDS: Mapping[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names}


_PRODUCTS = frozenset(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "baddbmm", "addmm"))
"""Linear if one factor is a parameter."""


def kind_of(name: str) -> Kind:
    """Of the operation with this name."""
    return _KINDS.get(name, "other")


class CurrentOperation(TorchFunctionMode):
    """Knows which operation is being called from Python, within its context.

    Args:
        instead: Called with the name and the arguments of each operation; what it returns, if not None, is the result.
        after: Called with the name, the arguments and the result of each operation.

    Attributes:
        name: Of the operation, or empty.
        largest: Numbers in the largest tensor that it has saved so far.
    """

    def __init__(
        self,
        instead: Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any],
        after: Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None],
    ) -> None:
        super().__init__()
        self._instead = instead
        self.name = ""
        self.largest = 0
        self._arguments: tuple[Any, ...] = ()
        self._after = after

    @property
    def kind(self) -> Kind:
        """Of the operation."""
        if self.name in _PRODUCTS:
            return "linear" if any(isinstance(argument, nn.Parameter) for argument in self._arguments) else "other"
        return kind_of(self.name)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.name, self.largest, self._arguments
        self.name, self.largest, self._arguments = getattr(func, "__name__", ""), 0, args
        try:
            kwargs = kwargs or {}
            result = self._instead(self.name, args, kwargs)
            if result is None:
                result = func(*args, **kwargs)
            self._after(self.name, args, kwargs, result)
            return result
        finally:
            self.name, self.largest, self._arguments = before
