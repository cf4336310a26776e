"""Kernels, each with an eager twin that gives the same bits: Triton's on a GPU, C on a CPU.

Triton comes with torch's builds for GPUs and is imported where there is a tensor for it, not before; C is compiled
then, see :mod:`lightning_efficient.core.native`.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_efficient.core.kernels import host

__all__ = ["kernels_for"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(values: Tensor) -> Any | None:
    """The module of kernels that can work on ``values``; None: do it with torch's operations."""
    if values.is_cuda:
        return _kernels(values.device) if values.dtype in _TYPES else None
    return host if values.device.type == "cpu" and type(values) is Tensor and host.available(values.dtype) else None


@cache
def _kernels(device: torch.device) -> Any | None:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):  # what Triton supports
        return None
    try:
        kernels = importlib.import_module("lightning_efficient.core.kernels.quantization")
        nothing = torch.empty(64, dtype=torch.uint8, device=device)
        kernels.encode(nothing.float(), nothing, 8, 64, "nearest", 0, 1.0, 1.0)
    except Exception as error:  # no C compiler, for one, which Triton needs to launch anything
        warnings.warn(f"Triton does not work here ({error}); compression takes several times as long.", stacklevel=3)
        return None
    return kernels
