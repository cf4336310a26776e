"""A checkpoint in two parts: all but the bytes of its tensors, fixed at once, and the storages whose bytes can follow.

``torch.save`` writes an object as a pickle in which each tensor's storage is a numbered reference, and the storages
beside it. All that is not a tensor (numbers, NumPy arrays, the state of callbacks) is in the pickle by value. Taken
alone it is therefore an exact snapshot of everything but the tensors' bytes, with tied tensors, views and
``state_dict._metadata`` as ``torch.save`` keeps them.

To pickle takes milliseconds. A checkpoint of plain containers and tensors, as most are, is therefore copied as far as
it could change (its containers, where its tensors lie), and pickled later; one with other objects is pickled at once.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import PosixPath, PurePosixPath
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


_ATOMS = frozenset(
    (str, int, float, bool, complex, bytes, type(None), torch.Size, torch.dtype, torch.device, PosixPath, PurePosixPath)
)
"""Types whose objects never change, and which ``pickle`` writes by value."""

_NO_STORAGES = _ATOMS | {tuple, list, dict, OrderedDict, Tensor}


class Skeleton:
    """What :func:`take_skeleton` found.

    Attributes:
        storages: By number, alive.
        tensors: The first one met in each storage.
        numbers: The number of each storage, by :func:`storage_key`.
        on_gpu: Whether any of them is on a CUDA device.
    """

    def __init__(self, collected: _Storages, pickled: Callable[[], bytes]) -> None:
        self.storages: Sequence[UntypedStorage] = collected.storages
        self.tensors: Sequence[Tensor | None] = collected.tensors
        self.numbers: Mapping[tuple[int, int], int] = collected.numbers
        self.on_gpu = collected.on_gpu
        self._pickle = pickled

    @cached_property
    def pickled(self) -> bytes:
        """The object, with references in place of storages; made when it is first asked for."""
        return self._pickle()


class _Reference:
    """Stands for a storage until the pickler asks for its persistent id."""

    __slots__ = ("kind", "number", "numel")

    def __init__(self, number: int, kind: Any, numel: int) -> None:
        self.number = number
        self.kind = kind
        self.numel = numel


class _TensorParts(tuple[Any, ...]):
    """A plain tensor without its bytes: storage's number, type, offset, shape, stride, whether it needs a gradient.

    A tuple, for hundreds are made while the training thread waits.
    """

    __slots__ = ()


class _Storages:
    """Numbers storages in the order in which they are met."""

    def __init__(self) -> None:
        self.storages: list[UntypedStorage] = []
        self.tensors: list[Tensor | None] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self.on_gpu = False
        self._types: list[torch.dtype] = []
        self._sizes: list[int] = []  # then: a storage may be resized before it is pickled

    def parts(self, tensor: Tensor) -> _TensorParts | None:
        """Of a plain tensor; None for one that must be asked for its own reduction."""
        dtype, requires_grad, on_cpu = tensor.dtype, tensor.requires_grad, tensor.is_cpu
        if (
            dtype not in _LEGACY_STORAGES
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or not (on_cpu or tensor.is_cuda)
            or tensor.__dict__
            or tensor.is_neg()
            or (requires_grad and (not tensor.is_leaf or tensor._backward_hooks))
        ):
            return None
        number = self._number(tensor.untyped_storage(), dtype, tensor, on_cpu)
        return _TensorParts((number, dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), requires_grad))

    def reduced(self, parts: _TensorParts) -> tuple[Any, ...]:
        """What the tensor's ``__reduce_ex__`` returned then."""
        number, dtype, offset, shape, stride, requires_grad = parts
        reference = _Reference(number, _LEGACY_STORAGES[dtype], self._sizes[number] // dtype.itemsize)
        return rebuild_tensor, (reference, offset, tuple(shape), stride, requires_grad, OrderedDict())

    def persistent_id(self, reference: _Reference) -> tuple[Any, ...]:
        """As ``torch.save`` writes it."""
        storage = self.storages[reference.number]
        location = "cpu" if storage.device.type == "cpu" else torch.serialization.location_tag(storage)
        return "storage", reference.kind, str(reference.number), location, reference.numel

    def persistent_id_of(self, storage: UntypedStorage, dtype: torch.dtype, kind: Any, numel: int) -> tuple[Any, ...]:
        """Of a storage that is met alone."""
        number = self._number(storage, dtype, None, storage.device.type != "cuda")
        return self.persistent_id(_Reference(number, kind, numel))

    def _number(self, storage: UntypedStorage, dtype: torch.dtype, tensor: Tensor | None, on_cpu: bool) -> int:
        key = storage_key(storage)
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.storages)
            self.storages.append(storage)
            self.tensors.append(tensor)
            self._types.append(dtype)
            self._sizes.append(key[1])
            self.on_gpu |= not on_cpu
        elif self._types[number] != dtype:
            raise RuntimeError(
                f"A checkpoint holds tensors that view the same memory as {self._types[number]} and as {dtype}, which "
                "torch.save refuses too. Clone one of them."
            )
        return number


