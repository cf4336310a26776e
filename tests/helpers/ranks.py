"""A process, and two ranks over gloo, in two processes on one machine, without a fixed port."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from tests.helpers.processes import context

__all__ = ["RankError", "run_in_a_process", "run_on_two_ranks"]

WORLD_SIZE = 2


class RankError(RuntimeError):
    """A rank failed; the message is its traceback."""


def run_on_two_ranks(function: Callable[..., Any], tmp_path: Path, *args: Any, timeout: float = 120) -> tuple[Any, Any]:
    """Call ``function(rank, *args)`` in two processes that are ranks of one process group.

    A Lightning Trainer made in it with ``devices=2`` takes them for its own.

    Args:
        function: Of a module that can be imported.
        tmp_path: For the rendezvous and the results.
        *args: Can be pickled.
        timeout: Seconds for both.

    Returns:
        What the ranks returned; ``torch.save`` must be able to write it.

    Raises:
        RankError: With the traceback of the rank that failed first.
        TimeoutError: If a rank still runs then; both are killed.
    """
    one, other = _run(_rank, WORLD_SIZE, tmp_path, function, args, timeout)
    return one, other


def run_in_a_process(function: Callable[..., Any], tmp_path: Path, *args: Any, timeout: float = 120) -> Any:
    """Call ``function(0, *args)`` in a process of its own; see :func:`run_on_two_ranks`."""
    [result] = _run(_alone, 1, tmp_path, function, args, timeout)
    return result


def _run(
    target: Callable[..., None], number: int, tmp_path: Path, function: Callable[..., Any], args: Any, timeout: float
) -> list[Any]:
    folder = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
    folder.mkdir()
    fork = context()
    processes = [fork.Process(target=target, args=(rank, folder, function, args)) for rank in range(number)]
    for process in processes:
        process.start()
    try:
        _wait(processes, folder, monotonic() + timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(number)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        _raise_what_failed(processes, folder)
        if monotonic() > deadline:
            raise TimeoutError(f"Ranks {[r for r, p in enumerate(processes) if p.is_alive()]} did not end in time.")
        sleep(0.02)
    _raise_what_failed(processes, folder)


def _raise_what_failed(processes: list[Any], folder: Path) -> None:
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RankError(f"rank {errors[0].stem}:\n{errors[0].read_text()}")
    for rank, process in enumerate(processes):
        if process.exitcode:
            raise RankError(f"rank {rank} died with exit code {process.exitcode}, before it began")


def _alone(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        torch.save(function(rank, *args), folder / f"{rank}.result")
    except BaseException:
        _end_with_traceback(rank, folder)


def _rank(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    local = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in local.items()})
    os.environ.pop("PL_GLOBAL_SEED", None)  # of an earlier test: DDP would seed with it
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine may not know its own name
    try:
        rendezvous = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD_SIZE)
        result = function(rank, *args)
        torch.save(result, folder / f"{rank}.result")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        _end_with_traceback(rank, folder)


def _end_with_traceback(rank: int, folder: Path) -> None:
    unfinished = folder / f"{rank}.unfinished"
    unfinished.write_text(traceback.format_exc())
    unfinished.rename(folder / f"{rank}.error")
    os._exit(1)  # another rank may wait for this one for ever
