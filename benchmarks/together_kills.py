"""All techniques in one run that is killed with -9 again and again, and goes on from its newest checkpoint each time.

Random moments of a run would rarely be those that matter, so most kills are aimed: the run tells through a pipe when it
begins and ends to grow, to write state to the disk, or to write a checkpoint, and is killed a random time after that
began. What was going on when it died is what had begun and not ended.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import Table
from benchmarks.together_runs import AT_WORK, TINY, context, fit, settings
from lightning_efficient import GrowAndUnshareCallback
from lightning_efficient.checkpointing.retention import newest_intact
from lightning_efficient.checkpointing.verification import verify
from lightning_efficient.core.durable_file import DurableFile
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.offload.tiers.direct_file import DirectFile
from lightning_efficient.offload.tiers.spill_header import verify as verify_spilled

__all__ = ["Killed", "differences", "killed_and_resumed"]

GROWN = 0.5  # of the run, as configs/all.yaml says
MOMENTS: Mapping[str, float] = {
    "start": 1.0,
    "any": 1.5,
    "growth": 0.01,
    "offload write": 0.002,
    "checkpoint write": 0.01,
}
"""What a kill is aimed at, and the seconds within which it comes, from when that begins; ``start`` is that of the
process, ``any`` begins with the first step."""
_SECONDS = 300.0  # that a run may take
_ACCEPTED_AFTER = 0.002  # seconds that state is on the disk and not yet taken as written, for a kill to come amid that
_OTHERWISE = ("[EfficiencyMonitor]", "[autosave]", "[ModelCheckpoint{", ".val_loop.")
"""In checkpoints: measured times, names of folders, and how many batches the last validation had, which each
process counts anew."""


@dataclass(frozen=True)
class Killed:
    """What a series of kills came to.

    Attributes:
        kills: Runs that were killed.
        exact: Of these, those whose series ended bit-equal to the uninterrupted run, and after which all was well.
        amid: Kills by what was going on, of :data:`MOMENTS` without the first two.
        problems: What was not well, in words.
        table: For a person.
    """

    kills: int
    exact: int
    amid: Mapping[str, int]
    problems: list[str]
    table: Table


def killed_and_resumed(folder: Path, *, kills: int, steps: int = 96, every: int = 4, seed: int = 0) -> Killed:
    """Kill runs ``kills`` times in all; each of the series of runs goes on to its end, and a new one begins behind it.

    Args:
        folder: For everything.
        kills: How often.
        steps: Of a run.
        every: Steps between two checkpoints; divides ``steps``.
        seed: Of the moments.
    """
    run = functools.partial(_run, steps=steps, every=every)
    whole = {}  # how the uninterrupted run ends, and how if it goes on from that end
    for goes_on in (False, True):
        run(folder / "whole", newest_intact(folder / "whole" / "checkpoints") if goes_on else None, None)
        whole[goes_on] = _end(folder / "whole")
    chance = random.Random(seed)
    aims = _aims(chance)
    problems: list[str] = []
    aimed, amid, hit = Counter[str](), Counter[str](), Counter[str]()
    exact = number = 0
    while sum(aimed.values()) < kills:
        place, in_series, before = folder / f"series {number}", 0, len(problems)
        died: Counter[str] | None = Counter()
        while sum(aimed.values()) < kills:
            checkpoint = newest_intact(place / "checkpoints")
            came_to = 0 if checkpoint is None else _place(checkpoint)[0]
            grown = came_to > GROWN * steps
            aim = next(aim for aim in aims if not (grown and aim == "growth"))
            died = run(place, checkpoint, functools.partial(_moment, chance, aim))
            if died is None:
                break
            in_series += 1
            aimed[aim] += 1
            amid.update(died)
            hit[aim] += aim in died or aim in ("start", "any")
            problems += [f"series {number}, kill {in_series} ({aim}): {what}" for what in _wrong(place, checkpoint)]
        if died is not None:
            run(place, checkpoint := newest_intact(place / "checkpoints"), None)
            came_to = 0 if checkpoint is None else _place(checkpoint)[0]
        # killed behind the save of its last step, it has nothing to train; Lightning saves once more, in the next epoch
        end = differences(_end(place), whole[came_to == steps])
        problems += [f"series {number}: {what}" for what in [*end, *_left(place)]]
        exact += in_series if len(problems) == before else 0
        print(f"kills  series {number}: {in_series} kills, {len(problems) - before} problems", flush=True)
        number += 1
    rows = [(aim, f"{aimed[aim]}", f"{hit[aim]}", f"{amid[aim]}" if aim in amid else "-") for aim in MOMENTS]
    rows.append(("all", f"{sum(aimed.values())}", f"{sum(hit.values())}", "-"))
    table = Table(
        f"Killed with -9, everything on: {exact} of {kills} went on to a bit-equal end, in {number} series",
        ("aimed at", "kills", "hit", "kills amid it, whatever they were aimed at"),
        rows,
        f"A run has {steps} steps and grows at a quarter and at half of them; optimizer state is on the disk, "
        f"activations are in 4 bits, and a checkpoint is written every {every} steps. What is on the disk is taken as "
        f"written {_ACCEPTED_AFTER * 1000:.0f} ms later, for kills to come between. "
        "RollbackPrecision has only_if_faster=False, for times "
        "differ from run to run, and so would the operations that it leaves alone. Compared are weights, optimizer "
        f"state, schedulers and the state of the techniques. Problems: {'; '.join(problems[:3]) or 'none'}.",
    )
    return Killed(sum(aimed.values()), exact, amid, problems, table)


def _aims(chance: random.Random) -> Iterator[str]:
    """All of them by turns; growth twice, for only runs that have not grown can be killed there."""
    turn = ["growth", "checkpoint write", "offload write", "start", "any", "growth"]
    while True:
        yield from turn
        chance.shuffle(turn)


def _moment(chance: random.Random, aim: str, kind: str) -> float | None:
    """Seconds until the kill, if what begins now is what it is aimed at, and this is the time of it."""
    if kind != {"any": "step"}.get(aim, aim):
        return None
    often = {"offload write": 40, "checkpoint write": 3}.get(aim, 1)  # times that it begins until it is its turn
    return chance.uniform(0.0, MOMENTS[aim]) if chance.random() < 1 / often else None


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(
    folder: Path, checkpoint: Path | None, moment: Callable[[str], float | None] | None, *, steps: int, every: int
) -> Counter[str] | None:
    """Train from ``checkpoint``; what was going on when it was killed, or None if it came to its end.

    Args:
        folder: For all that it writes.
        checkpoint: None: from the beginning.
        moment: Told what begins; returns the seconds until the kill, or None. None: it is not killed.
        steps: Of the run.
        every: Steps between two checkpoints.

    Raises:
        RuntimeError: If the run ends with an error of its own, or does not end.
    """
    fork = context()
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=_train, args=(folder, checkpoint, writer, steps, every))
    process.start()
    writer.close()
    begun, ended = Counter[str](), Counter[str]()
    kill_at = time.monotonic() + seconds if moment and (seconds := moment("start")) is not None else None
    deadline, rest, killed = time.monotonic() + _SECONDS, b"", False
    with contextlib.closing(reader):
        while True:
            if not killed and time.monotonic() >= (kill_at or deadline):
                process.kill()
                killed = True
            if not reader.poll(None if killed else max(0.0, (kill_at or deadline) - time.monotonic())):
                continue
            news = os.read(reader.fileno(), 1 << 16)
            if not news:
                break
            *lines, rest = (rest + news).split(b"\n")
            for line in lines:
                kind = line[1:].decode()
                (begun if line[:1] == b"+" else ended)[kind] += 1
                if line[:1] == b"+" and moment and kill_at is None and (seconds := moment(kind)) is not None:
                    kill_at = time.monotonic() + seconds
    process.join()
    if killed and kill_at is None:
        raise RuntimeError(f"The run in {folder} did not end in {_SECONDS:.0f} s.")
    if not killed and process.exitcode:
        raise RuntimeError(f"The run in {folder} ended by itself with exit code {process.exitcode}.")
    return Counter({kind: 1 for kind in begun if begun[kind] > ended[kind]}) if killed and process.exitcode else None


def _train(folder: Path, checkpoint: Path | None, news: Any, steps: int, every: int) -> None:
    """In a process of its own; tells what begins and ends."""

    def tell(word: str) -> None:
        os.write(news.fileno(), f"{word}\n".encode())  # short, and so in one piece, from whatever thread

    def told(
        kind: str, call: Callable[..., Any], *, begins: bool = True, ends: bool = True, pause: float = 0.0
    ) -> Callable[..., Any]:
        @functools.wraps(call)
        def around(*args: Any, **kwargs: Any) -> Any:
            if begins:
                tell(f"+{kind}")
            try:
                return call(*args, **kwargs)
            finally:
                time.sleep(pause)
                if ends:
                    tell(f"-{kind}")

        return around

    watched = [
        (GrowingModule, "grow_layers", told("growth", GrowingModule.grow_layers)),
        (GrowAndUnshareCallback, "_after_switch", told("growth", GrowAndUnshareCallback._after_switch)),
        (DirectFile, "write", told("offload write", DirectFile.write, pause=_ACCEPTED_AFTER)),
        (DurableFile, "__init__", told("checkpoint write", DurableFile.__init__, ends=False)),
        (DurableFile, "commit", told("checkpoint write", DurableFile.commit, begins=False)),
        (ByteLanguageModel, "training_step", told("step", ByteLanguageModel.training_step)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, call in watched:
            stack.enter_context(mock.patch.object(owner, name, call))
        fit(folder, _settings(folder, steps, every), checkpoint)


def _settings(folder: Path, steps: int, every: int) -> dict[str, Any]:
    return settings(
        folder,
        trainer={"limit_train_batches": steps, "val_check_interval": steps // 2},
        changes={
            **TINY,
            **AT_WORK,
            "EfficiencyMonitor": {"report": False},
            "RollbackPrecision": {**AT_WORK["RollbackPrecision"], "pre_learning_steps": every},
            "ModelCheckpoint": {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": every},
        },
    )


# -- how it is afterwards ----------------------------------------------------------------------------------------------


def _last(folder: Path) -> Path:
    """Where a run went on from its very first checkpoint, Lightning leaves ``last.ckpt``, and names a ``last-v1``."""
    return max((folder / "checkpoints").glob("last*.ckpt"), key=_place).resolve()


def _end(folder: Path) -> dict[str, Any]:
    return dict(torch.load(_last(folder), weights_only=True))


def _place(checkpoint: Path) -> tuple[int, int]:
    """In training: steps, and epochs that are over."""
    saved = torch.load(checkpoint, weights_only=True, mmap=True)
    return int(saved["global_step"]), int(saved["epoch"])


def _wrong(folder: Path, before: Path | None) -> list[str]:
    """What is not well on the disk after a kill."""
    found = []
    places = folder / "checkpoints"
    if before is not None and newest_intact(places) is None:
        found.append("no intact checkpoint is left")
    for path in places.glob("*.ckpt"):
        if not path.is_symlink():
            verify(path)  # raises: a file under its final name is never unfinished
        elif not path.exists():
            found.append(f"'{path.name}' names a file that is not there")
    for path in _spilled(folder):
        if torn := verify_spilled(path).torn:
            found.append(f"{len(torn)} accepted records of optimizer state are torn")
    return found


def _left(folder: Path) -> list[str]:
    """What a run that came to its end should not have left."""
    strays = [path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".ckpt"]
    strays += [path.name for path in _spilled(folder)]
    return [f"{strays} stayed"] if strays else []


def _spilled(folder: Path) -> list[Path]:
    return [path for path in (folder / "swap").glob(".*") if path.is_file()]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints are not bit for bit the same, but for :data:`_OTHERWISE`."""
    if any(name in where for name in _OTHERWISE):
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{where}[{key}]")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(_bits(one), _bits(other)) else [f"{where} differs"]
    same = type(one) is type(other) and (one == other or (one != one and other != other))  # a NaN is that NaN
    return [] if same else [f"{where}: {str(one)[:60]} is not {str(other)[:60]}"]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
