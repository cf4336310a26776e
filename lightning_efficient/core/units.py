"""Amounts of memory, and other numbers, as people write them."""

from __future__ import annotations

import re

__all__ = ["digits", "human_bytes", "parse_bytes"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FACTORS |= {f"{prefix}i": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(amount: int | str, argument: str) -> int:
    """Bytes from a number or a text such as ``"2GiB"`` or ``"500 MB"``.

    Args:
        amount: What was given.
        argument: Its name, for the message.

    Raises:
        ValueError: If it is neither, or not positive.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | str):
        raise ValueError(f"{argument}={amount!r} is no amount of memory. Give bytes, or a text such as '2GiB'.")
    if isinstance(amount, str):
        match = _PATTERN.fullmatch(amount)
        if not match:
            raise ValueError(f"{argument}={amount!r} is no amount of memory. Give bytes, or a text such as '2GiB'.")
        value = int(float(match[1]) * _FACTORS[(match[2] or "").lower()])
    else:
        value = amount
    if value <= 0:
        raise ValueError(f"{argument}={amount!r} must be more than nothing.")
    return value


def human_bytes(value: float) -> str:
    """``1.5 GiB`` and the like."""
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value /= 1024
        power += 1
    return f"{digits(value)} {_BINARY[power]}"


def digits(value: float) -> str:
    """At least three digits that matter, never an exponent for what a person can read without."""
    if value == 0 or (float(value).is_integer() and abs(value) < 10_000):
        return f"{value:.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 0.001:
        return f"{value:.3g}"
    return f"{value:.2e}"
