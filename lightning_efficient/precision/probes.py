"""A look at a few numbers of a large result: how large they are, and how far off.

So few that the time goes into calls rather than numbers: between two large products each of torch's operations finds
the caches cold and takes ten times as long as in a loop of its own. On a CPU all of a look is one call of C, see
``probes.c``; elsewhere it is done with torch's operations.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.native import compiled
from lightning_efficient.precision.signs import Measured, Probe, shared_exponent

__all__ = ["GROUP", "SIDE", "measured_result", "places", "probe_of"]

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
    "probe": (*(_POINTER, _INT, _LONG, _LONG) * 2, *(_POINTER, _INT) * 2, *(_LONG,) * 4, _POINTER),
}  # fmt: skip


def measured_result(result: Tensor) -> Measured:
    """What can be seen in a sample of a result: its exponent, and whether it is finite or zero."""
    result = result.detach()
    count = result.numel()
    runs = count // _RUN
    step = max(_PART, runs // _MOST | 1) if runs >= 2 * _PART else 1
    library = _library_for(result) if result.is_contiguous() else None
    if not count:
        largest = 0.0
    elif library is not None:
        largest = library.largest_in_runs(result.data_ptr(), _TYPES[result.dtype], count, _RUN, step)
    else:
        part = result.reshape(-1)
        part = part[: runs * _RUN].view(runs, _RUN)[::step] if step > 1 else part
        largest = float(torch.linalg.vector_norm(part, math.inf))
    if not math.isfinite(largest):
        return Measured(None, finite=False)
    return Measured(shared_exponent(largest, 8), all_zero=largest == 0)


def probe_of(one: Tensor, other: Tensor, bias: Tensor | None, result: Tensor, at: int) -> Probe:
    """How far off some numbers of ``one @ other + bias`` are, which are computed again.

    Args:
        one: ``[M, K]``, of any strides.
        other: ``[K, N]``, likewise.
        bias: ``[N]``.
        result: ``[M, N]``, to be checked.
        at: Others with each number.
    """
    plain = result, *((bias,) if bias is not None else ())
    if _library_for(one, other) and all(_library_for(tensor) and tensor.is_contiguous() for tensor in plain):
        size, off = _sums_in_c(one, other, bias, result, at)
    else:
        rows, columns = places(one.shape[0], at, one.device), places(other.shape[1], at, one.device)
        exact = one.index_select(0, rows).float() @ other.index_select(1, columns).float()
        if bias is not None:
            exact += bias[columns].float()
        found = result.index_select(0, rows).index_select(1, columns).float()
        size, off = float(exact.double().square().sum()), float((found - exact).double().square().sum())
    return Probe(math.sqrt(off), math.sqrt(size))


def _sums_in_c(one: Tensor, other: Tensor, bias: Tensor | None, result: Tensor, at: int) -> tuple[float, float]:
    rows, columns = result.shape
    if not result.numel():
        return 0.0, 0.0
    found = (ctypes.c_double * 2)()
    given: list[int | None] = []
    for matrix in (one, other.t()):
        given += (matrix.data_ptr(), _TYPES[matrix.dtype], *matrix.stride())
    for tensor in (bias, result):
        given += (tensor.data_ptr(), _TYPES[tensor.dtype]) if tensor is not None else (None, 0)
    _library().probe(*given, rows, columns, one.shape[1], at, found)  # type: ignore[union-attr]
    return found[0], found[1]


def places(size: int, at: int, device: torch.device) -> Tensor:
    """Which of ``size`` rows are looked at: groups of neighbours, evenly spread."""
    number = torch.arange(min(size, SIDE), device=device)
    spread = number if size < SIDE else number // GROUP * (size * GROUP // SIDE) + number % GROUP
    return (spread + at) % max(1, size)


@cache
def _library() -> Any | None:
    library = compiled(Path(__file__).with_name("probes.c"))
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.largest_in_runs.restype = ctypes.c_float
    return library


def _library_for(*tensors: Tensor) -> Any | None:
    return _library() if all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors) else None
