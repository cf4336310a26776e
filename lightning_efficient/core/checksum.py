"""CRC-32 as ZIP files have it, at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from isal import isal_zlib

    _crc32: Callable[[Any, int], int] = isal_zlib.crc32
except ImportError:  # no wheel for this machine: the same value, more slowly
    import zlib

    _crc32 = zlib.crc32

__all__ = ["crc32"]


def crc32(data: Any, value: int = 0) -> int:
    """Of anything with a contiguous buffer; other threads run meanwhile.

    Args:
        data: What it is taken of.
        value: Of what lies before, to go on from.
    """
    return _crc32(data, value)
