"""A checkpoint in two parts: what ``pickle`` makes of it at once, and the storages whose bytes can follow later.

``torch.save`` writes an object as a pickle in which each tensor's storage is a numbered reference, and the storages
beside it. The pickle is small and takes milliseconds, and all that is not a tensor (numbers, NumPy arrays, the state of
callbacks) is in it by value. Taken alone it is therefore an exact snapshot of everything but the tensors' bytes, with
tied tensors, views and ``state_dict._metadata`` as ``torch.save`` keeps them.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

from lightning_efficient.core.torch_internals import rebuild_tensor, storage_key, typed_storage_parts

__all__ = ["Skeleton", "take_skeleton"]

_PROTOCOL = 2  # as torch.save

_LEGACY_STORAGES = {
    dtype: getattr(torch, name)
    for dtype, name in {
        torch.float64: "DoubleStorage",
        torch.float32: "FloatStorage",
        torch.float16: "HalfStorage",
        torch.bfloat16: "BFloat16Storage",
        torch.int64: "LongStorage",
        torch.int32: "IntStorage",
        torch.int16: "ShortStorage",
        torch.int8: "CharStorage",
        torch.uint8: "ByteStorage",
        torch.bool: "BoolStorage",
    }.items()
}
"""The class by which a file names the type of a storage; other types take the long way through torch."""


_NO_STORAGES = frozenset((str, int, float, bool, tuple, list, dict, OrderedDict, type(None), Tensor, bytes))


@dataclass(frozen=True)
class Skeleton:
    """What :func:`take_skeleton` found.

    Attributes:
        pickled: The object, with references in place of storages.
        storages: By number, alive.
        numbers: The number of each, by :func:`storage_key`.
    """

    pickled: bytes
    storages: tuple[UntypedStorage, ...]
    numbers: Mapping[tuple[int, int], int]


class _Reference:
    """Stands for a storage until the pickler asks for its persistent id."""

    __slots__ = ("persistent_id",)

    def __init__(self, persistent_id: tuple[Any, ...]) -> None:
        self.persistent_id = persistent_id


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self.storages: list[UntypedStorage] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self._types: list[torch.dtype] = []
        self._references: dict[tuple[tuple[int, int], torch.dtype], _Reference] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind = type(obj)  # asked of every object, so it must be quick
        if kind in _NO_STORAGES:
            return None
        if kind is _Reference:
            return obj.persistent_id
        if isinstance(obj, TypedStorage):
            return self._reference(*typed_storage_parts(obj))
        if isinstance(obj, UntypedStorage):
            return self._reference(obj, torch.uint8, torch.UntypedStorage, obj.nbytes())
        return None

    def reducer_override(self, obj: Any) -> Any:
        """For a plain tensor, what its ``__reduce_ex__`` returns, at a third of the time."""
        if (
            type(obj) is not Tensor
            or obj.layout is not torch.strided
            or not (obj.is_cpu or obj.is_cuda)
            or obj.__dict__
            or not obj.is_leaf
            or obj.dtype not in _LEGACY_STORAGES
            or obj._backward_hooks
            or obj.is_neg()
            or obj.is_conj()
        ):
            return NotImplemented
        storage = obj.untyped_storage()
        key = (storage_key(storage), obj.dtype)
        reference = self._references.get(key)
        if reference is None:
            kind = _LEGACY_STORAGES[obj.dtype]
            reference = _Reference(self._reference(storage, obj.dtype, kind, storage.nbytes() // obj.element_size()))
            self._references[key] = reference
        arguments: tuple[Any, ...] = (
            reference,
            obj.storage_offset(),
            tuple(obj.shape),
            obj.stride(),
            obj.requires_grad,
            OrderedDict(),
        )
        return rebuild_tensor, arguments

    def _reference(self, storage: UntypedStorage, dtype: torch.dtype, kind: Any, numel: int) -> tuple[Any, ...]:
        number = self.numbers.setdefault(storage_key(storage), len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
            self._types.append(dtype)
        elif self._types[number] != dtype:
            raise RuntimeError(
                f"A checkpoint holds tensors that view the same memory as {self._types[number]} and as {dtype}, which "
                "torch.save refuses too. Clone one of them."
            )
        location = "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)
        return "storage", kind, str(number), location, numel


def take_skeleton(checkpoint: Any) -> Skeleton:
    """Pickle ``checkpoint`` as ``torch.save`` would, but for the bytes of its tensors.

    Args:
        checkpoint: Anything that ``torch.save`` can write.

    Raises:
        RuntimeError: As ``torch.save``, for tensors that view the same memory as different types.
        pickle.PicklingError: As ``torch.save``, for what cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(checkpoint)
    return Skeleton(stream.getvalue(), tuple(pickler.storages), pickler.numbers)
