"""What operations save for backward goes to another tier, and is back before backward needs it, bit for bit.

Autograd holds handles, and a handle holds what was put away, so that lives as long as an operation may need it. Where a
block is checkpointed its inputs are what is saved, so they are what goes. (Source: Rajbhandari et al. 2021,
"ZeRO-Infinity", sections 5.1.2 and 5.2; Bae et al. 2021, "FlashNeuron".)
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.storage import UntypedStorage

from lightning_efficient.core.saved_tensors import Witness, covers, first_byte, is_plain, parameter_of
from lightning_efficient.core.torch_internals import (
    WeakStorage,
    bytes_of,
    in_backward,
    shares_version,
    without_torch_function,
)
from lightning_efficient.offload.saved.handles import Handle, Held, Moved, Part, Same
from lightning_efficient.offload.saved.stash import Stash
from lightning_efficient.offload.saved.stashed import Stashed, StashStatistics
from lightning_efficient.offload.tiers.tier import Tier

__all__ = ["ActivationStatistics", "SavedTensorOffload", "Why"]

Why = Literal["held", "small", "view", "in backward", "not plain", "not torch's memory", "device"]
"""Why a saved tensor stays where it is: somebody holds it anyway; it is not worth the work; it is a view whose few
numbers lie far apart; it was saved by a backward pass, which uses it soon; it is sparse, quantized, of a class of its
own or the like; its memory is numpy's or a file's; nothing can be moved from its device."""

_WHOLE = 4  # a view goes with all of its storage if that is at most so many times as large
_ALIGNED = 64  # bytes: memory that comes back begins at an address with the same remainder, for kernels that look at it


@dataclass(frozen=True)
class ActivationStatistics:
    """What was saved so far, and where it went.

    Attributes:
        packs: Tensors that operations saved.
        shared: Of them, views of what had been put away already.
        put: Of them, put away.
        put_bytes: Theirs.
        stayed: Number and bytes of those that stay where they are, and why; bytes as they are saved, views each.
        stash: What became of what was put away.
    """

    packs: int
    shared: int
    put: int
    put_bytes: int
    stayed: dict[Why, tuple[int, int]]
    stash: StashStatistics


class SavedTensorOffload:
    """Moves saved tensors to a tier, within contexts of :meth:`saving`.

    Each storage goes once for each state that it was saved in, whatever views of it are saved. A tensor that is changed
    in place after it was saved makes backward raise, as it does without hooks. Where other hooks on saved tensors are
    active, an operation goes by the innermost.

    Args:
        tier: Where to. It stays the caller's.
        staging_bytes: That may be on their way there and back at a time.
        minimum_bytes: What is smaller stays.
        keep_bytes: Of the newest that stay, for they are needed first.
        held: Called when a context begins: tensors that stay in memory, or that somebody streams, as parameters and
            buffers. They, and views of them, are looked up again when they are needed.
        room_bytes: Asked how much of the tier may be taken; what does not fit stays.

    Raises:
        ValueError: If an amount cannot be.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        staging_bytes: int,
        minimum_bytes: int = 1 << 20,
        keep_bytes: int = 0,
        held: Callable[[], Iterable[Tensor]] = tuple,
        room_bytes: Callable[[], float] = lambda: math.inf,
    ) -> None:
        for name, given, least in (
            ("staging_bytes", staging_bytes, 1), ("minimum_bytes", minimum_bytes, 1), ("keep_bytes", keep_bytes, 0)
        ):  # fmt: skip
            if given < least:
                raise ValueError(f"{name}={given} must be at least {least}.")
        self.minimum_bytes = minimum_bytes
        self._stash = Stash(tier, staging_bytes=staging_bytes, keep_bytes=keep_bytes, room_bytes=room_bytes)
        self._held = held
        self._lock = threading.RLock()
        self._references: dict[int, Tensor] = {}  # by storage
        self._index: dict[tuple[int, int, int, int], tuple[WeakStorage, weakref.ref[Stashed], Witness]] = {}
        self._packs = self._shared = self._put = self._put_bytes = 0
        self._stayed: dict[Why, list[int]] = {}

    @contextlib.contextmanager
    def saving(self, *held: Tensor) -> Iterator[None]:
        """Within it, what operations save is put away; backward may come within or after it, in any thread.

        Args:
            *held: Tensors that stay in memory until after backward, as those of the batch.
        """
        before = self._references, self._index
        with without_torch_function():
            everything = [tensor for tensor in (*self._held(), *held) if is_plain(tensor)]
            self._references = {tensor.untyped_storage()._cdata: tensor for tensor in everything}
        self._index = {}
        self._stash.open()
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
            self._stash.expect()
        finally:
            self._references, self._index = before

    def hold(self, held: Iterable[Tensor]) -> None:
        """Within the context that is open these, too, stay in memory or are brought back to it by somebody."""
        with without_torch_function():
            self._references.update((t.untyped_storage()._cdata, t) for t in held if is_plain(t))

    def statistics(self) -> ActivationStatistics:
        """Since the beginning."""
        with self._lock:
            stayed = {why: (count, nbytes) for why, (count, nbytes) in self._stayed.items()}
            return ActivationStatistics(
                self._packs, self._shared, self._put, self._put_bytes, stayed, self._stash.statistics()
            )

    def close(self) -> None:
        """Give the room in the tier back. A graph whose tensors are there cannot be gone through any more.

        Raises:
            TierError: If something could not be written.
        """
        self._stash.close()

    def _pack(self, tensor: Tensor) -> Handle:
        with without_torch_function(), self._lock:
            self._packs += 1
            if not is_plain(tensor):
                return self._stays("not plain", tensor)
            storage = tensor.untyped_storage()
            reference: Tensor | None = parameter_of(tensor)
            reference = self._references.get(storage._cdata) if reference is None else reference
            if reference is not None:
                self._count("held", tensor)
                return Held(reference, tensor)
            why = self._why_stays(tensor, storage)
            return self._moved(tensor, storage) if why is None else self._stays(why, tensor)

    def _why_stays(self, tensor: Tensor, storage: UntypedStorage) -> Why | None:
        if storage.nbytes() < self.minimum_bytes:
            return "small"
        if in_backward():
            return "in backward"
        if tensor.device.type not in ("cpu", "cuda"):
            return "device"
        return None if storage.resizable() else "not torch's memory"

    def _moved(self, tensor: Tensor, storage: UntypedStorage) -> Handle:
        """Put it away, with as much of its storage as will be used, or find that this has been done."""
        total = storage.nbytes()
        extent = _Extent.of(tensor)
        stashed = self._find(tensor, storage, 0, total)
        if stashed is not None or _goes_whole(tensor, total, extent):
            extent = _Extent(0, total, total)
        elif extent.span < self.minimum_bytes:
            self._count("small", tensor)  # in a copy, lest it keep what is larger
            return Part(bytes_of(storage)[extent.begin : extent.end].clone(), extent.begin, tensor)
        elif extent.span > _WHOLE * extent.nbytes:
            return self._stays("view", tensor)
        else:
            stashed = self._find(tensor, storage, extent.begin, extent.end)
        if stashed is None:
            stashed = self._stash.put(bytes_of(storage)[extent.begin : extent.end])
            key = storage._cdata, tensor._version, extent.begin, extent.end
            self._index[key] = WeakStorage(storage), weakref.ref(stashed), Witness(tensor)
            self._put += 1
            self._put_bytes += stashed.nbytes
        else:
            self._shared += 1
        return Moved(self._stash, stashed, extent.begin, tensor)

    def _find(self, tensor: Tensor, storage: UntypedStorage, begin: int, end: int) -> Stashed | None:
        """What was put away of these bytes as they are now."""
        entry = self._index.get((storage._cdata, tensor._version, begin, end))
        if entry is None:
            return None
        _, stashed, witness = entry
        # Tensors that share memory and not their counts of changes may have the same count by chance.
        return stashed() if shares_version(tensor, witness.tensor) else None

    def _stays(self, why: Why, tensor: Tensor) -> Handle:
        self._count(why, tensor)
        return Same(tensor)

    def _count(self, why: Why, tensor: Tensor) -> None:
        count = self._stayed.setdefault(why, [0, 0])
        count[0] += 1
        count[1] += tensor.numel() * tensor.dtype.itemsize


