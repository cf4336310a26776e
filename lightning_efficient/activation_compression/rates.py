"""How many bits for what: by the kind of operation, the layer, and the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from lightning_efficient.activation_compression.classify import BOUNDED, EXACT, FP8
from lightning_efficient.activation_compression.operations import FLOORS, Kind

__all__ = ["LayerRates", "Override"]

Override = int | Literal["raw", "fp8"]
_LEVELS = {"raw": EXACT, "fp8": FP8}


class LayerRates:
    """The rates of a run.

    Args:
        bits: For the inputs of linear operations, or a level beside them; others have a floor (:data:`FLOORS`).
        error_bound: In place of bits, for all operations.
        overrides: By pattern of a module's name, for all that it and those in it save; the first that fits counts.

    Attributes:
        bits: To be changed between steps, as is ``error_bound``.
    """

    def __init__(
        self, bits: float, overrides: Mapping[str, Override] | None = None, error_bound: float | None = None
    ) -> None:
        self.bits = bits
        self.error_bound = error_bound
        self.overrides = dict(overrides or {})
        self._found: dict[str, float | None] = {}

    def of(self, kind: Kind, layer: str) -> float:
        """Bits of a number that an operation of ``kind`` saves in ``layer``; :data:`FP8`; :data:`EXACT` for all."""
        if layer not in self._found:
            self._found[layer] = self._override(layer)
        found = self._found[layer]
        if found is not None:
            return found
        return max(self.bits, FLOORS[kind]) if self.error_bound is None else BOUNDED

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
