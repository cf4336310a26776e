"""Rates that follow the gradients: what each layer's errors may be, and so its bits or its error bound.

Every W steps the phases of Jin et al. 2021 ("COMET", section 4): parameter collection (:mod:`.collect`), gradient
assessment (what error of a weight's gradient is acceptable), activation assessment (what error of the saved input that
allows), adaptive compression (its rate until the next time). Beyond them a guard: the errors of a gradient stay a small
part of what differs from batch to batch anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_efficient.activation_compression.bounds import allocate_bits, error_bound, step_variance
from lightning_efficient.activation_compression.collect import LayerMeasurement
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.activation_compression.store import Unit

__all__ = ["AdaptiveRates", "Choice"]

MOST_BITS = 8


@dataclass(frozen=True)
class Choice:
    """Rates for the steps to come.

    Attributes:
        bits: By unit; empty where error bounds are what is chosen.
        bounds: By unit.
        guarded: Units that got more than the target and the budget would give, because of the guard.
        predicted: Relative deviation of the gradients that it makes, of all weights together.
        noise: Its variance over that from batch to batch; None: not known.
    """

    bits: Mapping[Unit, int]
    bounds: Mapping[Unit, float]
    guarded: tuple[Unit, ...]
    predicted: float
    noise: float | None

    def state_dict(self) -> dict[str, Any]:
        rates = {name: [[*unit, rate] for unit, rate in getattr(self, name).items()] for name in ("bits", "bounds")}
        return {**rates, "guarded": [list(unit) for unit in self.guarded], "errors": [self.predicted, self.noise]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Choice:
        bits, bounds = ({(kind, layer): rate for kind, layer, rate in state[name]} for name in ("bits", "bounds"))
        return cls(bits, bounds, tuple((kind, layer) for kind, layer in state["guarded"]), *state["errors"])


class AdaptiveRates:
    """Remembers what was measured, and chooses.

    Args:
        every: Steps between measurements.
        target: Acceptable deviation of a weight's gradient, over the gradient itself (root mean squares); over the
            mean magnitude of its momentum where the optimizer has that (Jin et al. 2021, section 4.2).
        guard: Most variance of a weight's gradient, over its variance from batch to batch.

    Attributes:
        measured: By layer.
    """

    def __init__(self, every: int, target: float, guard: float = 0.1) -> None:
        self.every = every
        self.target = target
        self.guard = guard
        self.measured: dict[str, LayerMeasurement] = {}

    def take(self, measured: Mapping[str, LayerMeasurement]) -> None:
        """New measurements; what is known of the noise stays until it is measured anew."""
        for layer, one in measured.items():
            known = self.measured.get(layer)
            self.measured[layer] = replace(one, noise_squares=known.noise_squares if known is not None else None)

    def take_noise(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        """The same elements of the gradients of two batches, by layer: half of their squared difference is noise."""
        for layer in first.keys() & second.keys() & self.measured.keys():
            if first[layer].shape == second[layer].shape:
                difference = float((first[layer] - second[layer]).square().mean()) / 2
                one = self.measured[layer]
                if math.isfinite(difference) and difference > 0:  # else it is not known, rather than none
                    self.measured[layer] = replace(one, noise_squares=difference * one.weight_numel)

    def choose(
        self, rates: LayerRates, average_bits: float | None, sizes: Mapping[Unit, float] | None = None
    ) -> Choice:
        """Rates for what was measured.

        Args:
            rates: Of the run: overrides, floors, and the error bound if that is what is given.
            average_bits: Budget: bits of a number, over all units that were measured; None: as many as it takes.
            sizes: Numbers of each unit, where they are others than when it was measured.
        """
        units: dict[Unit, list[LayerMeasurement]] = {}
        for one in self.measured.values():
            if rates.override(one.unit[1]) is None and math.isfinite(one.sensitivity * one.gradient_squares):
                units.setdefault(one.unit, []).append(one)
        if rates.error_bound is not None:
            return self._bounds(units, rates.error_bound)
        floors = {unit: rates.floor(unit[0]) for unit in units}  # type: ignore[arg-type]
        needed = {unit: self._fewest(units[unit], floors[unit], self.allowed) for unit in units}
        safe = {unit: self._fewest(units[unit], floors[unit], self._tolerated) for unit in units}
        bits = needed
        if average_bits is not None:
            sizes = {**self.sizes(), **(sizes or {})}
            sizes = {unit: sizes[unit] for unit in units}
            harm = {
                unit: sum(one.sensitivity / one.gradient_squares for one in ones if one.gradient_squares)
                for unit, ones in units.items()
            }
            bits = allocate_bits(sizes, harm, floors, needed, average_bits * sum(sizes.values()))
        guarded = tuple(unit for unit in units if safe[unit] > bits[unit])
        bits = {unit: max(bits[unit], safe[unit]) for unit in units}
        return Choice(bits, {}, guarded, *self._errors(units, {unit: step_variance(bits[unit]) for unit in units}))

    def sizes(self) -> dict[Unit, float]:
        """Numbers of each unit that was measured."""
        return {one.unit: one.numel for one in self.measured.values()}

    def state_dict(self) -> dict[str, Any]:
        return {layer: one.state_dict() for layer, one in self.measured.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.measured = {layer: LayerMeasurement.from_state(one) for layer, one in state.items()}

    def allowed(self, one: LayerMeasurement) -> float:
        """Gradient assessment: the variance of its weight's gradient that is acceptable."""
        squares = one.gradient_squares if one.momentum is None else one.momentum**2 * one.weight_numel
        return self.target**2 * squares

    def _tolerated(self, one: LayerMeasurement) -> float:
        return math.inf if one.noise_squares is None else self.guard * one.noise_squares

    def _fewest(self, ones: list[LayerMeasurement], floor: int, limit: Any) -> int:
        """Activation assessment: fewest bits with which no gradient's variance is above its limit."""
        for bits in range(floor, MOST_BITS):
            if all(one.sensitivity * step_variance(bits) <= limit(one) for one in ones):
                return bits
        return max(floor, MOST_BITS)

    def _bounds(self, units: Mapping[Unit, list[LayerMeasurement]], most: float) -> Choice:
        bounds: dict[Unit, float] = {}
        guarded = []
        for unit, ones in units.items():
            wanted, safe = (
                min(
                    (error_bound(math.sqrt(limit(one)), one.sensitivity, 1.0) for one in ones if limit(one) > 0),
                    default=math.inf,  # a gradient of zero says nothing
                )
                for limit in (self.allowed, self._tolerated)
            )
            bounds[unit] = min(most, wanted, safe)
            if safe < min(most, wanted):
                guarded.append(unit)
        errors = self._errors(units, {unit: bound**2 / 3 for unit, bound in bounds.items()})
        return Choice({}, bounds, tuple(guarded), *errors)

    def _errors(
        self, units: Mapping[Unit, list[LayerMeasurement]], variances: Mapping[Unit, float]
    ) -> tuple[float, float | None]:
        """Relative deviation of all gradients together, and its variance over that from batch to batch."""
        modelled = [(one, one.sensitivity * variances[unit]) for unit, ones in units.items() for one in ones]
        squares = sum(one.gradient_squares for one, _ in modelled)
        relative = math.sqrt(sum(variance for _, variance in modelled) / squares) if squares else 0.0
        known = [(variance, one.noise_squares) for one, variance in modelled if one.noise_squares]
        noise = sum(noise for _, noise in known)
        return relative, sum(variance for variance, _ in known) / noise if noise else None

    def measured_error(self) -> float:
        """Relative deviation of all gradients together, as it was when they were measured."""
        known = [(one.error_squares, one.gradient_squares) for one in self.measured.values() if one.error_squares]
        squares = sum(gradient for _, gradient in known)
        return math.sqrt(sum(error for error, _ in known) / squares) if squares else 0.0
