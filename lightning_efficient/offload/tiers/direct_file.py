"""A file that is read and written past the page cache, straight from and to the memory of the caller.

Where the file system refuses ``O_DIRECT`` (some refuse it only when it comes to reading or writing), the page cache is
used and told to let go of each piece. (Rajbhandari et al. 2021, "ZeRO-Infinity", 6.3: bulk reads and writes, aligned
buffers, no copies between.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_efficient.core.buffers import PAGE, BufferPool, round_up
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.direct_io import set_direct
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["PIECE", "DirectFile", "SystemCalls", "memory_at"]

PIECE = 16 << 20
"""Bytes that one call to the system moves at most."""

_NO_ALLOCATION = frozenset((errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV))


_ALLOCATE: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
_SYNC: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class SystemCalls:
    """What is asked of the system, so that a test can let any call fail."""

    preadv: Callable[[int, Sequence[Any], int], int] = os.preadv
    pwritev: Callable[[int, Sequence[Any], int], int] = os.pwritev
    fallocate: Callable[[int, int, int], None] | None = _ALLOCATE
    fdatasync: Callable[[int], None] = _SYNC
    statvfs: Callable[[int], os.statvfs_result] = os.fstatvfs


def memory_at(address: int, nbytes: int) -> memoryview:
    """The bytes there, for as long as somebody else keeps them alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class DirectFile:
    """Positional reads and writes of whole records, with their CRC-32.

    Each record begins at a page of the file and may fill up its last page. Page-aligned memory is used as it is; other
    memory goes through a buffer. Any number of threads may call at once.

    Attributes:
        path: For messages.
        nbytes: Of the file that are allocated.
        direct: Whether it goes past the page cache.

    Args:
        descriptor: Open for reading and writing; becomes this object's.
        path: Its name.
        buffers: For memory that is not aligned, and for last pages.
        staged_bytes: Size of such a buffer at most, whole pages.
        system: See :class:`SystemCalls`.
    """

    def __init__(
        self, descriptor: int, path: Path, buffers: BufferPool, staged_bytes: int, system: SystemCalls
    ) -> None:
        self.path = path
        self.nbytes = 0
        self._descriptor = descriptor
        self._buffers = buffers
        self._staged_bytes = staged_bytes
        self._system = system
        self.direct = set_direct(descriptor, True)

    @property
    def descriptor(self) -> int:
        """Of the open file; -1 once it is closed."""
        return self._descriptor

    def write(self, offset: int, address: int, nbytes: int) -> int:
        """Write memory to the file.

        Args:
            offset: In the file, a multiple of the page size, with room for whole pages.
            address: Of the memory.
            nbytes: Of the memory.

        Returns:
            The CRC-32 of the bytes.

        Raises:
            TierError: If the system cannot.
        """
        crc = 0
        for start, piece in self._pieces(address, nbytes):
            crc = crc32(memory_at(address + start, piece), crc)
            with self._aligned(address + start, piece) as (memory, staged, copied):
                ctypes.memmove(staged, address + start + piece - copied, copied)
                self._all("write", self._system.pwritev, offset + start, memory)
        return crc

    def read(self, offset: int, address: int, nbytes: int) -> int:
        """Fill memory from the file; arguments, result and errors as of :meth:`write`."""
        crc = 0
        for start, piece in self._pieces(address, nbytes):
            with self._aligned(address + start, piece) as (memory, staged, copied):
                self._all("read", self._system.preadv, offset + start, memory)
                ctypes.memmove(address + start + piece - copied, staged, copied)
            crc = crc32(memory_at(address + start, piece), crc)
        return crc

    def grow(self, nbytes: int) -> None:
        """Allocate the file up to ``nbytes`` in all; where the file system cannot, at least see that there is room.

        Raises:
            TierError: If there is not that much room.
        """
        needed = nbytes - self.nbytes
        if needed <= 0:
            return
        free = self._free_bytes()
        try:
            if needed > free:  # do not fill the disk first and find out then
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._allocate(needed)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.nbytes)
            raise TierError(
                error.errno,
                f"no room to offload to: {self.path.parent} has {free:,} bytes free and {needed:,} bytes more are "
                f"needed ({error.strerror}). Free space there, name a folder on a larger disk, lift a quota or file "
                "size limit (ulimit -f), or offload less",
                str(self.path),
            ) from error
        self.nbytes = nbytes

    def sync(self) -> None:
        """Until all that was written survives a loss of power.

        Raises:
            TierError: If the system cannot.
        """
        try:
            self._system.fdatasync(self._descriptor)
        except OSError as error:
            raise self._failure("fdatasync", 0, self.nbytes, error) from error

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Ask the page cache to let go of a part of the file (0 bytes: to its end)."""
        if self._descriptor >= 0 and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file, which keeps its name."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._buffers.clear()

    def _pieces(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """The offset and size of each piece of a record."""
        most = min(PIECE, self._staged_bytes) if address % PAGE else PIECE
        for start in range(0, nbytes, most):
            yield start, min(most, nbytes - start)

    @contextlib.contextmanager
    def _aligned(self, address: int, nbytes: int) -> Iterator[tuple[list[memoryview], int, int]]:
        """Whole pages of memory for a piece; where the last of them are staged, and how many bytes are."""
        straight = nbytes // PAGE * PAGE if address % PAGE == 0 else 0
        copied = nbytes - straight
        memory = [memory_at(address, straight)] if straight else []
        if not copied:
            yield memory, address, 0
            return
        buffer = self._buffers.take(round_up(copied))
        try:
            yield [*memory, buffer.view[: round_up(copied)]], buffer.address, copied
        finally:
            self._buffers.give_back(buffer)

    def _all(self, operation: str, call: Callable[..., int], offset: int, memory: list[memoryview]) -> None:
        """Call until all is moved: a call may do less than it was asked for."""
        start, nbytes = offset, sum(map(len, memory))
        while memory:
            direct = self.direct
            try:
                count = call(self._descriptor, memory, offset)
                if count <= 0:
                    raise OSError(errno.EIO, "the file ends here" if operation == "read" else "nothing was written")
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise self._failure(operation, offset, nbytes - (offset - start), error) from error
                self.direct = set_direct(self._descriptor, False)
                continue
            if count % PAGE and direct:  # it goes on within a page
                self.direct = set_direct(self._descriptor, False)
            offset += count
            memory = _behind(memory, count)
        if not self.direct:
            self.forget(start, nbytes)

    def _failure(self, operation: str, offset: int, nbytes: int, error: OSError) -> TierError:
        return TierError(
            error.errno,
            f"{operation} of {nbytes:,} bytes at offset {offset:,} of the offload file failed ({error.strerror}). "
            "Look at the disk's health and free space, or name another folder",
            str(self.path),
        )

    def _allocate(self, nbytes: int) -> None:
        if self._system.fallocate is not None:
            try:
                return self._system.fallocate(self._descriptor, self.nbytes, nbytes)
            except OSError as error:
                if error.errno not in _NO_ALLOCATION:
                    raise
        os.ftruncate(self._descriptor, self.nbytes + nbytes)

    def _free_bytes(self) -> int:
        try:
            room = self._system.statvfs(self._descriptor)
        except OSError as error:
            raise self._failure("statvfs", 0, self.nbytes, error) from error
        return room.f_bavail * room.f_frsize


def _behind(memory: list[memoryview], count: int) -> list[memoryview]:
    """What lies behind the first ``count`` bytes."""
    left = []
    for view in memory:
        if count < len(view):
            left.append(view[count:])
        count = max(0, count - len(view))
    return left
