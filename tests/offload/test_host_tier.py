"""The tier in the memory of the host keeps what it is given, within its budget."""

from __future__ import annotations

import gc
import os
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.offload.tiers import host_slabs
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.mapped_memory import drop_pages
from lightning_efficient.offload.tiers.tier import TierError
from tests.offload.tier_model import noise, read, run_against_model, write


@pytest.mark.parametrize("seed", range(4))
def test_a_host_tier_is_a_dict_of_bytes_o2(seed: int) -> None:
    tier = HostTier("1GiB")
    run_against_model(tier, seed, steps=200)
    tier.close()


def test_the_budget_is_kept_and_named_o5() -> None:
    tier = HostTier(10 * PAGE)
    first = tier.reserve([PAGE, 1], versioned=True)
    assert tier.reserved_bytes == 4 * PAGE
    with pytest.raises(TierError, match=r"budget_bytes=40,960 in use, and 28,672 bytes more") as told:
        tier.reserve([7 * PAGE], versioned=False)
    assert "larger budget" in str(told.value)
    with pytest.raises(TierError, match="32,768 bytes more"):
        tier.reserve([PAGE] * 4, versioned=True)
    rest = tier.reserve([6 * PAGE], versioned=False)
    assert tier.reserved_bytes == tier.budget_bytes == 10 * PAGE
    write(tier, first[0], noise(PAGE, 0))
    tier.commit()
    tier.release(first)
    tier.release(rest)
    assert tier.reserved_bytes == 0
    tier.close()


def test_the_second_copy_takes_memory_only_when_it_is_needed() -> None:
    size = 8 << 20
    tier = HostTier("64MiB")
    record = tier.reserve([size], versioned=True)[0]
    data = noise(size, 0)
    before = resident()
    write(tier, record, data)
    write(tier, record, data)
    assert resident() - before < 1.5 * size
    tier.commit()
    write(tier, record, data)
    assert resident() - before > 1.5 * size
    tier.release([record])
    assert resident() - before < size // 2
    tier.close()


def resident() -> int:
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


def test_what_is_mapped_is_the_record_itself_and_is_never_overwritten() -> None:
    tier = HostTier(3 * PAGE)
    record = tier.reserve([PAGE], versioned=True)[0]
    write(tier, record, noise(PAGE, 0))
    tier.commit()
    mapped = tier.mapped(record)
    assert mapped.data_ptr() == tier.mapped(record).data_ptr()
    assert drop_pages(mapped) == 0
    write(tier, record, noise(PAGE, 1))
    tier.commit()
    write(tier, record, noise(PAGE, 2))  # a third copy, for which there is room
    assert torch.equal(mapped, noise(PAGE, 0))
    assert tier.reserved_bytes == 3 * PAGE
    assert torch.equal(read(tier, record), noise(PAGE, 2))
    tier.close()


def test_there_must_be_room_for_what_is_mapped_and_overwritten() -> None:
    tier = HostTier(2 * PAGE)
    record = tier.reserve([PAGE], versioned=True)[0]
    write(tier, record, noise(PAGE, 0))
    tier.commit()
    mapped = tier.mapped(record)
    write(tier, record, noise(PAGE, 1))
    tier.commit()
    with pytest.raises(TierError, match="budget_bytes"):
        write(tier, record, noise(PAGE, 2))
    assert torch.equal(mapped, noise(PAGE, 0))
    assert torch.equal(read(tier, record), noise(PAGE, 1))
    del mapped
    gc.collect()
    write(tier, record, noise(PAGE, 2))
    assert torch.equal(read(tier, record), noise(PAGE, 2))
    tier.close()


def test_what_is_mapped_of_one_copy_stays_beyond_the_budget() -> None:
    tier = HostTier(PAGE)
    record = tier.reserve([PAGE], versioned=False)[0]
    write(tier, record, noise(PAGE, 0))
    mapped = tier.mapped(record)
    write(tier, record, noise(PAGE, 1))
    assert torch.equal(mapped, noise(PAGE, 0))
    assert torch.equal(read(tier, record), noise(PAGE, 1))
    del mapped
    gc.collect()
    tier.commit()
    assert tier.reserved_bytes == PAGE
    tier.close()


