"""What errors in saved tensors do to the gradients of weights, measured in a step like any other.

(The source's phase "parameter collection", Jin et al. 2021, section 4.1.) For each linear operation: the sum of squares
of its loss signal, of a few columns of its input both before and after compression, and of the gradient of its weight.
A few columns are enough to see the error of the input; times the loss signal they give the very error of some columns
of the gradient, to hold the prediction against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_efficient.activation_compression.bounds import step_variance
from lightning_efficient.activation_compression.classify import BOUNDED, FP8
from lightning_efficient.activation_compression.store import Handle, Kept, Unit

__all__ = ["Collector", "LayerMeasurement", "source"]

_COLUMNS = 16  # of a linear layer's input that are kept exactly in a measured step
_CHANNELS = 4  # of a convolution's
_SAMPLE = 1024  # elements of a weight's gradient that are compared between batches
_LEAST_PART = 0.1  # of a gradient that is taken for more than its errors
_GROUP = 128
_GROUPS = 512  # of which the spread is taken
_CONVOLUTIONS: Mapping[str, tuple[int, bool, Callable[..., Tensor]]] = {
    "conv1d": (1, False, conv1d_weight),
    "conv2d": (2, False, conv2d_weight),
    "conv3d": (3, False, conv3d_weight),
    "conv_transpose1d": (1, True, conv1d_weight),
    "conv_transpose2d": (2, True, conv2d_weight),
    "conv_transpose3d": (3, True, conv3d_weight),
}
"""Dimensions, whether transposed, and what makes the gradient of the weight."""


@dataclass(frozen=True)
class LayerMeasurement:
    """Of one layer, in one step.

    Attributes:
        unit: Whose rate the error of its input comes from.
        numel: Numbers of its input, or, where that is known, all those that its unit keeps.
        sensitivity: Variance of the weight's gradient, the sum over its elements, for each unit of the variance that
            comes with the rate: :func:`step_variance` of the bits, or a third of the squared error bound.
        gradient_squares: Sum of squares of the weight's gradient, without its errors.
        weight_numel: Elements of the weight.
        nonzero: R, the fraction of its input that is not zero.
        error_squares: Measured variance of the weight's gradient, likewise the sum; None: not measured.
        momentum: Mean magnitude of the weight's momentum; None: the optimizer has none.
        noise_squares: Variance of the weight's gradient from batch to batch, likewise; None: not known yet.
    """

    unit: Unit
    numel: int
    sensitivity: float
    gradient_squares: float
    weight_numel: int
    nonzero: float
    error_squares: float | None = None
    momentum: float | None = None
    noise_squares: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self) | {"unit": list(self.unit)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LayerMeasurement:
        kind, layer = state["unit"]
        return cls(**{**state, "unit": (kind, layer)})


@dataclass(frozen=True)
class _Operation:
    """A linear operation, as far as its errors go.

    Attributes:
        fan: Elements of the weight's gradient that each number of the loss signal goes into, and each of the input.
        columns: Takes some columns of the input, or some of its channels.
        error: Of those columns of the weight's gradient, from the loss signal and the error of the input's; None where
            that is too much to ask.
    """

    fan: float
    columns: Callable[[Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor] | None


@dataclass
class _Call:
    """One that is measured."""

    operation: _Operation
    layer: str
    kept: Kept
    numel: int
    exact: Tensor  # the columns before compression
    spread_squares: Tensor
    loss: Tensor | None = None
    loss_squares: Tensor | None = None
    input_error: Tensor | None = None  # mean of squares
    gradient_error: Tensor | None = None


@dataclass
class _Weight:
    numel: int
    momentum: Tensor | None
    squares: Tensor | None = None
    sample: Tensor | None = None


class Collector:
    """Measures one forward pass and its backward pass; an observer of the saved tensors.

    Args:
        bound: Error bound by unit, where that is what is given.
        momentum: Mean magnitude of a weight's momentum, if its optimizer has one.
    """

    def __init__(
        self, bound: Callable[[Unit], float | None], momentum: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> None:
        self._bound = bound
        self._momentum = momentum
        self._packed: list[tuple[Handle, Tensor]] = []
        self._calls: dict[int, tuple[Handle, _Call]] = {}
        self._weights: dict[str, _Weight] = {}
        self._hooks: list[Any] = []

    def packed(self, handle: Handle, tensor: Tensor) -> None:
        self._packed.append((handle, tensor))

    def after(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, layer: str) -> None:
        """The operation ``name`` in ``layer`` is done."""
        packed, self._packed = self._packed, []
        if not packed or not isinstance(result, Tensor) or not result.requires_grad:
            return
        operands = _operands(name, args, kwargs)
        if operands is None or not operands[1].requires_grad:
            return
        x, weight = operands
        for handle, tensor in packed:
            if handle.record is None or tensor.numel() != x.numel():
                continue
            operation = _operation(name, args, kwargs, tensor, weight)
            call = _Call(
                operation,
                layer,
                handle.record,
                tensor.numel(),
                exact=operation.columns(tensor.detach()).float().clone(),
                spread_squares=_spread_squares(tensor.detach()),
            )
            self._watch(weight, layer)
            self._calls[id(handle)] = handle, call
            self._hooks.append(result.register_hook(partial(_note_loss, call)))
            return

    def unpacked(self, handle: Handle, tensor: Tensor) -> None:
        call = self._calls[id(handle)][1] if id(handle) in self._calls else None
        if call is None or call.loss is None:
            return
        loss, call.loss = call.loss, None
        with torch.no_grad():
            error = call.operation.columns(tensor).float() - call.exact
            call.input_error = error.square().mean()
            if call.operation.error is not None:
                call.gradient_error = call.operation.error(loss.float(), error).square().mean()

    def gradient_samples(self) -> dict[str, Tensor]:
        """Some elements of each weight's gradient, by layer."""
        return {layer: weight.sample for layer, weight in self._weights.items() if weight.sample is not None}

    def measurements(self) -> dict[str, LayerMeasurement]:
        """By layer, of those that a backward pass went through."""
        found: dict[str, LayerMeasurement] = {}
        for _, call in self._calls.values():
            weight = self._weights[call.layer]
            if weight.squares is None or call.loss_squares is None or call.input_error is None:
                continue
            reach = call.operation.fan * float(call.loss_squares)
            error, noisy = reach * float(call.input_error), float(weight.squares)
            one = LayerMeasurement(
                unit=source(call.kept),
                numel=call.numel,
                sensitivity=reach * self._gain(call),
                gradient_squares=max(noisy - error, _LEAST_PART * noisy),  # its errors are in the squares too
                weight_numel=weight.numel,
                nonzero=float((call.exact != 0).float().mean()),
                error_squares=float(call.gradient_error) * weight.numel if call.gradient_error is not None else None,
                momentum=float(weight.momentum) if weight.momentum is not None else None,
            )
            found[call.layer] = _together(found[call.layer], one) if call.layer in found else one
        return found

    def close(self) -> None:
        """Leave nothing behind in the graph."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()
        self._packed.clear()

    def _watch(self, weight: Tensor, layer: str) -> None:
        if layer not in self._weights:
            noted = _Weight(weight.numel(), self._momentum(weight))
            self._weights[layer] = noted
            self._hooks.append(weight.register_hook(partial(_note_gradient, noted)))

    def _gain(self, call: _Call) -> float:
        """Variance of the input's errors for each unit of that which comes with the rate."""
        base, error = _base(call.kept), float(call.input_error or 0)
        exact = base.record.exact or not error or base.level == FP8  # what errors it would have with a rate
        if base.level == BOUNDED:
            bound = self._bound(base.unit) or 1.0
            return float((call.exact != 0).float().mean()) if exact else error * 3 / bound**2
        return float(call.spread_squares) if exact else error / step_variance(int(base.level))


