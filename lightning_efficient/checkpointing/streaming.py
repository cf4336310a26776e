"""A checkpoint written at once, through a small buffer: for states that no buffer may hold, and signal handlers."""

from __future__ import annotations

from pathlib import Path

from lightning_efficient.checkpointing.archive import Archive, Record, StorageLayout
from lightning_efficient.checkpointing.skeleton import Skeleton
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.durable_stream import BUFFER_BYTES, DurableStream, durable_stream
from lightning_efficient.core.torch_internals import bytes_of

__all__ = ["write_streaming"]


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
    with durable_stream(path) as stream:
        _write(stream, skeleton, archive)


def _write(stream: DurableStream, skeleton: Skeleton, archive: Archive) -> None:
    checksums: dict[str, int] = {}
    headers = 0

    def begin(record: Record, checksum: int) -> None:
        nonlocal headers
        checksums[record.name] = checksum
        header = archive.header(record, checksum)
        headers = crc32(header, headers)
        stream.write(header)

    for number, record in archive.storages.items():
        data = bytes_of(skeleton.storages[number])
        pieces = data.split(BUFFER_BYTES) if data.numel() else ()
        checksum = 0
        for piece in pieces:
            checksum = crc32(piece.cpu().numpy(), checksum)
        begin(record, checksum)
        for piece in pieces:
            stream.write(piece.cpu().numpy())
    for record, content in archive.small:
        begin(record, crc32(content))
        stream.write(content)
    stream.write(archive.tail(checksums, headers))
