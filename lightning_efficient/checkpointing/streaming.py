"""A checkpoint written at once, through a small buffer: for states that no buffer may hold, and signal handlers."""

from __future__ import annotations

from pathlib import Path

from lightning_efficient.checkpointing.archive import Archive, Record, StorageLayout
from lightning_efficient.checkpointing.durable_file import DurableFile
from lightning_efficient.checkpointing.skeleton import Skeleton
from lightning_efficient.core.buffers import HostBuffer, round_up
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.torch_internals import bytes_of

__all__ = ["write_streaming"]

_BUFFER_BYTES = 8 << 20


def write_streaming(skeleton: Skeleton, layout: StorageLayout, path: Path, note: bytes) -> None:
    """Write the file that a :class:`Snapshot` of this state would become; it uses no thread and takes no lock.

    Args:
        skeleton: The state; nothing of it may change meanwhile.
        layout: Where its storages go.
        path: Of the file.
        note: See :class:`Archive`.

    Raises:
        OSError: As the system says.
    """
    archive = Archive(layout, skeleton.pickled, note)
    file = DurableFile(path)
    try:
        _Stream(file).write(skeleton, archive)
        file.commit(archive.nbytes)
    except BaseException:
        file.abandon()
        raise


class _Stream:
    """Appends bytes of any length to a file that takes whole pages."""

    def __init__(self, file: DurableFile) -> None:
        self._file = file
        self._buffer = HostBuffer(_BUFFER_BYTES)
        self._filled = 0
        self._headers = 0
        self._checksums: dict[str, int] = {}

    def write(self, skeleton: Skeleton, archive: Archive) -> None:
        for number, record in archive.storages.items():
            data = bytes_of(skeleton.storages[number])
            pieces = data.split(_BUFFER_BYTES) if data.numel() else ()
            checksum = 0
            for piece in pieces:
                checksum = crc32(piece.cpu().numpy(), checksum)
            self._header(archive, record, checksum)
            for piece in pieces:
                self._put(memoryview(piece.cpu().numpy()))
        for record, content in archive.small:
            self._header(archive, record, crc32(content))
            self._put(memoryview(content))
        self._put(memoryview(archive.tail(self._checksums, self._headers)))
        self._file.append(self._buffer.view[: round_up(self._filled)])

    def _header(self, archive: Archive, record: Record, checksum: int) -> None:
        self._checksums[record.name] = checksum
        header = archive.header(record, checksum)
        self._headers = crc32(header, self._headers)
        self._put(memoryview(header))

    def _put(self, data: memoryview) -> None:
        while len(data):
            part = data[: self._buffer.nbytes - self._filled]
            self._buffer.view[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == self._buffer.nbytes:
                self._file.append(self._buffer.view)
                self._filled = 0