def source(kept: Kept) -> Unit:
    """Whose rate says how large the errors of these numbers are."""
    return _base(kept).unit


def _base(kept: Kept) -> Kept:
    while kept.source is not None:
        kept = kept.source
    return kept


def _together(a: LayerMeasurement, b: LayerMeasurement) -> LayerMeasurement:
    """Of a layer that is called more than once, where the weight is the same."""
    errors = (a.error_squares, b.error_squares)
    return replace(
        a,
        numel=a.numel + b.numel,
        sensitivity=a.sensitivity + b.sensitivity,
        gradient_squares=min(a.gradient_squares, b.gradient_squares),
        nonzero=(a.nonzero + b.nonzero) / 2,
        error_squares=errors[0] + errors[1] if errors[0] is not None and errors[1] is not None else None,
    )


def _note_loss(call: _Call, loss: Tensor) -> None:
    call.loss = loss.detach()
    call.loss_squares = torch.linalg.vector_norm(call.loss, dtype=torch.float32).square()


def _note_gradient(weight: _Weight, gradient: Tensor) -> None:
    gradient = gradient.detach()
    weight.squares = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    flat = gradient.reshape(-1)
    weight.sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().clone()


_PRODUCTS = ("matmul", "mm", "__matmul__", "addmm")


def _operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Input and weight of a linear operation."""
    operands: tuple[Any, Any]
    if name == "linear" or name in _CONVOLUTIONS:
        operands = _argument(args, kwargs, 0, "input", None), _argument(args, kwargs, 1, "weight", None)
    elif name in _PRODUCTS and len(args) >= 2 and isinstance(args[-1], nn.Parameter) and args[-1].dim() == 2:
        operands = args[-2], args[-1]
    else:
        return None
    return operands if isinstance(operands[0], Tensor) and isinstance(operands[1], Tensor) else None


def _operation(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, weight: Tensor) -> _Operation:
    if name not in _CONVOLUTIONS:
        outputs = weight.shape[1 if name in _PRODUCTS else 0]
        take = slice(0, x.shape[-1], max(1, x.shape[-1] // _COLUMNS))
        return _Operation(weight.numel() / outputs, lambda x: x[..., take], _linear_error)
    dimensions, transposed, gradient = _CONVOLUTIONS[name]
    take = slice(0, x.shape[1], max(1, x.shape[1] // _CHANNELS))
    stride = _each(_argument(args, kwargs, 3, "stride", 1), dimensions)
    groups = _argument(args, kwargs, 6, "groups", 1)
    if transposed:  # each number of the loss signal meets one in so many elements of the kernel
        outputs = weight.shape[1] * groups
        return _Operation(weight.numel() / outputs / math.prod(stride), lambda x: x[:, take], None)
    padding, dilation = _argument(args, kwargs, 4, "padding", 0), _argument(args, kwargs, 5, "dilation", 1)
    error = None
    if groups == 1 and not isinstance(padding, str) and x.dim() == dimensions + 2:

        def error(loss: Tensor, difference: Tensor) -> Tensor:
            shape = (weight.shape[0], difference.shape[1], *weight.shape[2:])
            return gradient(
                difference, shape, loss.view(-1, *loss.shape[-dimensions - 1 :]), stride,
                _each(padding, dimensions), _each(dilation, dimensions),
            )  # fmt: skip

    return _Operation(weight.numel() / weight.shape[0], lambda x: x[:, take], error)


def _linear_error(loss: Tensor, difference: Tensor) -> Tensor:
    return loss.reshape(-1, loss.shape[-1]).T @ difference.reshape(-1, difference.shape[-1])


def _spread_squares(x: Tensor) -> Tensor:
    """Mean of the squared spreads of the first groups."""
    numbers = x.reshape(-1)[: _GROUPS * _GROUP]
    width = min(_GROUP, numbers.numel())
    groups = numbers[: numbers.numel() // width * width].view(-1, width).float()
    return (groups.amax(1) - groups.amin(1)).square().mean()


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _each(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))
