"""What the user asked for, checked and turned into phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lightning_efficient.growth.moments import StateMode
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.schedule import Until, parse_until
from lightning_efficient.growth.sharing import SharingPattern, sharing_leaders

__all__ = ["Mode", "Phase", "Settings", "WidthSettings", "check_stages", "make_phases", "parse_width"]

Mode = Literal["share", "stack", "interleave", "middle"]

DEFAULT_FRACTIONS = {"share": 0.10, "depth": 0.50, "width": 0.20}
"""Caps where the user gives none, as fractions of the run."""


@dataclass(frozen=True)
class Phase:
    """One part of the run with one arrangement of the layers.

    Attributes:
        leaders: See :mod:`lightning_efficient.growth.arrangement`.
        until: When it ends; None for the last.
        lr_scale: Factor on the user's learning rates while it lasts.
    """

    leaders: tuple[int, ...]
    until: Until | None
    lr_scale: float = 1.0

    def __str__(self) -> str:
        distinct = len(set(self.leaders))
        noun = "layer" if len(self.leaders) == 1 else "layers"
        weights = (
            f" with {distinct} set{'s' if distinct > 1 else ''} of weights" if distinct < len(self.leaders) else ""
        )
        return f"{len(self.leaders)} {noun}{weights}"


@dataclass(frozen=True)
class WidthSettings:
    """The narrow first phase; see :func:`parse_width`."""

    factor: int
    until: Until
    arguments: Mapping[str, Any] | None = None
    build: Any = None
    readout: str | None = None
    sections: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: all but when to grow, and how to build the narrow model."""
        return {
            "factor": self.factor,
            "arguments": dict(self.arguments) if self.arguments else None,
            "readout": self.readout,
            "sections": dict(self.sections) if self.sections else None,
        }


@dataclass(frozen=True)
class Settings:
    """All that the user asked for, except when readings are taken; see ``GrowAndUnshareCallback``.

    Raises:
        ValueError: Naming the argument that is out of range, or does not go with another.
    """

    layers: str | list[str] | None
    mode: Mode | None
    stages: Sequence[Mapping[str, Any]] | None
    unit: int | None
    sharing: SharingPattern
    until: Any
    unshare: Literal["together", "by_correlation"]
    width: WidthSettings | None
    optimizer_state: StateMode
    gradient: Literal["mean", "sum"]
    lr_scale: float
    rewarm_steps: int

    def __post_init__(self) -> None:
        check_stages(self.mode, self.stages, self.unit, self.until)
        for name, allowed in (
            ("sharing", ("cycle", "sequence", "all")),
            ("unshare", ("together", "by_correlation")),
            ("optimizer_state", ("copy", "reset")),
            ("gradient", ("mean", "sum")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {list(allowed)}.")
        check_count("rewarm_steps", self.rewarm_steps, least=0)
        if self.unit is not None:
            check_count("unit", self.unit, least=1)
        check_factor("lr_scale", self.lr_scale)
        if self.layers is not None and not isinstance(self.layers, str | list | tuple):
            raise ValueError(f"layers={self.layers!r}: expected a pattern such as 'blocks.*', or a list of them.")
        if self.unshare == "by_correlation" and self.mode != "share":
            raise ValueError(f"unshare='by_correlation' is for mode='share', not for mode={self.mode!r}.")
        if self.mode == "share" and self.stages is None:
            until = parse_until(self.until, where="until", default_fraction=DEFAULT_FRACTIONS["share"])
            if self.unshare == "by_correlation" and until.correlation_below is None:
                raise ValueError(
                    "unshare='by_correlation' needs the threshold under which groups are split: "
                    "until={'correlation_below': 0.5, 'fraction': 0.1}."
                )

    def phases(self, full_depth: int) -> list[Phase]:
        """The phases of a model with ``full_depth`` repeated layers; see :func:`make_phases`."""
        return make_phases(
            self.mode,
            self.stages,
            unit=self.unit,
            sharing=self.sharing,
            until=self.until,
            lr_scale=self.lr_scale,
            full_depth=full_depth,
        )


def check_count(name: str, value: Any, *, least: int) -> None:
    """Whether ``value`` is a whole number of at least ``least``.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number, at least {least}.")


def check_factor(name: str, value: Any) -> None:
    """Whether ``value`` is a number above zero.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a factor above 0.")


def parse_width(width: Mapping[str, Any] | None) -> WidthSettings | None:
    """Read ``width`` as a user writes it.

    Raises:
        ValueError: If a key is unknown or the factor is not an integer above one.
    """
    if width is None:
        return None
    known = ["factor", "until", "arguments", "build", "readout", "sections"]
    if not isinstance(width, Mapping):
        raise ValueError(f"width={width!r}: expected a mapping such as {{'factor': 2, 'until': 0.2}}.")
    unknown = sorted(set(width) - set(known))
    if unknown:
        raise ValueError(f"width has unknown keys {unknown}; allowed are {known}.")
    factor = width.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"width.factor={factor!r}: expected an integer of at least 2, e.g. width={{'factor': 2}}.")
    until = parse_until(width.get("until"), where="width.until", default_fraction=DEFAULT_FRACTIONS["width"])
    if until.correlation_below is not None:
        raise ValueError("width.until.correlation_below: gradient correlation compares layers; it is for mode='share'.")
    rest = {key: width[key] for key in known[2:] if width.get(key) is not None}
    return WidthSettings(factor, until, **rest)


def check_stages(mode: Mode | None, stages: Sequence[Mapping[str, Any]] | None, unit: int | None, until: Any) -> None:
    """Check what can be checked without the model.

    Raises:
        ValueError: Naming the argument.
    """
    if mode is not None and mode not in ("share", *DEPTH_OPERATORS):
        raise ValueError(f"mode={mode!r}: expected one of {['share', *DEPTH_OPERATORS]}.")
    if mode != "share" and unit is not None:
        raise ValueError(f"unit={unit} is for mode='share', not for mode={mode!r}.")
    if mode != "share" and until is not None:
        raise ValueError(
            f"until={until!r} is for mode='share'. For mode={mode!r} give it for each stage: "
            "stages=[{'depth': 2, 'until': 0.25}, {'depth': 8}]."
        )
    if stages is None:
        return
    if mode is None or (mode == "share" and (unit is not None or until is not None)):
        raise ValueError("Give either `stages` or `unit` and `until`, with a `mode`.")
    if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence):
        raise ValueError(f"stages={stages!r}: expected a list such as [{{'depth': 2, 'until': 0.25}}, {{'depth': 8}}].")
    if len(stages) < 2:
        raise ValueError(f"stages={list(stages)!r}: expected at least two, the last of them the full model.")
    size = "unit" if mode == "share" else "depth"
    for i, stage in enumerate(stages):
        if not isinstance(stage, Mapping):
            raise ValueError(f"stages[{i}]={stage!r}: expected a mapping such as {{'{size}': 2, 'until': 0.25}}.")
        unknown = sorted(set(stage) - {size, "until", "lr_scale"})
        if unknown:
            raise ValueError(f"stages[{i}] has unknown keys {unknown}; mode={mode!r} allows {size}, until, lr_scale.")
        last = i == len(stages) - 1
        value = stage.get(size)
        if not (last and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"stages[{i}].{size}={value!r}: expected a number of layers, at least 1.")
        if last and stage.get("until") is not None:
            raise ValueError(f"stages[{i}].until: the last stage lasts to the end of the run; leave `until` out.")
        scale = stage.get("lr_scale", 1.0)
        check_factor(f"stages[{i}].lr_scale", scale)
        if not last:
            parse_until(stage.get("until"), where=f"stages[{i}].until", default_fraction=0.5)


