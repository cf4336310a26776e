"""Amounts of memory as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

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
