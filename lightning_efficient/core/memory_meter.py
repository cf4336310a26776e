"""Memory in use: the peak of a span of time, of a device or of the process."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import torch

__all__ = ["MemoryMeter"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter:
    """The peak memory since :meth:`start`, of one device or of the process.

    With a CUDA device it is what torch's allocator held for tensors (``torch.cuda.max_memory_allocated``, reset at the
    start). Without, it is the resident memory of the process. The kernel's high-water mark of that never goes down by
    itself; Linux lets a process set its own back to the present (``5`` into ``/proc/self/clear_refs``), which this
    does at the start, so that it sees peaks inside a step. Where that is not allowed, the peak is the largest
    :meth:`sample`. Several meters of one device do not disturb each other: before one sets the mark back, the others
    note it. Setting the mark back also lowers what ``resource.getrusage`` reports afterwards as ``ru_maxrss``.

    Args:
        device: The device to watch; None, or any device that is not CUDA, watches the process.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        import psutil  # not before somebody measures

        self._process = psutil.Process()
        self._kernel_mark = False
        self._largest_sample = 0
        self.start_bytes = 0
        _meters.add(self)

    @property
    def on_device(self) -> bool:
        """Whether it watches a GPU, not the process."""
        return self._device is not None

    @property
    def source(self) -> str:
        """Where the numbers come from, in words for a reader."""
        if self._device is not None:
            return f"memory that torch's allocator gave to tensors on {self._device}"
        if self._kernel_mark:
            return "resident memory of the process (the kernel's high-water mark, set back at the start)"
        return "resident memory of the process, sampled at the hooks of each step (peaks in between are missed)"

    @property
    def needs_samples(self) -> bool:
        """Whether the peak is only as good as the samples taken."""
        return self._device is None and not self._kernel_mark

    def start(self) -> None:
        """Forget all before now."""
        for other in list(_meters):
            if other is not self and other._device == self._device and other.start_bytes:
                other._largest_sample = other.peak_bytes()
        if self._device is not None:
            torch.cuda.init()  # the allocator has no statistics to reset before
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._kernel_mark = _reset_kernel_mark()
        self.start_bytes = self._largest_sample = self._now()

    def sample(self) -> int:
        """The bytes held now."""
        now = self._now()
        self._largest_sample = max(self._largest_sample, now)
        return now

    def peak_bytes(self) -> int:
        """The most bytes held at any moment since :meth:`start`."""
        self.sample()
        if self._device is not None:
            return max(self._largest_sample, torch.cuda.max_memory_allocated(self._device))
        if self._kernel_mark:
            return max(self._largest_sample, _read_kernel_mark())
        return self._largest_sample

    def _now(self) -> int:
        if self._device is not None:
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)


_meters: weakref.WeakSet[MemoryMeter] = weakref.WeakSet()


def _reset_kernel_mark() -> bool:
    if sys.platform != "linux":
        return False
    try:
        _CLEAR_REFS.write_text("5")
        return _read_kernel_mark() > 0
    except OSError:
        return False


def _read_kernel_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
