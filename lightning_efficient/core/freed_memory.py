"""Freed memory of the host goes back to the system, where the C library would keep it.

That of GNU keeps what is freed in its heap. It also learns: whoever frees a tensor of some MiB makes it put the next
one of that size into the heap too (up to 32 MiB), and before version 2.38 freed memory that was aligned, as that of
tensors is, is not used for the next tensor of the same size. A training run then holds the memory of gradients and
temporary tensors two or three times. Where a run is to stay within an amount of memory, large tensors therefore get
mappings of their own (``M_MMAP_THRESHOLD``), which end with them. What that costs is to have their pages made anew each
time; ``malloc_trim`` after each step costs as much, and comes too late for the peak within the step.

Other C libraries (musl, that of macOS) give large memory back by themselves: nothing is done there. Nor is it where the
environment says already what the C library should do.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from functools import cache
from typing import Any

__all__ = ["ReturnsFreedMemory", "return_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED = 128 << 10  # from which on memory has its own mapping: what the C library begins with
_KEPT = 1 << 20  # at the end of the heap, for small things that come and go
_LEARNT = 32 << 20  # the most that the C library comes to by itself, and of the end of the heap twice that


def return_freed_memory() -> None:
    """Give the system what was freed and is still in the heap."""
    trim = getattr(_gnu(), "malloc_trim", None)
    if trim is not None:
        trim(0)


class ReturnsFreedMemory:
    """From its making until :meth:`close`, freed memory of 128 KiB and more goes back to the system at once.

    Of the whole process; any number may be at work at a time. After the last one the C library keeps freed memory as
    it does once tensors of 32 MiB were freed, which is what it comes to in training.
    """

    def __init__(self) -> None:
        user = object()
        with _lock:
            _users.add(user)
            _set(_MAPPED, _KEPT)
        self._end = weakref.finalize(self, _leave, user)
        return_freed_memory()

    def close(self) -> None:
        """May be called again."""
        self._end()


_lock = threading.RLock()  # also taken by what is collected meanwhile
_users: set[object] = set()


def _leave(user: object) -> None:
    with _lock:
        _users.discard(user)
        if not _users:
            _set(_LEARNT, 2 * _LEARNT)


def _set(mapped_bytes: int, kept_bytes: int) -> None:
    change = getattr(_gnu(), "mallopt", None)
    if change is not None and not _chosen_by_user():
        change(_M_MMAP_THRESHOLD, mapped_bytes)
        change(_M_TRIM_THRESHOLD, kept_bytes)


def _chosen_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in tunables


@cache
def _gnu() -> Any:
    """The C library, if it is that of GNU."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
