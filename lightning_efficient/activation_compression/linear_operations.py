"""Linear operations, as far as errors in their input go: what of them reaches the gradient of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

__all__ = ["LinearOperation", "linear_operation", "operands_of"]

_COLUMNS = 16  # of a linear layer's input that are kept exactly in a measured step
_CHANNELS = 4  # of a convolution's
_CONVOLUTIONS: Mapping[str, tuple[int, bool, Callable[..., Tensor]]] = {
    "conv1d": (1, False, conv1d_weight),
    "conv2d": (2, False, conv2d_weight),
    "conv3d": (3, False, conv3d_weight),
    "conv_transpose1d": (1, True, conv1d_weight),
    "conv_transpose2d": (2, True, conv2d_weight),
    "conv_transpose3d": (3, True, conv3d_weight),
}
"""Dimensions, whether transposed, and what makes the gradient of the weight."""
_PRODUCTS = ("matmul", "mm", "__matmul__", "addmm")


@dataclass(frozen=True)
class LinearOperation:
    """One of them.

    Attributes:
        fan: Elements of the weight's gradient that each number of the loss signal goes into, and each of the input.
        columns: Takes some columns of the input, or some of its channels.
        error: Of those columns of the weight's gradient, from the loss signal and the error of the input's; None where
            that is too much to ask.
    """

    fan: float
    columns: Callable[[Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor] | None


def operands_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Input and weight of a linear operation."""
    operands: tuple[Any, Any]
    if name == "linear" or name in _CONVOLUTIONS:
        operands = _argument(args, kwargs, 0, "input", None), _argument(args, kwargs, 1, "weight", None)
    elif name in _PRODUCTS and len(args) >= 2 and isinstance(args[-1], nn.Parameter) and args[-1].dim() == 2:
        operands = args[-2], args[-1]
    else:
        return None
    return operands if isinstance(operands[0], Tensor) and isinstance(operands[1], Tensor) else None


def linear_operation(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, weight: Tensor
) -> LinearOperation:
    """The operation ``name`` that saves ``x``, the input, or a view of it."""
    if name not in _CONVOLUTIONS:
        outputs = weight.shape[1 if name in _PRODUCTS else 0]
        take = slice(0, x.shape[-1], max(1, x.shape[-1] // _COLUMNS))
        return LinearOperation(weight.numel() / outputs, lambda x: x[..., take], _linear_error)
    dimensions, transposed, gradient = _CONVOLUTIONS[name]
    take = slice(0, x.shape[1], max(1, x.shape[1] // _CHANNELS))
    stride = _each(_argument(args, kwargs, 3, "stride", 1), dimensions)
    groups = _argument(args, kwargs, 6, "groups", 1)
    if transposed:  # each number of the loss signal meets one in so many elements of the kernel
        outputs = weight.shape[1] * groups
        return LinearOperation(weight.numel() / outputs / math.prod(stride), lambda x: x[:, take], None)
    padding, dilation = _argument(args, kwargs, 4, "padding", 0), _argument(args, kwargs, 5, "dilation", 1)
    error = None
    if groups == 1 and not isinstance(padding, str) and x.dim() == dimensions + 2:

        def error(loss: Tensor, difference: Tensor) -> Tensor:
            shape = (weight.shape[0], difference.shape[1], *weight.shape[2:])
            return gradient(
                difference, shape, loss.view(-1, *loss.shape[-dimensions - 1 :]), stride,
                _each(padding, dimensions), _each(dilation, dimensions),
            )  # fmt: skip

    return LinearOperation(weight.numel() / weight.shape[0], lambda x: x[:, take], error)


def _linear_error(loss: Tensor, difference: Tensor) -> Tensor:
    return loss.reshape(-1, loss.shape[-1]).T @ difference.reshape(-1, difference.shape[-1])


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _each(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))
