"""How the bytes of tensors get from where they are to a tier and back, beside the computation."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from lightning_efficient.core.torch_internals import WeakStorage, bytes_of
from lightning_efficient.offload.tiers.tier import Pending, Record, Tier, TierError

__all__ = ["Arrival", "Arriving", "Carrier", "HostCarrier", "Leaving", "carrier_for"]


class Leaving(Protocol):
    """Bytes on their way to a tier."""

    @property
    def gone(self) -> bool:
        """Whether the memory that they came from may be given up.

        Raises:
            TierError: If they could not be written.
        """

    def let_go(self) -> None:
        """Make it so that the memory may be given up.

        Raises:
            TierError: If they could not be written.
        """

    def settle(self) -> None:
        """Until they are in the tier.

        Raises:
            TierError: If they could not be written.
        """

    def hand_over(self) -> None:
        """The tier, or the device, has been asked for all that has to be done; what is asked for later comes later."""


class Arriving(Protocol):
    """Bytes on their way from a tier."""

    @property
    def data(self) -> Tensor | None:
        """Where to, uint8 ``[nbytes]``; None once they were let loose and nobody uses them any more."""

    def wait(self) -> None:
        """Whatever is computed in this thread from now on finds them there.

        Raises:
            TierError: If they could not be read.
        """

    def loosen(self) -> None:
        """From now on they are in memory only as long as somebody else uses them."""


class Carrier(Protocol):
    """Moves bytes between the memory of one kind of device and tiers."""

    def send(self, tier: Tier, record: Record, data: Tensor) -> Leaving:
        """Begin to keep ``data``, uint8 ``[record.nbytes]``, which must stay as it is until it is gone."""

    def fetch(self, tier: Tier, record: Record, device: torch.device, into: Tensor | None = None) -> Arriving:
        """Begin to bring the bytes of a record to new memory, or into ``into``, uint8 ``[record.nbytes]``."""

    def forget(self, record: Record) -> None:
        """Nobody will ask for what is on its way there; the record may be given back."""

    def advance(self) -> None:
        """Do what was waiting for something that has happened since; does not wait."""

    def flush(self) -> None:
        """Until all that was sent has been written, or could not be.

        Raises:
            TierError: If something could not be.
        """


def carrier_for(device: torch.device, staging_bytes: int) -> Carrier:
    """The one for a kind of device.

    Args:
        device: Its index does not matter.
        staging_bytes: Pinned memory in which bytes wait for a tier that the device does not write to itself.

    Raises:
        ValueError: If there is none.
    """
    if device.type == "cpu":
        return HostCarrier()
    if device.type == "cuda":
        from lightning_efficient.offload.tiers.cuda_carrier import CudaCarrier

        return CudaCarrier(staging_bytes)
    raise ValueError(f"Tensors on {device} cannot be moved to a tier; only those of CPUs and CUDA devices can.")


class HostCarrier:
    """The tier reads and writes the memory of tensors directly."""

    def __init__(self) -> None:
        self._sent: deque[Pending] = deque()
        self._read: deque[tuple[Pending, Tensor]] = deque()  # the tier fills the memory, whoever lets go of it

    def send(self, tier: Tier, record: Record, data: Tensor) -> Leaving:
        pending = tier.write(record, data)
        self._sent.append(pending)
        return _Written(pending)

    def fetch(self, tier: Tier, record: Record, device: torch.device, into: Tensor | None = None) -> Arriving:
        data = torch.empty(record.nbytes, dtype=torch.uint8, device=device) if into is None else into
        pending = tier.read(record, data)
        self._read.append((pending, data))
        return _Read(data, pending)

    def forget(self, record: Record) -> None:
        return  # the tier has been asked for all, and gives a record to somebody else when that has ended

    def advance(self) -> None:
        while self._sent and self._sent[0].done:
            self._sent.popleft()
        while self._read and self._read[0][0].done:
            self._read.popleft()

    def flush(self) -> None:
        while self._read:
            pending, _ = self._read.popleft()
            with contextlib.suppress(TierError):  # nobody needs it any more
                pending.wait()
        failed: TierError | None = None
        while self._sent:
            try:
                self._sent.popleft().wait()
            except TierError as error:
                failed = failed or error
        if failed is not None:
            raise failed


class _Written:
    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    @property
    def gone(self) -> bool:
        if not self._pending.done:
            return False
        self._pending.wait()  # which raises what it may have ended with
        return True

    def let_go(self) -> None:
        self._pending.wait()

    def settle(self) -> None:
        self._pending.wait()

    def hand_over(self) -> None:
        pass


class Arrival:
    """What all that arrives has in common."""

    def __init__(self, data: Tensor) -> None:
        self._data: Tensor | None = data
        self._loose: WeakStorage | None = None

    @property
    def data(self) -> Tensor | None:
        data = self._data
        if data is None and self._loose is not None and (storage := self._loose.get()) is not None:
            return bytes_of(storage)
        return data

    def loosen(self) -> None:
        if self._data is not None:
            self._loose = WeakStorage(self._data.untyped_storage())
            self._data = None


class _Read(Arrival):
    def __init__(self, data: Tensor, pending: Pending) -> None:
        super().__init__(data)
        self._pending = pending

    def wait(self) -> None:
        self._pending.wait()
