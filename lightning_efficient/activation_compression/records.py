"""What is kept in a tensor's place, each kind able to give the numbers back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_efficient.core.kernels import host, kernels_for
from lightning_efficient.core.quantization import Quantized, dequantize, dequantized_pieces, pack_bits, unpack_bits

__all__ = ["Bits", "Lossy", "Narrowed", "Raw", "Recomputed", "Record", "narrowed", "signs", "two_valued"]


_INCOMPARABLE = (torch.uint16, torch.uint32, torch.uint64)  # torch finds no extremes of them


class Record(ABC):
    """The contents of a storage, or of a part of it.

    Attributes:
        nbytes: What it takes.
        exact: Whether it gives back the very bits.
        way: In a word, for a person.
    """

    nbytes: int
    exact: bool
    way: str

    @abstractmethod
    def decode(self) -> Tensor:
        """The numbers, ``[n]``."""

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Which numbers, and they, a few at a time where that takes less memory; each until the next is asked for."""
        numbers = self.decode()
        yield slice(0, numbers.numel()), numbers


@dataclass(frozen=True)
class Raw(Record):
    """As it was.

    Attributes:
        values: Not to be changed.
    """

    values: Tensor
    nbytes: int
    exact: bool = True
    way: str = "raw"

    def decode(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Lossy(Record):
    """In few bits."""

    encoded: Quantized
    exact: bool = False

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.encoded.nbytes

    @property
    def way(self) -> str:  # type: ignore[override]
        return "fp8" if self.encoded.bits == "fp8" else f"{self.encoded.bits} bits"

    def decode(self) -> Tensor:
        return dequantize(self.encoded)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        return dequantized_pieces(self.encoded)


@dataclass(frozen=True)
class Bits(Record):
    """Of two values: one bit each."""

    packed: Tensor
    values: tuple[Tensor, Tensor]
    numel: int
    exact: bool = True
    way: str = "1 bit, exact"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.packed.nbytes

    def decode(self) -> Tensor:
        if _in_c(self.values[0]):
            numbers = torch.empty(self.numel)
            low, high = (float(value) for value in self.values)
            host.unpack_two(numbers, low, high, self.packed)
            return numbers
        codes = torch.empty(-(-self.numel // 64) * 64, dtype=torch.uint8, device=self.packed.device)
        unpack_bits(self.packed, 1, codes)
        upper = codes[: self.numel].view(torch.bool)
        return upper if self.values[0].dtype == torch.bool else torch.where(upper, self.values[1], self.values[0])


@dataclass(frozen=True)
class Narrowed(Record):
    """Integers in a smaller type."""

    values: Tensor
    dtype: torch.dtype
    exact: bool = True
    way: str = "narrowed"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.values.nbytes

    def decode(self) -> Tensor:
        return self.values.to(self.dtype)


@dataclass(frozen=True)
class Recomputed(Record):
    """Made again of what is kept for another operation.

    Attributes:
        make: Makes the numbers.
        exact: Whether what they are made of is.
    """

    make: Callable[[], Tensor]
    exact: bool
    nbytes: int = 0
    way: str = "recomputed"

    def decode(self) -> Tensor:
        return self.make()


def two_valued(values: Tensor) -> Bits | None:
    """A record of numbers ``[n]`` of which there are at most two different ones; None if there are more."""
    if values.dtype == torch.bool:
        return _bits(values, *_zero_and_one(torch.uint8, values.device).to(torch.bool))
    sample = values[:: max(1, values.numel() // 64)]
    if not ((sample == sample.amin()) | (sample == sample.amax())).all():
        return None
    low, high = torch.aminmax(values)
    if _in_c(values):
        packed = torch.empty(_packed_bytes(values), dtype=torch.uint8)
        return (
            Bits(packed, (low, high), values.numel())
            if host.pack_two(values, float(low), float(high), packed)
            else None
        )
    upper = values == high
    return _bits(upper, low, high) if (upper | (values == low)).all() else None


def signs(values: Tensor) -> Bits:
    """A record of which of the numbers ``[n]`` are positive, as ones and zeros of their type."""
    return _bits(values > 0, *_zero_and_one(values.dtype, values.device))


def _zero_and_one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(2, dtype=dtype, device=device)  # made there: to copy them from the host is to wait for it


def _bits(upper: Tensor, low: Tensor, high: Tensor) -> Bits:
    packed = torch.empty(_packed_bytes(upper), dtype=torch.uint8, device=upper.device)
    codes = torch.zeros(packed.numel() * 8, dtype=torch.uint8, device=upper.device)
    codes[: upper.numel()].copy_(upper)
    pack_bits(codes, 1, packed)
    return Bits(packed, (low, high), upper.numel())


def _packed_bytes(values: Tensor) -> int:
    """With a bit of each, filled up to whole words."""
    return -(-values.numel() // 64) * 8


def _in_c(values: Tensor) -> bool:
    return values.dtype == torch.float32 and kernels_for(values) is host


def narrowed(values: Tensor) -> Narrowed | None:
    """A record of integers ``[n]`` in the smallest type that holds them; None if that is theirs."""
    if values.dtype in _INCOMPARABLE:
        return None
    low, high = (int(value) for value in torch.aminmax(values))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        if dtype.itemsize >= values.dtype.itemsize:
            break
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return Narrowed(values.to(dtype), values.dtype)
    return None
