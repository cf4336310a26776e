"""Copies from an accelerator that neither the host nor, but for the updates that must, the device waits for.

They run on a stream of their own beside the training's. What the training may overwrite only after the copy waits for
an event on the device; the host goes on at once. (CUDA C++ Programming Guide, "Asynchronous Concurrent Execution".)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.storage import UntypedStorage

__all__ = ["DeviceCopies", "cloned_on_device", "fingerprint"]

_WORDS = 1 << 20  # of which a fingerprint is made at a time
_ALIGNMENT = 512  # bytes, for the widest loads and stores


class DeviceCopies:
    """The side stream of each CUDA device, and what waits for it."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def takes(self, source: Tensor | UntypedStorage) -> bool:
        """Whether copies of ``source`` go this way."""
        return source.device.type == "cuda"

    def begin(self, device: torch.device) -> torch.cuda.Stream:
        """The side stream, behind all that the current stream has been given so far."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy to host memory; it blocks this thread only if that is not pinned."""
        with torch.cuda.device(source.device), torch.cuda.stream(self._streams[source.device]):
            target.copy_(source, non_blocking=True)

    def mark(self, device: torch.device) -> torch.cuda.Event:
        """An event after all copies from ``device`` so far; who waits for it on the host sleeps."""
        return self._streams[device].record_event(torch.cuda.Event(blocking=True))

    def let_current_wait(self, events: Sequence[tuple[torch.device, torch.cuda.Event]]) -> None:
        """What is given to the current streams from now on comes after ``events``; the host does not wait."""
        for device, event in events:
            if event.query():
                continue
            current = torch.cuda.current_stream(device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(current)
            current.wait_event(event)
            after.record(current)
            self._stalls.append((before, after))

    def take_stalled_seconds(self) -> float:
        """How long the device has waited for copies, since this was asked the last time, as far as it is over."""
        pairs, self._stalls = self._stalls, []
        seconds = 0.0
        for before, after in pairs:
            if after.query():
                seconds += before.elapsed_time(after) / 1e3
            else:
                self._stalls.append((before, after))
        return seconds


def cloned_on_device(sources: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Copies of byte tensors in one new allocation of their device, in few launches on the current stream.

    Args:
        sources: ``[nbytes]`` each, on one device.

    Raises:
        torch.cuda.OutOfMemoryError: If the device has not that much memory left.
    """
    starts, total = {}, 0
    for number, source in sources.items():
        starts[number] = total
        total += -(-source.numel() // _ALIGNMENT) * _ALIGNMENT
    device = next(iter(sources.values())).device
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    clones = {number: memory[starts[number] : starts[number] + s.numel()] for number, s in sources.items()}
    by_type: dict[torch.dtype, list[int]] = {}
    for number, source in sources.items():
        by_type.setdefault(_widest(source), []).append(number)
    for dtype, chosen in by_type.items():
        targets = [clones[number].view(dtype) for number in chosen]
        torch._foreach_copy_(targets, [sources[number].view(dtype) for number in chosen])
    return clones


def _widest(data: Tensor) -> torch.dtype:
    """The widest words that bytes can be taken for."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if data.numel() % dtype.itemsize == 0 and data.data_ptr() % dtype.itemsize == 0:
            return dtype
    return torch.uint8


def fingerprint(data: Tensor) -> Tensor:
    """A checksum of bytes on a device, computed there, to be compared with another one; int64 ``[1]``.

    Args:
        data: uint8 ``[nbytes]``.
    """
    whole = data.numel() // 4 * 4 if data.data_ptr() % 4 == 0 else 0
    total = torch.zeros(1, dtype=torch.int64, device=data.device)
    for part in (data[:whole].view(torch.int32), data[whole:]):
        for start in range(0, part.numel(), _WORDS):
            words = part[start : start + _WORDS].to(torch.int64)
            places = torch.arange(start, start + words.numel(), device=data.device)
            mixed = words * (words ^ 0x5BD1E995) * (2 * places + 1)  # wraps around, as it may
            total = total * 1_000_003 + mixed.sum()
    return total
