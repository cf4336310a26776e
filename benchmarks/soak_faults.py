"""What goes wrong in a soak, when, and how the process is meanwhile: a callback for a run's configuration."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl

from benchmarks.precision_faults import FAULTS
from lightning_efficient.core.durable_file import DurableFile
from lightning_efficient.offload.tiers.direct_file import DirectFile
from lightning_efficient.precision import kinds

__all__ = ["FAULTS_BY_NAME", "LAST", "TERMINATED", "WINDOWS", "Faults", "records"]

WINDOWS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "slow disk": ((0.10, 0.13), (0.60, 0.63)),
    "disk full": ((0.18, 0.22), (0.70, 0.74)),
    "memory pressure": ((0.34, 0.40), (0.78, 0.84)),
    "wrong products": ((0.42, 0.44), (0.88, 0.90)),
}
"""Parts of the run in which each fault is there."""
TERMINATED = (0.15, 0.30, 0.46)
"""Where the run is sent SIGTERM."""
_BYTES_PER_SECOND = 50e6  # of a slow disk
_LEFT = 96 << 20  # bytes that a process under pressure may still take

LAST: list[pl.LightningModule] = []
"""The module of this process's newest run with :class:`Faults`, so that somebody can look at it afterwards."""

Hit = Callable[[], None]
"""Called whenever a fault does harm."""


@contextlib.contextmanager
def _slow_disk(hit: Hit) -> Iterator[None]:
    def slowly(call: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def move(*args: Any) -> Any:
            hit()
            time.sleep(size(*args) / _BYTES_PER_SECOND)
            return call(*args)

        return move

    with (
        mock.patch.object(DirectFile, "read", slowly(DirectFile.read, lambda *args: args[3])),
        mock.patch.object(DirectFile, "write", slowly(DirectFile.write, lambda *args: args[3])),
        mock.patch.object(DurableFile, "append", slowly(DurableFile.append, lambda *args: len(args[1]))),
    ):
        yield


@contextlib.contextmanager
def _disk_full(hit: Hit) -> Iterator[None]:
    def append(self: DurableFile, piece: memoryview) -> None:
        hit()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(DurableFile, "append", append):
        yield


@contextlib.contextmanager
def _memory_pressure(hit: Hit) -> Iterator[None]:
    hit()
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + _LEFT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


@contextlib.contextmanager
def _wrong_products(hit: Hit) -> Iterator[None]:
    with FAULTS["corrupted result, all three"](None, 0):  # type: ignore[arg-type]  # which does not look at the model
        wrong = kinds.MatMul.in_integers

        def in_integers(*args: Any) -> Any:
            hit()
            return wrong(*args)

        with mock.patch.object(kinds.MatMul, "in_integers", in_integers):
            yield


FAULTS_BY_NAME: Mapping[str, Callable[[Hit], contextlib.AbstractContextManager[None]]] = {
    "slow disk": _slow_disk,
    "disk full": _disk_full,
    "memory pressure": _memory_pressure,
    "wrong products": _wrong_products,
}


class Faults(pl.Callback):
    """Injects faults in parts of the run, and writes down how the process is.

    Args:
        steps: Of the run.
        every: Steps from one sample to the next.
        record: File to which a line of JSON is added for each sample, and each fault that is over.
    """

    def __init__(self, *, steps: int, every: int, record: str) -> None:
        self.steps, self.every, self.record = steps, every, Path(record)
        self._there: dict[str, contextlib.ExitStack] = {}
        self._hits: dict[str, int] = {}
        self._terminated: set[float] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        LAST[:] = [pl_module]
        self._terminated = {line["terminated"] for line in records(self.record) if "terminated" in line}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        step, part = trainer.global_step, trainer.global_step / self.steps
        for name, windows in WINDOWS.items():
            wanted = any(begin <= part < end for begin, end in windows)
            if wanted and name not in self._there:
                self._hits[name] = 0
                self._there[name] = contextlib.ExitStack()
                self._there[name].enter_context(FAULTS_BY_NAME[name](functools.partial(self._hit, name)))
            elif not wanted and name in self._there:
                self._end(name, step)
        if step % self.every == 0:
            threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
            self._write({"step": step, "rss": _memory("VmRSS"), "threads": threads, "files": files})
        for at in TERMINATED:
            if part >= at and at not in self._terminated:
                self._terminated.add(at)
                self._write({"terminated": at})
                os.kill(os.getpid(), signal.SIGTERM)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_all(trainer)

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self._end_all(trainer)  # Lightning tears callbacks down only where a fit ends well

    def _hit(self, name: str) -> None:
        self._hits[name] += 1

    def _end_all(self, trainer: pl.Trainer) -> None:
        for name in list(self._there):
            self._end(name, trainer.global_step)

    def _end(self, name: str, step: int) -> None:
        self._there.pop(name).close()
        self._write({"fault": name, "until": step, "hits": self._hits[name]})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines that were written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
