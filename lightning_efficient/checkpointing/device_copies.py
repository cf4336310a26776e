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

_WORDS = 1 << 22  # of which a fingerprint is made at a time


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
        with torch.cuda.stream(self._streams[source.device]):
            target.copy_(source, non_blocking=True)

    def mark(self, device: torch.device) -> torch.cuda.Event:
        """An event after all copies from ``device`` so far."""
        return self._streams[device].record_event()

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
        over = [(before, after) for before, after in self._stalls if after.query()]
        self._stalls = [pair for pair in self._stalls if pair not in over]
        return sum(before.elapsed_time(after) for before, after in over) / 1e3


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
        total += -(-source.numel() // 16) * 16  # so that they can be copied as wide words
    device = next(iter(sources.values())).device
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    clones = {number: memory[starts[number] : starts[number] + s.numel()] for number, s in sources.items()}
    for width, dtype in ((8, torch.int64), (1, torch.uint8)):
        chosen = [n for n, s in sources.items() if (s.numel() % 8 == 0 and s.data_ptr() % 8 == 0) == (width == 8)]
        if chosen:
            targets = [clones[number].view(dtype) for number in chosen]
            torch._foreach_copy_(targets, [sources[number].view(dtype) for number in chosen])
    return clones


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
            total = total * 1_000_003 + (words * (2 * places + 1)).sum()  # the sums wrap around, as they may
    return total
