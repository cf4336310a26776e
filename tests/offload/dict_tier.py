"""The simplest tier: a dict of bytes, which notices what a tier must not be asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.tier import Pending, Record, TierError

__all__ = ["DictTier"]


class _Done:
    done = True

    def wait(self) -> None:
        return


class DictTier:
    """Keeps what is written in memory of its own.

    Attributes:
        reads: Records that were read, in order.
        writes: Records that were written, in order.
    """

    name = "memory"

    def __init__(self) -> None:
        self.bytes: dict[Record, Tensor] = {}
        self.reserved: set[Record] = set()
        self.reads: list[Record] = []
        self.writes: list[Record] = []

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        records = [Record(size, versioned) for size in sizes]
        self.reserved.update(records)
        return records

    def release(self, records: Sequence[Record]) -> None:
        for record in records:
            self.reserved.remove(record)
            self.bytes.pop(record, None)

    def write(self, record: Record, data: Tensor) -> Pending:
        assert record in self.reserved
        assert data.dtype == torch.uint8
        assert data.shape == (record.nbytes,)
        self.writes.append(record)
        self.bytes[record] = data.clone()
        return _Done()

    def read(self, record: Record, into: Tensor) -> Pending:
        assert into.shape == (record.nbytes,)
        if record not in self.bytes:
            raise TierError(5, "nothing was written there")
        self.reads.append(record)
        into.copy_(self.bytes[record])
        return _Done()

    def mapped(self, record: Record) -> Tensor:
        return self.bytes[record].clone()

    def keep(self, record: Record) -> Tensor:
        return self.bytes[record]

    def commit(self) -> None:
        return

    def close(self) -> None:
        self.bytes.clear()
