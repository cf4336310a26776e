"""What is freed goes back to the system, for as long as somebody wants that and where the C library would keep it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_efficient.core import freed_memory
from lightning_efficient.core.freed_memory import ReturnsFreedMemory, return_freed_memory

MIB = 1 << 20


def test_freed_memory_is_returned_and_what_is_in_use_stays() -> None:
    kept = [torch.full((1 << 18,), float(value)) for value in range(16)]
    del kept[::2]
    return_freed_memory()
    assert [one[0].item() for one in kept] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0]


class Library:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(freed_memory, "_gnu", lambda: found)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return found


MAPPED, LEARNT = [(-3, 128 << 10), (-1, MIB)], [(-3, 32 * MIB), (-1, 64 * MIB)]


def test_the_last_one_leaves_it_as_it_comes_to_be(library: Library) -> None:
    one, other = ReturnsFreedMemory(), ReturnsFreedMemory()
    assert library.told == 2 * MAPPED
    one.close()
    one.close()
    assert library.told == 2 * MAPPED
    del other
    assert library.told == 2 * MAPPED + LEARNT


@pytest.mark.parametrize(
    "chosen", [("MALLOC_MMAP_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000")]
)
def test_what_the_user_has_told_it_stays(
    chosen: tuple[str, str], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*chosen)
    ReturnsFreedMemory().close()
    assert not library.told


def test_with_another_library_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_gnu", lambda: None)
    ReturnsFreedMemory().close()
    return_freed_memory()


_GRADIENTS = """
import psutil, torch
from lightning_efficient.core.freed_memory import ReturnsFreedMemory

torch.set_num_threads(1)
process, between = psutil.Process(), []
returns = ReturnsFreedMemory()
torch.ones(1 << 20)
before = most = process.memory_info().rss
for _ in range(32):
    gradient = torch.ones(1 << 20)
    between.append(torch.ones(1000))  # so that the end of the heap is in use
    del gradient
    most = max(most, process.memory_info().rss)
print(most - before, sum(float(value.sum()) for value in between))
"""


@pytest.mark.skipif(freed_memory._gnu() is None, reason="other C libraries are left alone")
def test_large_tensors_leave_nothing_behind() -> None:
    # In a process of its own: threads that other tests have left take memory, too.
    command = [sys.executable, "-c", _GRADIENTS]
    grown, kept = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(grown) < 16 * MIB  # of 128 in all
    assert float(kept) == 32 * 1000
