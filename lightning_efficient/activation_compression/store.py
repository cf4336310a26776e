"""Saved tensors go in, handles come out: each storage is kept once, as its operations allow, and freed at its last use.

Autograd holds the handles, and a handle holds its record, so a record lives as long as an operation needs it; what was
decoded lives only while an operation uses it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_efficient.activation_compression.ledger import Ledger
from lightning_efficient.activation_compression.records import Record
from lightning_efficient.core.saved_tensors import changed_since, covers, elements_of, without_memory
from lightning_efficient.core.torch_internals import WeakStorage, without_torch_function

__all__ = ["Chooser", "Demand", "Handle", "Kept", "Observer", "SavedTensors", "Unit"]

Unit = tuple[str, str]
"""A kind of operation, and the layer that it is in: what has a rate of its own."""

_WHOLE = 4  # a view is kept with all of its storage if that is at most so many times as large


@dataclass(frozen=True)
class Demand:
    """What an operation needs of a tensor.

    Attributes:
        level: Bits with which to keep it, or a level beside them; :data:`EXACT` for all of them.
        least: What will do, if it is kept already or can be made of what is.
        unit: Who asks: the kind of operation, and the layer.
        of: All of its numbers, or which of them are positive.
    """

    level: float
    least: float
    unit: Unit
    of: Literal["values", "signs"] = "values"


class Chooser(Protocol):
    """Knows what is going on in the model."""

    def by_reference(self, tensor: Tensor) -> Callable[[], Tensor] | Tensor | None:
        """If somebody keeps these numbers anyway: a tensor like it, or what returns the memory that they are in."""

    def demand(self, tensor: Tensor) -> Demand:
        """What the operation that is going on needs of ``tensor``."""

    def record(self, numbers: Tensor, tensor: Tensor, demand: Demand) -> Record:
        """Keep ``numbers``, the memory ``[n]`` in which ``tensor`` lies."""

    def kept(self, record: Record, nbytes: int, instead_of: Kept | None) -> None:
        """Hear that ``record`` is kept now for ``nbytes`` that were saved; ``instead_of`` what another one has."""

    def freed(self, record: Record, unit: Unit) -> None:
        """Nobody needs ``record``, which was kept for ``unit``, any more."""


class Observer(Protocol):
    """Compares what goes in with what comes out."""

    def packed(self, handle: Handle, tensor: Tensor) -> None:
        """``handle`` is kept instead of ``tensor``."""

    def unpacked(self, handle: Handle, tensor: Tensor) -> None:
        """``tensor`` was made of ``handle``."""


class Kept:
    """A record, shared by all handles to it, and what was decoded of it, while somebody uses that.

    Attributes:
        record: May be replaced by a better one of the same numbers.
        level: The bits that were asked for.
        unit: By whom.
        source: What it is made again of, if it is.
        uses: How often it will be decoded, as far as is known.
        in_hand: It, decoded, where it will be needed again at once.
    """

    def __init__(self, record: Record, level: float, unit: Unit, freed: Callable[[Record, Unit], None]) -> None:
        self.record = record
        self.level = level
        self.unit = unit
        self.source: Kept | None = None
        self.uses = 0
        self.in_hand: Tensor | None = None
        self._freed = freed
        self._decoded: WeakStorage | None = None
        self._dtype = torch.float32

    @property
    def in_use(self) -> bool:
        """Whether the numbers are decoded somewhere, so that to have them all costs nothing."""
        return self._decoded is not None and self._decoded.get() is not None

    def numbers(self) -> Tensor:
        """All of them, ``[n]``, not to be changed."""
        storage = self._decoded.get() if self._decoded is not None else None
        if storage is not None:
            return elements_of(storage, self._dtype)
        numbers = self.record.decode()
        self._decoded, self._dtype = WeakStorage(numbers.untyped_storage()), numbers.dtype
        return numbers

    def replace(self, record: Record, level: float, unit: Unit) -> None:
        """From now on keep ``record``, which is better, for ``unit``."""
        self.record, self.level, self.unit = record, level, unit
        self._decoded = self.in_hand = None

    def __del__(self) -> None:
        self._freed(self.record, self.unit)


class Handle:
    """What autograd keeps instead of a tensor."""

    __slots__ = ("in_order", "numbers", "offset", "record", "shape", "stride", "version", "witness")

    def __init__(
        self,
        numbers: Callable[[], Tensor] | Tensor,
        tensor: Tensor,
        geometry: tuple[tuple[int, ...], int] | None,
        kept: Kept | None,
    ) -> None:
        self.numbers = numbers
        self.shape = tensor.shape
        self.record = kept
        self.version = tensor._version
        self.in_order = False  # whether its numbers are all that is kept, one after another
        if isinstance(numbers, Tensor):
            self.witness = numbers
            return
        self.witness = without_memory(tensor)
        self.stride, self.offset = geometry or (tensor.stride(), tensor.storage_offset())
        whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
        self.in_order = tensor.is_contiguous() if geometry is not None else whole

    def check(self) -> None:
        """Whether it may be used.

        Raises:
            RuntimeError: If it was changed since, or if its gradient shall be differentiated and it is not exact.
        """
        if self.witness._version != self.version:
            raise changed_since(self.witness, self.shape, self.version)
        if self.record is not None and not self.record.record.exact and torch.is_grad_enabled():
            raise RuntimeError(
                f"A tensor of shape {list(self.shape)} is kept in few bits, and gradients of gradients (create_graph) "
                "would be wrong by more than its error bound says. Keep it exact: bits='lossless', or an override "
                "'raw' for the modules whose gradients are differentiated."
            )

    def tensor(self) -> Tensor:
        """It, or one like it.

        Raises:
            RuntimeError: See :meth:`check`.
        """
        self.check()
        if isinstance(self.numbers, Tensor):
            return self.numbers
        return self.numbers().as_strided(self.shape, self.stride, self.offset)

    def pieces(self) -> Iterator[tuple[slice, Tensor]] | None:
        """Its numbers in their order, a few at a time; None where they do not lie so.

        Raises:
            RuntimeError: See :meth:`check`.
        """
        self.check()
        return self.record.record.pieces() if self.record is not None and self.in_order else None


class SavedTensors:
    """Packs and unpacks, for ``torch.autograd.graph.saved_tensors_hooks``.

    Args:
        chooser: Says how.
        ledger: Where the time is noted.

    Attributes:
        observer: Sees what goes in and comes out, if there is one.
    """

    def __init__(self, chooser: Chooser, ledger: Ledger) -> None:
        self.ledger = ledger
        self.observer: Observer | None = None
        self._chooser = chooser
        self._deferred: dict[int, list[Handle]] = {}  # by thread: each device has its own in backward
        self._last: weakref.ref[Kept] | None = None  # is in hand
        self._index: dict[tuple[Any, ...], tuple[WeakStorage, weakref.ref[Kept]]] = {}
        self._derived: dict[tuple[Any, ...], tuple[WeakStorage, weakref.ref[Kept], Callable[[Kept], Record]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def pack(self, tensor: Tensor) -> Handle:
        """What is kept instead of ``tensor``."""
        begin = time.perf_counter()
        with without_torch_function():
            reference = self._chooser.by_reference(tensor)
            if reference is not None:
                self.ledger.encode_seconds += time.perf_counter() - begin
                return Handle(reference, tensor, None, None)
            kept, geometry = self._keep(tensor, self._chooser.demand(tensor))
            kept.uses += 1
            handle = Handle(kept.numbers, tensor, geometry, kept)
            if self.observer is not None:
                self.observer.packed(handle, tensor)
        self.ledger.encode_seconds += time.perf_counter() - begin
        return handle

    def unpack(self, handle: Handle) -> Tensor:
        """The tensor of this handle, within the error bound of its record."""
        deferred = self._deferred.get(threading.get_ident())
        if deferred is not None:
            self._let_go()
            deferred.append(handle)
            if handle.record is not None:
                handle.record.uses -= 1
            return torch.empty(0)
        begin = time.perf_counter()
        kept = handle.record
        if kept is not None and (self._last is None or self._last() is not kept):
            self._let_go()
        with without_torch_function():
            tensor = handle.tensor()
            if self.observer is not None:
                self.observer.unpacked(handle, tensor)
        if kept is not None:
            kept.uses -= 1
            kept.in_hand = tensor if kept.uses > 0 else None
            self._last = weakref.ref(kept)
        self.ledger.decode_seconds += time.perf_counter() - begin
        return tensor

    def pieces(self, handle: Handle) -> Iterator[tuple[slice, Tensor]] | None:
        """Of a handle that was deferred; see :meth:`Handle.pieces`."""
        pieces = handle.pieces()
        return self._timed(pieces) if pieces is not None else None

    @contextlib.contextmanager
    def deferring(self) -> Iterator[list[Handle]]:
        """Within it, who unpacks in this thread gets nothing, and the handle is in the list."""
        thread = threading.get_ident()
        handles = self._deferred[thread] = []
        try:
            yield handles
        finally:
            del self._deferred[thread]

    def find(self, tensor: Tensor) -> Kept | None:
        """What is kept of the numbers of ``tensor``, if they are all of its storage's."""
        return self._find(_key(tensor, "values")) if _is_kept_whole(tensor) else None

    def derive(self, result: Tensor, source: Kept, make: Callable[[Kept], Record]) -> None:
        """From now on the numbers of ``result`` need not be kept for who demands no more than ``source`` has."""
        storage = WeakStorage(result.untyped_storage())
        self._derived[_key(result, "values")] = storage, weakref.ref(source), make

    def clear(self) -> None:
        """Forget which storages were met: they are others in the next step."""
        self._index.clear()
        self._derived.clear()
        self._let_go()

    def _timed(self, pieces: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        while True:
            begin = time.perf_counter()
            piece = next(pieces, None)
            self.ledger.decode_seconds += time.perf_counter() - begin
            if piece is None:
                return
            yield piece

    def _let_go(self) -> None:
        last = self._last() if self._last is not None else None
        if last is not None:
            last.in_hand = None
        self._last = None

    def _keep(self, tensor: Tensor, demand: Demand) -> tuple[Kept, tuple[tuple[int, ...], int] | None]:
        """What is kept of ``tensor``, and its stride and offset in that where they are not its own."""
        storage = tensor.untyped_storage()
        whole = _is_kept_whole(tensor)
        geometry = None if whole else (_dense_stride(tensor), 0)
        key = _key(tensor, demand.of, None if whole else (tensor.storage_offset(), tensor.shape, tensor.stride()))
        kept = self._find(key)
        if kept is not None and kept.level >= demand.least:
            return kept, geometry
        record, level, source = self._made_again(key, demand)
        numbers = elements_of(storage, tensor.dtype) if whole else None
        if record is None:
            numbers = _own_numbers(tensor) if numbers is None else numbers
            record = self._chooser.record(numbers, tensor, demand)
        nbytes = storage.nbytes() if numbers is None else numbers.nbytes
        self._chooser.kept(record, nbytes, kept)
        if kept is None:
            kept = Kept(record, level, demand.unit, self._chooser.freed)
            self._index[key] = WeakStorage(storage), weakref.ref(kept)
        else:
            kept.replace(record, level, demand.unit)
        kept.source = source
        return kept, geometry

    def _made_again(self, key: tuple[Any, ...], demand: Demand) -> tuple[Record | None, float, Kept | None]:
        _, source, make = self._derived.get(key, (None, None, None))
        kept = source() if source is not None else None
        if make is None or kept is None or kept.level < demand.least:
            return None, demand.level, None
        return make(kept), kept.level, kept

    def _find(self, key: tuple[Any, ...]) -> Kept | None:
        entry = self._index.get(key)
        return entry[1]() if entry is not None else None


def _key(tensor: Tensor, of: str, region: Any = None) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor._version, tensor.dtype, of, region


def _is_kept_whole(tensor: Tensor) -> bool:
    """Whether it is kept with all of its storage, and so once with all other views of that.

    Not where it is much smaller, nor where the rest may be memory that nobody wrote, whose numbers would spoil the
    scales of its own, or tensors that change without its version (``unsafe_chunk``): it must cover the storage, or be a
    view of what an operation made and what covers it.
    """
    size = tensor.untyped_storage().nbytes()
    if covers(tensor, size):
        return True
    base = tensor._base
    if base is None or size > _WHOLE * tensor.nbytes or not base.requires_grad or not covers(base, size):
        return False
    return base.grad_fn is None or not base.grad_fn.name().endswith("CopySlices")  # of which parts were written


def _each_once(tensor: Tensor) -> Tensor:
    """Without what an expansion repeats."""
    return tensor.detach()[tuple(slice(None if stride else 1) for stride in tensor.stride())]


def _own_numbers(tensor: Tensor) -> Tensor:
    """Its numbers, each once, one after another in the order of memory: ``[n]``; a view, where they lie so."""
    once = _each_once(tensor)
    if torch.empty_like(once, device="meta").stride() != once.stride():
        once = once.clone()
    return once.as_strided((once.numel(),), (1,))


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """With which those are it."""
    dense = torch.empty_like(_each_once(tensor), device="meta").stride()
    return tuple(step if stride else 0 for step, stride in zip(dense, tensor.stride(), strict=True))
