"""Host buffers: aligned, lent and returned, within a cap."""

from __future__ import annotations

import threading
import zlib

import pytest
import torch

from lightning_efficient.core.buffers import PAGE, BufferPool, HostBuffer
from lightning_efficient.core.checksum import crc32
from lightning_efficient.core.units import parse_bytes


def test_a_buffer_is_whole_pages_and_shares_memory_with_its_tensor() -> None:
    buffer = HostBuffer(PAGE + 1)
    assert buffer.nbytes == 2 * PAGE
    assert buffer.address % PAGE == 0
    buffer.tensor[3] = 7
    assert buffer.view[3] == 7
    buffer.touch()
    assert not buffer.tensor.any()
    assert not buffer.pinned


def test_the_pool_lends_a_buffer_again() -> None:
    pool = BufferPool(None)
    first = pool.take(10)
    pool.give_back(first)
    assert pool.take(PAGE) is first
    assert pool.held_bytes == PAGE


def test_the_pool_keeps_to_its_cap_and_number() -> None:
    pool = BufferPool(3 * PAGE, most=2)
    one = pool.take(PAGE)
    assert pool.try_take(3 * PAGE) is None
    two = pool.take(2 * PAGE)
    assert pool.try_take(1) is None
    pool.give_back(one)
    pool.give_back(two)
    three = pool.take(3 * PAGE)  # the others make room
    assert pool.held_bytes == three.nbytes == 3 * PAGE


def test_a_new_buffer_is_larger_where_the_cap_allows_it() -> None:
    pool = BufferPool(3 * PAGE, spare_bytes=PAGE)
    assert pool.take(PAGE).nbytes == 2 * PAGE
    assert pool.take(PAGE).nbytes == PAGE


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(MemoryError, match="does not fit under the cap"):
        BufferPool(PAGE).take(2 * PAGE)


def test_who_waits_gets_the_buffer_that_comes_back() -> None:
    pool = BufferPool(PAGE)
    first = pool.take(PAGE)
    with pytest.raises(TimeoutError):
        pool.take(PAGE, timeout=0.01)
    threading.Timer(0.05, pool.give_back, [first]).start()
    assert pool.take(PAGE, timeout=10) is first


def test_a_buffer_of_nobody_is_let_go() -> None:
    pool = BufferPool(None)
    pool.give_back(HostBuffer(1))
    assert pool.held_bytes == 0


def test_prepared_buffers_count() -> None:
    pool = BufferPool(2 * PAGE, most=2)
    pool.prepare(PAGE)
    pool.prepare(PAGE)  # there is one already
    assert pool.held_bytes == PAGE
    first = pool.take(PAGE)
    pool.prepare(PAGE)
    assert pool.held_bytes == 2 * PAGE
    assert pool.take(PAGE) is not first
    pool.prepare(PAGE)
    assert pool.held_bytes == 2 * PAGE


def test_clear_lets_go_of_what_is_not_lent() -> None:
    pool = BufferPool(None)
    kept, free = pool.take(PAGE), pool.take(PAGE)
    pool.give_back(free)
    pool.clear()
    assert pool.held_bytes == kept.nbytes


def test_checksums_are_those_of_zip_files() -> None:
    data = torch.randint(256, (100_003,), dtype=torch.uint8).numpy()
    assert crc32(data) == zlib.crc32(data)
    assert crc32(data[50_000:], crc32(data[:50_000])) == zlib.crc32(data)
    assert crc32(b"") == 0


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [(7, 7), ("7", 7), ("2GiB", 2 << 30), ("1.5 kB", 1500), ("3mib", 3 << 20), ("2g", 2 * 10**9), (" 1 TB ", 10**12)],
)
def test_amounts_of_memory(text: int | str, nbytes: int) -> None:
    assert parse_bytes(text, "memory_cap") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "2 horses", "-1", 0, -5, 1.5, True, None, "2..5k"])
def test_what_is_no_amount_is_named(text: object) -> None:
    with pytest.raises(ValueError, match="memory_cap="):
        parse_bytes(text, "memory_cap")  # type: ignore[arg-type]


def test_memory_that_cannot_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_efficient.core import buffers

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Cannot allocate memory")

    pool = BufferPool(None)
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "HostBuffer", refuse)
        with pytest.raises(OSError, match="Cannot allocate"):
            pool.prepare(PAGE)
    assert pool.held_bytes == 0
    assert pool.take(PAGE, timeout=1).nbytes == PAGE