def test_mapped_memory_outlives_the_tier() -> None:
    tier = HostTier("1MiB")
    record = tier.reserve([1000], versioned=False)[0]
    write(tier, record, noise(1000, 0))
    mapped = tier.mapped(record)[10:20]
    tier.close()
    tier.close()
    del tier
    gc.collect()
    assert torch.equal(mapped, noise(1000, 0)[10:20])


def test_a_closed_tier_says_so() -> None:
    tier = HostTier("1MiB")
    record = tier.reserve([8], versioned=True)[0]
    with pytest.raises(TierError, match="Nothing was written"):
        read(tier, record)
    tier.close()
    for use in (tier.commit, lambda: read(tier, record), lambda: tier.reserve([1], versioned=False)):
        with pytest.raises(TierError, match="is closed"):
            use()


def test_a_fork_leaves_it_to_its_parent() -> None:
    tier = HostTier("1MiB")
    record = tier.reserve([8], versioned=True)[0]
    write(tier, record, noise(8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if not child:
        try:
            for use in (tier.commit, lambda: read(tier, record), lambda: tier.release([record])):
                with pytest.raises(TierError, match="belongs to another process"):
                    use()
            tier.close()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(read(tier, record), noise(8, 0))
    tier.close()


def test_threads_read_and_write_their_own_records() -> None:
    tier = HostTier("64MiB")
    records = tier.reserve([1 << 20] * 4, versioned=True)
    failed = []

    def work(index: int) -> None:
        for turn in range(10):
            data = noise(1 << 20, 10 * index + turn)
            write(tier, records[index], data)
            if not torch.equal(read(tier, records[index]), data):
                failed.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        tier.commit()
    for thread in threads:
        thread.join()
    assert not failed
    tier.close()


def test_memory_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    tier = HostTier("1MiB")
    record = tier.reserve([8], versioned=True)[0]
    with monkeypatch.context() as patch:
        patch.setattr(host_slabs, "HostBuffer", refuse)
        with pytest.raises(TierError, match=r"cannot take 4,096 bytes"):
            write(tier, record, noise(8, 0))
    for use in (lambda: read(tier, record), tier.commit):
        with pytest.raises(TierError, match="not whole"):
            use()
    write(tier, record, noise(8, 1))
    assert torch.equal(read(tier, record), noise(8, 1))
    tier.close()


def test_what_is_no_budget_or_data_is_refused() -> None:
    with pytest.raises(ValueError, match="budget_bytes='much'"):
        HostTier("much")
    tier = HostTier(PAGE)
    record = tier.reserve([8], versioned=False)[0]
    with pytest.raises(ValueError, match=r"uint8 \[8\] and contiguous"):
        tier.write(record, torch.zeros(8))
    with pytest.raises(ValueError, match="record of -1 bytes"):
        tier.reserve([-1], versioned=False)
    tier.close()


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
def test_data_of_a_gpu_is_copied_on_its_stream(pinned: bool) -> None:
    tier = HostTier("256MiB", pinned=pinned)
    size = 16 << 20
    records = tier.reserve([size] * 3, versioned=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(3):
        for index, record in enumerate(records):
            with torch.cuda.stream(streams[index % 2]):
                data = noise(size, 10 * turn + index).cuda()
                pending = tier.write(record, data)
            into = torch.empty(size, dtype=torch.uint8, device="cuda")
            with torch.cuda.stream(streams[1 - index % 2]):
                back = tier.read(record, into)
            assert torch.equal(tier.mapped(record), noise(size, 10 * turn + index))
            back.wait()
            pending.wait()
            assert torch.equal(into, data)
            assert tier.mapped(record).is_pinned() == pinned
        tier.commit()
    tier.close()


@pytest.mark.gpu
def test_host_data_waits_for_the_gpu_to_be_done_with_the_record() -> None:
    tier = HostTier("64MiB", pinned=True)
    record = tier.reserve([16 << 20], versioned=False)[0]
    write(tier, record, noise(16 << 20, 0))
    into = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(50_000_000)
    pending = tier.read(record, into)
    tier.write(record, noise(16 << 20, 1))
    assert pending.done
    assert torch.equal(into.cpu(), noise(16 << 20, 0))
    buffer = HostBuffer(16 << 20).tensor
    tier.read(record, buffer).wait()
    assert torch.equal(buffer, noise(16 << 20, 1))
    tier.close()
