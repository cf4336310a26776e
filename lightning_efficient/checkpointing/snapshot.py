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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.checkpointing.archive import Archive, Record, StorageLayout
from lightning_efficient.checkpointing.device_copies import DeviceCopies
from lightning_efficient.checkpointing.verification import tensor_names
from lightning_efficient.core.buffers import HostBuffer
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.memory_stream import MemoryStream
from lightning_efficient.core.torch_internals import bytes_of

__all__ = ["Snapshot", "TornSnapshotError", "note_of"]

FORMAT = 1
PIECE_BYTES = 16 << 20  # what a waiting update waits for at most once all is claimed


class TornSnapshotError(RuntimeError):
    """Tensors changed while they were being copied, other than by an optimizer's step, or were not copied whole.

    Args:
        names: Of the tensors, as paths in the checkpoint.
    """

    def __init__(self, names: Sequence[str]) -> None:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        super().__init__(
            f"{', '.join(names[:3])}{more} changed after the save and before the copy, by other code than the "
            "optimizer's, or the copy was interrupted"
        )
        self.names = tuple(names)


class Snapshot:
    """One state on its way into ``buffer``, where each byte goes to its place in the file.

    Pieces are claimed one by one, by the copying thread and by an update that would otherwise wait for it. From a CUDA
    device a piece counts as copied as soon as its copy is enqueued; what then overwrites it is enqueued behind.

    Args:
        layout: Where each storage goes.
        buffer: Large enough for the storages; if not for what follows them, another one takes its place.
        step: Of the run.
        copies: For storages of CUDA devices; None: there are none.

    Attributes:
        lent: The buffer that was given.
        describe: Returns the pickle that goes with the storages; to be set before :meth:`seal`.
        expected: Checksums that the copies must have, by number of the storage, as far as they are known.
        archive: Where everything is in the file; from :meth:`seal` on.
        torn: Numbers of the storages that changed while they were being copied, as far as it was noticed.
        sealed: Whether the image is the whole file.
    """

    archive: Archive

    def __init__(
        self, layout: StorageLayout, buffer: HostBuffer, step: int, copies: DeviceCopies | None = None
    ) -> None:
        if layout.end > buffer.nbytes:
            raise ValueError(f"The buffer has {buffer.nbytes} bytes and the storages need {layout.end}.")
        self.layout = layout
        self.buffer = self.lent = buffer
        self.step = step
        self.describe: Callable[[], bytes]
        self.expected: Mapping[int, int] = {}
        self.torn: list[int] = []
        self.sealed = False
        self._copies = copies
        self._sources: dict[int, UntypedStorage | Tensor] = {}
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._left = {number: -(-record.nbytes // PIECE_BYTES) for number, record in layout.records.items()}
        self._unfinished = sum(left > 0 for left in self._left.values())
        self._waiting: dict[int, int] = {}
        self._busy: set[int] = set()  # threads that copy a piece
        self._enqueued: dict[int, tuple[int, torch.device, torch.cuda.Event]] = {}
        self._last: dict[torch.device, torch.cuda.Event] = {}
        self._changed = threading.Condition()
        self._reading = threading.Lock()

    def offer(
        self, sources: Mapping[int, UntypedStorage | Tensor], watched: Mapping[int, Tensor] | None = None
    ) -> None:
        """Let these be copied from now on.

        Args:
            sources: By number: storages, or byte tensors that nothing changes.
            watched: Tensors that must not change until they are copied, likewise.
        """
        if self._copies is not None:
            for device in {source.device for source in sources.values() if self._copies.takes(source)}:
                self._copies.begin(device)
        with self._changed:
            new = [number for number in sources if number not in self._sources]
            self._sources.update({number: sources[number] for number in new})
            for number, tensor in (watched or {}).items():
                self._versions[number] = tensor, tensor._version
            self._waiting.update({number: self._left[number] for number in new if self._left[number]})

    @property
    def offered(self) -> frozenset[int]:
        """The numbers of what may be copied."""
        return frozenset(self._sources)

    @property
    def complete(self) -> bool:
        """Whether every byte is copied, or its copy enqueued."""
        return self._unfinished == 0

    @property
    def safe(self) -> bool:
        """Whether nothing that happens to the live tensors from now on can reach the copies."""
        return self.complete and all(event.query() for _, event in self._last_events(None))

    @property
    def settled(self) -> bool:
        """Whether no update needs to look at it any more."""
        return self.safe and not self._versions

    def copied(self, number: int) -> bool:
        """Whether storage ``number`` is."""
        return self._left[number] == 0

    def unchanged(self) -> bool:
        """Whether none of the watched tensors has changed, as far as torch counts it."""
        return all(tensor._version == version for tensor, version in self._versions.values())

    def copy(self, numbers: Iterable[int] | None = None) -> None:
        """Copy what nobody has claimed yet, in this thread.

        Args:
            numbers: Of these storages only, in this order; None: of all that were offered, in that order.
        """
        try:
            for number in (None,) if numbers is None else numbers:
                while claimed := self._claim(number):
                    for piece in claimed:
                        self._copy_piece(*piece)
                    self._note_copied(claimed)
        except BaseException:  # an interrupt, for one
            self._abort()
            raise

    def wait(self, numbers: Collection[int] | None = None) -> float:
        """After this, the calling thread may change these storages (None: all), and helps to copy them before.

        Where they are on a device, what it enqueues there on the current stream comes after the copies.

        Returns:
            Seconds that it took.
        """
        begin = time.perf_counter()
        waited = not self.safe
        if waited:
            self._wait_copied(numbers)
            if self._copies is not None:
                self._copies.let_current_wait(self._last_events(numbers))
        # Once more: torch counts a change when it is over, and one may have been going on during the copy.
        with self._changed:
            for number in list(self._versions) if numbers is None else numbers:
                self._compare_version(number)
                self._versions.pop(number, None)
        return time.perf_counter() - begin if waited else 0.0

    def seal(self) -> Iterator[int]:
        """Wait for the copies one after another and make the image the file that it shall be.

        Yields:
            Up to which byte the image is final.

        Raises:
            TornSnapshotError: If a tensor changed while it was being copied.
        """
        checksums: dict[str, int] = {}
        headers = 0
        archive = self.archive = Archive(self.layout, self.describe(), note_of(self.step))

        def close(record: Record) -> None:
            nonlocal headers
            image = self.buffer.view
            checksums[record.name] = crc32(image[record.start : record.end])
            header = archive.header(record, checksums[record.name])
            image[record.header : record.start] = header
            headers = crc32(header, headers)

        for number, record in archive.storages.items():
            self._wait_arrived(number)
            close(record)
            if self.expected.get(number, checksums[record.name]) != checksums[record.name]:
                self.torn.append(number)
            self._raise_if_torn()
            yield record.end
        if archive.nbytes > self.buffer.nbytes:
            self.buffer = self.buffer.grown(archive.nbytes, keep=self.layout.end)  # for this time: it goes with us
        image = self.buffer.view
        for record, content in archive.small:
            image[record.start : record.end] = content
            close(record)
        image[archive.directory : archive.nbytes] = archive.tail(checksums, headers)
        self.sealed = True
        yield archive.nbytes

    def refuse_torn(self) -> None:
        """To be called again when all is written: a change is counted when it is over, maybe after what it changed.

        Raises:
            TornSnapshotError: If a tensor changed while it was being copied, as far as it was noticed by now.
        """
        with self._changed:
            for number in self._versions:
                self._compare_version(number)
        self._raise_if_torn()

    def checksum(self, number: int) -> int:
        """CRC-32 of the copy of a storage that was offered, once it is there."""
        self._wait_arrived(number)
        record = self.layout.records[number]
        return crc32(self.buffer.view[record.start : record.end])

    def cancel(self) -> None:
        """Copy nothing more; who waits, waits no longer."""
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._busy)
            self._left = dict.fromkeys(self._left, 0)
            self._unfinished = 0
            self._changed.notify_all()
        if self._copies is not None:
            for device in {source.device for source in self._sources.values() if self._copies.takes(source)}:
                self._copies.mark(device).synchronize()  # pieces of storages that are not complete too

    def load(self, map_location: Any = "cpu") -> Any:
        """The state, read from a sealed image as ``torch.load`` would read it from its file.

        Raises:
            LookupError: If it is not in memory any more.
        """
        with self._reading:
            if not self.sealed:
                raise LookupError(f"The state of step {self.step} is not in memory any more.")
            stream = io.BufferedReader(MemoryStream(self.buffer.view[: self.archive.nbytes]))  # type: ignore[type-var]
            return torch.load(stream, map_location=map_location, weights_only=False)

    def retire(self) -> HostBuffer:
        """Take the buffer for something else, when nobody reads from it."""
        with self._reading:
            self.sealed = False
            return self.lent

    def release_sources(self) -> None:
        """Let go of the live tensors; nothing is compared or copied any more."""
        self._sources = {}
        self._versions = {}
        self.describe = _nothing

    def _wait_copied(self, numbers: Collection[int] | None) -> None:
        self.copy(numbers)
        wanted = list(self._left) if numbers is None else numbers
        with self._changed:
            self._changed.wait_for(lambda: all(self._left[number] == 0 for number in wanted))

    def _wait_arrived(self, number: int) -> None:
        if self._left[number]:
            self._wait_copied([number])
        for _, event in self._last_events([number]):
            event.synchronize()

    def _last_events(self, numbers: Collection[int] | None) -> list[tuple[torch.device, torch.cuda.Event]]:
        """The last enqueued copy of these on each device; those before it are over when it is."""
        if not self._enqueued:
            return []
        if numbers is None:
            return list(self._last.items())
        found = [self._enqueued[number] for number in numbers if number in self._enqueued]
        last = {device: (device, event) for _, device, event in sorted(found, key=lambda entry: entry[0])}
        return list(last.values())

    def _claim(self, number: int | None) -> list[tuple[int, int]]:
        """Numbers and indices of pieces that are now ours: one, of storage ``number`` or any (None), or small ones.

        Empty if nobody has to copy one any more.
        """
        claimed: list[tuple[int, int]] = []
        room = PIECE_BYTES // 16
        with self._changed:
            while self._waiting and (not claimed or room > 0):
                this = next(iter(self._waiting)) if number is None else number
                if this not in self._waiting:
                    break
                nbytes = self.layout.records[this].nbytes
                if claimed and nbytes > room:
                    break
                room -= nbytes
                claimed.append((this, -(-nbytes // PIECE_BYTES) - self._waiting[this]))
                if self._waiting[this] > 1:
                    self._waiting[this] -= 1
                else:
                    del self._waiting[this]
            if claimed:
                self._busy.add(threading.get_ident())
        return claimed

    def _copy_piece(self, number: int, piece: int) -> None:
        record = self.layout.records[number]
        offset = piece * PIECE_BYTES
        nbytes = min(PIECE_BYTES, record.nbytes - offset)
        source, target = self._sources[number], record.start + offset
        try:
            if self._copies is not None and self._copies.takes(source):
                data = source if isinstance(source, Tensor) else bytes_of(source)
                into = self.buffer.tensor[target : target + nbytes]
                self._copies.copy(into, data[offset : offset + nbytes])
            elif source.device.type == "cpu":
                ctypes.memmove(self.buffer.address + target, source.data_ptr() + offset, nbytes)
            else:
                data = source if isinstance(source, Tensor) else bytes_of(source)
                self.buffer.tensor[target : target + nbytes].copy_(data[offset : offset + nbytes])
        except BaseException:  # what is there is not known
            self.torn.append(number)
            raise

    def _abort(self) -> None:
        """In a thread that cannot finish its piece: nobody shall wait for it, and no file become of it."""
        with self._changed:
            self.torn.append(-1)
            self._busy.discard(threading.get_ident())
            self._waiting.clear()
            self._left = dict.fromkeys(self._left, 0)
            self._unfinished = 0
            self._changed.notify_all()

    def _note_copied(self, pieces: Iterable[tuple[int, int]]) -> None:
        marks: dict[torch.device, torch.cuda.Event] = {}  # one behind all of them
        with self._changed:
            for number, _ in pieces:
                if self._left[number] == 1:
                    self._note_last_piece(number, marks)
                if self._left[number]:  # else another thread was interrupted, and nothing counts any more
                    self._left[number] -= 1
                    self._unfinished -= self._left[number] == 0
            self._busy.discard(threading.get_ident())
            self._changed.notify_all()

    def _note_last_piece(self, number: int, marks: dict[torch.device, torch.cuda.Event]) -> None:
        source = self._sources[number]
        if self._copies is not None and self._copies.takes(source):
            device = source.device
            if device not in marks:
                self._last[device] = marks[device] = self._copies.mark(device)
            self._enqueued[number] = len(self._enqueued), device, marks[device]
        self._compare_version(number)  # now: the update that waits for this copy is about to change it, rightly

    def _raise_if_torn(self) -> None:
        if self.torn:
            names = tensor_names(self.describe())
            raise TornSnapshotError([names.get(str(number), "a tensor") for number in self.torn])

    def _compare_version(self, number: int) -> None:
        tensor, version = self._versions.get(number, (None, 0))
        if tensor is not None and tensor._version != version and number not in self.torn:
            self.torn.append(number)


def _nothing() -> bytes:
    raise RuntimeError("The snapshot has been written.")


def note_of(step: int) -> bytes:
    """What the writer notes in a file."""
    return json.dumps({"format": FORMAT, "global_step": step}).encode()
