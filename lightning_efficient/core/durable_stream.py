"""A durable file that is written in pieces of any length, through a small buffer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_efficient.core.buffers import HostBuffer, round_up
from lightning_efficient.core.durable_file import DurableFile

__all__ = ["BUFFER_BYTES", "DurableStream", "durable_stream"]

BUFFER_BYTES = 8 << 20
"""Memory that it takes, however large the file."""


class DurableStream:
    """What ``torch.save`` and others write to; it uses no thread and takes no lock.

    Attributes:
        nbytes: Written so far.

    Args:
        file: That takes whole pages.
    """

    def __init__(self, file: DurableFile) -> None:
        self.nbytes = 0
        self._file = file
        self._buffer = HostBuffer(BUFFER_BYTES)
        self._filled = 0

    def write(self, data: Any) -> int:
        """Write anything with a contiguous buffer behind the rest.

        Returns:
            Its bytes.

        Raises:
            OSError: As the system says.
        """
        count = memoryview(data).nbytes
        left = memoryview(data).cast("B") if count else memoryview(b"")
        while len(left):
            part = left[: self._buffer.nbytes - self._filled]
            self._buffer.view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == self._buffer.nbytes:
                self._file.append(self._buffer.view)
                self._filled = 0
        self.nbytes += count
        return count

    def flush(self) -> None:
        """Nothing: the file is there when all of it is."""

    def finish(self) -> None:
        """Write what the buffer still holds, up to a whole page."""
        self._file.append(self._buffer.view[: round_up(self._filled)])
        self._filled = 0


@contextlib.contextmanager
def durable_stream(path: Path) -> Iterator[DurableStream]:
    """Write a file that appears under its name at the end, whole and on the disk, or not at all.

    Raises:
        OSError: As the system says; what had the name before still has it.
    """
    file = DurableFile(path)
    try:
        stream = DurableStream(file)
        yield stream
        stream.finish()
        file.commit(stream.nbytes)
    except BaseException:
        file.abandon()
        raise
