"""Codes of 1 to 8 bits side by side in bytes, and out of them again, by whole words."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filled", "pack_bits", "unpack_bits"]

_ALIGNMENT = 64  # codes to which they are filled up: parts of them are then whole words at any number of bits
_LOW_BITS = {1: 0x0101010101010101, 2: 0x0303030303030303, 4: 0x0F0F0F0F0F0F0F0F}


def filled(size: int) -> int:
    """How many codes are packed where there are ``size``."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def pack_bits(codes: Tensor, bits: int, packed: Tensor) -> None:
    """Put codes of ``bits`` bits side by side: uint8 ``[n]`` into uint8 ``[n * bits / 8]``; n is a multiple of 64.

    A byte holds the codes of one place in each part of the chunk, so that all goes by whole words; 3 bits are two
    planes, of 2 and of 1.
    """
    if bits == 8:
        packed.copy_(codes)
        return
    words, start, shift = codes.view(torch.int64), 0, 0
    for width in _planes(bits):
        count = words.numel() * width // 8
        out = packed.view(torch.int64)[start : start + count]
        last = 8 // width - 1
        for place in range(last, -1, -1):
            part = words[place * count : (place + 1) * count]
            if bits != width:
                part = (part >> shift) & _LOW_BITS[width]
            if place == last:
                out.copy_(part)
            else:
                out.bitwise_left_shift_(width).bitwise_or_(part)
        start, shift = start + count, shift + width


def unpack_bits(packed: Tensor, bits: int, codes: Tensor) -> None:
    """The inverse of :func:`pack_bits`."""
    if bits == 8:
        codes.copy_(packed)
        return
    words, start, shift = codes.view(torch.int64), 0, 0
    for width in _planes(bits):
        count = words.numel() * width // 8
        part = packed.view(torch.int64)[start : start + count]
        for place in range(8 // width):
            out = words[place * count : (place + 1) * count]
            plane = (part >> (place * width) if place else part) & _LOW_BITS[width]
            if shift:
                out.bitwise_or_(plane << shift)
            else:
                out.copy_(plane)
        start, shift = start + count, shift + width


def _planes(bits: int) -> list[int]:
    return [width for width in (4, 2, 1) if bits & width]
