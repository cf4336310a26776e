"""Tensors on their way between a device and the host, for steps that are taken on the host.

The computing stream is never held up but by an event, and the host only by what it is about to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Crossing", "CudaCrossing", "HostCrossing", "Mark", "crossing_for"]


class Mark(Protocol):
    """A point in the work of a stream; ``torch.cuda.Event`` is one."""

    def synchronize(self) -> None:
        """Until it has been reached."""


class Crossing(Protocol):
    """The ways between one device and the host; each may be used by several threads."""

    def mark(self) -> Mark:
        """What the computing stream of this thread has been asked for so far."""

    def to_host(self, tensors: Sequence[Tensor], after: Mark) -> tuple[list[Tensor], Mark]:
        """Begin to copy, behind ``after``; new tensors of the host, and when they can be read.

        The memory of ``tensors`` may be given up at once.
        """

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        """Begin to copy to the first of each pair from the second, which must stay as it is until then."""

    def like(self, tensor: Tensor) -> Tensor:
        """Memory of the host with the shape and dtype of ``tensor``, from which it can be sent."""

    def follow(self, mark: Mark) -> None:
        """What the computing stream of this thread is asked for from now on comes behind ``mark``."""

    def settle(self) -> None:
        """Until all copies have ended."""


def crossing_for(device: torch.device) -> Crossing:
    """The one for a device.

    Raises:
        ValueError: If there is none.
    """
    if device.type == "cpu":
        return HostCrossing()
    if device.type == "cuda":
        return CudaCrossing(device)
    raise ValueError(f"Parameters on {device} cannot be stepped on the host; only those of CPUs and CUDA devices can.")


class _Reached:
    def synchronize(self) -> None:
        return


class HostCrossing:
    """Where the device is the host: copies, at once."""

    def mark(self) -> Mark:
        return _Reached()

    def to_host(self, tensors: Sequence[Tensor], after: Mark) -> tuple[list[Tensor], Mark]:
        return [tensor.detach().clone() for tensor in tensors], _Reached()

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        for target, source in pairs:
            target.copy_(source)
        return _Reached()

    def like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, requires_grad=False)

    def follow(self, mark: Mark) -> None:
        return

    def settle(self) -> None:
        return


class CudaCrossing:
    """Two streams, one for each direction, and pinned memory of the host.

    Args:
        device: With its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def to_host(self, tensors: Sequence[Tensor], after: Mark) -> tuple[list[Tensor], Mark]:
        self._out.wait_event(after)  # type: ignore[arg-type]
        found = []
        with torch.cuda.stream(self._out):
            for tensor in tensors:
                tensor = tensor.detach()
                if tensor.device.type != "cuda":
                    found.append(tensor.clone())
                elif tensor.layout != torch.strided:  # of which there is no pinned form; small, and seldom
                    found.append(tensor.cpu())
                else:
                    there = self.like(tensor)
                    there.copy_(tensor, non_blocking=True)
                    tensor.record_stream(self._out)
                    found.append(there)
            return found, self._out.record_event()

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Mark) -> Mark:
        self._back.wait_event(after)  # type: ignore[arg-type]
        with torch.cuda.stream(self._back):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._back.record_event()

    def like(self, tensor: Tensor) -> Tensor:
        # torch does not lend pinned memory again before the copies from it have ended
        return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)

    def follow(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)  # type: ignore[arg-type]

    def settle(self) -> None:
        self._out.synchronize()
        self._back.synchronize()
