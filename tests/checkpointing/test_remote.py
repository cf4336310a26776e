"""Checkpoints on remote storage: in order, whole or not at all, and nothing is lost on the way."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from lightning_efficient.checkpointing import remote, remote_file
from lightning_efficient.checkpointing.remote import RemoteTier
from lightning_efficient.checkpointing.remote_file import is_remote
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify
from tests.checkpointing.clouds import Bucket, Cloud, Network, content, everything, seen, until
from tests.checkpointing.states import snapshot_of


@pytest.fixture(params=["cloud", "cloudtx"])
def run(request: pytest.FixtureRequest) -> str:
    """URL of a run's remote directory."""
    return f"{request.param}://store/run"


@pytest.fixture
def network() -> Iterator[Network]:
    Cloud.network = Network()
    Cloud.store.clear()
    yield Cloud.network
    Cloud.network.gate.set()
    Cloud.store.clear()


@pytest.fixture
def tier(tmp_path: Path, network: Network) -> Iterator[RemoteTier]:
    made = RemoteTier(tmp_path / "fast", attempts=2, retry_seconds=0.001)
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-upload"]


def checkpoint(path: Path, step: int, *, count: int = 1000, **more: Any) -> bytes:
    """A file as the writer makes it."""
    snapshot = snapshot_of({"w": torch.full((count,), float(step)), "global_step": step, **more}, step)
    for _ in snapshot.seal():
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_bytes(snapshot.buffer.view[: snapshot.archive.nbytes])
    os.replace(path.with_suffix(".new"), path)
    return path.read_bytes()


def save(tier: RemoteTier, url: str, step: int, **more: Any) -> bytes:
    """What the engine does with a save."""
    content = checkpoint(tier.local(url), step, **more)
    tier.saved(tier.local(url), step)
    return content


def remove(tier: RemoteTier, url: str) -> None:
    """What the engine does with a removal."""
    tier.local(url).unlink(missing_ok=True)
    tier.removed(tier.local(url))


def damage(path: Path) -> None:
    spoilt = bytearray(path.read_bytes())
    spoilt[200] ^= 1
    path.write_bytes(spoilt)


# -- uploads and removals ----------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_while_others_go_on(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    saved = save(tier, f"{run}/a.ckpt", 3)
    assert tier.pending(f"{run}/a.ckpt")
    assert not tier.pending(f"{run}/b.ckpt")
    assert not tier.wait(timeout=0.02)
    until(lambda: network.writes)
    assert seen(run) == [], "what is not complete has not its name"
    network.gate.set()
    assert tier.wait(f"{run}/a.ckpt")
    assert content(f"{run}/a.ckpt") == saved
    [written] = tier.take_written()
    assert (written.url, written.step, written.nbytes) == (f"{run}/a.ckpt", 3, len(saved))
    assert written.seconds >= written.upload_seconds > 0
    assert tier.take_written() == [] == tier.take_failures()
    assert everything(run) == ["a.ckpt"]


