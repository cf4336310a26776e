"""Between the memory of CUDA devices and tiers: copies on streams of their own."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.carriers import Arrival, Arriving, Leaving
from lightning_efficient.offload.tiers.tier import Pending, Record, Tier, TierError

__all__ = ["CudaCarrier"]


class CudaCarrier:
    """Copies run on two streams for each device; the computation waits for them by events, never the host.

    The host waits only where it must: for a disk's bytes that are needed now, for pinned memory while the disk has not
    taken what is in it, and for bytes on their way there that are asked for again. A tier that takes tensors of the
    device itself copies them in the stream that is current, where what is asked for later comes later; one that does
    not refuses the first with a ``ValueError``, and gets pinned memory of the host.
    """

    def __init__(self, staging_bytes: int) -> None:
        self._staging_bytes = staging_bytes
        self._staged = 0
        self._settling: deque[_ThroughHost] = deque()
        self._arriving: deque[_FromHost] = deque()
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self._refuse: weakref.WeakSet[Tier] = weakref.WeakSet()

    def send(self, tier: Tier, record: Record, data: Tensor) -> Leaving:
        going = self._of(data.device)[1]
        going.wait_stream(torch.cuda.current_stream(data.device))
        if tier not in self._refuse:
            try:
                with torch.cuda.stream(going):
                    tier.write(record, data)
            except ValueError:
                self._refuse.add(tier)
            else:
                return _Copied(data.device, going.record_event())
        while self._settling and self._staged + record.nbytes > self._staging_bytes:
            self._settle()
        staging = torch.empty(record.nbytes, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(going):
            staging.copy_(data, non_blocking=True)
        leaving = _ThroughHost(tier, record, staging, data.device, going.record_event(), self._settling)
        self._staged += record.nbytes
        self._settling.append(leaving)
        return leaving

    def fetch(self, tier: Tier, record: Record, device: torch.device, into: Tensor | None = None) -> Arriving:
        coming = self._of(device)[0]
        if into is None:
            with torch.cuda.stream(coming):  # whose memory it is, so that nobody's work is waited for
                data = torch.empty(record.nbytes, dtype=torch.uint8, device=device)
        else:
            data = into
            coming.wait_stream(torch.cuda.current_stream(device))
        if tier not in self._refuse:
            with torch.cuda.stream(coming):
                tier.read(record, data)
            return _Coming(data, coming)
        for leaving in reversed(self._settling):
            if leaving.record is record:  # the tier would read what was there before
                leaving.hand_over()
                break
        staging = torch.empty(record.nbytes, dtype=torch.uint8, pin_memory=True)
        arriving = _FromHost(data, staging, tier.read(record, staging), coming)
        self._arriving.append(arriving)
        return arriving

    def forget(self, record: Record) -> None:
        for leaving in [one for one in self._settling if one.record is record and one.drop()]:
            self._settling.remove(leaving)
            self._staged -= leaving.nbytes

    def advance(self) -> None:
        for leaving in self._settling:
            if not leaving.advance():
                break
        while self._settling and self._settling[0].done:
            self._settle()
        while self._arriving and self._arriving[0].advance():
            self._arriving.popleft()

    def flush(self) -> None:
        failed: TierError | None = None
        while self._settling:
            try:
                self._settle()
            except TierError as error:
                failed = failed or error
        for coming, going in self._streams.values():
            coming.synchronize()
            going.synchronize()
        if failed is not None:
            raise failed

    def _settle(self) -> None:
        leaving = self._settling.popleft()
        self._staged -= leaving.nbytes
        leaving.ask()  # by itself: whatever stood before it has been asked for, or has failed
        leaving.settle()

    def _of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The streams to and from it."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]


class _Copied:
    """By the device, to where it stays."""

    def __init__(self, device: torch.device, copied: torch.cuda.Event) -> None:
        self._device = device
        self._copied = copied

    @property
    def gone(self) -> bool:
        return bool(self._copied.query())

    def let_go(self) -> None:
        # The stream that computes gets the memory back. A tensor that was taken in yet another stream would have to be
        # recorded; autograd saves tensors of the stream that computes.
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def settle(self) -> None:
        self._copied.synchronize()

    def hand_over(self) -> None:
        pass


class _ThroughHost(_Copied):
    """By the device to pinned memory, and from there by the tier.

    Args:
        tier: Where to.
        record: Its place there.
        staging: The pinned memory.
        device: Where from.
        copied: When the device is done.
        line: All that the tiers have not taken yet, in the order in which it was sent.
    """

    def __init__(
        self,
        tier: Tier,
        record: Record,
        staging: Tensor,
        device: torch.device,
        copied: torch.cuda.Event,
        line: Iterable[_ThroughHost],
    ) -> None:
        super().__init__(device, copied)
        self.record, self.nbytes = record, record.nbytes
        self._asked: Pending | None = None
        self._tier, self._line = tier, line
        self._staging: Tensor | None = staging

    @property
    def done(self) -> bool:
        return self._asked is not None and self._asked.done

    def advance(self) -> bool:
        """Ask the tier, if the device is done; whether it has been asked."""
        if self._asked is None and self._copied.query():
            self.ask()
        return self._asked is not None

    def hand_over(self) -> None:
        if self._asked is None:
            for earlier in self._line:  # one of them may be what was in this record when it was somebody else's
                if earlier is self:
                    break
                earlier.ask()
            self.ask()

    def ask(self) -> None:
        """Ask the tier, once the device is done; all that stands before it has been asked for."""
        if self._asked is None and self._staging is not None:
            self._copied.synchronize()
            self._asked = self._tier.write(self.record, self._staging)

    def drop(self) -> bool:
        """Never ask the tier; False if it has been asked."""
        if self._asked is None:
            self._staging = None  # the device's copy to it is waited for by the allocator of pinned memory
        return self._asked is None

    def settle(self) -> None:
        self.hand_over()
        if self._asked is not None:
            self._asked.wait()
        self._staging = None


class _Coming(Arrival):
    """By the device."""

    def __init__(self, data: Tensor, stream: torch.cuda.Stream) -> None:
        super().__init__(data)
        self._device = data.device
        self._stream = stream
        self._there = stream.record_event()

    def wait(self) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._there)
        if (data := self.data) is not None:
            data.record_stream(current)  # it was taken in the stream of copies


class _FromHost(_Coming):
    """From pinned memory by the device, once the tier has read it there."""

    def __init__(self, data: Tensor, source: Tensor, reading: Pending, stream: torch.cuda.Stream) -> None:
        super().__init__(data, stream)
        self._source: Tensor | None = source
        self._reading = reading
        self._lock = threading.Lock()

    def advance(self) -> bool:
        """Copy it, if it has been read; whether this has been done, or cannot be."""
        if not self._reading.done:
            return False
        with contextlib.suppress(TierError):  # for whoever waits for it
            self._copy()
        return True

    def wait(self) -> None:
        self._copy()
        super().wait()

    def _copy(self) -> None:
        with self._lock:
            source, data = self._source, self.data
            if source is None or data is None:
                return
            self._reading.wait()
            with torch.cuda.stream(self._stream):
                data.copy_(source, non_blocking=True)
            self._there = self._stream.record_event()
            self._source = None  # torch does not lend pinned memory again before the copies from it have ended
