"""Train, checkpoint after every step, and be killed with -9 at random moments, again and again.

A supervisor forks runs that keep only their newest checkpoint, kills each after a random time, and looks at what is on
the disk: an intact checkpoint must be there, as new as the run had heard of, and the next run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.leftovers import sweep
from lightning_efficient.checkpointing.retention import newest_intact, step_of
from lightning_efficient.checkpointing.verification import verify

__all__ = ["Outcome", "run_and_kill"]


@dataclass
class Outcome:
    """What a series of kills came to.

    Attributes:
        kills: Runs that were killed.
        survived: Kills after which all was well.
        steps: That the last run had reached.
        problems: What was not well, in words.
    """

    kills: int
    survived: int
    steps: int
    problems: list[str]


def run_and_kill(directory: Path, *, kills: int, seed: int, megabytes: float = 2.0) -> Outcome:
    """Fork and kill ``kills`` runs in ``directory``; to be called in a process without threads.

    Args:
        directory: Made if it is not there.
        kills: How many.
        seed: Of the moments.
        megabytes: Of each checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    problems: list[str] = []
    survived, newest = 0, 0
    for kill in range(kills):
        before = len(problems)
        durable, asked = _one_run(directory, megabytes, chance.uniform(0.0, 0.12))
        found = newest_intact(directory)
        step = (step_of(found) or 0) if found else 0
        if step < max(durable, newest):
            problems.append(f"kill {kill}: step {step} is there, and {max(durable, newest)} was")
        if step < asked - 2:
            problems.append(f"kill {kill}: of {asked} steps only {step} are there")
        for path in directory.glob("*.ckpt"):
            if path.is_symlink() and not path.exists():
                problems.append(f"kill {kill}: '{path.name}' names a file that is not there")
            elif not path.is_symlink():
                verify(path)  # raises: a file under its final name is never unfinished
        sweep(directory)
        kept = {found.name, "last.ckpt"} if found else set()
        strays = [path.name for path in directory.iterdir() if path.name not in kept and not path.is_symlink()]
        if strays:
            problems.append(f"kill {kill}: {strays} stayed")
        newest = max(newest, step)
        survived += len(problems) == before
    return Outcome(kills, survived, newest, problems)


def _one_run(directory: Path, megabytes: float, seconds: float) -> tuple[int, int]:
    """Fork a run and kill it; the newest step that it knew to be durable, and the newest that it had asked for."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _train(directory, megabytes, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as news:
        first = news.readline()  # it is training now
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        lines = [first, *news.read().splitlines()]
    os.waitpid(child, 0)
    told = [line.split() for line in lines if len(line.split()) == 2]
    steps = {word: [int(number) for kind, number in told if kind == word] for word in (b"durable", b"asked")}
    return max(steps[b"durable"], default=0), max(steps[b"asked"], default=0)


def _train(directory: Path, megabytes: float, news: int) -> None:
    """Until it is killed: a step, a checkpoint, the one before removed, a link to the newest."""
    torch.set_num_threads(1)
    numel = int(megabytes * 1e6 / 12) // 64 * 64  # with two moments; no odd elements, whose rounding may differ
    weight = torch.nn.Parameter(torch.zeros(numel))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    engine = CheckpointEngine(memory_cap=None)
    engine.barrier.attach()
    sweep(directory)
    found = newest_intact(directory)
    step, previous = 0, found
    if found:
        state = torch.load(found, weights_only=True)
        step = state["global_step"]
        weight.data.copy_(state["weight"])
        if not torch.equal(weight.data, torch.full_like(weight, weight[0].item())):
            os.write(news, b"durable 1000000000\n")  # torn: can be no step that was
    os.write(news, b"begun 0\n")
    while True:
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        step += 1
        path = directory / f"step={step}.ckpt"
        state = {"weight": weight.detach(), "optimizer": optimizer.state_dict(), "global_step": step}
        engine.save(state, path, step, owners=[optimizer], place="step")
        os.write(news, f"asked {step}\n".encode())
        engine.link(path, directory / "last.ckpt")
        if previous is not None:
            engine.remove(previous)
        previous = path
        for written in engine.take_written():
            os.write(news, f"durable {written.step}\n".encode())


def main() -> None:
    """From the command line, for a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = run_and_kill(options.directory, kills=options.kills, seed=options.seed)
    json.dump(vars(outcome), sys.stdout)


if __name__ == "__main__":
    main()
