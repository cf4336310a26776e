"""A training that is killed again and again, and starts anew from the newest checkpoint that can be loaded."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from tests.helpers.processes import context

__all__ = ["Killed", "newest_loadable", "run_and_kill"]


@dataclass(frozen=True)
class Killed:
    """How a run went that was killed.

    Attributes:
        kills: How often it was.
        resumed_from: Names of the checkpoints that it went on from, in order; empty names for a start from nothing.
    """

    kills: int
    resumed_from: list[str]


def run_and_kill(
    script: Callable[..., None], folder: Path, *args: Any, seed: int, kills: int, timeout: float = 120
) -> Killed:
    """Run ``script(folder, checkpoint, *args)`` in a process of its own until it ends well.

    Args:
        script: Of a module that can be imported; ``checkpoint`` is what it resumes from, or None. It writes
            checkpoints to ``folder / "checkpoints"``.
        folder: For all that it writes.
        *args: Can be pickled.
        seed: Of the moments at which it is killed (SIGKILL: no handler, no flush, no teardown).
        kills: How often, each a random moment after a random number of further checkpoints, so that it does not
            depend on the speed of the machine; after that it runs to its end.
        timeout: Seconds for all of it.

    Raises:
        TimeoutError: If it does not end.
        RuntimeError: If it ends with an error of its own.
    """
    draw = random.Random(seed)
    deadline = monotonic() + timeout
    killed, resumed_from = 0, []
    while True:
        checkpoint = newest_loadable(folder / "checkpoints")
        resumed_from.append(checkpoint.name if checkpoint else "")
        process = context().Process(target=script, args=(folder, checkpoint, *args))
        process.start()
        enough = _written(folder) + draw.randint(1, 4) if killed < kills else sys.maxsize
        while process.is_alive() and _written(folder) < enough:
            process.join(0.002)
            if monotonic() > deadline:
                process.kill()
                process.join()
                raise TimeoutError(f"The run did not end in {timeout} s.")
        process.join(draw.uniform(0.0, 0.04))
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        elif process.exitcode:
            raise RuntimeError(f"The run ended by itself with exit code {process.exitcode}.")
        else:
            return Killed(killed, resumed_from)


def _written(folder: Path) -> int:
    return len(list((folder / "checkpoints").glob("*.ckpt")))


def newest_loadable(folder: Path) -> Path | None:
    """The newest checkpoint below ``folder`` that can be read to its end: the last one may have been cut off."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path
    return None
