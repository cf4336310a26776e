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
from lightning_efficient.precision.signs import Measured, shared_exponent

__all__ = ["error_of_some", "measured_result"]

_RUN = 64  # neighbours that are looked at together
_PART = 100  # one run in so many is looked at,
_MOST = 128  # but not more than about so many: a result has left the cache, and each has to be fetched anew
_SIDE = 16  # rows and columns that are computed again
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_ARGUMENTS = {
    "largest_in_runs": (_POINTER, _INT, _LONG, _LONG, _LONG),
    "probe": (*(_POINTER, _INT) * 4, *(_LONG,) * 4, _POINTER),
}  # fmt: skip


def measured_result(result: Tensor) -> Measured:
    """What can be seen in a sample of a result: its exponent, and whether it is finite or zero."""
    result = result.detach()
    count = result.numel()
    runs = count // _RUN
    step = max(_PART, runs // _MOST | 1) if runs >= 2 * _PART else 1
    library = _library_for(result)
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


def error_of_some(rows: Tensor, columns: Tensor, bias: Tensor | None, result: Tensor, at: int) -> float | None:
    """Relative error of some numbers of ``rows @ columns.T + bias``, computed again.

    Args:
        rows: ``[M, K]``.
        columns: ``[N, K]``.
        bias: ``[N]``.
        result: ``[M, N]``, to be checked.
        at: Others with each number.

    Returns:
        The norm of what is off over that of what is right; None where that is zero.
    """
    tensors = rows, columns, result, *((bias,) if bias is not None else ())
    if all(_library_for(tensor) is not None for tensor in tensors) and result.numel():
        size, off = _sums_in_c(rows, columns, bias, result, at)
    else:
        some = _places(rows.shape[0], at, rows.device), _places(columns.shape[0], at, rows.device)
        exact = rows.index_select(0, some[0]).float() @ columns.index_select(0, some[1]).float().t()
        if bias is not None:
            exact += bias[some[1]].float()
        found = result.index_select(0, some[0]).index_select(1, some[1]).float()
        size, off = float(exact.double().square().sum()), float((found - exact).double().square().sum())
    return math.sqrt(off / size) if size else None


def _sums_in_c(rows: Tensor, columns: Tensor, bias: Tensor | None, result: Tensor, at: int) -> tuple[float, float]:
    found = (ctypes.c_double * 2)()
    given: list[int | None] = []
    for tensor in (rows, columns, bias, result):
        given += (tensor.data_ptr(), _TYPES[tensor.dtype]) if tensor is not None else (None, 0)
    _library().probe(*given, rows.shape[0], columns.shape[0], rows.shape[1], at, found)  # type: ignore[union-attr]
    return found[0], found[1]


def _places(size: int, at: int, device: torch.device) -> Tensor:
    count = min(size, _SIDE)
    return (torch.arange(count, device=device) * (size // count if count else 1) + at) % max(1, size)


@cache
def _library() -> Any | None:
    library = compiled(Path(__file__).with_name("probes.c"))
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.largest_in_runs.restype = ctypes.c_float
    return library


def _library_for(tensor: Tensor) -> Any | None:
    return _library() if tensor.device.type == "cpu" and tensor.dtype in _TYPES and tensor.is_contiguous() else None
