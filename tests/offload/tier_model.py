"""A tier against the simplest thing that does the same: dicts of bytes, through a random sequence of operations."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.offload.tiers.tier import Pending, Record, Tier, TierError

__all__ = ["memory", "noise", "read", "run_against_model", "write"]

SIZES = [1, 63, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 10 * PAGE + 17, 1 << 20, (1 << 20) + 1, 3 * (1 << 20) + 5]


@dataclass
class _Mapped:
    """What a mapped tensor must be."""

    tensor: Tensor
    bytes: Tensor
    until: int


def noise(nbytes: int, seed: int) -> Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def memory(nbytes: int, shift: int) -> Tensor:
    """Memory that begins so many bytes behind the beginning of a page."""
    return HostBuffer(nbytes + shift).tensor[shift : shift + nbytes]


def write(tier: Tier, record: Record, data: Tensor) -> None:
    tier.write(record, data).wait()


def read(tier: Tier, record: Record) -> Tensor:
    into = memory(record.nbytes, 0)
    tier.read(record, into).wait()
    return into


def run_against_model(tier: Tier, seed: int, steps: int) -> None:
    """Reserve, write, read, map, commit and release at random; every byte that comes back is compared."""
    draw = random.Random(seed)
    now: dict[Record, Tensor] = {}
    records: list[Record] = []
    mapped: list[_Mapped] = []
    reading: list[tuple[Pending, Tensor, Tensor]] = []
    writing: list[tuple[Pending, Tensor]] = []
    commits = 0
    for step in range(steps):
        action = draw.choices(["reserve", "write", "read", "map", "commit", "release"], [2, 12, 8, 3, 4, 1])[0]
        if action == "reserve" and len(records) < 12:
            records += tier.reserve(
                [draw.choice(SIZES) for _ in range(draw.randint(1, 3))], versioned=draw.random() < 0.7
            )
        elif action == "commit":
            tier.commit()
            commits += 1
            assert all(pending.done for pending, _ in writing)
        elif not records:
            continue
        else:
            record = draw.choice(records)
            if action == "write":
                data = memory(record.nbytes, draw.choice([0, 0, 1, 64, 4095]))
                data.copy_(noise(record.nbytes, step))
                writing.append((tier.write(record, data), data))
                now[record] = data
            elif action == "release":
                records.remove(record)
                tier.release([record])
                now.pop(record, None)
            elif action == "read" and record in now:
                into = memory(record.nbytes, draw.choice([0, 0, 1, 64, 4095]))
                reading.append((tier.read(record, into), into, now[record]))
            elif action == "read":
                with pytest.raises(TierError, match="Nothing was written"):
                    tier.read(record, memory(record.nbytes, 0))
            elif action == "map" and record in now:
                mapped.append(_Mapped(tier.mapped(record), now[record], commits + 2))
        if draw.random() < 0.2:
            _compare(reading)
            reading.clear()
        mapped = [one for one in mapped if commits < one.until]
        assert all(torch.equal(one.tensor, one.bytes) for one in mapped)
        if draw.random() < 0.1:
            mapped = mapped[1:]
    _compare(reading)
    for record, data in now.items():
        assert torch.equal(read(tier, record), data)
        assert torch.equal(tier.mapped(record), data)


def _compare(reading: list[tuple[Pending, Tensor, Tensor]]) -> None:
    for pending, into, data in reading:
        pending.wait()
        assert torch.equal(into, data)
