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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled
from lightning_efficient.precision.signs import Measured, Probe, shared_exponent

__all__ = ["GROUP", "SIDE", "Kept", "Operand", "measured_result", "places", "probe_of"]

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

    Later they have left the caches, and in a wide matrix each of their numbers lies in a page of its own: to fetch
    those takes several times as long as all else that a probe does. Whether the matrix is still the same, a few show.

    Attributes:
        at: Which they are: see :func:`places`.
        columns: float32 ``[rows of the matrix, SIDE]``; None: they have to be read again.
    """

    at: int
    columns: Tensor | None = None


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


def probe_of(one: Operand, other: Operand, bias: Tensor | None, result: Tensor, at: int) -> Probe:
    """How far off some numbers of a product are, which are computed again.

    Args:
        one: A matrix ``[M, K]``; its rows are multiplied by those of
        other: a matrix ``[N, K]``.
        bias: ``[N]``, that is added.
        result: To be checked, ``[..., N]`` with M rows.
        at: Others with each number.
    """
    left, right, plain = one.read(at), other.read(at), (result, *((bias,) if bias is not None else ()))
    if _library_for(left.values, right.values) and all(_library_for(t) and t.is_contiguous() for t in plain):
        size, off = 0.0, 0.0
        if left.size and right.size:
            found = (ctypes.c_double * 2)()
            _library().probe(  # type: ignore[union-attr]
                *left.in_c(), *right.in_c(), *_given(bias), *_given(result), left.size, right.size, left.terms, found
            )
            size, off = found
    else:
        exact = left.block() @ right.block().t()
        rows, columns = left.places(), right.places()
        if bias is not None:
            exact += bias[columns].float()
        wrong = result.reshape(left.size, right.size).index_select(0, rows).index_select(1, columns).float() - exact
        size, off = float(exact.double().square().sum()), float(wrong.double().square().sum())
    return Probe(math.sqrt(off), math.sqrt(size))


class Operand(NamedTuple):
    """Of a product.

    Attributes:
        values: ``[..., width]``.
        across: Whether the rows that are multiplied are its columns.
        kept: Of its columns; if it is across, these are looked at.
    """

    values: Tensor
    across: bool
    kept: Kept | None = None

    def read(self, at: int) -> _Rows:
        """Without a view of it: to make one takes longer than a look."""
        values, width = self.values, self.values.shape[-1]
        row, step = width, 1
        if not values.is_contiguous():
            values = values.reshape(-1, width)
            row, step = values.stride()
        count = values.numel() // width if width else values.shape[:-1].numel()
        if not self.across:
            return _Rows(values, count, width, row, step, at)
        if self.kept is None:
            return _Rows(values, width, count, step, row, at)
        columns = self.kept.columns
        fits = columns is not None and columns.shape == (count, SIDE)
        return _Rows(values, width, count, step, row, self.kept.at, columns if fits else None)


class _Rows(NamedTuple):
    """Of a matrix: how they lie, and which are looked at."""

    values: Tensor
    size: int
    terms: int
    row: int
    term: int
    at: int
    kept: Tensor | None = None

    def in_c(self) -> tuple[int | None, ...]:
        kept = self.kept.data_ptr() if self.kept is not None else None
        return *_given(self.values), self.row, self.term, kept, self.at

    def places(self) -> Tensor:
        return torch.tensor(places(self.size, self.at), dtype=torch.long, device=self.values.device)

    def block(self) -> Tensor:
        rows = self.values.as_strided((self.size, self.terms), (self.row, self.term))
        return rows.index_select(0, self.places()).float()


def _given(tensor: Tensor | None) -> tuple[int | None, int]:
    return (tensor.data_ptr(), _TYPES[tensor.dtype]) if tensor is not None else (None, 0)


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