class _Pickler(pickle.Pickler):
    """Writes what ``torch.save`` writes as ``data.pkl``."""

    def __init__(self, stream: io.BytesIO, storages: _Storages) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self._storages = storages

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind = type(obj)  # asked of every object, so it must be quick
        if kind in _NO_STORAGES:
            return None
        if kind is _Reference:
            return self._storages.persistent_id(obj)
        if isinstance(obj, TypedStorage):
            return self._storages.persistent_id_of(*typed_storage_parts(obj))
        if isinstance(obj, UntypedStorage):
            return self._storages.persistent_id_of(obj, torch.uint8, torch.UntypedStorage, obj.nbytes())
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is _TensorParts:
            return self._storages.reduced(obj)
        if type(obj) is Tensor and (parts := self._storages.parts(obj)) is not None:
            return self._storages.reduced(parts)  # what torch returns, at a third of the time
        return NotImplemented


class _OtherObjectError(Exception):
    """Something that is not known to be copied by copying its containers."""


class _Structure:
    """Copies containers; tensors by their parts; what cannot change by reference."""

    def __init__(self) -> None:
        self.storages = _Storages()
        self._copies: dict[int, Any] = {}  # by identity: what is one object stays one

    def copy(self, node: Any) -> Any:
        kind = type(node)
        if kind in _ATOMS:
            return node
        found = self._copies.get(id(node))
        if found is not None:
            return found
        copy = self.copy
        new: Any
        if kind is Tensor:
            new = self.storages.parts(node)
            if new is None:
                raise _OtherObjectError
        elif kind is dict or kind is OrderedDict:
            new = self._copies[id(node)] = kind()
            for key, value in node.items():
                new[key if type(key) in _ATOMS else copy(key)] = value if type(value) in _ATOMS else copy(value)
            if kind is OrderedDict:
                new.__dict__.update(copy(node.__dict__))  # _metadata
        elif kind is list:
            new = self._copies[id(node)] = []
            new.extend([value if type(value) in _ATOMS else copy(value) for value in node])
        elif kind is tuple:
            new = tuple([value if type(value) in _ATOMS else copy(value) for value in node])
        elif kind is _ndarray() and not node.dtype.hasobject:
            new = node.copy(order="K")
        else:
            raise _OtherObjectError
        self._copies[id(node)] = new
        return new


def _ndarray() -> Any:
    numpy = sys.modules.get("numpy")
    return numpy.ndarray if numpy else None


def take_skeleton(checkpoint: Any) -> Skeleton:
    """Fix all of ``checkpoint`` but the bytes of its tensors.

    Args:
        checkpoint: Anything that ``torch.save`` can write.

    Raises:
        RuntimeError: As ``torch.save``, for tensors that view the same memory as different types.
        pickle.PicklingError: As ``torch.save``, for what cannot be pickled.
    """
    structure = _Structure()
    try:
        copied = structure.copy(checkpoint)
    except _OtherObjectError:
        storages = _Storages()
        pickled = _pickled(checkpoint, storages)
        return Skeleton(storages, lambda: pickled)
    return Skeleton(structure.storages, lambda: _pickled(copied, structure.storages))


def _pickled(checkpoint: Any, storages: _Storages) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, storages).dump(checkpoint)
    return stream.getvalue()
