"""What ``core/quantization.py`` does, for a CPU: C that goes over the numbers once, see ``host.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled, in_threads
from lightning_efficient.core.random import TABLE, noise_table

__all__ = ["available", "decode", "decoded_pieces", "encode", "pack_two", "unpack_two"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KEYS = (1 << 64) - 1
_LONG, _WORD, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p
_INT = ctypes.c_int
_ARGUMENTS = {
    "encode": (
        _POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _WORD, _FLOAT, _FLOAT, _POINTER, _POINTER, _POINTER, _LONG, _LONG,
        _LONG,
    ),
    "decode": (
        _POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _WORD, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG,
    ),
    "pack_two": (_POINTER, _LONG, _FLOAT, _FLOAT, _POINTER),
    "unpack_two": (_POINTER, _LONG, _FLOAT, _FLOAT, _POINTER),
}  # fmt: skip


@cache
def _library() -> Any:
    """None where there is none: :func:`available` is asked first."""
    library = compiled(Path(__file__).with_name("host.c"))
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.half_is_known.restype = _INT
    return library


def available(dtype: torch.dtype) -> bool:
    """Whether numbers of this type can be worked on."""
    library = _library() if dtype in _TYPES else None
    return library is not None and (dtype != torch.float16 or bool(library.half_is_known()))


def encode(
    values: Tensor, payload: Tensor, code: Any, group_size: int, rounding: str, key: int, factor: float, least: float
) -> tuple[Tensor, Tensor | None]:
    """Fill ``payload``.

    Returns:
        Scale and minimum of each group; NaN and 0 where it has what no scale holds.
    """
    groups = -(-values.numel() // group_size)
    scale = torch.empty(groups, dtype=torch.bfloat16)
    minimum = torch.empty(groups, dtype=torch.bfloat16) if code != "fp8" else None
    table = noise_table(values.device) if rounding != "nearest" else None
    whole, pieces = _counts(values.numel(), group_size)
    library = _library()

    def work(first: int, last: int) -> None:
        library.encode(
            values.data_ptr(), _TYPES[values.dtype], values.numel(), group_size, 0 if code == "fp8" else code,
            _pointer(table), key & _KEYS, factor, least, scale.data_ptr(), _pointer(minimum), payload.data_ptr(),
            first, last, whole,
        )  # fmt: skip

    in_threads(work, pieces)
    return scale, minimum


def decode(
    values: Tensor, payload: Tensor, scale: Tensor, minimum: Tensor | None, code: Any, group_size: int, rounding: str,
    key: int,
) -> None:  # fmt: skip
    """Fill ``values`` with the numbers; see :func:`encode`."""
    whole, pieces = _counts(values.numel(), group_size)

    def work(first: int, last: int) -> None:
        start = _start(first, whole, values.numel(), group_size)
        arguments = payload, scale, minimum, code, group_size, rounding, key, first, last, whole
        _decode(values[start:], values.numel(), *arguments)

    in_threads(work, pieces)


def decoded_pieces(
    numel: int, dtype: torch.dtype, payload: Tensor, scale: Tensor, minimum: Tensor | None, code: Any, group_size: int,
    rounding: str, key: int,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Which numbers, and they, a chunk at a time: until the next one is asked for."""
    whole, pieces = _counts(numel, group_size)
    memory = torch.empty(min(numel, TABLE), dtype=dtype)
    for piece in range(pieces):
        start, end = (_start(number, whole, numel, group_size) for number in (piece, piece + 1))
        out = memory[: end - start]
        _decode(out, numel, payload, scale, minimum, code, group_size, rounding, key, piece, piece + 1, whole)
        yield slice(start, end), out


def _decode(
    out: Tensor, numel: int, payload: Tensor, scale: Tensor, minimum: Tensor | None, code: Any, group_size: int,
    rounding: str, key: int, first: int, last: int, whole: int,
) -> None:  # fmt: skip
    table = noise_table(out.device) if rounding == "dither" else None
    library = _library()
    library.decode(
        out.data_ptr(), _TYPES[out.dtype], numel, group_size, 0 if code == "fp8" else code, _pointer(table),
        key & _KEYS, scale.data_ptr(), _pointer(minimum), payload.data_ptr(), first, last, whole,
    )  # fmt: skip


def pack_two(values: Tensor, low: float, high: float, packed: Tensor) -> bool:
    """Whether each of ``values``, float32 ``[n]``, is one of two; then a bit of each is in ``packed``."""
    return bool(_library().pack_two(values.data_ptr(), values.numel(), low, high, packed.data_ptr()))


def unpack_two(values: Tensor, low: float, high: float, packed: Tensor) -> None:
    """Its inverse."""
    _library().unpack_two(values.data_ptr(), values.numel(), low, high, packed.data_ptr())


def _counts(numel: int, group_size: int) -> tuple[int, int]:
    """Chunks of whole groups, and with the shorter last group."""
    whole = -(-(numel // group_size * group_size) // TABLE)
    return whole, whole + bool(numel % group_size)


def _start(piece: int, whole_chunks: int, numel: int, group_size: int) -> int:
    """Of a piece's numbers."""
    whole = numel // group_size * group_size
    return min(piece * TABLE, whole) if piece <= whole_chunks else numel


def _pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None
