"""Which bytes of a spill file are accepted: a header that changes as a whole, and the check of a file by it.

The first two pages of the file are two copies of the root, of which the one with the higher sequence number counts. The
root says where the table is that lists the accepted extents with their CRC-32; root and table have one each.
A commit writes a new table into free room, then the older root: a process can be killed at any moment in between, and
there is always a whole root whose extents have not been touched since. (As in Hitz et al. 1994, "File System Design for
an NFS File Server Appliance", 3.2: consistent points by writing elsewhere, then the root.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.core.checksum import crc32
from lightning_efficient.offload.tiers.direct_file import DirectFile
from lightning_efficient.offload.tiers.extents import Extent, Extents

__all__ = ["ROOT_BYTES", "Accepted", "SpillHeader", "SpillReport", "verify"]

ROOT_BYTES = 2 * PAGE
"""At the beginning of the file, for the two roots."""

_MAGIC = b"LEspill1"
_ROOT = struct.Struct("<8sIIQQQII")  # magic, page, 0, sequence, entries, offset of the table, its CRC, that of the root
_ENTRY = struct.Struct("<QQI4x")  # offset, bytes, CRC
_PIECE = 8 << 20  # bytes that are verified at a time


@dataclass(frozen=True)
class Accepted:
    """The accepted bytes of one record.

    Attributes:
        offset: In the file.
        nbytes: Of the record.
        crc: The CRC-32 of the bytes.
    """

    offset: int
    nbytes: int
    crc: int


class SpillHeader:
    """Writes the header of one file, which is new.

    Args:
        file: At least ``ROOT_BYTES`` long.
        space: Of the file, behind the roots.
        durable: Whether what was accepted also survives a loss of power.

    Raises:
        TierError: If it cannot be written.
    """

    def __init__(self, file: DirectFile, space: Extents, *, durable: bool) -> None:
        self._file = file
        self._space = space
        self._durable = durable
        self._sequence = 0
        self._tables: list[Extent] = []
        self._accepted: Extent | None = None
        self._memory = HostBuffer(PAGE)
        for copy in range(2):
            self._write_root(copy, 0, 0, 0, 0)

    def make_room(self, entries: int) -> None:
        """See that there is room for two tables of so many entries; the file grows where it must.

        Raises:
            TierError: If it cannot: then all is as it was.
        """
        needed = max(entries, 1) * _ENTRY.size
        if self._tables and self._tables[0].nbytes >= needed:
            return
        size = PAGE
        while size < needed:
            size *= 2
        tables = self._space.take([size, size])
        for table in self._tables:
            if table is not self._accepted:
                self._space.give_back(table)
        self._tables = tables
        self._memory = HostBuffer(size)

    def write(self, accepted: Iterable[Accepted]) -> None:
        """From now on these are the accepted extents.

        Raises:
            TierError: If it cannot be written: those of before still are.
        """
        entries = 0
        for entry in accepted:
            _ENTRY.pack_into(self._memory.view, entries * _ENTRY.size, entry.offset, entry.nbytes, entry.crc)
            entries += 1
        nbytes = max(entries, 1) * _ENTRY.size
        table = next(extent for extent in self._tables if extent is not self._accepted)
        crc = self._file.write(table.offset, self._memory.address, nbytes)
        if self._durable:
            self._file.sync()
        self._write_root((self._sequence + 1) % 2, self._sequence + 1, entries, table.offset, crc)
        if self._durable:
            self._file.sync()
        self._sequence += 1
        if self._accepted is not None and self._accepted not in self._tables:
            self._space.give_back(self._accepted)
        self._accepted = table

    def _write_root(self, copy: int, sequence: int, entries: int, offset: int, table_crc: int) -> None:
        page = bytearray(PAGE)
        fields = (_MAGIC, PAGE, 0, sequence, entries, offset, table_crc)
        _ROOT.pack_into(page, 0, *fields, 0)
        _ROOT.pack_into(page, 0, *fields, crc32(page))
        self._memory.view[:PAGE] = page
        self._file.write(copy * PAGE, self._memory.address, PAGE)


@dataclass(frozen=True)
class SpillReport:
    """What a spill file holds.

    Attributes:
        path: The file.
        sequence: Of the commit that counts; 0 before the first; None if no header is whole.
        accepted: What that commit accepted.
        torn: Those of them whose bytes are not what was accepted.
        damaged_headers: Copies of the header, with their tables, that are not whole, of two. One may be so after a
            kill, or where the room of its table has been given to others.
    """

    path: Path
    sequence: int | None
    accepted: tuple[Accepted, ...]
    torn: tuple[Accepted, ...]
    damaged_headers: int

    @property
    def whole(self) -> bool:
        """Whether every accepted byte is as it was written."""
        return self.sequence is not None and not self.torn


def verify(path: str | Path) -> SpillReport:
    """Check every accepted byte of a spill file: of a running training (between commits), or of a killed one.

    It tells a disk that does not keep what it is given from an error elsewhere.

    Args:
        path: The file, which is only read.

    Raises:
        OSError: If it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        found = [root for copy in range(2) if (root := _read_root(file, copy)) is not None]
        if not found:
            return SpillReport(path, None, (), (), 2)
        sequence, accepted = max(found, key=lambda root: root[0])
        torn = tuple(entry for entry in accepted if _crc(file, entry.offset, entry.nbytes) != entry.crc)
    return SpillReport(path, sequence, tuple(accepted), torn, 2 - len(found))


def _read_root(file: BinaryIO, copy: int) -> tuple[int, list[Accepted]] | None:
    """The sequence number and the entries of the table, or None if one of them is damaged."""
    file.seek(copy * PAGE)
    page = bytearray(file.read(PAGE))
    if len(page) < PAGE:
        return None
    magic, size, zero, sequence, entries, offset, table_crc, crc = _ROOT.unpack_from(page)
    _ROOT.pack_into(page, 0, magic, size, zero, sequence, entries, offset, table_crc, 0)
    if magic != _MAGIC or size != PAGE or crc32(page) != crc:
        return None
    if not sequence:
        return 0, []
    file.seek(offset)
    table = file.read(max(entries, 1) * _ENTRY.size)
    if crc32(table) != table_crc or len(table) < entries * _ENTRY.size:
        return None
    return sequence, [Accepted(*_ENTRY.unpack_from(table, index * _ENTRY.size)) for index in range(entries)]


def _crc(file: BinaryIO, offset: int, nbytes: int) -> int:
    """The CRC-32 of a part of a file; of what there is, if it ends before."""
    file.seek(offset)
    crc = 0
    for start in range(0, nbytes, _PIECE):
        crc = crc32(file.read(min(_PIECE, nbytes - start)), crc)
    return crc
