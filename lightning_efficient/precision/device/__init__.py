"""Guarded products on a GPU: measured, decided and computed again there, and the host waits for none of it.

The host launches, for each product, the same kernels whatever is decided: the product in few bits, a look at it, the
decision (one small program, on a row of a table that stays on the device), and the product in high bits, which returns
at once where it is not needed. The host reads the table a step late, for the log, the map, and to leave out the low
product where the table says that it will not be used.

Tests hold the kernels to the eager code, interpreted. No time of this folder is measured on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch

from lightning_efficient.precision.device.codes import forms_of
from lightning_efficient.precision.formats import Format

__all__ = ["kernels_on"]

_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
"""Of the least GPU that multiplies such codes."""


def kernels_on(device: torch.device, low: Format) -> Any | None:
    """The kernels for products in few bits on a device; None: there are none, and products are emulated."""
    if device.type != "cuda" or forms_of(low) is None or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(device) < _CAPABILITY[low.name]:
        return None
    return _kernels()


@cache
def _kernels() -> Any | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.import_module("lightning_efficient.precision.device.kernels")
    except Exception as error:
        warnings.warn(f"Triton does not work here ({error}); each product waits for the device.", stacklevel=4)
        return None
