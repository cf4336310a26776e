"""A disk that fails, fills up, or does less than it was asked for."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.core.buffers import PAGE
from lightning_efficient.core.checksum import crc32
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.spill_header import verify
from lightning_efficient.offload.tiers.tier import Pending, TierError
from tests.helpers.processes import context
from tests.offload.tier_model import memory, noise, read, run_against_model, write

CALLS = ("preadv", "pwritev", "fallocate", "fdatasync", "statvfs")


def failing_at(call: str, number: int, code: int) -> tuple[SystemCalls, Callable[[], int]]:
    """The system, whose ``number``-th such call fails; and how many there have been."""
    counter = itertools.count()
    made = [0]

    def instead(*arguments: Any) -> Any:
        made[0] = next(counter) + 1
        if made[0] - 1 == number:
            raise OSError(code, os.strerror(code))
        return getattr(SystemCalls(), call)(*arguments)

    return replace(SystemCalls(), **{call: instead}), lambda: made[0]


def a_run(tier: DiskTier) -> list[TierError]:
    """Two commits, of which either may fail; what was accepted is in the file at the end, whatever happened."""
    errors: list[TierError] = []

    def attempt(what: Callable[[], object]) -> bool:
        try:
            what()
        except TierError as error:
            errors.append(error)
            return False
        return True

    records = []
    if not attempt(lambda: records.extend(tier.reserve([3 * PAGE + 7, 10, 2 * PAGE], versioned=True))):
        return errors
    accepted: list[set[tuple[int, int]]] = [set()]
    for turn in range(2):
        data = [noise(record.nbytes, 10 * turn + index) for index, record in enumerate(records)]
        pending: list[Pending] = []
        for record, one in zip(records, data, strict=True):
            attempt(lambda begun=pending, record=record, one=one: begun.append(tier.write(record, one)))
        ended = [attempt(one.wait) for one in pending]
        written = all(ended) and len(ended) == len(records)
        now = {(one.nbytes, crc32(one.numpy())) for one in data}
        committed = attempt(tier.commit)
        assert committed <= written, "a commit accepted what could not be written"
        if not committed:
            with pytest.raises(TierError):  # it stays so
                tier.commit()
            with pytest.raises(TierError):
                tier.write(records[0], data[0])
            accepted.append(now)  # the header may be there, and what failed be the word that it is
            break
        accepted = [now]
        for record, one in zip(records, data, strict=True):
            into = memory(record.nbytes, 0)
            if attempt(lambda record=record, into=into: tier.read(record, into).wait()):
                assert torch.equal(into, one)
    report = verify(tier.path)
    assert not report.torn
    assert {(entry.nbytes, entry.crc) for entry in report.accepted} in accepted
    return errors


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_at_any_call_is_told_and_what_was_accepted_is_kept(tmp_path: Path, call: str, code: int) -> None:
    for number in range(100):
        system, made = failing_at(call, number, code)
        try:
            tier = DiskTier(tmp_path, durable=True, system=system, readers=1, writers=1)
        except TierError as error:
            errors = [error]
        else:
            errors = a_run(tier)
            tier.close()
        assert not list(tmp_path.iterdir())
        if made() <= number:
            break
        assert errors, f"{call} {number} failed and nobody was told"
        assert all(error.errno == code and error.filename for error in errors)
        assert any(call in str(errors[0]) or word in str(errors[0]) for word in ("write", "read", "no room"))
    assert number > 0
    assert not errors


def test_a_failed_write_names_file_offset_operation_and_cause(tmp_path: Path) -> None:
    system, _ = failing_at("pwritev", 2, errno.EIO)  # after the two roots
    tier = DiskTier(tmp_path, system=system)
    record = tier.reserve([5 * PAGE], versioned=False)[0]
    pending = tier.write(record, memory(5 * PAGE, 0))
    with pytest.raises(
        TierError, match=r"write of 20,480 bytes at offset 8,192 .* failed \(Input/output error\)"
    ) as told:
        pending.wait()
    assert told.value.errno == errno.EIO
    assert told.value.filename == str(tier.path)
    with pytest.raises(TierError, match="at offset 8,192"):
        tier.commit()
    with pytest.raises(TierError, match="is not whole, because its last write failed"):
        read(tier, record)
    with pytest.raises(TierError, match="is not whole"):
        tier.mapped(record)
    tier.close()


def test_a_full_disk_is_told_before_training_begins(tmp_path: Path) -> None:
    system = replace(SystemCalls(), statvfs=lambda descriptor: _with_free(descriptor, 1 << 20))
    tier = DiskTier(tmp_path, system=system)
    kept = tier.reserve([100], versioned=True)[0]
    write(tier, kept, noise(100, 0))
    tier.commit()
    with pytest.raises(
        TierError, match=rf"{re.escape(str(tmp_path))} has 1,048,576 bytes free and 2,0\d\d,\d\d\d bytes"
    ) as told:
        tier.reserve([1_000_000], versioned=True)
    assert told.value.errno == errno.ENOSPC
    assert "offload less" in str(told.value)
    assert torch.equal(read(tier, kept), noise(100, 0))
    small = tier.reserve([1000], versioned=True)[0]
    write(tier, small, noise(1000, 1))
    tier.commit()
    assert torch.equal(read(tier, small), noise(1000, 1))
    tier.close()


def _with_free(descriptor: int, nbytes: int) -> Any:
    found = list(os.fstatvfs(descriptor))
    found[1], found[4] = 1, nbytes  # f_frsize and f_bavail
    return os.statvfs_result(found)


def test_a_limit_of_the_system_is_told_when_room_is_reserved(tmp_path: Path) -> None:
    process = context().Process(target=_under_a_limit, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "error").read_text()


def _under_a_limit(folder: Path) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # Python ignores SIGXFSZ
        tier = DiskTier(folder / "tier")
        with pytest.raises(TierError, match="file size limit") as told:
            tier.reserve([2 << 20], versioned=False)
        assert told.value.errno == errno.EFBIG
        run_against_small(tier)
        tier.close()
        assert not list((folder / "tier").iterdir())
    except BaseException as error:
        (folder / "error").write_text(repr(error))
        os._exit(1)


def run_against_small(tier: DiskTier) -> None:
    record = tier.reserve([100_000], versioned=True)[0]
    write(tier, record, noise(100_000, 0))
    tier.commit()
    assert torch.equal(read(tier, record), noise(100_000, 0))


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_do_less_than_asked_for_are_gone_on_with(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def less(memory: Sequence[memoryview]) -> list[memoryview]:
        view = memory[0]
        count = draw.choice(
            [1, 100, PAGE, len(view) // 2, len(view)] if seed else [PAGE, len(view) // 2 // PAGE * PAGE]
        )
        return [view[: max(1, min(count, len(view)))]]

    system = replace(
        SystemCalls(),
        preadv=lambda descriptor, memory, offset: os.preadv(descriptor, _unrefused(descriptor, less(memory)), offset),
        pwritev=lambda descriptor, memory, offset: os.pwritev(descriptor, _unrefused(descriptor, less(memory)), offset),
    )
    tier = DiskTier(tmp_path, system=system)
    records = tier.reserve([1, PAGE, 7 * PAGE + 3], versioned=True)
    for turn in range(3):
        for shift in (0, 1):
            for record in records:
                data = memory(record.nbytes, shift).copy_(noise(record.nbytes, turn))
                write(tier, record, data)
                assert torch.equal(read(tier, record), data)
        tier.commit()
    tier.close()


def _unrefused(descriptor: int, memory: list[memoryview]) -> list[memoryview]:
    """A system that does less than it was asked for has its own ways to do so past the page cache."""
    if len(memory[0]) % PAGE:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
    return memory


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_file_system_that_refuses_only_when_it_comes_to_it(tmp_path: Path, call: str) -> None:
    def refusing(descriptor: int, memory: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return getattr(os, call)(descriptor, memory, offset)

    tier = DiskTier(tmp_path, system=replace(SystemCalls(), **{call: refusing}))
    run_against_model(tier, 3, steps=80)
    assert not tier.statistics().direct
    tier.close()


def test_a_file_system_that_cannot_allocate(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    for system in (replace(SystemCalls(), fallocate=refuse), replace(SystemCalls(), fallocate=None)):
        tier = DiskTier(tmp_path, system=system)
        run_against_model(tier, 4, steps=60)
        tier.close()


@pytest.mark.parametrize("versioned", [True, False])
def test_a_damaged_record_is_not_given_back(tmp_path: Path, versioned: bool) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([2 * PAGE + 9], versioned=versioned)[0]
    write(tier, record, noise(record.nbytes, 0))
    tier.commit()
    content = tier.path.read_bytes()
    offset = content.index(noise(record.nbytes, 0).numpy().tobytes())
    with tier.path.open("r+b") as file:
        file.seek(offset + record.nbytes - 1)
        file.write(bytes([content[offset + record.nbytes - 1] ^ 1]))
        os.fsync(file.fileno())
    pending = tier.read(record, memory(record.nbytes, 0))
    with pytest.raises(TierError, match=rf"at offset {offset:,} of {re.escape(str(tier.path))} is damaged"):
        pending.wait()
    tier.commit()  # a read that fails has lost nothing that is written
    tier.close()


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    record = tier.reserve([2 * PAGE], versioned=False)[0]
    write(tier, record, noise(record.nbytes, 0))
    os.truncate(tier.path, PAGE)
    with pytest.raises(TierError, match=r"read of .* failed \(the file ends here\)"):
        read(tier, record)
    tier.close()


def test_who_asks_for_too_much_waits(tmp_path: Path) -> None:
    size, most = 1 << 18, 1 << 19
    tier = DiskTier(tmp_path, in_flight_bytes=most)
    records = tier.reserve([size] * 6, versioned=False)
    data = memory(size, 0)
    under_way = []
    for record in records * 4:
        under_way = [pending for pending in (*under_way, tier.write(record, data)) if not pending.done]
        assert (
            len(under_way) * size <= most + size
        )  # one may have ended, and not been told of, as the last was admitted
    write(tier, records[0], data)
    tier.close()


def test_an_error_of_the_program_in_a_thread_is_told_too(tmp_path: Path) -> None:
    def broken(*_: object) -> int:
        raise ZeroDivisionError("unforeseen")

    tier = DiskTier(tmp_path, system=replace(SystemCalls(), preadv=broken))
    record = tier.reserve([8], versioned=False)[0]
    write(tier, record, noise(8, 0))
    with pytest.raises(TierError, match="ZeroDivisionError: unforeseen"):
        read(tier, record)
    tier.close()


@pytest.mark.parametrize("times", [1, 10**6])
def test_a_folder_that_another_rank_removes_is_made_again(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removals = os.open, itertools.count()

    def removed_before(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".spill") and next(removals) < times:
            Path(path).parent.rmdir()
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", removed_before)
    if times == 1:
        DiskTier(tmp_path / "swap").close()
    else:  # whatever the reason is, it ends
        with pytest.raises(TierError, match="no file to offload to can be made"):
            DiskTier(tmp_path / "swap")
