"""A file is there as a whole, or not at all; a dead writer's leavings are swept, a living one's are not (C10)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_efficient.checkpointing import durable_file
from lightning_efficient.checkpointing.durable_file import DurableFile, Intention, durable_link, durable_remove, sweep
from lightning_efficient.core.buffers import PAGE, HostBuffer


def image(pages: int) -> memoryview:
    buffer = HostBuffer(pages * PAGE)
    buffer.view[:] = bytes(range(256)) * (buffer.nbytes // 256)
    return buffer.view


def test_a_file_appears_when_it_is_complete_c10(tmp_path: Path) -> None:
    path, data = tmp_path / "a.ckpt", image(3)
    file = DurableFile(path)
    file.append(data[:PAGE])
    file.append(data[PAGE:])
    assert not path.exists()
    file.commit(2 * PAGE + 5)
    assert path.read_bytes() == bytes(data[: 2 * PAGE + 5])
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_an_abandoned_file_leaves_nothing_c10(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("old")
    file = DurableFile(tmp_path / "a.ckpt")
    file.append(image(1))
    file.abandon()
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_text() == "old"


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_without_direct_io_it_writes_through_the_cache_c10(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on tmpfs and some network file systems, which refuse ``O_DIRECT`` at once or at the first write."""
    real_write, real_set = os.pwrite, DurableFile._set_direct
    refused = []
    if refuses == "open":
        monkeypatch.setattr(DurableFile, "_set_direct", lambda self, on: real_set(self, False))
    else:

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            if not refused:
                refused.append(offset)
                raise OSError(errno.EINVAL, "no direct IO here")
            return real_write(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
    file = DurableFile(tmp_path / "a.ckpt")
    data = image(2)
    file.append(data)
    file.commit(PAGE + 1)
    assert (tmp_path / "a.ckpt").read_bytes() == bytes(data[: PAGE + 1])


def test_short_writes_are_continued_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset))
    file = DurableFile(tmp_path / "a.ckpt")
    data = image(2)
    file.append(data)
    file.commit(2 * PAGE)
    assert (tmp_path / "a.ckpt").read_bytes() == bytes(data)


def test_the_order_is_file_rename_directory_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name must not be on the disk before the bytes are."""
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    def replace(one: Path, other: Path) -> None:
        done.append("rename")
        real_replace(one, other)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    file = DurableFile(tmp_path / "a.ckpt")
    file.append(image(1))
    file.commit(10)
    assert done == ["file", "rename", "directory"]


def test_a_link_is_never_missing_c10(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    durable_link(tmp_path / "a", tmp_path / "last")
    assert os.readlink(tmp_path / "last") == "a"
    durable_link(tmp_path / "b", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "b"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "last"]


def test_without_symbolic_links_it_is_a_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("none here")

    monkeypatch.setattr(os, "symlink", refuse)
    (tmp_path / "a").write_text("a")
    durable_link(tmp_path / "a", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "a"
    assert not (tmp_path / "last").is_symlink()


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    durable_remove(tmp_path / "nothing")
    (tmp_path / "some").write_text("")
    durable_remove(tmp_path / "some")
    assert not os.listdir(tmp_path)


def test_only_what_dead_writers_left_is_swept_c10(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from lightning_efficient.checkpointing.durable_file import DurableFile
file = DurableFile(Path({str(tmp_path)!r}) / "a.ckpt")
print("ready", flush=True)
sys.stdin.read()
"""
    (tmp_path / "user.tmp").write_text("not ours")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert sweep(tmp_path) == [], "its writer lives"
        writer.kill()
    assert len(sweep(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["user.tmp"]
    assert sweep(tmp_path / "nowhere") == []


def test_half_made_links_are_swept_when_they_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{durable_file.PREFIX}1-1-last{durable_file.SUFFIX}").symlink_to("a")
    assert sweep(tmp_path) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert len(sweep(tmp_path)) == 1


def test_an_intention_is_carried_out_by_the_next_run_c10(tmp_path: Path) -> None:
    old, new = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    old.write_text("old")
    (tmp_path / "last.ckpt").symlink_to("1.ckpt")
    Intention(old, new)
    assert sweep(tmp_path) == [], "its successor never came"
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "last.ckpt"]
    Intention(old, new)
    new.write_text("new")
    assert sweep(tmp_path) == [old]
    assert sorted(os.listdir(tmp_path)) == ["2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "new"


def test_an_intention_that_is_fulfilled_leaves_no_note_c10(tmp_path: Path) -> None:
    (tmp_path / "1.ckpt").write_text("old")
    Intention(tmp_path / "1.ckpt", tmp_path / "2.ckpt").fulfil()
    assert not os.listdir(tmp_path)
