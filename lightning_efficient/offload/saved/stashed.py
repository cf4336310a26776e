"""One byte string that was put away, and the account of all."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from lightning_efficient.offload.tiers.carriers import Arriving, Leaving
from lightning_efficient.offload.tiers.tier import Record

__all__ = ["StashStatistics", "Stashed"]


@dataclass(frozen=True)
class StashStatistics:
    """What has been done so far, and what is in memory now.

    Attributes:
        written_bytes: Sent to the tier.
        read_bytes: Brought back.
        hits: Uses of what was still, or again, in memory, or on its way back.
        misses: Uses of what had to be fetched then.
        wait_seconds: That uses waited for their bytes.
        back_pressure_seconds: That saving waited for room among the bytes on their way.
        resident_bytes: Kept, leaving, or fetched ahead.
        peak_resident_bytes: The most of them since the last step began.
        tier_bytes: In the tier, or on the way there.
        stuck_bytes: In memory because the tier had no room.
        reserved: Records for which the tier was asked.
    """

    written_bytes: int
    read_bytes: int
    hits: int
    misses: int
    wait_seconds: float
    back_pressure_seconds: float
    resident_bytes: int
    peak_resident_bytes: int
    tier_bytes: int
    stuck_bytes: int
    reserved: int


class Stashed:
    """Bytes that were put; they are given up when nobody holds this any more.

    Attributes:
        number: Counts up.
        nbytes: Their size.
        uses: How often they will be asked for, as far as is known.
        wanted: Whether they are needed soon, so that they need not go.
    """

    __slots__ = (
        "__weakref__", "_dead", "arriving", "data", "device", "leaving", "nbytes", "number", "record", "uses", "wanted"
    )  # fmt: skip

    def __init__(self, number: int, data: Tensor, dead: deque[tuple[int, Record | None]]) -> None:
        self.number = number
        self.nbytes = data.nbytes
        self.device = data.device
        self.data: Tensor | None = data
        self.uses = 0
        self.wanted = False
        self.record: Record | None = None
        self.leaving: Leaving | None = None
        self.arriving: Arriving | None = None
        self._dead = dead

    def __del__(self) -> None:
        self._dead.append((self.number, self.record))  # wherever a collection of garbage may be going on: no lock
