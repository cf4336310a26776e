"""How the optimizer state of a few parameters lies in one record, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import local_part, spread_of, spread_over_ranks
from lightning_efficient.offload.tiers.mapped_memory import alone

__all__ = ["MASTER", "VALUE", "Entry", "Layout", "is_bulk"]

MASTER = "master_weight"
"""The key, beside the optimizer's own, of a parameter's value in full precision."""
VALUE = "value_on_host"
"""Likewise of a copy of its value, where it is stepped on the host; it is no part of the optimizer's state."""
ALIGNMENT = 64  # bytes: a cache line, and what vectorized kernels like best


def is_bulk(value: Any) -> bool:
    """Whether a value of an optimizer's state is moved with the record; step counters and the like stay resident.

    Of a tensor that is spread over ranks, this rank's part counts.
    """
    return isinstance(value, Tensor) and value.layout == torch.strided and local_part(value).numel() > 1


@dataclass(frozen=True)
class Entry:
    """One tensor of the state of one parameter, or this rank's part of one that is spread over ranks.

    Attributes:
        parameter: Its index in the unit.
        key: Its name in the optimizer's state.
        dtype: Of its elements.
        size: Its shape.
        stride: In elements; its elements fill its place without gaps.
        offset: Of its first byte in the record.
        nbytes: Its size.
        spread: How it is spread over ranks; None if it is not.
    """

    parameter: int
    key: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    spread: Any = None

    def view(self, buffer: Tensor) -> Tensor:
        """What is here of the tensor, on the bytes of ``buffer``: uint8 ``[at least offset + nbytes]``."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Layout:
    """All tensors of a record.

    Attributes:
        entries: In the order of their places.
        nbytes: Of the record.
    """

    entries: tuple[Entry, ...]
    nbytes: int

    @classmethod
    def of(cls, states: Sequence[Mapping[str, Any]]) -> Layout:
        """The layout for the bulk of ``states``, one for each parameter of a unit."""
        entries, offset = [], 0
        for index, state in enumerate(states):
            for key, value in state.items():
                if is_bulk(value):
                    local = local_part(value)
                    nbytes = local.numel() * local.element_size()
                    size, stride = tuple(local.shape), _dense_stride(local)
                    entries.append(Entry(index, key, value.dtype, size, stride, offset, nbytes, spread_of(value)))
                    offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(entries), offset)

    def views(self, buffer: Tensor, parameters: int, *, to_save: bool = False) -> list[dict[str, Tensor]]:
        """The tensors in ``buffer``, by key, for each of so many parameters.

        Args:
            buffer: uint8 ``[nbytes]``.
            parameters: How many.
            to_save: It is on the host; tensors of several types get a storage each, for ``torch.save`` refuses others.
        """
        found: list[dict[str, Tensor]] = [{} for _ in range(parameters)]
        apart = to_save and len({entry.dtype for entry in self.entries}) > 1
        for entry in self.entries:
            view = entry.view(buffer)
            found[entry.parameter][entry.key] = spread_over_ranks(alone(view) if apart else view, entry.spread)
        return found

    def fill(self, buffer: Tensor, states: Sequence[Mapping[str, Any]]) -> None:
        """Copy the bulk of ``states`` into ``buffer``; a tensor that lies there already is left alone."""
        for entry in self.entries:
            place, value = entry.view(buffer), local_part(states[entry.parameter][entry.key])
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides that ``torch.empty_like`` gives: the tensor's own where it has no gaps."""
    return torch.empty_like(tensor, device="meta").stride()
