"""Saves, removals and links in order, in the background; whatever fails is heard of, and costs no older file (C10)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.checkpointing import writer as writer_module
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.checkpointing.verification import verify
from lightning_efficient.checkpointing.writer import BackgroundWriter
from lightning_efficient.core.buffers import BufferPool
from lightning_efficient.core.durable_file import DurableFile
from tests.checkpointing.states import checkpoint_of, same, snapshot_of, step, trained


@pytest.fixture
def make() -> Iterator[Callable[..., CheckpointEngine]]:
    engines: list[CheckpointEngine] = []

    def build(**arguments: Any) -> CheckpointEngine:
        engines.append(CheckpointEngine(**({"memory_cap": None} | arguments)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint-")]


def state(value: float = 1.0, count: int = 1000) -> dict[str, Any]:
    return {"w": torch.full((count,), value), "step": int(value)}


class Disk:
    """Makes writes slow, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = os.pwrite
        self.gate = threading.Event()
        self.gate.set()
        self.fails: list[OSError] = []
        self.writes = 0
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, *arguments: Any) -> int:
        self.gate.wait(30)
        self.writes += 1
        if self.fails and (error := self.fails.pop(0)) is not None:
            raise error
        return self.real(*arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_save_returns_before_the_file_is_there(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make()
    disk.gate.clear()
    live = state()
    engine.save(live, tmp_path / "a.ckpt", 1)
    live["w"].fill_(9)  # whatever happens to it now
    assert engine.pending(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    disk.gate.set()
    engine.drain()
    assert same(torch.load(tmp_path / "a.ckpt"), state())
    verify(tmp_path / "a.ckpt")
    [written] = engine.take_written()
    assert (written.path, written.step) == (tmp_path / "a.ckpt", 1)
    assert written.nbytes == (tmp_path / "a.ckpt").stat().st_size
    assert engine.take_written() == [] == engine.take_failures()


def test_a_file_is_removed_only_after_its_successor_is_there(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make()
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.drain()
    disk.gate.clear()
    engine.save(state(2), tmp_path / "2.ckpt", 2)
    engine.remove(tmp_path / "1.ckpt")
    engine.link(tmp_path / "2.ckpt", tmp_path / "last.ckpt")
    time.sleep(0.05)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["1.ckpt"]
    disk.gate.set()
    engine.drain()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt")["step"] == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_save_keeps_what_it_should_have_replaced(make: Any, disk: Disk, tmp_path: Path, code: int) -> None:
    engine = make()
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.link(tmp_path / "1.ckpt", tmp_path / "last.ckpt")
    engine.drain()
    disk.fails = [OSError(code, os.strerror(code))]
    engine.save(state(2), tmp_path / "2.ckpt", 2)
    engine.link(tmp_path / "2.ckpt", tmp_path / "last.ckpt")
    engine.remove(tmp_path / "1.ckpt")
    engine.drain()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt")["step"] == 1
    [failure] = engine.take_failures()
    assert (failure.action, failure.path.name, failure.step) == ("save", "2.ckpt", 2)
    assert os.strerror(code) in str(failure)
    engine.save(state(3), tmp_path / "3.ckpt", 3)  # what was kept for want of another stays
    engine.drain()
    assert sorted(p.name for p in tmp_path.glob("?.ckpt")) == ["1.ckpt", "3.ckpt"]


@pytest.mark.parametrize("at", range(4))
def test_an_error_at_the_nth_write(make: Any, disk: Disk, tmp_path: Path, at: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 1 << 12)
    engine = make()
    disk.fails = [*[None] * at, OSError(errno.EIO, "broken")]  # type: ignore[list-item]
    engine.save(state(1, 5000), tmp_path / "1.ckpt", 1)
    engine.drain()
    assert not list(tmp_path.iterdir())
    assert len(engine.take_failures()) == 1


def test_retries_until_the_disk_is_well_again(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make(attempts=3, retry_seconds=0.01)
    disk.fails = [OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full")]
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.drain()
    assert same(torch.load(tmp_path / "1.ckpt"), state(1))
    assert engine.take_failures() == []


def test_a_directory_that_is_gone_is_heard_of(make: Any, tmp_path: Path) -> None:
    engine = make()
    engine.save(state(1), tmp_path / "gone" / "1.ckpt", 1)
    engine.drain()
    [failure] = engine.take_failures()
    assert isinstance(failure.cause, FileNotFoundError)


def test_the_buffer_that_is_being_written_is_not_overwritten(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make()
    disk.gate.clear()
    threading.Timer(0.1, disk.gate.set).start()
    for value in range(1, 7):  # two fit, the third waits
        engine.save(state(value), tmp_path / f"{value}.ckpt", value)
    engine.drain()
    for value in range(1, 7):
        assert same(torch.load(tmp_path / f"{value}.ckpt"), state(value))
    assert engine.pool.held_bytes <= 2 * engine.pool.take(1).nbytes


def test_eagerly_past_the_cap(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make(when_busy="eager")
    disk.gate.clear()
    for value in range(1, 7):
        engine.save(state(value), tmp_path / f"{value}.ckpt", value)
    disk.gate.set()
    engine.drain()
    assert all(same(torch.load(tmp_path / f"{value}.ckpt"), state(value)) for value in range(1, 7))


def test_a_state_over_the_cap_is_written_at_once(make: Any, tmp_path: Path) -> None:
    engine = make(memory_cap=1 << 16)
    large = {"w": torch.randn(5 << 20), "cut": torch.randn(3), "empty": torch.empty(0)}  # more than the small buffer
    engine.save(large, tmp_path / "a.ckpt", 4)
    assert same(torch.load(tmp_path / "a.ckpt"), large)
    verify(tmp_path / "a.ckpt")
    assert engine.pool.held_bytes == 0


def test_both_ways_write_the_same_file(make: Any, tmp_path: Path) -> None:
    engine = make()
    saved = checkpoint_of(*trained())
    engine.save(saved, tmp_path / "a.ckpt", 4)
    engine.save_now(saved, tmp_path / "b.ckpt", 4)
    engine.drain()
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_a_save_in_a_signal_handler_may_interrupt_another_c10(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM's, which comes at any moment, also between any two steps of a save."""
    engine = make()
    engine.barrier.attach()
    model, optimizer = trained()
    saved = checkpoint_of(model, optimizer)
    handled: list[Path] = []

    def handler(*_: Any) -> None:
        path = tmp_path / f"hpc_ckpt_{len(handled)}.ckpt"
        engine.save_now(saved, path, 1)
        verify(path)
        handled.append(path)

    def interrupted(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), signal.SIGUSR2)
            return real(*arguments, **more)

        return call

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        for owner, name in (
            (Snapshot, "offer"), (Snapshot, "wait"), (Snapshot, "_note_copied"), (BufferPool, "try_take"),
            (BackgroundWriter, "save"), (BackgroundWriter, "_add"), (threading.Condition, "wait_for"),
        ):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted(getattr(owner, name)))
                for number in range(2):
                    engine.save(saved, tmp_path / f"{name}{number}.ckpt", 1, owners=[optimizer], place=name)
                    step(model, optimizer)
                engine.drain()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(handled) > 14
    assert engine.take_failures() == []
    assert len(list(tmp_path.glob("*.ckpt"))) == 14 + len(handled)


def test_a_failure_of_a_save_at_once_leaves_nothing(make: Any, disk: Disk, tmp_path: Path) -> None:
    disk.fails = [OSError(errno.ENOSPC, "full")]
    with pytest.raises(OSError, match="full"):
        make().save_now(state(), tmp_path / "a.ckpt", 1)
    assert not list(tmp_path.iterdir())


# -- what an optimizer owns is copied later ----------------------------------------------------------------------------


def test_only_owned_tensors_are_copied_later_c2(make: Any, tmp_path: Path) -> None:
    engine = make()
    engine.barrier.attach()
    model, optimizer = trained()
    first = engine.save(checkpoint_of(model, optimizer), tmp_path / "1.ckpt", 1, owners=[optimizer], place="here")
    assert first.later_bytes == 0, "the first is copied at once, and looked at again"
    step(model, optimizer)
    second = engine.save(checkpoint_of(model, optimizer), tmp_path / "2.ckpt", 2, owners=[optimizer], place="here")
    owned = sum(p.numel() for p in model.parameters()) * 4 * 3 + 4 * len(list(model.parameters()))
    assert second.later_bytes == owned
    assert second.copied_bytes >= sum(b.numel() * b.element_size() for b in model.buffers())
    assert not engine.planner.volatile
    elsewhere = engine.save(checkpoint_of(model, optimizer), tmp_path / "3.ckpt", 3, owners=[optimizer], place="there")
    assert elsewhere.later_bytes == 0


def test_weights_that_user_code_changes_are_copied_at_once_c2(make: Any, tmp_path: Path) -> None:
    """As in a WGAN, whose weights are clamped after each step, through ``.data``, which torch does not count."""
    engine = make(verify=True)
    engine.barrier.attach()
    model, optimizer = trained()
    for number in range(1, 6):
        step(model, optimizer)
        saved = checkpoint_of(model, optimizer)
        truth = {name: value.clone() for name, value in saved["state_dict"].items()}
        engine.save(saved, tmp_path / f"{number}.ckpt", number, owners=[optimizer], place="here")
        model.a.weight.data.clamp_(-0.1, 0.1)
        engine.drain()
        assert same(dict(torch.load(tmp_path / f"{number}.ckpt")["state_dict"]), truth)
    assert len(engine.planner.volatile) == 1
    assert engine.take_failures() == []


def test_a_change_that_was_not_foreseen_is_a_failure_not_a_file_c4(
    make: Any, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    engine.barrier.attach()
    model, optimizer = trained()
    engine.save(checkpoint_of(model, optimizer), tmp_path / "1.ckpt", 1, owners=[optimizer], place="here")
    step(model, optimizer)
    engine.drain()
    hold = threading.Event()
    engine._writer.prepare(lambda: hold.wait(30))
    monkeypatch.setattr("lightning_efficient.checkpointing.snapshot.Snapshot.seal", _after(hold))
    engine.save(checkpoint_of(model, optimizer), tmp_path / "2.ckpt", 2, owners=[optimizer], place="here")
    with torch.no_grad():
        model.a.weight.mul_(2)
    hold.set()
    engine.drain()
    [failure] = engine.take_failures()
    assert "'state_dict.a.weight' changed after the save" in str(failure)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt"]


def _after(event: threading.Event) -> Any:
    from lightning_efficient.checkpointing.snapshot import Snapshot

    real = Snapshot.seal

    def seal(self: Snapshot) -> Iterator[int]:
        event.wait(30)
        return real(self)

    return seal


# -- what stays in memory ----------------------------------------------------------------------------------------------


def test_the_last_good_stays_in_memory(make: Any, tmp_path: Path) -> None:
    engine = make(in_memory=2)
    assert engine.last_good() is None
    for value in (1, 2, 3):
        engine.save(state(value), tmp_path / f"{value}.ckpt", value)
        engine.drain()
    assert engine.last_good().step == 3
    assert same(engine.last_good().load(), state(3))
    engine.discard_after(2)
    assert same(engine.last_good().load(), state(2))
    engine.discard_after(1)
    assert engine.last_good() is None


def test_what_is_still_being_written_is_not_good_after_going_back(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes a file, but takes nobody's place in memory."""
    engine = make(in_memory=1)
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.drain()
    kept, hold = engine.last_good(), threading.Event()
    monkeypatch.setattr(Snapshot, "seal", _after(hold))
    engine.save(state(2), tmp_path / "2.ckpt", 2)
    engine.discard_after(1)
    hold.set()
    engine.drain()
    assert engine.last_good().step == 1
    assert same(kept.load(), state(1))
    verify(tmp_path / "2.ckpt")


def test_what_is_read_from_memory_is_not_overwritten_meanwhile(make: Any, tmp_path: Path) -> None:
    engine = make(in_memory=1)
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.drain()
    kept = engine.last_good()
    engine.save(state(2), tmp_path / "2.ckpt", 2)
    engine.drain()
    with pytest.raises(LookupError, match="The state of step 1 is not in memory any more"):
        kept.load()
    assert same(engine.last_good().load(), state(2))


def test_a_save_is_skipped_while_all_memory_is_in_use_c10(make: Any, disk: Disk, tmp_path: Path) -> None:
    """And what it should have replaced stays."""
    engine = make(when_busy="skip")
    model, optimizer = trained()
    disk.gate.clear()
    skipped = []
    for number in range(1, 5):
        path = tmp_path / f"{number}.ckpt"
        saved = engine.save(checkpoint_of(model, optimizer), path, number, owners=[optimizer], place="here")
        skipped.append(saved.skipped)
        engine.remove(tmp_path / f"{number - 1}.ckpt")
        engine.link(path, tmp_path / "last.ckpt")
        step(model, optimizer)
    assert skipped == [False, False, True, True]
    disk.gate.set()
    engine.drain()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "2.ckpt"
    assert engine.take_failures() == []
    at_the_end = engine.save(checkpoint_of(model, optimizer), tmp_path / "end.ckpt", 9)
    assert not at_the_end.skipped


def test_a_disk_that_is_ten_times_slower_loses_nothing_c10(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def slow(*arguments: Any) -> int:
        began = time.perf_counter()
        written = real(*arguments)
        time.sleep(max(0.02, 9 * (time.perf_counter() - began)))
        return written

    monkeypatch.setattr(os, "pwrite", slow)
    engine = make()
    engine.barrier.attach()
    model, optimizer = trained(width=300)
    truth = {}
    for number in range(1, 9):
        step(model, optimizer)
        saved = checkpoint_of(model, optimizer)
        truth[number] = {name: value.clone() for name, value in saved["state_dict"].items()}
        engine.save(saved, tmp_path / f"{number}.ckpt", number, owners=[optimizer], place="here")
        engine.remove(tmp_path / f"{number - 2}.ckpt")
    engine.drain()
    assert engine.take_failures() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7.ckpt", "8.ckpt"]
    for number in (7, 8):
        verify(tmp_path / f"{number}.ckpt")
        assert same(dict(torch.load(tmp_path / f"{number}.ckpt")["state_dict"]), truth[number])


def test_memory_for_the_next_goes_before_what_is_kept(make: Any, tmp_path: Path) -> None:
    engine = make(in_memory=3, memory_cap=3 << 20)  # of a bit more than a mebibyte each
    for value in range(1, 6):
        engine.save(state(value), tmp_path / f"{value}.ckpt", value)
    engine.drain()
    assert engine.last_good().step == 5
    assert engine.pool.held_bytes <= 3 << 20


def test_memory_is_there_before_the_first_save(make: Any, tmp_path: Path) -> None:
    engine = make()
    model, optimizer = trained(width=400)
    engine.prepare(model, [optimizer])
    while not engine.pool.held_bytes or not engine.pool._free:
        time.sleep(0.001)
    held = engine.pool.held_bytes
    engine.save(checkpoint_of(model, optimizer), tmp_path / "a.ckpt", 1)
    assert engine.pool.held_bytes in (held, 2 * held), "the first save takes the buffer that was prepared"


def test_a_steady_state_takes_no_new_memory(make: Any, tmp_path: Path) -> None:
    engine = make(in_memory=1)
    for value in range(1, 4):
        engine.save(state(value), tmp_path / "a.ckpt", value)
    engine.drain()
    engine.save(state(4), tmp_path / "a.ckpt", 4)
    engine.drain()
    held = engine.pool.held_bytes
    for value in range(5, 12):
        engine.save(state(value), tmp_path / "a.ckpt", value)
        engine.drain()
    assert engine.pool.held_bytes == held


def test_a_rest_that_grows_a_little_takes_no_new_memory(make: Any, tmp_path: Path) -> None:
    """Numbers get longer in a run; the first buffer is for all of it."""
    engine = make()
    for number in range(12):
        engine.save(state() | {"text": "x" * (number * 50_000)}, tmp_path / "a.ckpt", number)
        engine.drain()
        if number == 0:
            held = engine.pool.held_bytes
    assert engine.pool.held_bytes == held
    assert len(torch.load(tmp_path / "a.ckpt")["text"]) == 11 * 50_000


def test_a_rest_that_grows_from_save_to_save_takes_no_buffers_away(make: Any, tmp_path: Path) -> None:
    """What lies beside the tensors may outgrow the memory that was kept for it."""
    engine = make(in_memory=1)
    for number in range(6):
        text = "x" * (number * (3 << 20))
        engine.save(state() | {"text": text}, tmp_path / "a.ckpt", number)
        engine.drain()
        assert torch.load(tmp_path / "a.ckpt")["text"] == text
        assert len(engine.last_good().load()["text"]) == len(text)
    assert len(engine.pool._lent) <= 1


def test_a_file_that_could_not_be_finished_is_not_good(make: Any, disk: Disk, tmp_path: Path) -> None:
    engine = make(in_memory=1)
    engine.save(state(1), tmp_path / "1.ckpt", 1)
    engine.drain()
    disk.fails = [OSError(errno.EIO, "broken")]
    engine.save({"w": torch.full((6 << 20,), 2.0)}, tmp_path / "2.ckpt", 2)
    engine.drain()
    assert engine.last_good().step in (1, 2)
    engine.last_good().load()


def test_the_lock_of_a_file_goes_with_it(tmp_path: Path) -> None:
    DurableFile(tmp_path / "a").abandon()
    assert not list(tmp_path.iterdir())


def test_another_directory_is_no_successor_c10(make: Any, disk: Disk, tmp_path: Path) -> None:
    """Two that save: one's failure must not cost its old file because the other's save went well."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    engine = make()
    engine.save(state(1), tmp_path / "a" / "1.ckpt", 1)
    engine.drain()
    disk.fails = [OSError(errno.EDQUOT, "quota")]
    engine.save(state(2), tmp_path / "a" / "2.ckpt", 2)
    engine.remove(tmp_path / "a" / "1.ckpt")
    engine.save(state(2), tmp_path / "b" / "2.ckpt", 2)
    engine.drain()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.ckpt")) == ["a/1.ckpt", "b/2.ckpt"]


def test_a_save_that_fails_at_once_holds_nobody_up_c10(make: Any, tmp_path: Path) -> None:
    """While the copy is still going on, and an update waits for it."""
    engine = make()
    engine.barrier.attach()
    model, optimizer = trained(width=700)
    engine.save(checkpoint_of(model, optimizer), tmp_path / "1.ckpt", 1, owners=[optimizer], place="here")
    step(model, optimizer)
    engine.drain()
    for number in range(2, 12):
        where = tmp_path / "gone" / f"{number}.ckpt"
        engine.save(checkpoint_of(model, optimizer), where, number, owners=[optimizer], place="here")
        step(model, optimizer)
    engine.drain()
    assert len(engine.take_failures()) == 10


def test_an_end_that_was_interrupted_loses_no_later_save_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C: the threads end all the same."""
    writer = BackgroundWriter(lambda snapshot: None)
    writer.save(snapshot_of(state(1)), tmp_path / "1.ckpt")
    threads = list(writer._threads)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    for thread in threads:
        thread.join()
    writer.save(snapshot_of(state(2)), tmp_path / "2.ckpt")
    writer.close()
    assert same(torch.load(tmp_path / "2.ckpt"), state(2))


def test_what_was_asked_for_is_written_when_the_program_ends_c10(tmp_path: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from lightning_efficient.checkpointing.engine import CheckpointEngine
engine = CheckpointEngine(memory_cap=None)
engine.save({{"w": torch.ones(3_000_000)}}, Path({str(tmp_path)!r}) / "a.ckpt", 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    verify(tmp_path / "a.ckpt")
