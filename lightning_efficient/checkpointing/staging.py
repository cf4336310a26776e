"""Where the copy of a device's tensors goes first: to host memory, or to free memory of the device.

A copy within the device is some fifty times as fast as one to the host, and holds the training up for that time; one to
the host holds an update up only if it takes longer than forward and backward. (Mohan et al. 2021, "CheckFreq", 4.3.2.)
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from lightning_efficient.checkpointing.device_copies import cloned_on_device
from lightning_efficient.core.torch_internals import bytes_of

__all__ = ["DeviceStaging", "Staging", "stages_on_device"]

Staging = Literal["auto", "host", "device"]

_ROOM = 1.25  # of the copy's size that must be free, for the training needs memory too
_BYTES_PER_SECOND = 1e12  # of copies within a device, until they are measured
_RECENT = 3  # saves whose stall is looked at
_LOOK_AGAIN = 16  # saves within the device, until one to the host shows what it would cost now


def stages_on_device(nbytes: int, free_bytes: int, device_seconds: float, stall_seconds: float) -> bool:
    """Whether to copy within the device first (CheckFreq, Algorithm 1: ``M_max - M > m`` and ``T_og < T_oc``).

    Args:
        nbytes: Of the state on the device.
        free_bytes: Of the device.
        device_seconds: That a copy within the device takes, ``T_og``.
        stall_seconds: That an update waits for a copy to the host, ``T_oc``.
    """
    return nbytes * _ROOM <= free_bytes and device_seconds < stall_seconds


class DeviceStaging:
    """Chooses, and copies within the device where it pays.

    Args:
        mode: ``"host"`` and ``"device"`` leave no choice, but for a device without the memory.

    Attributes:
        chosen: What the last save did.
    """

    def __init__(self, mode: Staging) -> None:
        self.chosen: Literal["host", "device"] = "host"
        self._mode = mode
        self._stalls: deque[float] = deque(maxlen=_RECENT)
        self._device_saves = 0
        self._bytes_per_second = _BYTES_PER_SECOND
        self._timed: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def note_stall(self, seconds: float) -> None:
        """An update has waited for a copy to the host, or found it done after 0 seconds."""
        self._stalls.append(seconds)

    def stage(self, storages: Mapping[int, UntypedStorage]) -> dict[int, Tensor]:
        """Copies of those of ``storages`` that are on CUDA devices, on the current streams; none if it does not pay."""
        self.chosen = "host"
        if self._mode == "auto" and self._device_saves == _LOOK_AGAIN:  # whether updates would still wait
            self._device_saves = 0
            return {}
        by_device: dict[torch.device, dict[int, UntypedStorage]] = {}
        for number, storage in storages.items():
            if storage.is_cuda and storage.nbytes():
                by_device.setdefault(storage.device, {})[number] = storage
        if self._mode == "host" or not by_device:
            return {}
        clones: dict[int, Tensor] = {}
        for device, chosen in by_device.items():
            nbytes = sum(storage.nbytes() for storage in chosen.values())
            if self._pays(device, nbytes):
                try:
                    clones |= self._clone(device, nbytes, chosen)
                    self.chosen = "device"
                    self._device_saves += 1
                except torch.cuda.OutOfMemoryError:  # what is free is in pieces
                    continue
        return clones

    def _clone(self, device: torch.device, nbytes: int, storages: Mapping[int, UntypedStorage]) -> dict[int, Tensor]:
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        clones = cloned_on_device({number: bytes_of(storage) for number, storage in storages.items()})
        end.record(stream)
        self._timed = nbytes, begin, end
        return clones

    def _pays(self, device: torch.device, nbytes: int) -> bool:
        if self._timed is not None and self._timed[2].query():
            timed_bytes, begin, end = self._timed
            self._bytes_per_second = timed_bytes / max(begin.elapsed_time(end) / 1e3, 1e-6)
            self._timed = None
        # At its peak, in the forward and backward to come, not now.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.max_memory_allocated(device)
        stall = math.inf if self._mode == "device" else statistics.median(self._stalls or [0.0])
        return stages_on_device(nbytes, free, nbytes / self._bytes_per_second, stall)
