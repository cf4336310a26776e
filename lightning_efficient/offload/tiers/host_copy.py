"""Copies to and from the memory of a host tier, and what they amount to."""

from __future__ import annotations

import threading
import time
from collections import deque

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.host_slabs import Slab
from lightning_efficient.offload.tiers.record_slots import Slot
from lightning_efficient.offload.tiers.tier import Pending

__all__ = ["Copy", "Traffic"]


class Traffic:
    """What is copied in one direction: how many bytes, and in which time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes, self._seconds = 0, 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def nbytes(self) -> int:
        """Of all copies that have begun."""
        return self._bytes

    @property
    def seconds(self) -> float:
        """Of all copies that have ended."""
        with self._lock:
            self._count()
            return self._seconds

    def took(self, nbytes: int, seconds: float) -> None:
        """A copy has ended."""
        with self._lock:
            self._bytes += nbytes
            self._seconds += seconds

    def takes(self, nbytes: int, begun: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """A copy is between these two in a stream of a GPU."""
        with self._lock:
            self._bytes += nbytes
            self._under_way.append((begun, ended))
            self._count()

    def _count(self) -> None:
        while self._under_way and self._under_way[0][1].query():
            begun, ended = self._under_way.popleft()
            self._seconds += begun.elapsed_time(ended) / 1e3


class Copy:
    """A copy within the host, which ends when it begins, or with a GPU, which takes its place in a stream."""

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._event: torch.cuda.Event | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._begun.is_set() and (self._event is None or self._event.query())

    def wait(self) -> None:
        """Until it has ended."""
        self._begun.wait()
        if self._event is not None:
            self._event.synchronize()

    def run(
        self,
        target: Tensor,
        source: Tensor,
        before: Pending | None,
        traffic: Traffic,
        fills: Slot[Slab] | None = None,
    ) -> None:
        """Begin to copy, once the copy before is done, as part of ``traffic``; the slot that it fills is whole then."""
        try:
            device = target.device if target.is_cuda else source.device
            if device.type != "cuda":
                if before is not None:
                    before.wait()
                begin = time.perf_counter()
                target.copy_(source)
                traffic.took(target.nbytes, time.perf_counter() - begin)
            else:
                stream = torch.cuda.current_stream(device)
                if isinstance(before, Copy):
                    before.queue_before(stream)
                begun = stream.record_event(torch.cuda.Event(enable_timing=True))
                target.copy_(source, non_blocking=True)
                self._event = stream.record_event(torch.cuda.Event(enable_timing=True))
                traffic.takes(target.nbytes, begun, self._event)
            if fills is not None:
                fills.whole = True
        finally:
            self._begun.set()

    def queue_before(self, stream: torch.cuda.Stream) -> None:
        """What is asked of ``stream`` from now on comes after it."""
        self._begun.wait()
        if self._event is not None:
            stream.wait_event(self._event)
