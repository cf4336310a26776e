"""The file of a checkpoint as an image in memory: the ZIP archive that ``torch.save`` writes and ``torch.load`` reads.

The place of every byte is known before any tensor is copied: records are stored, not compressed. A storage is thus
copied straight to where it will be in the file, and the image goes to disk as it is, without another copy.
(The format: APPNOTE.TXT of PKWARE, 4.3 and 4.5.3 for sizes past 4 GiB; torch's records: ``torch/serialization.py``.)
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_efficient.core.checksum import crc32

__all__ = ["NOTE", "SEAL", "SEAL_DIGITS", "Archive", "Record", "StorageLayout"]

ROOT = "archive"  # torch.load takes the folder of the first record, whatever it is
ALIGNMENT = 64  # bytes; as torch aligns storages

NOTE = "lightning_efficient.json"
SEAL = b"lightning_efficient seal 1: "
SEAL_DIGITS = 8

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<IIQI")
_VERSION_64, _VERSION = 45, 20
_UTF8 = 0x0800
_DATE = 0x21  # 1980-01-01: equal states give equal files
_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF
_PADDING_ID = 0x4246


@dataclass(frozen=True)
class Record:
    """One member of the archive.

    Attributes:
        name: Within the archive.
        header: Where its header begins.
        start: Where its bytes begin; a multiple of 64.
        nbytes: How many they are.
    """

    name: str
    header: int
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class StorageLayout:
    """Where the storages are: at the beginning of the file, so that it stays while the rest of a checkpoint changes.

    Args:
        storages: ``(number, bytes)`` of each storage, in the order in which they shall lie in the file.

    Attributes:
        records: By number.
        end: Where the last one ends.
        directory_nbytes: What they take in the directory.
    """

    def __init__(self, storages: Sequence[tuple[int, int]]) -> None:
        self.records: dict[int, Record] = {}
        self.end = 0
        for number, nbytes in storages:
            record = _place(f"data/{number}", nbytes, self.end)
            self.records[number] = record
            self.end = record.end
        self.directory_nbytes = sum(_directory_nbytes(record) for record in self.records.values())


class Archive:
    """Where everything is in the file of a checkpoint.

    Args:
        layout: Of its storages.
        pickled: The record ``data.pkl``, which refers to them by number.
        note: Of the writer, in a record of its own, which ``torch.load`` does not read.

    Attributes:
        small: The records after the storages, with their contents.
        storages: The record of each storage, by number.
        directory: Where the directory begins.
        nbytes: Size of the file.
    """

    def __init__(self, layout: StorageLayout, pickled: bytes, note: bytes) -> None:
        self.storages = layout.records
        self.small: list[tuple[Record, bytes]] = []
        position, directory_nbytes = layout.end, layout.directory_nbytes
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
            (NOTE, note),
        ):
            record = _place(name, len(content), position)
            self.small.append((record, content))
            position = record.end
            directory_nbytes += _directory_nbytes(record)
        self.directory = position
        self._directory_nbytes = directory_nbytes
        count = len(self.storages) + len(self.small)
        self._ends_in_64 = count >= _FULL_16 or directory_nbytes >= _FULL_32 or position >= _FULL_32
        self.nbytes = position + directory_nbytes + _END.size + len(SEAL) + SEAL_DIGITS
        if self._ends_in_64:
            self.nbytes += _END_64.size + _LOCATOR_64.size

    def header(self, record: Record, crc: int) -> bytes:
        """What lies before the bytes of ``record``."""
        name = f"{ROOT}/{record.name}".encode()
        large = record.nbytes >= _FULL_32
        extra = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes) if large else b""
        padding = record.start - record.header - _LOCAL.size - len(name) - len(extra)
        extra += struct.pack("<HH", _PADDING_ID, padding - 4).ljust(padding, b"Z")
        size = _FULL_32 if large else record.nbytes
        version = _VERSION_64 if large else _VERSION
        fields = _LOCAL.pack(0x04034B50, version, _UTF8, 0, 0, _DATE, crc, size, size, len(name), len(extra))
        return fields + name + extra

    def tail(self, checksums: Mapping[str, int], headers: int) -> bytes:
        """The directory and the end of the file, which make it complete.

        The comment that closes the file is a seal: the checksum of every byte that no record's own checksum covers.

        Args:
            checksums: CRC-32 by record name.
            headers: CRC-32 of all headers, in the order of the file.
        """
        parts: list[bytes] = []
        for record in (*self.storages.values(), *(record for record, _ in self.small)):
            name = f"{ROOT}/{record.name}".encode()
            large, far = record.nbytes >= _FULL_32, record.header >= _FULL_32
            extra = struct.pack("<QQ", record.nbytes, record.nbytes) if large else b""
            extra += struct.pack("<Q", record.header) if far else b""
            extra = struct.pack("<HH", 1, len(extra)) + extra if extra else b""
            size = _FULL_32 if large else record.nbytes
            version = _VERSION_64 if large or far else _VERSION
            fixed = (0x02014B50, version, version, _UTF8, 0, 0, _DATE, checksums[record.name], size, size, len(name))
            parts.append(_CENTRAL.pack(*fixed, len(extra), 0, 0, 0, 0, _FULL_32 if far else record.header))
            parts += [name, extra]
        count, size, start = len(self.storages) + len(self.small), self._directory_nbytes, self.directory
        if self._ends_in_64:
            parts.append(_END_64.pack(0x06064B50, 44, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start))
            parts.append(_LOCATOR_64.pack(0x07064B50, 0, start + size, 1))
        count, size, start = min(count, _FULL_16), min(size, _FULL_32), min(start, _FULL_32)
        parts.append(_END.pack(0x06054B50, 0, 0, count, count, size, start, len(SEAL) + SEAL_DIGITS))
        tail = b"".join(parts)
        return tail + SEAL + f"{crc32(tail, headers):0{SEAL_DIGITS}x}".encode()


def _place(name: str, nbytes: int, position: int) -> Record:
    least = position + _LOCAL.size + len(ROOT) + 1 + len(name) + (20 if nbytes >= _FULL_32 else 0) + 4
    return Record(name, position, -(-least // ALIGNMENT) * ALIGNMENT, nbytes)


def _directory_nbytes(record: Record) -> int:
    zip64 = 16 * (record.nbytes >= _FULL_32) + 8 * (record.header >= _FULL_32)
    return _CENTRAL.size + len(ROOT) + 1 + len(record.name) + (4 + zip64 if zip64 else 0)
