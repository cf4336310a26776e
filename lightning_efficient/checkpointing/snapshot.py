"""The copy of a training state into the image of its file, begun at once and finished while training goes on.

What an optimizer owns does not change between two updates, so its bytes may be copied until the next one (Mohan et
al. 2021, "CheckFreq", 4.3.1); everything else may change at any moment and is copied before the snapshot is handed on.
"""

from __future__ import annotations

import ctypes
import io
import json
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.checkpointing.archive import Archive, Record, StorageLayout
from lightning_efficient.checkpointing.skeleton import Skeleton
from lightning_efficient.core.buffers import HostBuffer
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.torch_internals import bytes_of

__all__ = ["Snapshot", "TornSnapshotError", "note_of", "storage_checksum"]

FORMAT = 1
PIECE_BYTES = 16 << 20  # what a waiting update waits for at most once all is claimed


class TornSnapshotError(RuntimeError):
    """Tensors changed while they were being copied, other than by an optimizer's step, or were not copied whole.

    Args:
        numbers: Of their storages.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(f"{len(numbers)} tensors of the snapshot changed, or the copy was interrupted")
        self.numbers = tuple(numbers)


class Snapshot:
    """One state on its way into ``buffer``.

    Pieces are claimed one by one, by the copying thread and by an update that would otherwise wait for it.

    Args:
        skeleton: The state; its storages are kept alive until they are copied.
        layout: Where each storage goes.
        buffer: At least as large as the file.
        step: Of the run.
        watched: Tensors that must not change until they are copied, by the number of their storage.
        expected: Checksums that the copies must have, by number of the storage.

    Attributes:
        archive: Where everything is in the file.
        expected: As given.
        torn: Numbers of the storages that changed while they were being copied, as far as it was noticed.
        sealed: Whether the image is the whole file.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        layout: StorageLayout,
        buffer: HostBuffer,
        step: int,
        *,
        watched: Mapping[int, Tensor] | None = None,
        expected: Mapping[int, int] | None = None,
    ) -> None:
        self.archive = Archive(layout, skeleton.pickled, note_of(step))
        if self.archive.nbytes > buffer.nbytes:
            raise ValueError(f"The buffer has {buffer.nbytes} bytes and the file needs {self.archive.nbytes}.")
        self.buffer = buffer
        self.step = step
        self.expected = dict(expected or {})
        self.torn: list[int] = []
        self.sealed = False
        self._versions = {number: (tensor, tensor._version) for number, tensor in (watched or {}).items()}
        self._storages: Sequence[UntypedStorage] = skeleton.storages
        self._left = {number: -(-record.nbytes // PIECE_BYTES) for number, record in layout.records.items()}
        self._waiting = {number: self._left[number] for number in layout.records if self._left[number]}
        self._unfinished = len(self._waiting)
        self._changed = threading.Condition()

    @property
    def complete(self) -> bool:
        """Whether every byte is copied."""
        return self._unfinished == 0

    def copied(self, number: int) -> bool:
        """Whether storage ``number`` is."""
        return self._left[number] == 0

    def copy(self, numbers: Iterable[int] | None = None) -> None:
        """Copy what nobody has claimed yet, in this thread.

        Args:
            numbers: Of these storages only, in this order; None: of all, in the order of the file.
        """
        for number in (None,) if numbers is None else numbers:
            while (claimed := self._claim(number)) is not None:
                self._copy_piece(*claimed)

    def wait(self, numbers: Collection[int] | None = None) -> float:
        """Return once these storages (None: all) are copied, and help to copy them meanwhile.

        Returns:
            Seconds that it took.
        """
        if self.complete or (numbers is not None and all(self.copied(number) for number in numbers)):
            return 0.0
        begin = time.perf_counter()
        self.copy(numbers)
        wanted = list(self._left) if numbers is None else numbers
        with self._changed:
            self._changed.wait_for(lambda: all(self._left[number] == 0 for number in wanted))
        return time.perf_counter() - begin

    def seal(self) -> Iterator[int]:
        """Wait for the copies one after another and make the image the file that it shall be; once.

        Yields:
            Up to which byte the image is final.

        Raises:
            TornSnapshotError: If a tensor changed while it was being copied.
        """
        archive, image = self.archive, self.buffer.view
        checksums: dict[str, int] = {}
        headers = 0

        def close(record: Record) -> None:
            nonlocal headers
            checksums[record.name] = crc32(image[record.start : record.end])
            header = archive.header(record, checksums[record.name])
            image[record.header : record.start] = header
            headers = crc32(header, headers)

        for number, record in archive.storages.items():
            self.wait([number])
            close(record)
            if self.expected.get(number, checksums[record.name]) != checksums[record.name]:
                self.torn.append(number)
            if self.torn:
                raise TornSnapshotError(self.torn)
            yield record.end
        for record, content in archive.small:
            image[record.start : record.end] = content
            close(record)
        image[archive.directory : archive.nbytes] = archive.tail(checksums, headers)
        self.sealed = True
        yield archive.nbytes

    def cancel(self) -> None:
        """Copy nothing more; who waits, waits no longer."""
        with self._changed:
            for number, pieces in self._waiting.items():
                self._left[number] -= pieces
            self._waiting.clear()
            self._changed.wait_for(lambda: not any(self._left.values()))  # what is being copied now
            self._unfinished = 0
            self._changed.notify_all()

    def load(self, map_location: Any = "cpu") -> Any:
        """The state, read from a sealed image as ``torch.load`` would read it from its file."""
        stream = io.BufferedReader(_MemoryStream(self.buffer.view[: self.archive.nbytes]))  # type: ignore[type-var]
        return torch.load(stream, map_location=map_location, weights_only=False)

    def release_sources(self) -> None:
        """Let go of the live tensors; nothing is compared or copied any more."""
        self._storages = ()
        self._versions = {}

    def _claim(self, number: int | None) -> tuple[int, int] | None:
        """Number and index of a piece that is now ours."""
        with self._changed:
            if number is None:
                number = next(iter(self._waiting), None)
            if number is None or number not in self._waiting:
                return None
            left = self._waiting[number] - 1
            if left:
                self._waiting[number] = left
            else:
                del self._waiting[number]
            record = self.archive.storages[number]
            return number, -(-record.nbytes // PIECE_BYTES) - 1 - left

    def _copy_piece(self, number: int, piece: int) -> None:
        record = self.archive.storages[number]
        offset = piece * PIECE_BYTES
        nbytes = min(PIECE_BYTES, record.nbytes - offset)
        storage, target = self._storages[number], record.start + offset
        try:
            if storage.device.type == "cpu":
                ctypes.memmove(self.buffer.address + target, storage.data_ptr() + offset, nbytes)
            else:
                self.buffer.tensor[target : target + nbytes].copy_(bytes_of(storage)[offset : offset + nbytes])
        except BaseException:  # an interrupt, for one: what is there is not known, so it must not become a file
            self.torn.append(number)
            raise
        finally:  # or who waits for the piece would wait for ever
            self._note_copied(number)

    def _note_copied(self, number: int) -> None:
        with self._changed:
            self._left[number] -= 1
            if self._left[number] == 0:
                # Now, for the update that waits for this copy is about to change the tensor, rightly.
                tensor, version = self._versions.get(number, (None, 0))
                if tensor is not None and tensor._version != version:
                    self.torn.append(number)
                self._unfinished -= 1
                self._changed.notify_all()


class _MemoryStream(io.RawIOBase):
    """Reads memory as a file, without a copy of it."""

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


def note_of(step: int) -> bytes:
    """What the writer notes in a file."""
    return json.dumps({"format": FORMAT, "global_step": step}).encode()


def storage_checksum(storage: UntypedStorage) -> int:
    """CRC-32 of a storage as it is now."""
    return crc32(bytes_of(storage).cpu().numpy())