def make_phases(
    mode: Mode | None,
    stages: Sequence[Mapping[str, Any]] | None,
    *,
    unit: int | None,
    sharing: SharingPattern,
    until: Any,
    lr_scale: float,
    full_depth: int,
) -> list[Phase]:
    """The phases of a model with ``full_depth`` repeated layers; the last is the full model.

    Raises:
        ValueError: If a stage does not fit the model or the one before it.
    """
    full = tuple(range(full_depth))
    if mode is None:
        return [Phase(full, None)]
    if mode == "share":
        stages = stages or [{"unit": unit or (2 if sharing == "sequence" else 1), "until": until}, {}]
        build = lambda value: full if value is None else sharing_leaders(full_depth, sharing, value)  # noqa: E731
    else:
        stages = stages or _default_depths(full_depth)
        build = lambda value: full if value is None else tuple(range(value))  # noqa: E731
    size = "unit" if mode == "share" else "depth"
    fraction = DEFAULT_FRACTIONS["share" if mode == "share" else "depth"]
    phases: list[Phase] = []
    for i, stage in enumerate(stages):
        last = i == len(stages) - 1
        condition = None
        if not last:
            share_of_cap = fraction * (i + 1) / (len(stages) - 1)
            condition = parse_until(stage.get("until"), where=f"stages[{i}].until", default_fraction=share_of_cap)
        leaders = build(stage.get(size))
        if len(leaders) > full_depth:
            raise ValueError(f"stages[{i}].depth={stage[size]}, but the model has {full_depth} repeated layers.")
        phases.append(Phase(leaders, condition, float(stage.get("lr_scale", 1.0 if last else lr_scale))))
    if phases[-1].leaders != full:
        raise ValueError(
            f"The last stage is {phases[-1]}, but the model has {full_depth} repeated layers; the last stage must be "
            f"the full model. Leave its {size} out, or write {size}: {full_depth}."
        )
    for i, (before, after) in enumerate(pairwise(phases)):
        grows = len(set(after.leaders)) > len(set(before.leaders))
        refines = mode != "share" or all(before.leaders[a] == before.leaders[k] for k, a in enumerate(after.leaders))
        if not grows or not refines:
            raise ValueError(
                f"stages[{i + 1}] ({after}) does not continue stages[{i}] ({before}): each stage must have more layers "
                "of its own than the one before and, with mode='share', split its groups."
            )
        for field in ("step", "fraction"):
            first, second = getattr(before.until, field, None), getattr(after.until, field, None)
            if first is not None and second is not None and second <= first:
                raise ValueError(
                    f"stages[{i + 1}].until.{field}={second} does not come after stages[{i}].until.{field}={first}. "
                    "`until` counts from the start of the run; give increasing values."
                )
    return phases


def _default_depths(full_depth: int) -> list[dict[str, Any]]:
    """A quarter of the layers, then half of them ([Gong et al. 2019]), for longer than there: see the recipe page."""
    depths = sorted({max(1, full_depth // 4), max(1, full_depth // 2)} - {full_depth})
    caps = [0.25, 0.50][-len(depths) :]
    return [*({"depth": d, "until": cap} for d, cap in zip(depths, caps, strict=True)), {}]
