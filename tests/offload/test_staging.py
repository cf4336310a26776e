"""Memory for records on their way: less of it makes waiting longer, and none is said by the name of the argument."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.core import buffers
from lightning_efficient.core.buffers import PAGE, BufferPool, HostBuffer
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import Record
from lightning_efficient.offload.updates.staging import Lease, Placed, Staging
from tests.offload.tier_model import noise, write

SIZE = 4 * PAGE


class Scarce:
    """Lets so many buffers be made at a time."""

    def __init__(self, most: int, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.most, self.alive, self.refused = most, 0, 0
        self.error = error or OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        outer = self

        class Counted(HostBuffer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                if outer.alive >= outer.most:
                    outer.refused += 1
                    raise outer.error
                super().__init__(*args, **kwargs)
                outer.alive += 1

            def __del__(self) -> None:
                if hasattr(self, "tensor"):
                    outer.alive -= 1
                super().__del__()

        monkeypatch.setattr(buffers, "HostBuffer", Counted)


def records(number: int) -> list[Placed]:
    tier = HostTier("1MiB")
    made = tier.reserve([SIZE] * number, versioned=False)
    for seed, record in enumerate(made):
        write(tier, record, noise(SIZE, seed))
    return [Placed(tier, record) for record in made]


@pytest.mark.timeout(60)
def test_with_less_memory_than_the_cap_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = records(6)
    scarce = Scarce(2, monkeypatch)
    staging = Staging(6 * SIZE)
    for _ in range(3):
        staging.expect(placed)
        for seed, one in enumerate(placed):
            lease = staging.read(one)
            assert torch.equal(lease.data, noise(SIZE, seed))
            staging.write(lease)
    staging.flush()
    assert scarce.refused
    staging.close()


@pytest.mark.parametrize("error", [None, MemoryError("none")])
def test_without_any_it_names_the_arguments(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = records(1)
    Scarce(0, monkeypatch, error)
    staging = Staging(2 * SIZE)
    staging.expect(placed)
    message = rf"no memory for {SIZE:,} bytes .* staging may take {2 * SIZE:,} bytes, beside memory_budget"
    with pytest.raises(MemoryError, match=message):
        staging.read(placed[0])
    with pytest.raises(MemoryError, match="Give memory_budget less"):
        staging.room(SIZE)
    staging.close()


def test_a_cap_within_a_page_is_told_and_not_waited_for() -> None:
    assert not BufferPool(SIZE + 1).fits(SIZE + 1)
    assert BufferPool(SIZE + PAGE).fits(SIZE + 1)
    staging = Staging(SIZE - 1)
    with pytest.raises(MemoryError, match="Give `staging` more"):
        staging.room(SIZE - 1)
    staging.close()


def test_records_may_become_larger() -> None:
    placed = records(1)[0]
    staging = Staging(SIZE - PAGE)
    with pytest.raises(MemoryError, match="Give `staging` more"):
        staging.read(placed)
    staging.resize(SIZE)
    staging.drop(staging.read(placed))
    staging.resize(SIZE - PAGE)
    assert staging.held_bytes == 0
    staging.close()


class Interrupted:
    """A tier that has begun to read, and whose caller gives up waiting; the bytes come when ``comes`` is set."""

    def __init__(self) -> None:
        self.comes, self.record, self.reads = threading.Event(), Record(SIZE, False), 0

    def read(self, record: Record, into: Tensor) -> Interrupted:
        self.reads += 1
        return self

    def wait(self) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        self.comes.wait()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ahead", [False, True], ids=["asked for", "read ahead"])
def test_what_is_still_read_into_is_lent_to_nobody(ahead: bool) -> None:
    """Neither where its caller is interrupted, nor where it was read ahead and is to make room."""
    tier = Interrupted()
    placed, staging = Placed(tier, tier.record), Staging(SIZE)
    if ahead:
        staging.expect([placed])
        while not tier.reads:
            time.sleep(0.001)
    with pytest.raises(KeyboardInterrupt):
        staging.room(SIZE) if ahead else staging.read(placed)
    staging.expect([])
    got: list[Lease] = []
    waiting = threading.Thread(target=lambda: got.append(staging.room(SIZE)))
    waiting.start()
    waiting.join(0.2)
    assert not got
    tier.comes.set()
    waiting.join()
    staging.drop(*got)
    staging.close()
