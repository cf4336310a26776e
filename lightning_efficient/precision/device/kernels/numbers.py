"""What several kernels need: types that the interpreter does not round to, and powers of two from bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["as_bfloat16", "as_float", "device_of", "exponent_of", "raw", "shared", "times_power", "type_of"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def raw(tensor: Tensor) -> Tensor:
    """As kernels take it: bfloat16 as its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def type_of(tensor: Tensor) -> int:
    """By which kernels tell types apart; 1: bfloat16."""
    return _TYPES[tensor.dtype]


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it kernels are launched there; the interpreter takes tensors in the host's memory."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def as_float(bits, TYPE: tl.constexpr):
    if TYPE == 1:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float32)


@triton.jit
def as_bfloat16(x):
    """The bits, to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def as_type(x, TYPE: tl.constexpr):
    """What is stored of float32."""
    if TYPE == 1:
        return as_bfloat16(x)
    elif TYPE == 2:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def exponent_of(size):
    """``frexp``'s, of a magnitude given by its bits; of those that float32 has not in full, too."""
    few = size.to(tl.float32).to(tl.int32, bitcast=True)  # such a magnitude is so many times 2 ** -149
    return tl.where(size >= 0x800000, (size >> 23) - 126, (few >> 23) - 126 - 149)


@triton.jit
def shared(size, LEAST: tl.constexpr):
    """Q, so that the largest magnitude times ``2 ** Q`` is below ``2 ** LEAST``; 0 for zero, and if it is no number."""
    usable = (size > 0) & (size < 0x7F800000)
    return tl.where(usable, LEAST - exponent_of(tl.where(usable, size, 0x3F800000)), 0)


@triton.jit
def times_power(x, exponent):
    """``x * 2 ** exponent``, by two powers that float32 has, as it may not have the product."""
    near = (exponent >= -126) & (exponent <= 126)
    half = tl.where(near, exponent, exponent >> 1)
    return x * _power(half) * _power(tl.where(near, 0, exponent - half))


@triton.jit
def _power(exponent):
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)
