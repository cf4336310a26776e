"""Products of codes on a processor's tiles (Intel's AMX), converted where they are made; see ``tiles.c``.

They are torch's to the bit: sums of integers are exact, and their conversion is the same. torch 2.13's own kernel,
which is made for all processors, takes longer, and then the sums have to be converted.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled, in_team
from lightning_efficient.precision.scratch import Scratch

__all__ = ["can_tile", "multiply_in_tiles"]

_PANEL, _TERMS = 32, 64  # see ``tiles.c``
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SMALL = 1 << 24  # products of two numbers: no thread for less


class _Matrix(ctypes.Structure):
    """See ``tiles.c``."""

    _fields_ = (
        ("from", ctypes.c_void_p), ("rows", ctypes.c_int64), ("apart", ctypes.c_int64), ("across", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
    )  # fmt: skip


class _Job(ctypes.Structure):
    """Likewise."""

    _fields_ = (
        ("left", _Matrix), ("right", _Matrix), ("out", ctypes.c_void_p), ("type", ctypes.c_int64),
        ("terms", ctypes.c_int64), ("factor", ctypes.c_float), ("again", ctypes.c_float), ("bias", ctypes.c_void_p),
        ("seats", ctypes.c_int64), ("came", ctypes.c_int64), ("to_pack", ctypes.c_int64), ("packed", ctypes.c_int64),
        ("to_multiply", ctypes.c_int64),
    )  # fmt: skip


def can_tile(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of such codes can be had that way, as numbers of ``dtype``."""
    return codes.device.type == "cpu" and dtype in _TYPES and _library() is not None


def multiply_in_tiles(
    one: Tensor, other: Tensor, factor: float, again: float, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``one @ other * factor * again + bias``; see :func:`can_tile`.

    Args:
        one: int8 ``[M, K]``, neither of them zero; ``K`` so small that no sum overflows.
        other: int8 ``[K, N]``, likewise.
        factor: Of the sums.
        again: Likewise, of what that gives.
        bias: float32 ``[N]``, contiguous.
        dtype: Of the result.

    Returns:
        ``[M, N]``.
    """
    library: Any = _library()
    one, other = _laid_out(one), _laid_out(other.t())
    result = torch.empty(one.shape[0], other.shape[0], dtype=dtype)
    places = [_packed_bytes(matrix) for matrix in (one, other)]
    packed = _scratch.memory(sum(places)).data_ptr()
    left, right = _described(one, packed), _described(other, packed + places[0])
    pointer = bias.data_ptr() if bias is not None else None
    job = _Job(left, right, result.data_ptr(), _TYPES[dtype], one.shape[1], factor, again, pointer)
    in_team(library.tiles_multiply, job, 1 + result.numel() * one.shape[1] // _SMALL)
    return result


def _laid_out(codes: Tensor) -> Tensor:
    """Codes ``[rows, terms]``, of which rows, or terms, are neighbours."""
    return codes if 1 in (*codes.stride(), codes.shape[1]) else codes.contiguous()


def _packed_bytes(codes: Tensor) -> int:
    rows, terms = codes.shape
    return -(-rows // _PANEL) * _PANEL * -(-terms // _TERMS) * _TERMS


def _described(codes: Tensor, packed: int) -> _Matrix:
    across = codes.stride(1) != 1 and codes.shape[1] != 1
    return _Matrix(codes.data_ptr(), codes.shape[0], codes.stride(1 if across else 0), across, packed)


_scratch = Scratch()


@cache
def _library() -> Any | None:
    library = compiled(Path(__file__).with_name("tiles.c"))
    if library is None or not library.tiles_ready():
        return None
    library.tiles_multiply.argtypes, library.tiles_multiply.restype = [ctypes.POINTER(_Job)], None
    return library
