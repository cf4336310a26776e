"""Numbers of few bits: how a tensor becomes such, and what it stands for then.

=========== ================================================== =================================
name        numbers that share a scale (a power of two)         computed by
=========== ================================================== =================================
int8        all of a tensor                                    integer kernels; exact sums
int8-row    a row (of the last dimension)                      emulated
int8-block  128 neighbours in a row                            emulated
bfp16       16 neighbours in a row, 8 bits of mantissa each    emulated
fp8         all; e4m3, gradients e5m2                          emulated
fp16        none: values beyond 65504 are a sign of failure;   kernels of 16 bits; on a CPU, where those take a hundred
            gradients: all of a tensor                         times as long as float32's, emulated
bf16        none                                               kernels of 16 bits
=========== ================================================== =================================

"Emulated": each number is rounded to what the format has, and the product is summed in float32, as such hardware does;
results are those of real kernels but for the order of sums, and nothing is faster.

(Shared exponents: Yamaguchi et al.; block floating point: Rouhani et al. 2020, "Pushing the limits of narrow precision
inferencing at cloud scale with Microsoft floating point", 2; fp8: Micikevicius et al. 2022, 3 and 4.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_efficient.precision.integers import Integers, largest_magnitude, with_shared_exponent
from lightning_efficient.precision.signs import Measured, quantization_error, sample, shared_exponent

__all__ = ["FORMATS", "AtRandom", "Encoded", "Format", "format_named", "is_at_random"]


AtRandom = bool | Literal["gradients"]
"""Whether numbers are rounded up or down at random: all, none, or those of gradients."""


def is_at_random(what: AtRandom, which: str) -> bool:
    """Whether an operand (input, weight or gradient) is."""
    return which == "gradient" if what == "gradients" else bool(what)


@dataclass(frozen=True)
class Encoded:
    """A tensor in few bits.

    Attributes:
        measured: What can be seen of it.
        integers: Its codes, where there are kernels for them.
        values: Or the numbers that it stands for, times ``2 ** shift``, in a type that has them all; None if there are
            none, as the tensor has values that are not finite.
        shift: Of those.
    """

    measured: Measured
    integers: Integers | None = None
    values: Tensor | None = None
    shift: int = 0

    def decoded(self) -> Tensor:
        """The numbers that it stands for."""
        if self.integers is not None:
            return self.integers.decoded()
        if self.values is None:
            raise RuntimeError("What is not finite has no numbers of few bits.")
        return self.values.float() * math.ldexp(1.0, -self.shift) if self.shift else self.values


_LEAST = -126  # power of two that float32 has in full; scales beyond are zero or infinite
_NOT_FINITE = Encoded(Measured(None, finite=False))


class Format(ABC):
    """How a tensor becomes numbers of few bits.

    Attributes:
        name: As users write it.
        bits: Of a number.
        emulated: Whether products take no less time than in high bits.
        at_random: Whether numbers can be rounded up or down at random.
    """

    name: str
    bits: int
    emulated: bool
    at_random: bool = True

    @abstractmethod
    def encode(
        self,
        values: Tensor,
        *,
        gradient: bool = False,
        key: int | None = None,
        guess: int | None = None,
        at: int | None = None,
    ) -> Encoded:
        """``values``, of any shape, in this format.

        Args:
            values: Floating-point numbers.
            gradient: Whether they are one.
            key: Of the noise by which they are rounded at random.
            guess: What their shared exponent may well be; it changes nothing but the time.
            at: Which columns are kept as they are, where they can be: see :func:`~.integers.to_integers`.
        """


class SharedExponent(Format):
    """Integers of 8 bits, one exponent for a tensor."""

    name, bits, emulated = "int8", 8, False

    def encode(
        self,
        values: Tensor,
        *,
        gradient: bool = False,
        key: int | None = None,
        guess: int | None = None,
        at: int | None = None,
    ) -> Encoded:
        found = with_shared_exponent(values, guess=guess, key=key, at=at)
        return Encoded(found[1], found[0]) if found is not None else _NOT_FINITE


class _Rounded(Format):
    """Numbers that are kept in a type that has them all."""

    def encode(
        self,
        values: Tensor,
        *,
        gradient: bool = False,
        key: int | None = None,
        guess: int | None = None,
        at: int | None = None,
    ) -> Encoded:
        largest = largest_magnitude(values)
        if not math.isfinite(largest):
            return _NOT_FINITE
        shift = self._shift(largest) if gradient else 0
        if shift:
            values, largest = values.float() * math.ldexp(1.0, shift), math.ldexp(largest, shift)
        rounded, overflow = self._rounded(values.detach(), largest, gradient, key)
        before, after = sample(values.detach().reshape(-1)).float(), sample(rounded.reshape(-1)).float()
        some = before != 0
        known = int(some.sum())
        measured = Measured(
            shared_exponent(math.ldexp(largest, -shift), self.bits) if known else None,
            overflow=overflow,
            underflow=int((some & (after == 0)).sum()) / known if known else 0.0,
            all_zero=not known,
            error=quantization_error(float(before.abs().sum()), float(after.abs().sum())),
        )
        return Encoded(measured, values=rounded, shift=shift)

    def _shift(self, largest: float) -> int:
        """By how many powers of two gradients, of which this is the largest, are larger while they are few bits."""
        return 0

    @abstractmethod
    def _rounded(self, values: Tensor, largest: float, gradient: bool, key: int | None) -> tuple[Tensor, float]:
        """The numbers of the format, and the part of ``values`` that were beyond them."""


@dataclass(frozen=True)
class Blocks(_Rounded):
    """Integers of 8 bits, an exponent for so many neighbours in a row.

    Attributes:
        size: Of a block; 0: the row.
    """

    name: str
    size: int
    bits: int = 8
    emulated: bool = True

    def _rounded(self, values: Tensor, largest: float, gradient: bool, key: int | None) -> tuple[Tensor, float]:
        rows = values.float().reshape(-1, values.shape[-1] if values.dim() else 1)
        width = rows.shape[1]
        size = self.size or width
        filled = torch.nn.functional.pad(rows, (0, -width % size)) if size and width % size else rows
        blocks = filled.reshape(-1, size) if size else filled
        exponent = torch.frexp(blocks.abs().amax(1, keepdim=True)).exponent - (self.bits - 1.0)
        step = torch.exp2(exponent.clamp_(min=_LEAST))
        codes = _round(blocks / step, key).clamp_(-127, 127)
        return codes.mul_(step).reshape(rows.shape[0], -1)[:, :width].reshape(values.shape), 0.0


class Float8(_Rounded):
    """e4m3, with a wider range for gradients: e5m2; one power of two for a tensor."""

    name, bits, emulated, at_random = "fp8", 8, True, False

    def _rounded(self, values: Tensor, largest: float, gradient: bool, key: int | None) -> tuple[Tensor, float]:
        kind = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
        most = torch.finfo(kind).max
        exponent = min(math.frexp(most)[1] - 1 - math.frexp(largest)[1], -_LEAST) if largest else 0
        scaled = values.float() * math.ldexp(1.0, exponent)
        # what casts make of numbers beyond the largest differs between versions and devices
        return scaled.clamp_(-most, most).to(kind).float().mul_(math.ldexp(1.0, -exponent)), 0.0


@dataclass(frozen=True)
class Half(_Rounded):
    """Floats of 16 bits."""

    name: str
    dtype: torch.dtype
    bits: int = 16
    emulated: bool = False
    at_random: bool = False

    def _rounded(self, values: Tensor, largest: float, gradient: bool, key: int | None) -> tuple[Tensor, float]:
        most = torch.finfo(self.dtype).max
        beyond = float((values.abs() > most).float().mean()) if largest > most else 0.0
        rounded = values.to(self.dtype)
        return rounded.float() if self.dtype == torch.float16 and values.device.type == "cpu" else rounded, beyond

    def _shift(self, largest: float) -> int:
        # a loss scale of its own for each gradient (Zhao et al. 2019, "Adaptive Loss Scaling"): below one, so that
        # products have room, and as far above the smallest float16 as can be
        return min(-math.frexp(largest)[1], -_LEAST) if self.dtype == torch.float16 and largest else 0


def _round(numbers: Tensor, key: int | None) -> Tensor:
    if key is None:
        return numbers.round()
    noise = torch.rand(numbers.shape, generator=torch.Generator().manual_seed(key & ((1 << 63) - 1)))
    return (numbers + noise.to(numbers.device)).floor_()


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        SharedExponent(), Blocks("int8-row", 0), Blocks("int8-block", 128), Blocks("bfp16", 16), Float8(),
        Half("fp16", torch.float16), Half("bf16", torch.bfloat16),
    )
}  # fmt: skip


def format_named(name: str) -> Format:
    """One of :data:`FORMATS`.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in FORMATS:
        raise ValueError(f"low={name!r} is no format; there are {', '.join(FORMATS)}.")
    return FORMATS[name]
