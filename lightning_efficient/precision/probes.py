"""A look at a few numbers of a large result: how large they are, and how far off.

So few that the time goes into calls rather than numbers: between two large products each of torch's operations finds
the caches cold and takes ten times as long as in a loop of its own. On a CPU all of a look is one call of C, see
``probes.c``; elsewhere it is done with torch's operations.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled
from lightning_efficient.precision.signs import Measured, Probe, shared_exponent

__all__ = ["GROUP", "SIDE", "Kept", "measured_result", "places", "probe_of"]

SIDE = 16
"""Rows and columns of the block that is computed again exactly."""
GROUP = 4
"""Of those that are neighbours."""

_RUN = 64  # neighbours that are looked at together
_PART = 100  # one run in so many is looked at,
_MOST = 128  # but not more than about so many: a result has left the cache, and each has to be fetched anew
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "largest_in_runs": (_POINTER, _INT, _LONG, _LONG, _LONG),
    "probe": (
        *(_POINTER, _INT, _LONG, _LONG, _POINTER, _LONG) * 2, *(_POINTER, _INT) * 2, *(_LONG,) * 3, _POINTER,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Some columns of a matrix, taken when all of it was read.

    Later each of their numbers lies in a page of its own, which has left the caches: to fetch those takes several times
    as long as all else that a probe does.

    Attributes:
        at: Which they are: see :func:`places`.
        columns: float32 ``[rows of the matrix, SIDE]``.
        width: Columns of the matrix.
    """

    at: int
    columns: Tensor
    width: int

    def has_rows_of(self, size: int, terms: int, step: int) -> bool:
        """Whether they are rows of a view of the matrix ``[size, terms]``, whose terms are ``step`` elements apart."""
        return step != 1 and self.width == size and self.columns.shape[0] == terms


def measured_result(result: Tensor) -> Measured:
    """What can be seen in a sample of a result: its exponent, and whether it is finite or zero."""
    count = result.numel()
    runs = count // _RUN
    step = max(_PART, runs // _MOST | 1) if runs >= 2 * _PART else 1
    library = _library_for(result) if result.is_contiguous() else None
    if not count:
        largest = 0.0
    elif library is not None:
        largest = library.largest_in_runs(result.data_ptr(), _TYPES[result.dtype], count, _RUN, step)
    else:
        part = result.detach().reshape(-1)
        part = part[: runs * _RUN].view(runs, _RUN)[::step] if step > 1 else part
        largest = float(torch.linalg.vector_norm(part, math.inf))
    if not math.isfinite(largest):
        return Measured(None, finite=False)
    return Measured(shared_exponent(largest, 8), all_zero=largest == 0)


def probe_of(
    one: Tensor,
    other: Tensor,
    bias: Tensor | None,
    result: Tensor,
    at: int,
    kept: tuple[Kept | None, Kept | None] = (None, None),
) -> Probe:
    """How far off some numbers of ``one @ other + bias`` are, which are computed again.

    Args:
        one: ``[M, K]``, of any strides.
        other: ``[K, N]``, likewise.
        bias: ``[N]``.
        result: ``[M, N]``, to be checked.
        at: Others with each number.
        kept: Of the matrices that ``one`` and ``other`` are or are views of: if sums run over their rows, these
            columns are looked at.
    """
    rows, columns, terms = one.shape[0], other.shape[1], one.shape[1]
    left, right = kept
    if left is not None and not left.has_rows_of(rows, terms, one.stride(1)):
        left = None
    if right is not None and not right.has_rows_of(columns, terms, other.stride(0)):
        right = None
    down, across = left.at if left is not None else at, right.at if right is not None else at
    plain = result, *((bias,) if bias is not None else ())
    if _library_for(one, other) and all(_library_for(tensor) and tensor.is_contiguous() for tensor in plain):
        size, off = 0.0, 0.0
        if rows and columns:
            found = (ctypes.c_double * 2)()
            _library().probe(  # type: ignore[union-attr]
                *_given(one), *one.stride(), _pointer(left), down,
                *_given(other), *reversed(other.stride()), _pointer(right), across,
                *_given(bias), *_given(result), rows, columns, terms, found,
            )  # fmt: skip
            size, off = found
    else:
        these, those = (
            torch.tensor(places(count, there), dtype=torch.long, device=one.device)
            for count, there in ((rows, down), (columns, across))
        )
        exact = one.index_select(0, these).float() @ other.index_select(1, those).float()
        if bias is not None:
            exact += bias[those].float()
        wrong = result.index_select(0, these).index_select(1, those).float() - exact
        size, off = float(exact.double().square().sum()), float(wrong.double().square().sum())
    return Probe(math.sqrt(off), math.sqrt(size))


def _given(tensor: Tensor | None) -> tuple[int | None, int]:
    return (tensor.data_ptr(), _TYPES[tensor.dtype]) if tensor is not None else (None, 0)


def _pointer(kept: Kept | None) -> int | None:
    return kept.columns.data_ptr() if kept is not None else None


def places(size: int, at: int) -> tuple[int, ...]:
    """Which of ``size`` rows are looked at: groups of neighbours, evenly spread, others with each ``at``."""
    spread = range(size) if size < SIDE else [n // GROUP * (size * GROUP // SIDE) + n % GROUP for n in range(SIDE)]
    return tuple((number + at) % size for number in spread)


@cache
def _library() -> Any | None:
    library = compiled(Path(__file__).with_name("probes.c"))
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.largest_in_runs.restype = ctypes.c_float
    return library


def _library_for(*tensors: Tensor) -> Any | None:
    return _library() if all(t.is_cpu and t.dtype in _TYPES for t in tensors) else None
