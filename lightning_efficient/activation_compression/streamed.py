"""Activation functions whose gradient is made of a few numbers at a time.

In backward an activation function needs its saved input, the gradient that comes in, and memory for the one that goes
out: three tensors as large as the widest of the model, and so often the peak of the whole step. The saved one is in few
bits; decoded piece by piece it never is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.activation_compression.store import SavedTensors
from lightning_efficient.core.torch_internals import innermost_pack_hook

__all__ = ["streamed"]

_LEAST = 1 << 19  # numbers: fewer are no more than two pieces

_aten = torch.ops.aten
Gradient = Callable[..., Tensor]


def _silu_gradient(grad: Tensor, x: Tensor, **out: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # aten's cannot be differentiated
        sigmoid = x.sigmoid()
        return grad * sigmoid * (1 + x * (1 - sigmoid))
    result: Tensor = _aten.silu_backward(grad, x, **out)
    return result


_FUNCTIONS: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Gradient], bool]] = {
    "gelu": (F.gelu, lambda approximate="none": partial(_aten.gelu_backward, approximate=approximate), False),
    "silu": (F.silu, lambda: _silu_gradient, False),
    "relu": (torch.relu, lambda: lambda g, r, **out: _aten.threshold_backward(g, r, 0, **out), True),
    "tanh": (torch.tanh, lambda: _aten.tanh_backward, True),
    "sigmoid": (torch.sigmoid, lambda: _aten.sigmoid_backward, True),
}
"""The function, what makes its gradient of the arguments, and whether that is of the result (else: of the input)."""


def streamed(saved: SavedTensors, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of the function ``name``, or None where this is not for it."""
    if name not in _FUNCTIONS or len(args) != 1 or type(args[0]) is not Tensor:
        return None
    x: Tensor = args[0]
    arguments = {key: value for key, value in kwargs.items() if not (key == "inplace" and not value)}
    if set(arguments) - {"approximate"} or not (
        x.requires_grad and torch.is_grad_enabled() and x.is_cpu and x.is_contiguous() and x.numel() >= _LEAST
    ):
        return None
    if x.dtype not in (torch.float32, torch.bfloat16) or innermost_pack_hook() != saved.pack:
        return None  # in activation checkpointing, for one, which keeps other things than we
    result: Tensor = _Streamed.apply(x, saved, name, arguments)  # type: ignore[no-untyped-call]
    return result


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: SavedTensors, name: str, arguments: Mapping[str, Any]) -> Tensor:
        function, gradient, of_result = _FUNCTIONS[name]
        result = function(x, **arguments)
        ctx.saved, ctx.gradient = saved, gradient(**arguments)
        ctx.save_for_backward(result if of_result else x)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        if torch.is_grad_enabled():  # its gradient is differentiated too
            return ctx.gradient(grad, *ctx.saved_tensors), None, None, None
        with ctx.saved.deferring() as handles:
            (tensor,) = ctx.saved_tensors
        pieces = ctx.saved.pieces(handles[0]) if handles else None
        if pieces is None:
            return ctx.gradient(grad, handles[0].tensor() if handles else tensor), None, None, None
        grad = grad.contiguous()
        result = torch.empty_like(grad)
        for which, numbers in pieces:
            ctx.gradient(grad.view(-1)[which], numbers, grad_input=result.view(-1)[which])
        return result, None, None, None
