"""What a tier of memory is: a place that keeps records, which are byte strings of a fixed size.

The device is no tier in this sense: what is there is simply a tensor. Host memory, disks and NUMA nodes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Pending", "Record", "Tier", "TierError", "check_data", "check_sizes"]


class TierError(OSError):
    """A tier could not keep or give back a record; the message says which tier, what failed and what to do."""


@dataclass(frozen=True, eq=False)
class Record:
    """A place in a tier.

    Attributes:
        nbytes: Its size.
        versioned: Whether the last committed bytes stay until the next ones are committed.
    """

    nbytes: int
    versioned: bool


class Pending(Protocol):
    """A transfer that may still run."""

    def wait(self) -> None:
        """Until it is done.

        Raises:
            TierError: If it failed.
        """

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""


class Tier(Protocol):
    """Keeps records.

    What is read is what was last written, committed or not. Transfers of one record take place in the order in which
    they were asked for; those of different records in any order.
    """

    name: str

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        """Room for one record of each size, in bytes; nothing is in them yet.

        Raises:
            TierError: If there is not that much room.
        """

    def release(self, records: Sequence[Record]) -> None:
        """Give the room back, after the transfers that are under way."""

    def write(self, record: Record, data: Tensor) -> Pending:
        """Begin to keep ``data``, uint8 ``[record.nbytes]`` and contiguous, which must stay as it is until done."""

    def read(self, record: Record, into: Tensor) -> Pending:
        """Begin to fill ``into``, uint8 ``[record.nbytes]`` and contiguous.

        Raises:
            TierError: If nothing was ever written there.
        """

    def mapped(self, record: Record) -> Tensor:
        """The bytes that were last written, uint8 ``[record.nbytes]``, without taking memory for them where possible.

        They may only be read, and are those of now until the second commit after this one.
        """

    def keep(self, record: Record) -> Tensor:
        """The bytes that were last written, uint8 ``[record.nbytes]``, as ordinary memory that outlives the tier.

        The record is not used any more. What is on a disk takes memory only where it is read or changed.
        """

    def commit(self) -> None:
        """What was written so far is accepted, and kept by versioned records until the next; waits for the writes."""

    def close(self) -> None:
        """Give everything back; what is under way is waited for."""


def check_sizes(sizes: Sequence[int]) -> None:
    """Whether records can have these sizes.

    Raises:
        ValueError: Naming the one that they cannot have.
    """
    for size in sizes:
        if size < 1:
            raise ValueError(f"A record of {size!r} bytes cannot be kept. Give each at least one byte.")


def check_data(record: Record, data: Tensor) -> None:
    """Whether ``data`` can be the bytes of ``record``.

    Raises:
        ValueError: If it is not uint8 ``[record.nbytes]`` and contiguous.
    """
    if data.dtype != torch.uint8 or data.shape != (record.nbytes,) or not data.is_contiguous():
        raise ValueError(
            f"The bytes of this record are uint8 [{record.nbytes}] and contiguous, not {data.dtype} "
            f"{list(data.shape)} with strides {list(data.stride())}. View the tensor so."
        )
