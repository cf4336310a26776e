"""The tier on a disk keeps what it is given, within its memory, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import resource
import threading
from pathlib import Path

import pytest
import torch

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.disk_bandwidth import measure_bandwidth
from lightning_efficient.offload.tiers.mapped_memory import drop_pages
from lightning_efficient.offload.tiers.spill_header import verify
from lightning_efficient.offload.tiers.tier import TierError
from tests.offload.tier_model import noise, read, run_against_model, write

SHARED_MEMORY = Path("/dev/shm")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def resident(name: str) -> int:
    """Bytes, from the system's own account of this process."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


@pytest.mark.parametrize("seed", range(6))
def test_a_disk_tier_is_a_dict_of_bytes_o2_o8(tmp_path: Path, seed: int) -> None:
    options = [{}, {"readers": 1, "writers": 1}, {"buffer_bytes": PAGE}, {"in_flight_bytes": 1}, {"durable": True}]
    tier = DiskTier(tmp_path, **options[seed % len(options)])
    run_against_model(tier, seed, steps=160)
    assert verify(tier.path).whole
    tier.close()
    assert not files(tmp_path)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no file system in memory here")
def test_where_the_page_cache_cannot_be_passed_by_it_is_used(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = SHARED_MEMORY / f"lightning-efficient-test-{os.getpid()}"
    try:
        tier = DiskTier(folder)
        assert tier.in_memory
        run_against_model(tier, 7, steps=100)
        tier.close()
        assert not files(folder)
    finally:
        folder.rmdir()


def test_the_file_is_allocated_when_room_is_reserved_and_used_again(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    one = tier.reserve([1 << 20], versioned=True)
    allocated = tier.path.stat().st_blocks * 512
    assert allocated >= 2 << 20
    assert tier.path.stat().st_size == tier.statistics().file_bytes
    for _ in range(5):
        write(tier, one[0], noise(1 << 20, 0))
        tier.commit()
        tier.release(one)
        tier.commit()
        one = tier.reserve([1 << 20], versioned=True)
    assert tier.path.stat().st_blocks * 512 == allocated
    tier.close()


def test_a_mapped_record_stays_until_the_second_commit_and_costs_no_memory_o8(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    size = 8 << 20
    record = tier.reserve([size], versioned=True)[0]
    data = [noise(size, seed) for seed in range(6)]
    write(tier, record, data[0])
    tier.commit()
    first = tier.mapped(record)
    anonymous = resident("RssAnon")
    for turn in (1, 2, 3):
        write(tier, record, data[turn])
        assert torch.equal(tier.mapped(record), data[turn])
        assert turn == 3 or torch.equal(first, data[0])
        if turn < 3:
            tier.commit()
    assert resident("RssAnon") - anonymous < size
    drop_pages(tier.mapped(record))  # code that runs for the first time is read from a file too
    mapped = tier.mapped(record)
    before = resident("RssFile")
    assert mapped.sum() == data[3].sum()
    assert resident("RssFile") - before > size // 2
    assert drop_pages(mapped[100:200]) == size
    assert resident("RssFile") - before < size // 4
    assert torch.equal(mapped, data[3])
    assert drop_pages(data[0]) == 0
    assert torch.equal(data[0], noise(size, 0))
    tier.close()
    assert torch.equal(mapped, data[3])


def test_what_is_written_to_a_mapped_record_is_only_there(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    size = 8 << 20
    record = tier.reserve([size], versioned=True)[0]
    data = noise(size, 0)
    write(tier, record, data)
    mapped, other = tier.mapped(record), tier.mapped(record)
    mapped[: size // 2].zero_()
    assert torch.equal(other, data)
    assert torch.equal(read(tier, record), data)
    before = resident("RssAnon")
    drop_pages(mapped)
    assert resident("RssAnon") == pytest.approx(before, abs=1 << 20)
    assert mapped[: size // 2].count_nonzero() == 0
    assert torch.equal(mapped[size // 2 :], data[size // 2 :])
    write(tier, record, noise(size, 1))
    tier.commit()
    assert torch.equal(other, data)
    tier.close()


def test_where_memory_to_write_to_is_limited_what_is_mapped_takes_none_of_it(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    size = 64 << 20
    record = tier.reserve([size], versioned=False)[0]
    data = noise(size, 0)
    write(tier, record, data)
    limits, before = resource.getrlimit(resource.RLIMIT_DATA), resident("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (before + 2 * size, limits[1]))
    try:
        mapped = tier.mapped(record)
        assert resident("VmData") - before < size // 2
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert torch.equal(mapped, data)
    tier.close()


def test_rewritten_records_are_seen_through_new_mappings(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([3 * PAGE + 5], versioned=False)[0]
    for turn in range(30):
        data = noise(record.nbytes, turn)
        write(tier, record, data)
        assert torch.equal(tier.mapped(record), data)
        assert torch.equal(read(tier, record), data)
    tier.close()


def test_256_mib_pass_through_a_few_buffers_and_no_page_cache_o5(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, buffer_bytes="4MiB")
    if not tier.statistics().direct:
        pytest.skip("this file system does not let the page cache be passed by")
    size = 8 << 20
    records = tier.reserve([size] * 8, versioned=True)
    data, into = HostBuffer(2 * size).tensor[1 : size + 1], HostBuffer(2 * size).tensor[1 : size + 1]
    into.zero_()
    data.copy_(noise(size, 1))
    before = resident("RssAnon")
    for _ in range(2):
        for record in records:
            write(tier, record, data)
            tier.read(record, into).wait()
        tier.commit()
    assert torch.equal(into, data)
    assert resident("RssAnon") - before < 6 << 20  # the buffers, and what Python takes
    assert cached_bytes(tier.path) < 1 << 20
    tier.close()


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        libc = ctypes.CDLL(None)
        pages = (ctypes.c_ubyte * -(-len(mapping) // PAGE))()
        anchor = ctypes.c_char.from_buffer(mapping)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(mapping)), pages) == 0
        del anchor
        return sum(page & 1 for page in pages) * PAGE


def test_statistics_count_what_was_moved(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([5 << 20], versioned=True)[0]
    for turn in range(3):
        write(tier, record, noise(5 << 20, turn))
    read(tier, record)
    counts = tier.statistics()
    assert (counts.written_bytes, counts.read_bytes) == (15 << 20, 5 << 20)
    assert counts.write_seconds > 0
    assert counts.read_seconds > 0
    assert counts.waited_seconds > 0
    tier.close()


def test_the_bandwidth_of_a_folder_is_measured_by_the_same_code(tmp_path: Path) -> None:
    measured = measure_bandwidth(tmp_path / "new", record_bytes=1 << 20, records=2, seconds=0.01)
    rates = (measured.read_bytes_per_second, measured.write_bytes_per_second, measured.mixed_bytes_per_second)
    assert all(rate > 0 for rate in rates)
    assert not files(tmp_path / "new")


def test_two_tiers_share_a_folder(tmp_path: Path) -> None:
    one, other = DiskTier(tmp_path), DiskTier(tmp_path)
    records = [tier.reserve([100], versioned=True)[0] for tier in (one, other)]
    for turn, (tier, record) in enumerate(zip((one, other), records, strict=True)):
        write(tier, record, noise(100, turn))
    one.close()
    assert files(tmp_path) == [other.path]
    assert torch.equal(read(other, records[1]), noise(100, 1))
    with pytest.raises(TierError, match="not, or not any more, one of the disk tier"):
        other.read(records[0], noise(100, 0))
    other.close()


def test_threads_end_and_the_file_goes_with_the_tier(tmp_path: Path) -> None:
    before = threading.active_count()
    tier = DiskTier(tmp_path, readers=3, writers=1)
    record = tier.reserve([1 << 20], versioned=False)[0]
    pending = tier.write(record, noise(1 << 20, 0))
    assert threading.active_count() == before + 4
    tier.close()
    assert pending.done
    assert threading.active_count() == before
    tier.close()
    for use in (tier.commit, lambda: tier.reserve([1], versioned=True), lambda: tier.mapped(record)):
        with pytest.raises(TierError, match="is closed"):
            use()
    forgotten = DiskTier(tmp_path)
    del forgotten
    gc.collect()
    assert threading.active_count() == before
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_bytes": "lots"}, "buffer_bytes='lots'"),
        ({"in_flight_bytes": 0}, "in_flight_bytes=0"),
        ({"readers": 0}, "readers=0"),
        ({"writers": 65}, "writers=65"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiskTier(tmp_path, **options)
    assert not files(tmp_path)


def test_what_is_no_data_of_a_record_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([8], versioned=True)[0]
    bad = [torch.zeros(8), torch.zeros(9, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)[::2]]
    for data in bad:
        with pytest.raises(ValueError, match=r"uint8 \[8\] and contiguous"):
            tier.write(record, data)
    with pytest.raises(ValueError, match="not of meta"):
        tier.write(record, torch.zeros(8, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match="record of 0 bytes"):
        tier.reserve([4, 0], versioned=True)
    tier.close()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="no file to offload to can be made"):
        DiskTier(tmp_path / "file")
