"""Killed at any moment, a disk tier has not accepted a byte that is not whole; and nothing of it stays for ever."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_efficient.core.buffers import PAGE
from lightning_efficient.core.processes import machine_mark
from lightning_efficient.offload.tiers import spill_file
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.spill_header import SpillReport, verify
from lightning_efficient.offload.tiers.tier import TierError
from tests.helpers.processes import context
from tests.offload.tier_model import memory, noise, read, write

SIZES = [1, PAGE, 3 * PAGE + 5, 1 << 20]


def spill_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(".lightning-efficient-offload-*"))


def write_and_commit(folder: Path, kill_at: int | None = None, turns: int = 1 << 30) -> None:
    """Fill all records with the number of the turn and commit, again and again; releases and new records between."""
    calls = [0]

    def pwritev(descriptor: int, memory: Sequence[memoryview], offset: int) -> int:
        calls[0] += 1
        if calls[0] == kill_at:  # after half of it
            half = len(memory[0]) // 2 // PAGE * PAGE
            if half:
                os.pwritev(descriptor, [memory[0][:half]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return os.pwritev(descriptor, memory, offset)

    tier = DiskTier(folder, system=replace(SystemCalls(), pwritev=pwritev))
    records = tier.reserve(SIZES, versioned=True)
    buffers = [memory(size, 0) for size in SIZES]
    for turn in range(1, turns):
        if turn % 3 == 0:
            tier.release([records[0]])
            records[0] = tier.reserve([SIZES[0] + turn % 2], versioned=True)[0]
            buffers[0] = memory(records[0].nbytes, 0)
        pending = []
        for record, buffer in zip(records, buffers, strict=True):
            buffer.fill_(turn % 256)
            pending.append(tier.write(record, buffer))
        for one in pending:
            one.wait()
        tier.commit()
    tier.close()


def assert_one_turn(report: SpillReport) -> None:
    """All accepted records are whole and of the same turn."""
    assert report.whole
    assert report.damaged_headers <= 1
    if report.sequence:
        assert len(report.accepted) == len(SIZES)
        content = report.path.read_bytes()
        values = {value for one in report.accepted for value in content[one.offset : one.offset + one.nbytes]}
        assert values == {report.sequence % 256}


def test_killed_at_random_moments_no_torn_record_is_accepted_o8(tmp_path: Path) -> None:
    draw = random.Random(0)
    last = None
    for _ in range(20):
        process = context().Process(target=write_and_commit, args=(tmp_path,))
        process.start()
        deadline = monotonic() + 60
        while not (
            found := [path for path in spill_files(tmp_path) if path != last and path.stat().st_size > 2 * PAGE]
        ):
            assert process.is_alive()
            assert monotonic() < deadline
            process.join(0.001)
        assert found == spill_files(tmp_path), "the start has not removed what the killed process left"
        process.join(draw.uniform(0.0, 0.08))
        process.kill()
        process.join()
        last = found[0]
        assert_one_turn(verify(last))
    DiskTier(tmp_path).close()
    assert not spill_files(tmp_path)


@pytest.mark.parametrize("first", range(0, 32, 8))
def test_killed_within_any_write_no_torn_record_is_accepted_o8(tmp_path: Path, first: int) -> None:
    for kill_at in range(first + 1, first + 9):
        process = context().Process(target=write_and_commit, args=(tmp_path, kill_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (left,) = spill_files(tmp_path)
        if kill_at > 2:  # the roots
            assert_one_turn(verify(left))
            assert verify(left).sequence == max(0, (kill_at - 3) // (len(SIZES) + 2))


def two_commits(folder: Path) -> tuple[bytes, bytes, Path]:
    """The file after one commit and after the next, and where it can be put to be verified."""
    tier = DiskTier(folder)
    records = tier.reserve([1, 50, PAGE + 3], versioned=True)
    contents = []
    for turn in range(2):
        for index, record in enumerate(records):
            write(tier, record, noise(record.nbytes, 10 * turn + index))
        tier.commit()
        contents.append(tier.path.read_bytes())
    tier.close()
    return contents[0], contents[1], folder / "copy"


def test_every_flipped_byte_of_what_is_accepted_is_noticed(tmp_path: Path) -> None:
    _, content, copy = two_commits(tmp_path)
    copy.write_bytes(content)
    good = verify(copy)
    assert good.whole
    assert (good.sequence, good.damaged_headers) == (2, 0)
    records = [at for one in good.accepted for at in range(one.offset, one.offset + one.nbytes)]
    roots = [*range(0, 200), *range(200, 2 * PAGE, 37), *range(PAGE, PAGE + 200)]
    tables = [at for root in (0, PAGE) for at in range(_table_at(content, root), _table_at(content, root) + 72)]
    with copy.open("r+b", buffering=0) as file:
        for at in (*records, *roots, *tables):
            os.pwrite(file.fileno(), bytes([content[at] ^ 0x40]), at)
            report = verify(copy)
            assert not report.whole or report.damaged_headers == 1, f"byte {at}"
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert verify(copy) == good


def _table_at(content: bytes, root: int) -> int:
    return int.from_bytes(content[root + 32 : root + 40], "little")


def test_a_header_torn_at_any_length_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    before, after, copy = two_commits(tmp_path)
    old, new = _report(copy, before), _report(copy, after)
    assert (old.sequence, new.sequence) == (1, 2)
    table = _table_at(after, 0)
    for start, lengths in ((0, (*range(100), PAGE)), (table, range(73))):
        for length in lengths:
            torn = bytearray(after)
            end = start + (PAGE if start == 0 else 72)
            torn[start + length : end] = before[start + length : end]
            report = _report(copy, bytes(torn))
            assert report.whole
            assert report.accepted in (old.accepted, new.accepted)
            assert (report.accepted == new.accepted) == (bytes(torn) == after)


def _report(path: Path, content: bytes) -> SpillReport:
    path.write_bytes(content)
    return verify(path)


def test_a_file_without_a_whole_header_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    report = verify(tmp_path / "file")
    assert not report.whole
    assert (report.sequence, report.damaged_headers) == (None, 2)


def test_only_files_of_dead_processes_are_swept(tmp_path: Path) -> None:
    live = DiskTier(tmp_path)
    dead = _dead_process()
    machine = machine_mark()
    kept = [
        f".lightning-efficient-offload-unlocked-{machine}-{os.getpid()}-ab.spill",  # of a living process
        f".lightning-efficient-offload-unlocked-0123456789ab-{dead}-ab.spill",  # of another machine
        f".lightning-efficient-offload-{machine}-{dead}-ab.spill.txt",
        f".lightning-efficient-offload-{machine}-x-ab.spill",
        "data.spill",
    ]
    gone = [f".lightning-efficient-offload-{mark}{machine}-{dead}-ab.spill" for mark in ("", "unlocked-")]
    for name in (*kept, *gone):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "elsewhere").write_bytes(b"x")
    link = tmp_path / f".lightning-efficient-offload-{machine}-{dead}-cd.spill"
    link.symlink_to(tmp_path / "elsewhere")
    assert spill_file.sweep(tmp_path) == sorted(tmp_path / name for name in gone)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "elsewhere", link.name, live.path.name}
    live.close()


def _dead_process() -> int:
    process = context().Process(target=os.getpid)
    process.start()
    process.join()
    return int(process.pid or 0)


def test_without_locks_the_name_says_so_and_no_living_file_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    tier = DiskTier(tmp_path)
    assert "unlocked-" in tier.path.name
    other = DiskTier(tmp_path)
    assert tier.path.exists()
    tier.close()
    other.close()
    dead = tmp_path / tier.path.name.replace(f"-{os.getpid()}-", f"-{_dead_process()}-")
    dead.write_bytes(b"x")
    assert spill_file.sweep(tmp_path) == [dead]


def test_a_fork_leaves_the_tier_to_its_parent(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([PAGE], versioned=True)[0]
    write(tier, record, noise(PAGE, 0))
    tier.commit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if not child:
        os._exit(_in_the_child(tier, tmp_path))
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(read(tier, record), noise(PAGE, 0))
    assert tier.path.exists()
    tier.close()


def _in_the_child(tier: DiskTier, folder: Path) -> int:
    try:
        path, record = tier.path, next(iter(tier._slots)).record
        for use in (tier.write, tier.read):
            with pytest.raises(TierError, match="belongs to another process"):
                use(record, memory(PAGE, 0))
        with pytest.raises(TierError, match="belongs to another process"):
            tier.commit()
        tier.close()
        del tier
        gc.collect()
        spill_file.sweep(folder)
        assert path.exists()
    except BaseException:
        return 1
    return 0


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


def test_workers_of_a_data_loader_do_not_disturb_it(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([PAGE], versioned=True)[0]
    write(tier, record, noise(PAGE, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = [int(number) for number in DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork")]
    assert seen == list(range(8))
    assert torch.equal(read(tier, record), noise(PAGE, 0))
    tier.close()


SCRIPT = """
import os, sys
from lightning_efficient.offload.tiers.disk import DiskTier
import torch
tier = DiskTier(sys.argv[1])
record = tier.reserve([1 << 20], versioned=True)[0]
child = os.fork()
if not child:
    sys.exit(0)  # with all that is registered for the end of the interpreter
assert os.waitpid(child, 0)[1] == 0
assert tier.path.exists()
pending = tier.write(record, torch.ones(1 << 20, dtype=torch.uint8))
raise RuntimeError("the training failed")
"""


def test_after_an_error_of_the_training_the_file_is_gone(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "offload")], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert run.stderr.strip().endswith("RuntimeError: the training failed")
    assert not list((tmp_path / "offload").iterdir())


def test_a_folder_that_another_rank_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, left = tmp_path / "swap", [3]
    true = Path.mkdir

    def removed(path: Path, *arguments: Any, **options: Any) -> None:
        true(path, *arguments, **options)
        if path == folder and left[0]:
            left[0] -= 1
            path.rmdir()
            if left[0] == 1:
                raise FileExistsError(17, "File exists", str(path))  # as pathlib's, when it looks again and it is gone

    monkeypatch.setattr(Path, "mkdir", removed)
    spill_file.SpillFile(folder).remove()
    assert left == [0]

    def gone(path: Path, pattern: str) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "glob", gone)
    assert spill_file.sweep(folder) == []