def test_uploads_are_done_in_order(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    for step in (5, 1, 3):
        save(tier, f"{run}/{step}.ckpt", step)
    network.gate.set()
    tier.wait()
    assert [written.step for written in tier.take_written()] == [5, 1, 3]


def test_a_file_is_removed_only_after_its_successor_is_there(tier: RemoteTier, network: Network, run: str) -> None:
    save(tier, f"{run}/1.ckpt", 1)
    tier.wait()
    network.gate.clear()
    save(tier, f"{run}/2.ckpt", 2)
    remove(tier, f"{run}/1.ckpt")
    time.sleep(0.05)
    assert seen(run) == ["1.ckpt"]
    network.gate.set()
    tier.wait()
    assert everything(run) == ["2.ckpt"]
    remove(tier, f"{run}/never-there.ckpt")
    tier.wait()
    assert tier.take_failures() == []


def test_a_failed_upload_keeps_what_it_should_have_replaced(tier: RemoteTier, network: Network, run: str) -> None:
    first = save(tier, f"{run}/1.ckpt", 1)
    tier.wait()
    network.fails = [ConnectionError("gone"), RuntimeError("gone for good")]
    save(tier, f"{run}/2.ckpt", 2)
    remove(tier, f"{run}/1.ckpt")
    tier.wait()
    assert everything(run) == ["1.ckpt"]
    assert content(f"{run}/1.ckpt") == first
    [failure] = tier.take_failures()
    assert (failure.action, failure.url, failure.step) == ("upload", f"{run}/2.ckpt", 2)
    assert str(failure) == f"'{run}/2.ckpt' of step 2 could not be uploaded: RuntimeError: gone for good"
    save(tier, f"{run}/3.ckpt", 3)  # what was kept for want of another stays
    remove(tier, f"{run}/2.ckpt")
    tier.wait()
    assert everything(run) == ["1.ckpt", "3.ckpt"]


def test_it_is_tried_again(tier: RemoteTier, network: Network, run: str) -> None:
    network.fails = [OSError("a cable")]
    saved = save(tier, f"{run}/1.ckpt", 1)
    tier.wait()
    assert content(f"{run}/1.ckpt") == saved
    assert everything(run) == ["1.ckpt"]
    assert tier.take_failures() == []


def test_a_failure_in_the_middle_leaves_the_file_of_this_name_as_it_was(
    tier: RemoteTier, network: Network, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_file, "CHUNK_BYTES", 1000)
    before = save(tier, f"{run}/last.ckpt", 1)
    tier.wait()
    network.fails = [None, None, OSError("a cable"), None, OSError("a cable")]
    save(tier, f"{run}/last.ckpt", 2)
    tier.wait()
    assert content(f"{run}/last.ckpt") == before
    assert everything(run) == ["last.ckpt"]
    assert len(tier.take_failures()) == 1


def test_bytes_that_are_lost_without_a_word_are_missed(tier: RemoteTier, network: Network) -> None:
    network.swallows = 1
    save(tier, "cloud://store/run/1.ckpt", 1)
    tier.wait()
    assert everything("cloud://store/run") == []
    assert "is not what was uploaded" in str(tier.take_failures()[0])


def test_a_failed_removal_is_heard_of(tier: RemoteTier, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tier, f"{run}/1.ckpt", 1)
    tier.wait()
    monkeypatch.setattr(Cloud, "_rm", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    remove(tier, f"{run}/1.ckpt")
    tier.wait()
    assert str(tier.take_failures()[0]) == f"'{run}/1.ckpt' could not be removed: PermissionError: no"
    assert seen(run) == ["1.ckpt"]


def test_what_is_uploaded_is_what_was_saved(tier: RemoteTier, network: Network, run: str) -> None:
    """Whatever becomes of the local file meanwhile."""
    network.gate.clear()
    first = save(tier, f"{run}/1.ckpt", 1)
    until(lambda: network.writes)
    checkpoint(tier.local(f"{run}/1.ckpt"), 9)
    second = save(tier, f"{run}/2.ckpt", 2)
    tier.local(f"{run}/2.ckpt").unlink()
    network.gate.set()
    tier.wait()
    assert content(f"{run}/1.ckpt") == first
    assert content(f"{run}/2.ckpt") == second


def test_a_file_that_is_not_there_is_a_failure(tier: RemoteTier, run: str) -> None:
    save(tier, f"{run}/1.ckpt", 1)
    tier.upload(f"{run}/2.ckpt", 2)
    remove(tier, f"{run}/1.ckpt")
    tier.wait()
    assert isinstance(tier.take_failures()[0].cause, FileNotFoundError)
    assert seen(run) == ["1.ckpt"]


def test_the_directory_of_nobody_is_nobodys_business(tier: RemoteTier, tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.ckpt", 1)
    tier.saved(tmp_path / "a.ckpt", 1)
    tier.removed(tmp_path / "a.ckpt")
    assert not tier.pending()


def test_another_directory_is_no_successor(tier: RemoteTier, network: Network, run: str) -> None:
    save(tier, f"{run}/a/1.ckpt", 1)
    tier.wait()
    network.fails = [OSError(), OSError()]
    save(tier, f"{run}/a/2.ckpt", 2)
    remove(tier, f"{run}/a/1.ckpt")
    save(tier, f"{run}/b/2.ckpt", 2)
    tier.wait()
    assert everything(run) == ["a/1.ckpt", "b/2.ckpt"]


def test_nor_is_there_one_in_the_directory_of_an_earlier_run(tier: RemoteTier, network: Network, run: str) -> None:
    checkpoint(tier.local(f"{run}/old/1.ckpt"), 1)
    tier.upload(f"{run}/old/1.ckpt", 1)
    tier.wait()
    tier._uploads._last_asked.clear()
    network.fails = [OSError(), OSError()]
    save(tier, f"{run}/new/2.ckpt", 2)
    remove(tier, f"{run}/old/1.ckpt")
    tier.wait()
    assert everything(run) == ["old/1.ckpt"]


# -- more than the network can take ------------------------------------------------------------------------------------


def test_what_is_not_wanted_any_more_is_not_uploaded(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    until(lambda: network.writes)
    most = 0
    for step in range(2, 20):
        save(tier, f"{run}/{step}.ckpt", step)
        remove(tier, f"{run}/{step - 1}.ckpt")
        most = max(most, len(tier._uploads._uploads))
    assert most == 2
    network.gate.set()
    tier.wait()
    assert [written.step for written in tier.take_written()] == [1, 19]
    assert everything(run) == ["19.ckpt"]
    assert [path.name for path in tier.folder(run).iterdir()] == ["19.ckpt"]


def test_what_was_replaced_is_not_uploaded(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    until(lambda: network.writes)
    for step in range(2, 20):
        saved = save(tier, f"{run}/last.ckpt", step)
    remove(tier, f"{run}/1.ckpt")
    network.gate.set()
    tier.wait()
    assert [written.step for written in tier.take_written()] == [1, 19]
    assert content(f"{run}/last.ckpt") == saved
    assert everything(run) == ["last.ckpt"]


def test_what_waited_for_one_that_is_not_uploaded_waits_for_the_next(
    tier: RemoteTier, network: Network, run: str
) -> None:
    save(tier, f"{run}/1.ckpt", 1)
    tier.wait()
    network.gate.clear()
    save(tier, f"{run}/other.ckpt", 1)
    until(lambda: len(network.writes) > 1)
    for step in (2, 3):
        save(tier, f"{run}/{step}.ckpt", step)
        remove(tier, f"{run}/{step - 1}.ckpt")
    network.fails = [None, OSError(), OSError()]
    network.gate.set()
    tier.wait()
    assert everything(run) == ["1.ckpt", "other.ckpt"]


def test_a_name_that_is_given_again_is_not_removed(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    save(tier, f"{run}/2.ckpt", 2)
    remove(tier, f"{run}/1.ckpt")
    again = save(tier, f"{run}/1.ckpt", 3)
    network.gate.set()
    tier.wait()
    assert everything(run) == ["1.ckpt", "2.ckpt"]
    assert content(f"{run}/1.ckpt") == again


def test_the_newest_can_be_removed(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    remove(tier, f"{run}/1.ckpt")
    network.gate.set()
    tier.wait()
    assert everything(run) == []


# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_local_copy_saves_the_download(tier: RemoteTier, network: Network, run: str) -> None:
    network.gate.clear()
    saved = save(tier, f"{run}/1.ckpt", 1)
    threading.Timer(0.05, network.gate.set).start()
    path = tier.fetch(f"{run}/1.ckpt")  # waits for the upload
    assert seen(run) == ["1.ckpt"]
    assert path == tier.local(f"{run}/1.ckpt")
    reads = network.reads
    tier.fetch(f"{run}/1.ckpt")
    assert network.reads == reads + 1, "the end of the file, to compare"
    assert path.read_bytes() == saved


@pytest.mark.parametrize("what", ["absent", "damaged", "of another size", "other", "no checkpoint"])
def test_a_copy_that_is_not_right_is_downloaded(
    tier: RemoteTier, run: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1 << 12)  # a page
    url = f"{run}/last.ckpt"
    saved = save(tier, url, 5)
    tier.wait()
    local = tier.local(url)
    if what == "absent":
        local.unlink()
    elif what == "damaged":
        damage(local)
    elif what == "no checkpoint":
        local.write_bytes(b"")
    else:
        checkpoint(local, 4, count=1000 if what == "other" else 10)  # the file of another machine is newer
    assert tier.fetch(url) == local
    assert local.read_bytes() == saved
    assert [path.name for path in local.parent.iterdir()] == ["last.ckpt"]


def test_a_copy_that_was_not_uploaded_is_newer(tier: RemoteTier, run: str) -> None:
    """A run was killed before."""
    url = f"{run}/last.ckpt"
    save(tier, url, 5)
    tier.wait()
    newer = checkpoint(tier.local(url), 6)
    assert tier.fetch(url).read_bytes() == newer
    checkpoint(tier.local(f"{run}/6.ckpt"), 6)
    assert tier.fetch(f"{run}/6.ckpt") == tier.local(f"{run}/6.ckpt")


def test_what_is_not_there_is_said(tier: RemoteTier, run: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no checkpoint '{run}/1.ckpt'"):
        tier.fetch(f"{run}/1.ckpt")


def test_what_is_damaged_everywhere_is_said(tier: RemoteTier, run: str) -> None:
    url = f"{run}/1.ckpt"
    checkpoint(tier.local(url), 1)
    damage(tier.local(url))
    with pytest.raises(CheckpointDamagedError):
        tier.fetch(url)
    tier.saved(tier.local(url), 1)
    with pytest.raises(CheckpointDamagedError):
        tier.fetch(url)


def test_a_network_that_fails_is_not_taken_for_an_answer(
    tier: RemoteTier, network: Network, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{run}/1.ckpt"
    saved = save(tier, url, 1)
    tier.wait()
    tier.local(url).unlink()
    fails, read = [True], Cloud.cat_file

    def fail(self: Cloud, *arguments: Any, **options: Any) -> bytes:
        if fails and fails.pop():
            raise TimeoutError("slow")
        return read(self, *arguments, **options)

    monkeypatch.setattr(Cloud, "cat_file", fail)
    assert tier.fetch(url).read_bytes() == saved
    checkpoint(tier.local(url), 0)
    fails[:] = [True] * 9
    with pytest.raises(TimeoutError):
        tier.fetch(url)
    with pytest.raises(TimeoutError):
        tier.newest_intact(run)


def test_of_several_one_downloads(tier: RemoteTier, network: Network, run: str, tmp_path: Path) -> None:
    url = f"{run}/1.ckpt"
    save(tier, url, 1)
    tier.wait()
    others = [RemoteTier(tmp_path / "other machine") for _ in range(4)]
    network.reads = 0
    with ThreadPoolExecutor(4) as pool:
        [path] = set(pool.map(lambda other: other.fetch(url), others))
    verify(path)
    assert network.reads == 1 + 3, "a download, and three looks at the end of the file"


def test_it_waits_for_what_is_to_be_written(tier: RemoteTier, run: str) -> None:
    url = f"{run}/1.ckpt"
    tier.drain = lambda path: save(tier, url, 1) if path in (None, tier.local(url)) else None
    assert tier.fetch(url).exists()
    assert seen(run) == ["1.ckpt"]


def test_the_newest_intact_one(tier: RemoteTier, network: Network, run: str, tmp_path: Path) -> None:
    assert tier.newest_intact(run) is None
    for step in (1, 20, 3):
        save(tier, f"{run}/step={step}.ckpt", step, count=30_000)
    save(tier, f"{run}/notes.txt", 99)
    tier.wait()
    assert sorted(tier.checkpoints(run)) == [f"{run}/step={step}.ckpt" for step in (1, 20, 3)]
    elsewhere = RemoteTier(tmp_path / "other machine")
    assert elsewhere.newest_intact(run) == f"{run}/step=20.ckpt"
    assert [path.name for path in elsewhere.folder(run).iterdir()] == ["step=20.ckpt"], "the others were not downloaded"
    assert elsewhere.newest_intact(f"{run}/", besides=f"{run}/step=20.ckpt") == f"{run}/step=3.ckpt"
    Cloud.store["/store/run/step=20.ckpt"].getbuffer()[200] ^= 1
    elsewhere.local(f"{run}/step=20.ckpt").unlink()
    assert elsewhere.newest_intact(run) == f"{run}/step=3.ckpt"
    checkpoint(elsewhere.local(f"{run}/step=21.ckpt"), 21)  # a run was killed before the upload
    assert elsewhere.newest_intact(run) == f"{run}/step=21.ckpt"


def test_of_a_large_file_the_end_tells_the_step(
    tier: RemoteTier, run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote_file, "DIRECTORY_BYTES", 2048)
    save(tier, f"{run}/a.ckpt", 12, count=100_000)
    tier.wait()
    assert RemoteTier(tmp_path / "other machine").newest_intact(run) == f"{run}/a.ckpt"


def test_training_cannot_go_on_from_weights_alone(tier: RemoteTier, run: str) -> None:
    lightning = {"pytorch-lightning_version": "2.6"}
    save(tier, f"{run}/whole.ckpt", 1, optimizer_states=[], **lightning)
    save(tier, f"{run}/weights.ckpt", 2, **lightning)
    assert tier.newest_intact(run) == f"{run}/whole.ckpt"
    assert tier.newest_intact(run, complete=False) == f"{run}/weights.ckpt"


# -- file systems and URLs ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "local", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    Bucket.root = tmp_path
    names = {"memory": "memory://run", "local": f"local://{tmp_path}/store/run", "bucket": "bucket://store/run"}
    yield names[request.param]
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_the_file_systems_of_fsspec(tier: RemoteTier, place: str, tmp_path: Path) -> None:
    for step in range(1, 4):
        save(tier, f"{place}/{step}.ckpt", step)
        last = save(tier, f"{place}/last.ckpt", step)
        if step > 1:
            remove(tier, f"{place}/{step - 1}.ckpt")
    tier.wait()
    assert tier.take_failures() == []
    assert content(f"{place}/last.ckpt") == last
    system, path = fsspec.url_to_fs(place)
    assert sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False)) == ["3.ckpt", "last.ckpt"]
    elsewhere = RemoteTier(tmp_path / "other machine")
    assert elsewhere.newest_intact(place, besides=f"{place}/last.ckpt") == f"{place}/3.ckpt"
    assert elsewhere.fetch(f"{place}/last.ckpt").read_bytes() == last


def test_the_root_of_a_file_system(tier: RemoteTier, network: Network, tmp_path: Path) -> None:
    save(tier, "cloud://a.ckpt", 1)
    tier.wait()
    assert tier.take_failures() == []
    assert list(Cloud.store) == ["/a.ckpt"]
    assert RemoteTier(tmp_path / "other machine").newest_intact("cloud://") == "cloud://a.ckpt"


def test_other_writes_of_the_process_are_not_held_up(
    tier: RemoteTier, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction holds for all that is written through an object; fsspec gives many the same object."""
    network.gate.clear()
    save(tier, "cloudtx://store/run/1.ckpt", 1)
    until(lambda: network.writes)
    fsspec.filesystem("cloudtx").pipe_file("/store/log.txt", b"")
    assert "/store/log.txt" in Cloud.store
    network.gate.set()


def test_what_a_killed_run_left_is_swept(tier: RemoteTier, network: Network, tmp_path: Path) -> None:
    run = "cloud://store/run"
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    until(lambda: network.writes)
    [unfinished] = everything(run)
    network.gate.set()
    tier.wait()
    system = fsspec.filesystem("cloud")
    system.cp_file("/store/run/1.ckpt", f"/store/run/{unfinished}")
    assert RemoteTier(tmp_path / "other machine").sweep(run) == [], "what others are writing is theirs"
    assert tier.sweep(run) == [f"{run}/{unfinished}"]
    assert everything(run) == ["1.ckpt"]


def test_remote_is_what_has_a_protocol() -> None:
    assert all(map(is_remote, ("s3://bucket/run", "memory://a")))
    assert not any(map(is_remote, ("/a/b", "b", Path("/a"), "file:///a")))


def test_each_directory_has_its_own_folder(tier: RemoteTier) -> None:
    urls = ["cloud://a/b/c.ckpt", "cloud://a-b/c.ckpt", "cloud://a/b!/c.ckpt", "cloudtx://a/b/c.ckpt"]
    assert len({tier.local(url) for url in urls}) == 4
    assert {tier.local(url).name for url in urls} == {"c.ckpt"}
    assert tier.local(urls[0]).parent.name.startswith("a-b-")
    assert tier.folder("cloud://a/b/") == tier.local(urls[0]).parent
    assert tier.local(urls[0]).parent.parent == tier.local_dir


def test_what_cannot_be_used_is_said_at_once(tier: RemoteTier, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="protocol 'nonsense', which fsspec does not know"):
        tier.local("nonsense://bucket/a.ckpt")
    with pytest.raises(ValueError, match="no URL of a remote directory"):
        tier.local("/fast/disk/a.ckpt")
    with pytest.raises(ValueError, match="local_dir='s3://bucket' is a URL"):
        RemoteTier("s3://bucket")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ImportError, match=r"'s3://bucket/run' needs a driver .*: Install s3fs"):
        tier.local("s3://bucket/run/a.ckpt")


# -- memory, threads, processes ----------------------------------------------------------------------------------------


def test_no_file_is_held_in_memory_as_a_whole(tier: RemoteTier, tmp_path: Path) -> None:
    Bucket.root = tmp_path / "store"
    url = "bucket://run/large.ckpt"
    checkpoint(tier.local(url), 1, count=24 << 20)  # 96 MiB
    tracemalloc.start()
    try:
        tier.upload(url, 1)
        tier.wait()
        RemoteTier(tmp_path / "other machine").fetch(url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tier.take_failures() == []
    assert peak < 64 << 20


def test_it_can_be_closed_and_used_again(tier: RemoteTier, network: Network, run: str) -> None:
    tier.close()
    for step in (1, 2):
        save(tier, f"{run}/{step}.ckpt", step)
        tier.close()
        assert not tier.pending()
        tier.close()
    assert seen(run) == ["1.ckpt", "2.ckpt"]


_PROGRAM = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from lightning_efficient.checkpointing.remote import RemoteTier

class Pooled(LocalFileSystem):
    '''Needs a pool of threads, as those do that look up a host.'''
    protocol = "pooled"
    def _open(self, path, mode="rb", **options):
        time.sleep(0.2)
        ThreadPoolExecutor(1).submit(int).result()
        return super()._open(path, mode, **options)

fsspec.register_implementation("pooled", Pooled)
def save():
    tier.local(url).parent.mkdir(parents=True)
    tier.local(url).write_bytes(b"checkpoint")
    tier.saved(tier.local(url), 1)

for number, when in enumerate(sys.argv[1:]):  # each in a process of its own, which imports nothing again
    child = os.fork()
    if not child:
        tier = RemoteTier(f"fast-{number}", attempts=1)
        url = f"pooled://{os.getcwd()}/store-{number}/a.ckpt"
        exec(when)
        break
    assert os.waitpid(child, 0)[1] == 0
"""


def test_what_was_asked_for_is_uploaded_when_the_program_ends(tmp_path: Path) -> None:
    ways = ["save()", "tier.drain = lambda path: save()", "save(); tier.close()"]
    command = [sys.executable, "-c", _PROGRAM, *ways]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    for number in range(len(ways)):
        store = tmp_path / f"store-{number}"
        assert [path.name for path in store.iterdir()] == ["a.ckpt"]
        assert (store / "a.ckpt").read_bytes() == b"checkpoint"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_wait_for_the_upload(tier: RemoteTier, network: Network, run: str) -> None:
    """A worker of a DataLoader, for one."""
    network.gate.clear()
    save(tier, f"{run}/1.ckpt", 1)
    until(lambda: network.writes)
    worker = multiprocessing.get_context("fork").Process(target=os.getpid)
    worker.start()
    worker.join(20)
    assert worker.exitcode == 0
    network.gate.set()
