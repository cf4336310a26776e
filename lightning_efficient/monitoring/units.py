"""Tags ``<technique>/<quantity>_<unit>`` in words, and their values in units that a person reads."""

from __future__ import annotations

import math

from lightning_efficient.core.units import digits, human_bytes

__all__ = ["human", "label_of", "technique_of", "unit_of"]

_SUFFIXES = {
    "_gigabytes_per_second": "GB/s",
    "_bytes": "bytes",
    "_per_s": "per_s",
    "_ms": "ms",
    "_seconds": "s",
    "_s": "s",
    "_percent": "%",
}


def technique_of(tag: str) -> str:
    """``growth/parameters`` is of ``growth``."""
    return tag.partition("/")[0]


def unit_of(tag: str) -> str:
    """One of ``bytes``, ``GB/s``, ``per_s``, ``ms``, ``s``, ``%``, or the empty string for counts and ratios."""
    for suffix, unit in _SUFFIXES.items():
        if tag.endswith(suffix):
            return unit
    return ""


def label_of(tag: str) -> str:
    """The quantity in words, without its technique and, but for a rate, without its unit."""
    name = tag.partition("/")[2] or tag
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    name = f"{name}econd" if suffix == "_per_s" else name.removesuffix(suffix)
    return name.replace("/", " ").replace("_", " ")


def human(value: float, unit: str = "") -> str:
    """``value`` with at most four digits that matter, in the largest fitting unit.

    Args:
        value: The number.
        unit: As of :func:`unit_of`.
    """
    if not math.isfinite(value):
        return "not measured" if math.isnan(value) else f"{value:+}"
    if unit == "bytes":
        return human_bytes(value)
    if unit == "ms":
        return _short(value, "ms") if abs(value) < 10_000 else _duration(value / 1e3)
    if unit == "s":
        return _duration(value)
    if unit in ("%", "GB/s"):
        return _short(value, unit)
    return _decimal(value) + ("/s" if unit == "per_s" else "")


def _decimal(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return _short(value / (1e3 if letter == "k" else size), letter)
    return f"{value:,.0f}" if float(value).is_integer() else digits(value)


def _duration(seconds: float) -> str:
    if abs(seconds) < 120:
        return _short(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def _short(value: float, unit: str) -> str:
    return f"{digits(value)} {unit}"
