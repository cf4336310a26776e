"""One cell: it trains, goes on from checkpoints bit for bit, and its techniques work; or it is refused by name."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.helpers.fitting import Run, assert_same_tree, fit
from tests.helpers.ranks import RankError, run_in_a_process, run_on_two_ranks
from tests.helpers.summaries import DDP, assert_ranks_agree, assert_resumed, whole_summary
from tests.matrix.cells import PLACES, STEPS, Cell

__all__ = ["Outcome", "in_processes", "refusal", "refusals", "run_cell"]

_SAVED = (3, 7)
"""Steps of the checkpoints: before growth switches and low bits begin, and with everything on."""
_WORKS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "checkpoint": ("checkpoint/saves", lambda saves: saves > 0),
    "activations": ("activations/ratio", lambda ratio: ratio > 1.5),
    "offload": ("offload/states_elsewhere", lambda states: states > 0),
    "precision": ("precision/low_share", lambda share: share > 0),
}
"""By technique, the logged value that shows that it is at work, not only there."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        state: ``green``, ``refused``, or ``broken``, which is a bug.
        reason: The message, of what is refused; what went wrong.
        seconds: That it took.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0


def run_cell(cell: Cell, folder: Path, *, backend: str = "inductor", timeout: float = 400) -> Outcome:
    """Train, resume, compare.

    Args:
        cell: Which.
        folder: Where runs that several cells are compared with stay.
        backend: To compile with.
        timeout: Seconds.
    """
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(dir=folder, prefix="cell-"))
    try:
        results = in_processes(cell.place, _on_a_rank, root, cell, folder, root, backend, timeout=timeout)
        refused = {result["refused"] for result in results if "refused" in result}
        if refused:
            assert len(refused) == 1, f"ranks do not agree: {refused}"
            assert all("refused" in result for result in results), f"one rank refused: {refused}"
            return Outcome("refused", refused.pop(), time.monotonic() - began)
        if len(results) == 2:
            one, other = (result["whole"] for result in results)
            assert_ranks_agree(one, other, divided=cell.place == "DDP" and "offload" in cell.techniques)
    except (AssertionError, RankError, TimeoutError) as error:
        return Outcome("broken", str(error), time.monotonic() - began)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return Outcome("green", "", time.monotonic() - began)


def refusals(cells: list[Cell], folder: Path) -> dict[str, str]:
    """What these, all in one place, are refused with; empty: nothing was refused before the first batch."""
    one, *others = in_processes(cells[0].place, _refusals_on_a_rank, folder, cells, folder)
    assert all(other == one for other in others)
    return one


def in_processes(place: str, function: Callable[..., Any], root: Path, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function`` returns on each rank of one of :data:`~tests.matrix.cells.PLACES`."""
    if PLACES[place] is None:
        return [run_in_a_process(function, root, *args, timeout=timeout)]
    return list(run_on_two_ranks(function, root, *args, timeout=timeout))


def _on_a_rank(rank: int, cell: Cell, folder: Path, root: Path, backend: str) -> dict[str, Any]:
    begins = _Begins()
    try:
        whole = _train(cell, root, backend, checkpoints=_SAVED, before=[begins])
    except (MisconfigurationException, ValueError) as error:
        if begins.begun:
            raise
        return {"refused": _in_one_line(error)}
    reference = _reference(rank, cell, folder, root, backend)
    _check(cell, whole, reference)
    result = whole_summary(whole)
    for step in _SAVED[-1:] if cell.compiled else _SAVED:  # compiling takes long
        resumed = _train(cell, root, backend, ckpt_path=whole.checkpoints[step])
        assert len(resumed.losses) == STEPS - step
        assert_resumed(whole_summary(resumed), result)
    return {"whole": result}


def _train(cell: Cell, root: Path, backend: str, **arguments: Any) -> Run:
    torch.compiler.reset()
    ranks = {} if PLACES[cell.place] is None else DDP
    run = fit(
        cell.setting, build=cell.build(), module=cell.model(backend), root=root, max_steps=STEPS, **ranks, **arguments
    )
    run.events = [event for event in run.events if event.technique != "offload"]  # of the memory of this process
    if ranks:
        torch.distributed.barrier()  # rank zero writes the checkpoints
    return run


class _Begins(Callback):
    """Knows whether the first batch has begun.

    Args:
        ends: Whether the fit ends there.
    """

    def __init__(self, *, ends: bool = False) -> None:
        self.begun, self.ends = False, ends

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = True
        if self.ends:
            raise _BegunError


class _BegunError(Exception):
    pass


def refusal(train: Callable[..., Any]) -> str:
    """What a fit is refused with before its first batch; empty: it is not, and ends there.

    Args:
        train: Makes it; gets arguments of :func:`~tests.helpers.fitting.fit`.
    """
    torch.compiler.reset()
    try:
        train(after=[_Begins(ends=True)], enable_checkpointing=False)
    except _BegunError:
        return ""
    except (MisconfigurationException, ValueError) as error:
        return _in_one_line(error)
    raise AssertionError("the fit ended before its first batch")


def _in_one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))


def _refusals_on_a_rank(rank: int, cells: list[Cell], root: Path) -> dict[str, str]:
    return {cell.name: refusal(partial(_train, cell, root, "eager")) for cell in cells}


def _reference(rank: int, cell: Cell, folder: Path, root: Path, backend: str) -> dict[str, Any]:
    """Losses and weights of the run that this one is compared with; made once."""
    path = folder / f"{re.sub('[^a-z0-9]+', '-', cell.reference.name.lower())}-{backend}-{rank}.pt"
    there = torch.tensor(path.exists())
    if PLACES[cell.place] is not None:  # another process may be about to write them: ranks must agree
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MIN)
    if not there:
        run = whole_summary(_train(cell.reference, root, backend))
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save({"losses": run["losses"], "weights": run["weights"]}, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)


def _check(cell: Cell, run: Run, reference: dict[str, Any]) -> None:
    """It learned what the reference did, exactly where that is promised, and each technique was at work."""
    setting = cell.setting
    assert len(run.losses) == STEPS
    assert run.losses[-1] < run.losses[0]
    assert [event.step for event in run.events if event.technique == "growth"] == list(setting.switches)
    if setting.lossy:
        for mine, its in zip(run.losses, reference["losses"], strict=True):
            assert abs(mine - its) < 0.03 * its, f"{run.losses} is far from {reference['losses']}"
    else:
        assert run.losses == reference["losses"]
        weights = whole_summary(run)["weights"]
        assert_same_tree(weights, reference["weights"], "weights of the run without what must not change them")
    logged = {tag: value for _, values in run.logged for tag, value in values.items()}
    for name in cell.techniques:
        if name in _WORKS and (name != "checkpoint" or run.trainer.is_global_zero):  # the one that writes
            tag, works = _WORKS[name]
            values = [value for _, entry in run.logged for key, value in entry.items() if key == tag]
            assert any(map(works, values)), f"{name} is not at work: {tag} is {values}; there are {sorted(logged)}"
