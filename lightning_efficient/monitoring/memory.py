"""Memory: the bytes that a set of tensors holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["ParameterSize", "nested_tensors", "parameter_size", "tensor_bytes"]

_ORDINARY = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class ParameterSize:
    """How large a module's parameters are; one that is used in several places counts once.

    Attributes:
        count: Number of scalars.
        trainable: Those of them with ``requires_grad``.
        bytes: What they weigh in their dtypes, whether or not they are in memory at this moment.
    """

    count: int
    trainable: int
    bytes: int


def parameter_size(module: nn.Module) -> ParameterSize:
    """Count the parameters of ``module``, tied ones once."""
    seen: set[object] = set()
    count = trainable = size = 0
    for parameter in module.parameters():
        for part in _plain(parameter.detach()):
            key = _slice_of_storage(part) or id(parameter)
            if key in seen:
                continue
            seen.add(key)
            count += part.numel()
            trainable += part.numel() * parameter.requires_grad
            size += part.nbytes
    return ParameterSize(count, trainable, size)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of all storages that ``tensors`` keep alive, each storage once.

    A view counts its whole storage, since that is what it keeps in memory. A sharded or quantized tensor counts the
    plain tensors that it is made of on this rank. Tensors without memory (meta, freed storage) count nothing.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        for part in _plain(tensor):
            if part.layout is torch.strided:
                storage = part.untyped_storage()
                if address := storage.data_ptr():
                    storages[part.device, address] = storage.nbytes()
    return sum(storages.values())


def nested_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor inside mappings, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from nested_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from nested_tensors(item)


def _plain(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The ordinary tensors that a wrapper subclass (DTensor, a quantized tensor) is made of; else the tensor."""
    if type(tensor) in _ORDINARY or not hasattr(tensor, "__tensor_flatten__"):
        return (tensor,)
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # a DTensor's mesh is among them
    return [plain for part in parts if isinstance(part, torch.Tensor) for plain in _plain(part)]


def _slice_of_storage(tensor: torch.Tensor) -> object | None:
    """What tells whether two tensors are the same memory; None for one that has none now."""
    if tensor.layout is not torch.strided:
        return None
    address = tensor.data_ptr()
    return (tensor.device, address, tensor.shape) if address else None
