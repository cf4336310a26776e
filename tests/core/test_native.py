"""C that is compiled where it runs: kept, made again, and done without."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.core import native
from lightning_efficient.core.native import compiled, in_team, in_threads
from lightning_efficient.core.quantization import dequantize, quantize
from tests.helpers.processes import context

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native.OFF, raising=False)
    yield
    compiled.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "twice.c"
    path.write_text("int twice(int number) { return 2 * number; }\n")
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.so"))


def test_it_is_compiled_once_and_again_when_it_changes(source: Path, tmp_path: Path) -> None:
    library = compiled(source)
    assert library is not None
    assert library.twice(21) == 42
    (first,) = kept(tmp_path)
    made = first.stat().st_mtime_ns
    compiled.cache_clear()
    assert compiled(source) is not None
    assert first.stat().st_mtime_ns == made
    source.write_text("int twice(int number) { return number + number; }\n")
    compiled.cache_clear()
    assert compiled(source) is not None
    assert len(kept(tmp_path)) == 2


def test_without_a_compiler_there_is_none(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled(source) is None


def test_it_can_be_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.OFF, "0")
    assert compiled(source) is None
    assert not kept(tmp_path)


def test_a_compiler_that_fails_is_said_once(source: Path, tmp_path: Path) -> None:
    source.write_text("this is no C\n")
    with pytest.warns(UserWarning, match=r"twice\.c could not be compiled by .*LIGHTNING_EFFICIENT_NATIVE=0"):
        assert compiled(source) is None
    assert compiled(source) is None
    assert not kept(tmp_path)


def test_a_file_that_was_cut_off_is_made_again(source: Path) -> None:
    path = native._built(source, "cc")
    path.write_bytes(b"cut off")
    library = compiled(source)
    assert library is not None
    assert library.twice(6) == 12


def test_where_the_cache_cannot_be_written_the_process_has_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library = compiled(source)
    assert library is not None
    assert library.twice(4) == 8


def test_an_older_compiler_without_these_options_will_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bin" / "cc"
    old.parent.mkdir()
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *native*) echo unknown option >&2; exit 1;; esac\nexec {shutil.which("cc")} "$@"\n'
    )
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(old))
    library = compiled(source)
    assert library is not None
    assert library.twice(3) == 6


def test_processes_that_compile_at_once_do_not_disturb_each_other(source: Path, tmp_path: Path) -> None:
    fork = context()
    together, answers = fork.Barrier(2), fork.SimpleQueue()
    running = [fork.Process(target=_compile, args=(source, tmp_path / "cache", together, answers)) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [answers.get() for process in running if process.exitcode == 0] == [10, 10]
    assert len(kept(tmp_path)) == 1


def _compile(source: Path, cache: Path, together: Any, answers: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    together.wait(60)
    library = compiled(source)
    answers.put(library.twice(5) if library else None)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_shared_among_as_many_threads_as_torch_has(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done, who = set[int](), set[int]()
    together = threading.Barrier(min(threads, 7))

    def work(first: int, last: int) -> None:
        who.add(threading.get_ident())
        together.wait(20)
        done.update(range(first, last))

    in_threads(work, 7)
    assert done == set(range(7))
    assert len(who) == threads


def test_an_error_in_a_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(first: int, last: int) -> None:
        if first:
            raise ValueError("in another thread")

    with pytest.raises(ValueError, match="in another thread"):
        in_threads(work, 2)


def test_nobody_writes_behind_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    began, ended = threading.Event(), list[int]()

    def work(first: int, last: int) -> None:
        if first:
            began.set()
            time.sleep(0.2)
            ended.append(first)
            return
        began.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_threads(work, 2)
    assert ended == [1]


def _encode(numbers: torch.Tensor, answers: multiprocessing.Queue[bool]) -> None:
    encoded = quantize(numbers, 4)
    answers.put(encoded is not None and torch.isfinite(dequantize(encoded)).all().item())


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    numbers = torch.linspace(-1, 1, (1 << 19) + 5)
    assert quantize(numbers, 4) is not None
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_encode, args=(numbers, answers), daemon=True)
    child.start()
    assert answers.get(timeout=60)
    child.join(20)


class Doubling(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p), ("count", ctypes.c_int64), ("seats", ctypes.c_int64), ("came", ctypes.c_int64),
        ("taken", ctypes.c_int64),
    )  # fmt: skip


DOUBLE = """
#include <stdatomic.h>
#include <stdint.h>
struct job { int64_t *out; int64_t count, seats; _Atomic int64_t came, taken; };
void twice_all(struct job *job) {
    if (atomic_fetch_add(&job->came, 1) >= job->seats) return;
    for (int64_t i; (i = atomic_fetch_add(&job->taken, 1)) < job->count;) job->out[i] += 2 * i;
}
"""


def doubled(source: Path, count: int, parts: int) -> list[int]:
    library = compiled(source)
    assert library is not None
    out = (ctypes.c_int64 * count)()
    job = Doubling(ctypes.addressof(out), count)
    in_team(library.twice_all, job, parts)
    assert job.seats == max(1, min(parts, torch.get_num_threads()))
    if job.seats > 1 and native._gnu() is not None and os.getpid() == native._imported_by:
        assert job.came == torch.get_num_threads()  # GNU's team stays as large as torch's, or its threads end
    return list(out)


@pytest.mark.parametrize("team", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [0, 1, 2, 100])
def test_each_part_is_done_once_whoever_does_it(
    source: Path, monkeypatch: pytest.MonkeyPatch, team: bool, threads: int, parts: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if not team:
        monkeypatch.setattr(native, "_gnu", lambda: None)
    source.write_text(DOUBLE)
    for count in (0, 1, 5, 1000):
        assert doubled(source, count, parts) == [2 * i for i in range(count)]


def _doubled(source: Path, answers: multiprocessing.Queue[list[int]]) -> None:
    answers.put(doubled(source, 100, 2))


def test_a_forked_process_does_not_wait_for_a_team_that_is_gone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source.write_text(DOUBLE)
    assert doubled(source, 100, 2) == [2 * i for i in range(100)]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_doubled, args=(source, answers), daemon=True)
    child.start()
    assert answers.get(timeout=60) == [2 * i for i in range(100)]
    child.join(20)


@pytest.mark.skipif(torch.version.cuda is not None, reason="another build of torch may have another OpenMP")
def test_the_team_is_found() -> None:
    if sys.platform == "linux":
        assert native._gnu() is not None