@dataclass(frozen=True)
class _Extent:
    """Bytes of a storage, and how many of them are of a tensor."""

    begin: int
    end: int
    nbytes: int

    @property
    def span(self) -> int:
        return self.end - self.begin

    @staticmethod
    def of(tensor: Tensor) -> _Extent:
        """Those of a tensor, from an aligned one to its last."""
        size = tensor.dtype.itemsize
        offset = first_byte(tensor)
        if not tensor.numel():
            return _Extent(0, 0, 0)
        steps = list(zip(tensor.shape, tensor.stride(), strict=True))
        last = sum((count - 1) * step for count, step in steps)
        nbytes = prod(count for count, step in steps if step) * size
        return _Extent(offset // _ALIGNED * _ALIGNED, offset + (last + 1) * size, nbytes)


def _goes_whole(tensor: Tensor, total: int, extent: _Extent) -> bool:
    """Whether all of its storage goes, so that other views of that go with it.

    Where nobody knows what it is a view of, the rest may be changed without its count of changes telling
    (``unsafe_chunk``), and would go again for each part.
    """
    if covers(tensor, total):
        return True
    base = tensor._base
    return base is not None and covers(base, total) and extent.span * _WHOLE >= total


def _unpack(handle: Handle) -> Tensor:
    return handle.tensor()
