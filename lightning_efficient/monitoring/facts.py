"""What a reader of a report must know of the machine and the software: no names of hosts, users or folders."""

from __future__ import annotations

import platform
from datetime import datetime

import torch

from lightning_efficient.core.hardware import hardware

__all__ = ["machine_facts", "timing_notes"]


def machine_facts(device: torch.device) -> dict[str, str]:
    """Date, hardware and the versions that are the same for every program on this machine."""
    return {
        "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "Hardware": hardware(device),
        "System": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
    }


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
