"""What streaming of parameters costs, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StreamStatistics"]


@dataclass(frozen=True)
class StreamStatistics:
    """What streaming has cost so far.

    Attributes:
        fetches: Transfers from tiers.
        fetched_bytes: Of these.
        writes: Transfers of changed values to tiers.
        written_bytes: Of these.
        wait_seconds: That the host waited for transfers, those of writes included.
        prefetched: Fetches that had been begun before their parameters were needed.
        resident_bytes: On the device now.
        peak_bytes: The most that ever were there.
    """

    fetches: int
    fetched_bytes: int
    writes: int
    written_bytes: int
    wait_seconds: float
    prefetched: int
    resident_bytes: int
    peak_bytes: int
