"""How many bits for what: by the kind of operation, the layer, and the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from lightning_efficient.activation_compression.classify import BOUNDED, EXACT, FP8
from lightning_efficient.activation_compression.operations import FLOORS, Kind
from lightning_efficient.activation_compression.store import Unit

__all__ = ["LayerRates", "Override"]

Override = int | Literal["raw", "fp8"]
_LEVELS = {"raw": EXACT, "fp8": FP8}

_TOLERANT = ("linear", "normalization")


class LayerRates:
    """The rates of a run.

    Args:
        bits: For the inputs of linear operations, or a level beside them; others have a floor (:data:`FLOORS`).
        error_bound: In place of bits, for all operations.
        overrides: By pattern of a module's name, for all that it and those in it save; the first that fits counts.
        least: For operations other than linear ones and normalizations, where that is more than their floors.

    Attributes:
        bits: To be changed between steps, as is ``error_bound``.
        chosen: Bits of some units in place of ``bits``, never less than their floors; None: nobody chooses.
        bounds: Likewise error bounds, never more than ``error_bound``.
    """

    def __init__(
        self,
        bits: float,
        overrides: Mapping[str, Override] | None = None,
        error_bound: float | None = None,
        least: int | None = None,
    ) -> None:
        self.bits = bits
        self.error_bound = error_bound
        self.overrides = dict(overrides or {})
        self.chosen: Mapping[Unit, int] | None = None
        self.bounds: Mapping[Unit, float] = {}
        self._least = least
        self._found: dict[str, float | None] = {}

    def of(self, kind: Kind, layer: str) -> tuple[float, float]:
        """Bits of a number that an operation of ``kind`` saves in ``layer``, and how many would do.

        :data:`FP8`, or :data:`EXACT` for all of them. Where somebody chooses by layer, what is kept already has been
        chosen for all who need it: the floor will do.
        """
        override = self.override(layer)
        if override is not None:
            return override, override
        if self.error_bound is not None:
            return BOUNDED, BOUNDED
        floor = self.floor(kind)
        if self.chosen is None:
            level = max(self.bits, floor)
            return level, level
        return max(self.chosen.get((kind, layer), self.bits), floor), floor

    def bound(self, unit: Unit) -> float | None:
        """Of the errors of what is at the level :data:`BOUNDED`."""
        if self.error_bound is None:
            return None
        return min(self.error_bound, self.bounds.get(unit, self.error_bound))

    def floor(self, kind: Kind) -> int:
        """Fewest bits for what an operation of this kind saves."""
        return FLOORS[kind] if self._least is None or kind in _TOLERANT else max(FLOORS[kind], self._least)

    def override(self, layer: str) -> float | None:
        """Bits that the user asked for in this layer."""
        if layer not in self._found:
            self._found[layer] = self._override(layer)
        return self._found[layer]

    def unused(self, layers: Iterable[str]) -> list[str]:
        """Patterns that fit none of these."""
        names = list(layers)
        return [pattern for pattern in self.overrides if not any(fits(pattern, name) for name in names)]

    def _override(self, layer: str) -> float | None:
        for pattern, value in self.overrides.items():
            if fits(pattern, layer):
                return _LEVELS[value] if isinstance(value, str) else value
        return None


def fits(pattern: str, layer: str) -> bool:
    """Whether ``pattern`` names ``layer`` or one that it is in, by its whole name or by the end of it."""
    parts = layer.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in names)
