"""A file is there as a whole, or not at all; a dead writer's leavings are swept, a living one's are not (C10)."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_efficient.core import durable_file
from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.core.durable_file import DurableFile, durable_link, durable_remove, sweep_temporaries
from lightning_efficient.core.processes import machine_mark
from tests.helpers.processes import context


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
    real_write, real_set = os.pwrite, durable_file.set_direct
    refused = []
    if refuses == "open":
        monkeypatch.setattr(durable_file, "set_direct", lambda descriptor, on: real_set(descriptor, False))
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
    durable_link(tmp_path / "a", tmp_path / "last")
    assert (tmp_path / "last").samefile(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]
    monkeypatch.setattr(os, "link", refuse)  # as FAT
    (tmp_path / "b").write_text("b")
    durable_link(tmp_path / "b", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "b"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "last"]


def test_a_link_takes_the_place_of_a_directory(tmp_path: Path) -> None:
    """As the checkpoints of other strategies are."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "last" / "shard").mkdir(parents=True)
    (tmp_path / "last" / "shard" / "0").write_text("old")
    durable_link(tmp_path / "a", tmp_path / "last")
    assert os.readlink(tmp_path / "last") == "a"
    (tmp_path / "sharded").mkdir()
    durable_link(tmp_path / "sharded", tmp_path / "last")
    durable_link(tmp_path / "a", tmp_path / "last")
    assert sorted(os.listdir(tmp_path)) == ["a", "last", "sharded"], "a link to a directory is only a link"
    durable_remove(tmp_path / "sharded")
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_a_link_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "last").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "not yours")

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(OSError, match="not yours"):
        durable_link(tmp_path / "a", tmp_path / "last")
    monkeypatch.undo()
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(FileNotFoundError):
        durable_link(tmp_path / "nothing", tmp_path / "last")
    assert sorted(os.listdir(tmp_path)) == ["a", "last"]


def test_a_file_is_not_made_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "last").write_text("a")
    durable_link(tmp_path / "last", tmp_path / "last")
    assert (tmp_path / "last").read_text() == "a"


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    durable_remove(tmp_path / "nothing")
    (tmp_path / "some").write_text("")
    durable_remove(tmp_path / "some")
    assert not os.listdir(tmp_path)


NO_LOCKS = [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK]


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


def let_pass(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_files_are_written_all_the_same_c10(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems."""
    refuse_locks(monkeypatch, number)
    file = DurableFile(tmp_path / "a.ckpt")
    file.append(image(1))
    assert sweep_temporaries(tmp_path) == [], "its writer lives"
    file.commit(10)
    assert (tmp_path / "a.ckpt").read_bytes() == bytes(image(1)[:10])
    DurableFile(tmp_path / "a.ckpt").abandon()
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_what_was_written_without_locks_is_not_swept_when_they_come_back_c10(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as without:
        refuse_locks(without, errno.ENOLCK)
        file = DurableFile(tmp_path / "a.ckpt")
    assert sweep_temporaries(tmp_path) == []
    file.append(image(1))
    file.commit(10)
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("mark", ["", durable_file.UNLOCKED])
def test_without_locks_only_what_is_old_and_no_process_has_is_swept_c10(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of another host may be at work on what is not old; one of this host, suspended, on what is."""
    if not mark:
        refuse_locks(monkeypatch, errno.ENOSYS)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            pass
        numbers = {"living": living.pid, "dead": dead.pid, "ours, of a former life": os.getpid(), "none": "x"}
        paths = {
            whose: tmp_path / f"{durable_file.PREFIX}{mark}{number}-0-a.ckpt{durable_file.SUFFIX}"
            for whose, number in numbers.items()
        }
        for path in paths.values():
            path.write_bytes(b"half")
        let_pass(23 * 3600, monkeypatch)
        assert sweep_temporaries(tmp_path) == []
        let_pass(2 * 3600, monkeypatch)
        assert set(sweep_temporaries(tmp_path)) == {paths["dead"], paths["ours, of a former life"]}
        living.communicate(b"\n")


def test_a_link_that_a_dead_process_of_this_machine_did_not_finish_is_swept_at_once_c10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    owners = {
        "dead": f"{machine_mark()}-{dead.pid}", "living": f"{machine_mark()}-{os.getppid()}",
        "of another machine": f"0123456789ab-{dead.pid}", "nobody knows where": f"0-{dead.pid}",
    }  # fmt: skip
    links = {
        whose: tmp_path / f"{durable_file.PREFIX}{durable_file.UNLOCKED}{owner}-3-last.ckpt{durable_file.SUFFIX}"
        for whose, owner in owners.items()
    }
    for link in links.values():
        link.symlink_to("a.ckpt")
    assert sweep_temporaries(tmp_path) == [links["dead"]]
    let_pass(61, monkeypatch)
    assert set(sweep_temporaries(tmp_path)) == set(links.values()) - {links["dead"]}


def test_the_link_of_a_process_that_was_killed_amid_it_says_whose_it_is_c10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(source.name))
    durable_link(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    assert seen[0].startswith(f"{durable_file.PREFIX}{durable_file.UNLOCKED}{machine_mark()}-{os.getpid()}-")


def test_what_cannot_be_begun_leaves_nothing_open_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no locks here"):
        DurableFile(tmp_path / "a.ckpt")
    monkeypatch.undo()
    monkeypatch.setattr(durable_file, "set_direct", lambda descriptor, on: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        DurableFile(tmp_path / "a.ckpt")
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert not os.listdir(tmp_path)


def test_what_is_swept_is_locked_as_network_file_systems_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS only what is open for writing can be locked."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / f"{durable_file.PREFIX}1-0-a.ckpt{durable_file.SUFFIX}").write_bytes(b"half")
    assert len(sweep_temporaries(tmp_path)) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_mounts_that_sync_no_directory_are_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "not of a directory")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    DurableFile(tmp_path / "a.ckpt").commit(0)
    durable_link(tmp_path / "a.ckpt", tmp_path / "last.ckpt")
    durable_remove(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    number = errno.EIO
    with pytest.raises(OSError, match="not of a directory"):
        durable_remove(tmp_path / "a.ckpt")


def test_only_what_dead_writers_left_is_swept_c10(tmp_path: Path) -> None:
    (tmp_path / "user.tmp").write_text("not ours")
    mine, its = context().Pipe()
    writer = context().Process(target=_begin, args=(tmp_path / "a.ckpt", its))
    writer.start()
    assert mine.poll(60)
    assert sweep_temporaries(tmp_path) == [], "its writer lives"
    writer.kill()
    writer.join()
    assert len(sweep_temporaries(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["user.tmp"]
    assert sweep_temporaries(tmp_path / "nowhere") == []


def _begin(path: Path, connection: Any) -> None:
    file = DurableFile(path)
    connection.send("ready")
    time.sleep(60)
    del file


def test_half_made_links_are_swept_when_they_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{durable_file.PREFIX}1-1-last{durable_file.SUFFIX}").symlink_to("a")
    assert sweep_temporaries(tmp_path) == []
    let_pass(3600, monkeypatch)
    assert len(sweep_temporaries(tmp_path)) == 1
