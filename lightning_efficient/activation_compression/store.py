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
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.activation_compression.ledger import Ledger
from lightning_efficient.activation_compression.records import Record
from lightning_efficient.core.torch_internals import WeakStorage, without_torch_function

__all__ = ["Chooser", "Demand", "Handle", "Kept", "SavedTensors"]

_WHOLE = 4  # a view is kept with all of its storage if that is at most so many times as large


@dataclass(frozen=True)
class Demand:
    """What an operation needs of a tensor.

    Attributes:
        level: Bits, at least, or a level beside them; :data:`EXACT` for all of them.
        of: All of its numbers, or which of them are positive.
    """

    level: float
    of: Literal["values", "signs"] = "values"


class Chooser(Protocol):
    """Knows what is going on in the model."""

    def by_reference(self, tensor: Tensor) -> Callable[[], Tensor] | Tensor | None:
        """If somebody keeps these numbers anyway: a tensor like it, or what returns the memory that they are in."""

    def demand(self, tensor: Tensor) -> Demand:
        """What the operation that is going on needs of ``tensor``."""

    def record(self, numbers: Tensor, tensor: Tensor, demand: Demand) -> Record:
        """Keep ``numbers``, the memory ``[n]`` in which ``tensor`` lies."""

    def kept(self, record: Record, nbytes: int, instead_of: Record | None) -> None:
        """Hear that ``record`` is kept now for ``nbytes`` that were saved; ``instead_of`` another one of the same."""

    def freed(self, record: Record) -> None:
        """Nobody needs ``record`` any more."""


class Kept:
    """A record, shared by all handles to it, and what was decoded of it, while somebody uses that.

    Attributes:
        record: May be replaced by a better one of the same numbers.
        level: The bits that were asked for.
        uses: How often it will be decoded, as far as is known.
    """

    def __init__(self, record: Record, level: float, freed: Callable[[Record], None]) -> None:
        self.record = record
        self.level = level
        self.uses = 0
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
            return _flat(storage, self._dtype)
        numbers = self.record.decode()
        self._decoded, self._dtype = WeakStorage(numbers.untyped_storage()), numbers.dtype
        return numbers

    def __del__(self) -> None:
        self._freed(self.record)


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
        self.witness = _witness(tensor)
        self.stride, self.offset = geometry or (tensor.stride(), tensor.storage_offset())
        whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
        self.in_order = geometry is not None or whole

    def check(self) -> None:
        """Whether it may be used.

        Raises:
            RuntimeError: If it was changed since, or if its gradient shall be differentiated and it is not exact.
        """
        if self.witness._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"{self.witness.dtype} tensor of shape {list(self.shape)} is at version {self.witness._version}; "
                f"expected version {self.version} instead. Change it out of place, or a clone of it."
            )
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
    """

    def __init__(self, chooser: Chooser, ledger: Ledger) -> None:
        self.ledger = ledger
        self._chooser = chooser
        self._deferred: dict[int, list[Handle]] = {}  # by thread: each device has its own in backward
        self._last: Tensor | None = None  # decoded, for the operation that needs it next, often the very next one
        self._last_kept: Kept | None = None
        self._index: dict[tuple[Any, ...], tuple[WeakStorage, weakref.ref[Kept]]] = {}
        self._derived: dict[tuple[int, int], tuple[WeakStorage, Callable[[], Record], float]] = {}

    def pack(self, tensor: Tensor) -> Handle:
        """What is kept instead of ``tensor``."""
        begin = time.perf_counter()
        with without_torch_function():
            reference = self._chooser.by_reference(tensor)
            if reference is not None:
                return Handle(reference, tensor, None, None)
            kept, geometry = self._keep(tensor, self._chooser.demand(tensor))
            kept.uses += 1
            handle = Handle(kept.numbers, tensor, geometry, kept)
        self.ledger.encode_seconds += time.perf_counter() - begin
        return handle

    def unpack(self, handle: Handle) -> Tensor:
        """The tensor of this handle, within the error bound of its record."""
        deferred = self._deferred.get(threading.get_ident())
        if deferred is not None:
            self._last = self._last_kept = None
            deferred.append(handle)
            return torch.empty(0)
        begin = time.perf_counter()
        kept = handle.record
        if kept is not None and kept is not self._last_kept:
            self._last = self._last_kept = None
        with without_torch_function():
            tensor = handle.tensor()
        if kept is not None:
            kept.uses -= 1
            self._last, self._last_kept = (tensor, kept) if kept.uses > 0 else (None, None)
        self.ledger.decode_seconds += time.perf_counter() - begin
        return tensor

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
        return self._find(_key(tensor.untyped_storage(), tensor, "values", None))

    def derive(self, result: Tensor, make: Callable[[], Record], level: float) -> None:
        """From now on the numbers of ``result`` need not be kept for who demands no more than ``level``."""
        storage = result.untyped_storage()
        self._derived[storage._cdata, result._version] = WeakStorage(storage), make, level

    def clear(self) -> None:
        """Forget which storages were met: they are others in the next step."""
        self._index.clear()
        self._derived.clear()
        self._last = self._last_kept = None

    def _keep(self, tensor: Tensor, demand: Demand) -> tuple[Kept, tuple[tuple[int, ...], int] | None]:
        """What is kept of ``tensor``, and its stride and offset in that where they are not its own."""
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size()
        whole = size <= _WHOLE * tensor.numel()
        geometry = None if whole else (_contiguous_stride(tensor.shape), 0)
        region = None if whole else (tensor.storage_offset(), tensor.shape, tensor.stride())
        key = _key(storage, tensor, demand.of, region)
        kept = self._find(key)
        if kept is not None and kept.level >= demand.level:
            return kept, geometry
        record, level = None, demand.level
        if whole and demand.of == "values":
            record, level = self._made_again(storage, tensor, demand.level)
        nbytes = storage.nbytes() if whole else tensor.numel() * tensor.element_size()
        if record is None:
            numbers = _flat(storage, tensor.dtype) if whole else tensor.detach().contiguous().view(-1)
            record = self._chooser.record(numbers, tensor, demand)
        self._chooser.kept(record, nbytes, kept.record if kept is not None else None)
        if kept is None:
            kept = Kept(record, level, self._chooser.freed)
            self._index[key] = WeakStorage(storage), weakref.ref(kept)
        else:
            kept.record, kept.level = record, level
        return kept, geometry

    def _made_again(self, storage: UntypedStorage, tensor: Tensor, level: float) -> tuple[Record | None, float]:
        found = self._derived.get((storage._cdata, tensor._version))
        return (found[1](), found[2]) if found is not None and found[2] >= level else (None, level)

    def _find(self, key: tuple[Any, ...]) -> Kept | None:
        entry = self._index.get(key)
        return entry[1]() if entry is not None else None


def _key(storage: UntypedStorage, tensor: Tensor, of: str, region: Any) -> tuple[Any, ...]:
    return storage._cdata, tensor._version, tensor.dtype, of, region


def _flat(storage: UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of a storage as ``[n]``."""
    flat = torch.empty(0, dtype=dtype, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))  # type: ignore[call-overload]


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _witness(tensor: Tensor) -> Tensor:
    """Sees whether ``tensor`` is changed, without keeping its memory: it shares its version counter."""
    witness = tensor.detach()
    witness.data = _nothing(tensor.dtype, tensor.device)
    return witness


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)
