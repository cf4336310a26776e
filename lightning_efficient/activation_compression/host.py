"""Compressed numbers that wait in the host's memory, copied while the device computes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_efficient.activation_compression.records import Lossy, Record
from lightning_efficient.core.quantization import Quantized, dequantize, dequantized_pieces

__all__ = ["HostMemory", "OnHost"]

_AHEAD = 2  # records that are fetched before they are asked for, in the order of backward


class OnHost(Record):
    """Codes on the host, scales on the device."""

    exact = False
    nbytes: int

    def __init__(self, memory: HostMemory, encoded: Quantized) -> None:
        self._memory = memory
        self._encoded = replace(encoded, payload=memory.away(encoded.payload))
        self._device = encoded.payload.device
        self._fetched: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.nbytes = encoded.nbytes - encoded.payload.nbytes
        self.way = f"{Lossy(encoded).way} on the host"
        self.before: weakref.ref[OnHost] | None = None

    def decode(self) -> Tensor:
        return dequantize(self._here())

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        return dequantized_pieces(self._here())

    def fetch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy it to the device: the copy, and the event after which it is there."""
        if self._fetched is None:
            self._fetched = self._memory.back(self._encoded.payload, self._device)
        return self._fetched

    def _here(self) -> Quantized:
        payload, event = self.fetch()
        record: OnHost | None = self
        for _ in range(_AHEAD):
            record = record.before() if record is not None and record.before is not None else None
            if record is not None:
                record.fetch()
        self._fetched = None
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            payload.record_stream(torch.cuda.current_stream(self._device))
        return replace(self._encoded, payload=payload)


class HostMemory:
    """Copies to the host and back beside the computation, where the device can do that."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[OnHost] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_streams": {}, "_last": None}  # streams belong to a process

    def keep(self, encoded: Quantized) -> OnHost:
        """Send codes there."""
        record = OnHost(self, encoded)
        record.before, self._last = self._last, weakref.ref(record)
        return record

    def away(self, payload: Tensor) -> Tensor:
        """A copy on the host, which may still be under way: only :meth:`back` may read it."""
        if payload.device.type != "cuda":
            return payload.to("cpu", copy=True)
        copy = torch.empty(payload.shape, dtype=payload.dtype, pin_memory=True)
        with self._copying(payload.device) as stream:
            copy.copy_(payload, non_blocking=True)
            payload.record_stream(stream)
        return copy

    def back(self, copy: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """It on the device again, from when the event has happened."""
        if device.type != "cuda":
            return copy.to(device, copy=True), None
        with self._copying(device) as stream:  # after the copy to the host, for they share the stream
            payload = copy.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return payload, event

    @contextlib.contextmanager
    def _copying(self, device: torch.device) -> Iterator[torch.cuda.Stream]:
        """The stream for copies, which begins after all that was asked of the device so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream
