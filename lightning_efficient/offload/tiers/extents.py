"""Which parts of a file are free."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_efficient.core.buffers import round_up
from lightning_efficient.offload.tiers.direct_file import DirectFile

__all__ = ["Extent", "Extents"]


@dataclass(frozen=True)
class Extent:
    """Whole pages next to each other.

    Attributes:
        offset: Of the first byte, a multiple of the page size.
        nbytes: A multiple of the page size.
    """

    offset: int
    nbytes: int


class Extents:
    """Hands out page-aligned extents of a file, first fit, and takes them back. Not safe for threads.

    The file grows when it must and never becomes smaller: what is given back is used again.

    Args:
        file: That they are of.
    """

    def __init__(self, file: DirectFile) -> None:
        self._file = file
        self._end = file.nbytes  # no extent that is in use ends behind it
        self._free: list[Extent] = []  # by offset; no two of them touch, and none touches the end

    def take(self, sizes: Sequence[int]) -> list[Extent]:
        """One of at least each size, in bytes; all or none.

        Raises:
            TierError: If the file cannot grow that far.
        """
        taken = [self._reuse(size) or self._extend(size) for size in sizes]
        try:
            self._file.grow(self._end)
        except BaseException:
            for extent in taken:
                self.give_back(extent)
            raise
        return taken

    def prepare(self, nbytes: int) -> None:
        """Let the file have so much behind all that was taken: the next extents need not make it grow.

        Raises:
            TierError: If it cannot grow that far.
        """
        self._file.grow(self._end + nbytes)

    def give_back(self, extent: Extent) -> None:
        """It is free again, and joins what is free on its two sides."""
        index = bisect_left(self._free, extent.offset, key=lambda free: free.offset)
        first, last = index, index
        start, end = extent.offset, extent.offset + extent.nbytes
        if index and self._free[index - 1].offset + self._free[index - 1].nbytes == start:
            first, start = index - 1, self._free[index - 1].offset
        if index < len(self._free) and self._free[index].offset == end:
            last, end = index + 1, end + self._free[index].nbytes
        if end == self._end:
            self._end = start
            self._free[first:last] = []
        else:
            self._free[first:last] = [Extent(start, end - start)]

    def _reuse(self, nbytes: int) -> Extent | None:
        needed = round_up(nbytes)
        for index, found in enumerate(self._free):
            if found.nbytes >= needed:
                rest = Extent(found.offset + needed, found.nbytes - needed)
                self._free[index : index + 1] = [rest] if rest.nbytes else []
                return Extent(found.offset, needed)
        return None

    def _extend(self, nbytes: int) -> Extent:
        needed = round_up(nbytes)
        self._end += needed
        return Extent(self._end - needed, needed)
