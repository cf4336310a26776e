"""Arguments that users give, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_efficient.precision.formats import FORMATS, AtRandom, Format
from lightning_efficient.precision.signs import Limits

__all__ = ["limits_of", "rounding_of", "whole_number"]


def limits_of(thresholds: Mapping[str, float] | None) -> Limits | None:
    """Limits that are given rather than learnt; None: they are learnt.

    Raises:
        ValueError: If there is no such limit, or it is negative.
    """
    if thresholds is None:
        return None
    known = Limits().state_dict()
    for name, value in thresholds.items():
        if name not in known:
            raise ValueError(f"thresholds has {name!r}; there are {', '.join(known)}.")
        if not value >= 0:
            raise ValueError(f"thresholds[{name!r}]={value!r} must be 0 or more.")
    return Limits(**thresholds)


def whole_number(name: str, number: Any, least: int, other: str = "") -> None:
    """Complain if ``number`` is none, or less than ``least``; ``other``: what else it may be.

    Raises:
        ValueError: So.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}={number!r} must be a whole number, {least} or more{other}.")


def rounding_of(given: Any, low: Format) -> AtRandom:
    """What is rounded up or down at random; None: gradients, if the format can.

    Raises:
        ValueError: If ``given`` is nothing of that, or the format cannot.
    """
    if given not in (True, False, None, "gradients"):
        raise ValueError(f"stochastic_rounding={given!r}: it can be True, False, 'gradients' or None.")
    if given and not low.at_random:
        known = ", ".join(name for name, form in FORMATS.items() if form.at_random)
        raise ValueError(f"stochastic_rounding: low={low.name!r} rounds to nearest only; these can do both: {known}.")
    if given is None:
        return "gradients" if low.at_random else False
    return bool(given) if given != "gradients" else "gradients"
