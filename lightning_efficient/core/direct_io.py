"""Whether the reads and writes of an open file go past the page cache."""

from __future__ import annotations

import fcntl
import os

__all__ = ["set_direct"]


def set_direct(descriptor: int, on: bool) -> bool:
    """Let reads and writes go past the page cache (``O_DIRECT``), or through it again.

    Some file systems refuse it at once; others only when it comes to reading or writing (``EINVAL``).

    Returns:
        Whether they go past it now.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on
