"""What errors in saved tensors do to the gradients of weights, measured in a step like any other.

(The source's phase "parameter collection", Jin et al. 2021, section 4.1.) For each linear operation: the sum of squares
of its loss signal, of a few columns of its input both before and after compression, and of the gradient of its weight.
A few columns are enough to see the error of the input; times the loss signal they give the very error of some columns
of the gradient, to hold the prediction against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.activation_compression.bounds import step_variance
from lightning_efficient.activation_compression.classify import BOUNDED, FP8
from lightning_efficient.activation_compression.linear_operations import LinearOperation, linear_operation, operands_of
from lightning_efficient.activation_compression.store import Handle, Kept, Unit

__all__ = ["Collector", "LayerMeasurement", "source"]

_SAMPLE = 1024  # elements of a weight's gradient that are compared between batches
_LEAST_PART = 0.1  # of a gradient that is taken for more than its errors
_GROUP = 128
_GROUPS = 512  # of which the spread is taken


@dataclass(frozen=True)
class LayerMeasurement:
    """Of one layer, in one step.

    Attributes:
        unit: Whose rate the error of its input comes from.
        numel: Numbers of its input, or, where that is known, all those that its unit keeps.
        sensitivity: Variance of the weight's gradient, the sum over its elements, for each unit of the variance that
            comes with the rate: :func:`step_variance` of the bits, or a third of the squared error bound.
        gradient_squares: Sum of squares of the weight's gradient, without its errors.
        weight_numel: Elements of the weight. Where several units feed one weight, each has its part of these, and of
            the gradient's squares.
        nonzero: R, the fraction of its input that is not zero.
        error_squares: Measured variance of the weight's gradient, likewise the sum; None: not measured.
        momentum: Mean magnitude of the weight's momentum; None: the optimizer has none.
        noise_squares: Variance of the weight's gradient from batch to batch, likewise; None: not known yet.
    """

    unit: Unit
    numel: int
    sensitivity: float
    gradient_squares: float
    weight_numel: float
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


@dataclass
class _Weight:
    """One whose gradient is measured."""

    tensor: Tensor
    momentum: Tensor | None
    squares: Tensor | None = None
    sample: Tensor | None = None


@dataclass
class _Call:
    """One that is measured."""

    operation: LinearOperation
    layer: str
    weight: _Weight
    kept: Kept
    numel: int
    exact: Tensor  # the columns before compression
    spread_squares: Tensor
    loss: Tensor | None = None
    loss_squares: Tensor | None = None
    input_error: Tensor | None = None  # mean of squares
    gradient_error: Tensor | None = None


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
        self._weights: dict[int, _Weight] = {}
        self._hooks: list[Any] = []

    def packed(self, handle: Handle, tensor: Tensor) -> None:
        self._packed.append((handle, tensor))

    def after(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, layer: str) -> None:
        """The operation ``name`` in ``layer`` is done."""
        packed, self._packed = self._packed, []
        if not packed or not isinstance(result, Tensor) or not result.requires_grad:
            return
        operands = operands_of(name, args, kwargs)
        if operands is None or not operands[1].requires_grad:
            return
        x, weight = operands
        for handle, tensor in packed:
            if handle.record is None or tensor.numel() != x.numel():
                continue
            operation = linear_operation(name, args, kwargs, tensor, weight)
            call = _Call(
                operation,
                layer,
                self._watched(weight),
                handle.record,
                tensor.numel(),
                exact=operation.columns(tensor.detach()).float().clone(),
                spread_squares=_spread_squares(tensor.detach()),
            )
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
        samples = {layer: calls[0].weight.sample for layer, calls in self._by_layer().items()}
        return {layer: sample for layer, sample in samples.items() if sample is not None}

    def measurements(self) -> dict[str, LayerMeasurement]:
        """By layer, of those that a backward pass went through."""
        found: dict[str, LayerMeasurement] = {}
        by_layer = self._by_layer()
        shares = Counter(id(calls[0].weight) for calls in by_layer.values())
        for layer, calls in by_layer.items():
            measured = [one for one in map(self._measurement, calls) if one is not None]
            if measured:
                one, parts = reduce(_together, measured), shares[id(calls[0].weight)]
                found[layer] = replace(
                    one, gradient_squares=one.gradient_squares / parts, weight_numel=one.weight_numel / parts
                )
        return found

    def close(self) -> None:
        """Leave nothing behind in the graph."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()
        self._weights.clear()
        self._packed.clear()

    def _watched(self, weight: Tensor) -> _Weight:
        if id(weight) not in self._weights:
            noted = self._weights[id(weight)] = _Weight(weight, self._momentum(weight))
            self._hooks.append(weight.register_hook(partial(_note_gradient, noted)))
        return self._weights[id(weight)]

    def _by_layer(self) -> dict[str, list[_Call]]:
        """Calls with the same weight, whose inputs' errors come from the same unit: with more of them, numbered."""
        groups: dict[tuple[str, int, Unit], list[_Call]] = {}
        for _, call in self._calls.values():
            groups.setdefault((call.layer, id(call.weight), source(call.kept)), []).append(call)
        counts, found = Counter[str](), dict[str, list[_Call]]()
        for (layer, _, _), calls in groups.items():
            counts[layer] += 1
            found[layer if counts[layer] == 1 else f"{layer} ({counts[layer]})"] = calls
        return found

    def _measurement(self, call: _Call) -> LayerMeasurement | None:
        weight = call.weight
        if weight.squares is None or call.loss_squares is None or call.input_error is None:
            return None
        reach = call.operation.fan * float(call.loss_squares)
        error, noisy, numel = reach * float(call.input_error), float(weight.squares), weight.tensor.numel()
        return LayerMeasurement(
            unit=source(call.kept),
            numel=call.numel,
            sensitivity=reach * self._gain(call),
            gradient_squares=max(noisy - error, _LEAST_PART * noisy),  # its errors are in the squares too
            weight_numel=numel,
            nonzero=float((call.exact != 0).float().mean()),
            error_squares=float(call.gradient_error) * numel if call.gradient_error is not None else None,
            momentum=float(weight.momentum) if weight.momentum is not None else None,
        )

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
    """Of two calls with the same weight."""
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
    weight.sample = gradient.reshape(-1)[_places(gradient.numel()).to(gradient.device)].float()


@lru_cache(256)
def _places(numel: int) -> Tensor:
    """The same random ones each time: at equal distances they might be one column of the weight."""
    return torch.randint(numel, (min(numel, _SAMPLE),), generator=torch.Generator().manual_seed(numel))


def _spread_squares(x: Tensor) -> Tensor:
    """Mean of the squared spreads of the first groups."""
    numbers = x.reshape(-1)[: _GROUPS * _GROUP]
    width = min(_GROUP, numbers.numel())
    groups = numbers[: numbers.numel() // width * width].view(-1, width).float()
    return (groups.amax(1) - groups.amin(1)).square().mean()
