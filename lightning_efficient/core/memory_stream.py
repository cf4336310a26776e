"""Memory that is read as a file."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["MemoryStream"]


class MemoryStream(io.RawIOBase):
    """Reads memory as a file, without a copy of it.

    Args:
        view: Of the memory.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, len(self._view))[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
