"""What is kept raw, compressed, offloaded or made again, so that a batch of this size stays within a budget.

(After Liao et al. 2023, "Mimose": what each layer saves is a polynomial of the input's size, of which a few batches
show the coefficients while training goes on; each size gets a plan of its own.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_efficient.activation_compression.classify import EXACT
from lightning_efficient.activation_compression.layers import is_in
from lightning_efficient.activation_compression.ledger import PassSizes
from lightning_efficient.activation_compression.operations import Kind
from lightning_efficient.activation_compression.store import Unit

__all__ = ["MemoryPlan", "MemoryPlanner", "make_plan"]

_LEVELS = (EXACT, 8, 7, 6, 5, 4, 3, 2)
_OFFLOADED = 4  # bits at which what can go to the host goes there before it gets fewer
_FIRST = (
    "loss",
    "checkpoint",
    "attention",
    "activation",
    "other",
    "pooling",
    "dropout",
    "block",
    "normalization",
    "linear",
)
"""Which kinds of operation get what is left of the budget first: those whose errors reach the most gradients."""
_KEEP = 64  # sizes that are remembered


@dataclass(frozen=True)
class MemoryPlan:
    """For one size of input.

    Attributes:
        levels: Of each unit.
        offloaded: Units whose compressed numbers go to the host's memory.
        recomputed: Modules whose forward is done again in backward, so that only their inputs are kept.
        predicted_bytes: That it takes, at the end of the forward pass, with what the largest of ``recomputed`` needs
            while it is made again.
        budget_bytes: That it may take.
        uncompressed: Whether all that autograd saves fits as it is, so that nothing need be looked at.
    """

    levels: Mapping[Unit, int]
    offloaded: frozenset[Unit]
    recomputed: tuple[str, ...]
    predicted_bytes: float
    budget_bytes: float
    uncompressed: bool = False

    @property
    def fits(self) -> bool:
        return self.predicted_bytes <= self.budget_bytes

    def describe(self) -> str:
        """In a few words."""
        if self.uncompressed:
            return "everything uncompressed"
        counts: dict[str, int] = defaultdict(int)
        for unit, level in self.levels.items():
            if not any(is_in(unit[1], block) for block in self.recomputed):
                words = "raw" if level == EXACT else f"{level} bits"
                counts[words + (" on the host" if unit in self.offloaded else "")] += 1
        parts = [f"{count} x {words}" for words, count in counts.items()]
        return ", ".join(parts + [f"{name} recomputed" for name in self.recomputed])


class MemoryPlanner:
    """Knows what batches of each size save."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, PassSizes]] = {}

    def note(self, signature: str, size: int, found: PassSizes, recomputed: Sequence[str]) -> None:
        """A batch of ``size`` numbers and of this ``signature`` (the shapes) saved ``found``.

        Of layers in ``recomputed`` modules it shows nothing; what was predicted for them stays.
        """
        expected = self.predict(signature, size) if recomputed else None
        if expected is not None:
            hidden = _only(expected, lambda layer: any(is_in(layer, block) for block in recomputed))
            found.numbers = hidden.numbers | {u: n for u, n in found.numbers.items() if u not in hidden.numbers}
            found.fixed = defaultdict(float, hidden.fixed | {k: v for k, v in found.fixed.items() if v})
            found.saved = defaultdict(float, {**found.saved, **hidden.saved})
        self._seen.pop(signature, None)
        self._seen[signature] = size, found
        if len(self._seen) > _KEEP:
            del self._seen[next(iter(self._seen))]

    def knows(self, signature: str) -> bool:
        """Whether a batch of these shapes was seen."""
        return signature in self._seen

    def predict(self, signature: str, size: int) -> PassSizes | None:
        """What a batch will save; None if none was seen yet."""
        if signature in self._seen:
            return self._seen[signature][1]
        if not self._seen:
            return None
        passes = list(self._seen.values())
        curve = _Curve([seen for seen, _ in passes], size)
        units = {unit: numel[1] for _, found in passes for unit, numel in found.numbers.items()}
        layers = {layer for _, found in passes for layer in (*found.fixed, *found.saved)}
        return PassSizes(
            {u: (curve([found.numbers.get(u, (0, 0))[0] for _, found in passes]), item) for u, item in units.items()},
            defaultdict(float, {k: curve([found.fixed.get(k, 0) for _, found in passes]) for k in layers}),
            defaultdict(float, {k: curve([found.saved.get(k, 0) for _, found in passes]) for k in layers}),
        )

    def state_dict(self) -> dict[str, Any]:
        return {signature: [size, found.state_dict()] for signature, (size, found) in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = {signature: (size, PassSizes.from_state(found)) for signature, (size, found) in state.items()}


def make_plan(
    sizes: PassSizes,
    budget_bytes: float,
    floor: Callable[[Kind], int],
    *,
    group_size: int,
    blocks: Iterable[str] = (),
    host: bool = False,
    known: bool = False,
) -> MemoryPlan:
    """The least harm that fits: as many bits as possible, then the host, then fewer bits, then modules made again.

    Args:
        sizes: What will be saved.
        budget_bytes: For it.
        floor: Fewest bits by kind of operation.
        group_size: See :func:`quantize`.
        blocks: Modules that can be made again, in the order of the forward pass.
        host: Whether there is another memory than that of the device.
        known: Whether ``sizes`` are what such a batch has saved, not what it is believed to: then it may be left alone.
    """

    def unit_bytes(unit: Unit, level: int) -> float:
        numel, itemsize = sizes.numbers[unit]
        return numel * itemsize if level == EXACT else numel * level / 8 + 4 * math.ceil(numel / group_size)

    def at(level: int, unit: Unit) -> int:
        return max(level, floor(unit[0]))  # type: ignore[arg-type]

    fixed = sum(sizes.fixed.values())
    units = [unit for unit in sizes.numbers if unit[0] != "block"]
    if known and sizes.saved_bytes <= budget_bytes:
        raw = dict.fromkeys(units, EXACT)
        return MemoryPlan(raw, frozenset(), (), sizes.saved_bytes, budget_bytes, uncompressed=True)
    offloaded: frozenset[Unit] = frozenset()
    levels: dict[Unit, int] = {}
    total = fixed
    for level in _LEVELS:
        levels = {unit: at(level, unit) for unit in units}
        total = fixed + sum(unit_bytes(unit, level) for unit, level in levels.items())
        if total > budget_bytes and host and level <= _OFFLOADED:
            offloaded = frozenset(levels)
            total = fixed
        if total <= budget_bytes:
            break
    recomputed: tuple[str, ...] = ()
    if total > budget_bytes:
        gains = {}
        for block in blocks:
            inside = [unit for unit in units if is_in(unit[1], block) and unit not in offloaded]
            gain = sum(unit_bytes(unit, levels[unit]) for unit in inside)
            gain += sum(size for layer, size in sizes.fixed.items() if is_in(layer, block))
            if ("block", block) in sizes.numbers:  # its input
                gain -= unit_bytes(("block", block), floor("block"))
            gains[block] = gain, sum(size for layer, size in sizes.saved.items() if is_in(layer, block))
        recomputed, total = _again(gains, total, budget_bytes)
    if not recomputed and not offloaded:
        total = _spend(levels, total, budget_bytes, unit_bytes)
    return MemoryPlan(levels, offloaded, recomputed, total, budget_bytes)


def _again(gains: Mapping[str, tuple[float, float]], total: float, budget: float) -> tuple[tuple[str, ...], float]:
    """Which modules to make again, the first ones, and what is taken then: with what the largest of them needs once."""
    best: tuple[tuple[str, ...], float] = (), total
    chosen: list[str] = []
    working = 0.0
    for block, (gain, needs) in gains.items():
        chosen.append(block)
        total, working = total - gain, max(working, needs)
        if total + working < best[1]:
            best = tuple(chosen), total + working
        if best[1] <= budget:
            break
    return best


def _spend(levels: dict[Unit, int], total: float, budget: float, unit_bytes: Callable[[Unit, int], float]) -> float:
    """Raise units by a level each, as far as the budget goes; returns what is taken then."""
    for unit in sorted(levels, key=lambda unit: _FIRST.index(unit[0])):
        level = levels[unit]
        if level < EXACT:
            above = _LEVELS[_LEVELS.index(level) - 1] if level in _LEVELS else 2
            more = unit_bytes(unit, above) - unit_bytes(unit, level)
            if total + more <= budget:
                levels[unit], total = above, total + more
    return total


def _only(sizes: PassSizes, hidden: Callable[[str], bool]) -> PassSizes:
    return PassSizes(
        {unit: numel for unit, numel in sizes.numbers.items() if hidden(unit[1]) and unit[0] != "block"},
        defaultdict(float, {layer: size for layer, size in sizes.fixed.items() if hidden(layer)}),
        defaultdict(float, {layer: size for layer, size in sizes.saved.items() if hidden(layer)}),
    )


class _Curve:
    """The polynomial through what was seen at some sizes, at another one: as many terms as they tell, up to squares."""

    def __init__(self, seen: Sequence[int], size: int) -> None:
        different = len(set(seen))
        powers = (1,) if different == 1 else (0, 1) if different == 2 else (0, 1, 2)
        scale = max(1, *seen)  # a batch may be empty
        basis = torch.tensor([[(one / scale) ** power for power in powers] for one in seen], dtype=torch.float64)
        at = torch.tensor([(size / scale) ** power for power in powers], dtype=torch.float64)
        self._weights = (at @ torch.linalg.pinv(basis)).tolist()

    def __call__(self, values: Sequence[float]) -> float:
        return max(0.0, sum(weight * value for weight, value in zip(self._weights, values, strict=True)))
