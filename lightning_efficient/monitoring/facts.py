"""What a reader of a report must know of the machine and the software: no names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from pathlib import Path

import torch

__all__ = ["hardware", "machine_facts", "timing_notes"]

_CPU_INFO = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> str:
    """The processor that trains, and the one beside it."""
    cpu = f"{_cpu_model()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {cpu}"
    return cpu if device.type == "cpu" else f"{device.type}; {cpu}"


def machine_facts(device: torch.device) -> dict[str, str]:
    """Date, hardware and the versions that are the same for every program on this machine."""
    return {
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "Hardware": hardware(device),
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _cpu_model() -> str:
    # platform.processor() is empty or says only "x86_64" on Linux.
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def timing_notes(batch_unit: str) -> list[str]:
    """How time is measured, one sentence each."""
    return [
        "The time of a batch runs from the callback's start-of-batch hook to its end-of-batch hook; nothing waits for "
        "the device there, so on a GPU the time of one batch is that of its launches, while sums and throughput are "
        "right.",
        "The time between two batches is waiting for data and everything else that ran there: other callbacks, "
        "logging, checkpoints that are saved synchronously.",
        "Validation, its data included, is counted apart and is in no other number. CPU time is that of all threads "
        "of this process, not of data-loader workers.",
        f"Throughput is that of one rank: {batch_unit} by training time, the time between batches included.",
        "Percentiles and medians are over at most 2,000 batches, evenly spaced over the run. The training loss is "
        "the mean over the batches since the point before.",
    ]
