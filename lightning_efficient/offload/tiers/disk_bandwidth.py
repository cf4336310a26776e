"""How fast a folder is, measured with the code that will use it: what a plan of transfers rests on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.tier import Pending, Record, TierError

__all__ = ["DiskBandwidth", "bandwidth_for", "measure_bandwidth"]

_WORTH = 256 << 20  # bytes that a step moves, from which on measuring takes no longer than a few steps


@dataclass(frozen=True)
class DiskBandwidth:
    """Bytes a second that a disk tier moves.

    Attributes:
        read_bytes_per_second: While nothing is written.
        write_bytes_per_second: While nothing is read.
        mixed_bytes_per_second: Both directions together, while as much is read as written.
        direct: Whether the page cache was passed by; else these are rather numbers of memory.
    """

    read_bytes_per_second: float
    write_bytes_per_second: float
    mixed_bytes_per_second: float
    direct: bool


def measure_bandwidth(
    directory: str | Path, *, record_bytes: int = 8 << 20, records: int = 4, seconds: float = 0.1
) -> DiskBandwidth:
    """Read and write records in a folder for a moment.

    Args:
        directory: Made if it is missing; must have room for four times the records.
        record_bytes: Size of each.
        records: In memory at a time, in each direction.
        seconds: For each of the three measurements; a slow disk takes as long as one round of the records does.

    Raises:
        TierError: If the folder cannot be used.
    """
    buffers = [HostBuffer(record_bytes) for _ in range(2 * records)]
    sources = [buffer.tensor[:record_bytes] for buffer in buffers[:records]]
    targets = [buffer.tensor[:record_bytes] for buffer in buffers[records:]]
    for number, source in enumerate(sources):
        source.fill_(number + 1)
    for target in targets:
        target.zero_()
    tier = DiskTier(directory, name="calibration")
    try:
        read_from = tier.reserve([record_bytes] * records, versioned=True)
        write_to = tier.reserve([record_bytes] * records, versioned=True)

        def read() -> list[Pending]:
            return [tier.read(record, into) for record, into in zip(read_from, targets, strict=True)]

        def write(to: Sequence[Record]) -> list[Pending]:
            return [tier.write(record, data) for record, data in zip(to, sources, strict=True)]

        def mixed() -> list[Pending]:
            return [*write(write_to), *read()]

        for _ in range(2):  # the first write of a place also has to allocate it, as it will not later
            _wait([*write(read_from), *write(write_to)])
            tier.commit()
        amount = record_bytes * records
        return DiskBandwidth(
            read_bytes_per_second=_rate(read, amount, seconds),
            write_bytes_per_second=_rate(lambda: write(write_to), amount, seconds),
            mixed_bytes_per_second=_rate(mixed, 2 * amount, seconds),
            direct=tier.statistics().direct,
        )
    finally:
        tier.close()


def bandwidth_for(directory: str | Path, moved_bytes: int, *, memory_bytes: int) -> float | None:
    """Bytes a second, in both directions together, that a run will get; None where measuring is not worth its time.

    Args:
        directory: See :func:`measure_bandwidth`.
        moved_bytes: What a step will move each way.
        memory_bytes: That may be taken for a moment.
    """
    if moved_bytes < _WORTH:
        return None
    record_bytes = max(PAGE, min(8 << 20, memory_bytes // 8 // PAGE * PAGE))  # eight of them are in memory
    try:
        return measure_bandwidth(directory, record_bytes=record_bytes).mixed_bytes_per_second
    except TierError:  # no room beside what will be there, of which its own error tells better
        return None


def _rate(begin: Callable[[], list[Pending]], nbytes: int, seconds: float) -> float:
    """Bytes a second, with the next round begun before the last one has ended."""
    start = time.perf_counter()
    rounds, under_way = 0, begin()
    while time.perf_counter() - start < seconds:
        following = begin()
        _wait(under_way)
        rounds, under_way = rounds + 1, following
    _wait(under_way)
    return (rounds + 1) * nbytes / (time.perf_counter() - start)


def _wait(transfers: Sequence[Pending]) -> None:
    for transfer in transfers:
        transfer.wait()
