"""A tier in memory whose transfers happen as late as they may, so that whoever does not wait for one is found out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_efficient.offload.tiers.tier import Record, TierError


class _Late:
    def __init__(self, earlier: _Late | None, act: Callable[[], None]) -> None:
        self._earlier = earlier
        self._act = act
        self.done = False

    def wait(self) -> None:
        if not self.done:
            if self._earlier is not None:
                self._earlier.wait()  # those of one record take place in order
            self._act()
            self.done = True
            self._earlier, self._act = None, _nothing  # and with it the memory


def _nothing() -> None:
    pass


class MemoryTier:
    """Reads deliver, and writes look at the data, only when somebody waits for them.

    Attributes:
        calls: How often each method was called.
        broken: Methods that fail.
        early: Transfers happen at once, for a change.
    """

    def __init__(self, name: str = "memory", *, early: bool = False) -> None:
        self.name = name
        self.early = early
        self.calls: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.values: dict[Record, Tensor] = {}
        self._last: dict[Record, _Late] = {}

    def reserve(self, sizes: Sequence[int], *, versioned: bool) -> list[Record]:
        self._call("reserve")
        return [Record(nbytes, versioned) for nbytes in sizes]

    def release(self, records: Sequence[Record]) -> None:
        for record in records:
            self._settle(record)
            self.values.pop(record, None)

    def write(self, record: Record, data: Tensor) -> _Late:
        assert data.dtype == torch.uint8
        assert data.shape == (record.nbytes,)
        self._call("write")

        def act() -> None:
            self._fail("write")
            self.values[record] = data.clone()

        return self._begin(record, act)

    def read(self, record: Record, into: Tensor) -> _Late:
        assert into.dtype == torch.uint8
        assert into.shape == (record.nbytes,)
        self._call("read")
        if not self.early:
            into.fill_(255)  # NaN, until it is there

        def act() -> None:
            self._fail("read")
            into.copy_(self.values[record])

        return self._begin(record, act)

    def mapped(self, record: Record) -> Tensor:
        self._call("mapped")
        self._settle(record)
        return self.values[record]

    def commit(self) -> None:
        self._call("commit")
        for record in list(self._last):
            self._settle(record)

    def close(self) -> None:
        self.values.clear()

    def _begin(self, record: Record, act: Callable[[], None]) -> _Late:
        self._last[record] = _Late(self._last.get(record), act)
        if self.early:
            self._last[record].wait()
        return self._last[record]

    def _settle(self, record: Record) -> None:
        if record in self._last:
            self._last[record].wait()

    def _call(self, method: str) -> None:
        self.calls[method] += 1

    def _fail(self, method: str) -> None:
        if method in self.broken:
            raise TierError(f"{self.name}: {method} failed.")
