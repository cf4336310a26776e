"""What computes, in a line: by that times can be compared, and results that others measured be told apart."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch

__all__ = ["hardware"]

_CPU_INFO = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> str:
    """The processor that trains, and the one beside it."""
    cpu = f"{_cpu_model()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {cpu}"
    return cpu if device.type == "cpu" else f"{device.type}; {cpu}"


@cache
def _cpu_model() -> str:
    # platform.processor() is empty or says only "x86_64" on Linux.
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
