"""Snapshots become files in the background, in the order in which they were taken, and nothing is lost silently."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lightning_efficient.checkpointing.leftovers import Intention, hand_links_over
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.buffers import round_up
from lightning_efficient.core.durable_file import DurableFile, durable_link, durable_remove

__all__ = ["BackgroundWriter", "Failure", "Written"]

CHUNK_BYTES = 8 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """A checkpoint that has become durable.

    Attributes:
        path: Its file.
        step: Of the run.
        nbytes: Size of the file.
        copy_seconds: From the request until all was copied.
        persist_seconds: From the first byte written until it was durable.
        seconds: From the request until it was durable.
    """

    path: Path
    step: int
    nbytes: int
    copy_seconds: float
    persist_seconds: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Something that could not be done; ``path`` is as it was before.

    Attributes:
        action: ``"save"``, ``"remove"`` or ``"link"``.
        path: What should have been written or removed.
        step: Of the run, of a save.
        cause: What went wrong.
    """

    action: Literal["save", "skip", "remove", "link"]
    path: Path
    step: int | None
    cause: BaseException

    def __str__(self) -> str:
        what = {"save": "saved", "skip": "skipped", "remove": "removed", "link": "made a link"}[self.action]
        at = f" of step {self.step}" if self.step is not None else ""
        return f"'{self.path}'{at} could not be {what}: {type(self.cause).__name__}: {self.cause}"


@dataclass
class _Job:
    action: Literal["save", "skip", "remove", "link"]
    path: Path
    snapshot: Snapshot | None = None
    target: Path | None = None
    intention: Intention | None = None
    asked: float = 0.0
    step: int | None = None


class BackgroundWriter:
    """Does saves, removals and links one after another, in the order in which they were asked for.

    A removal is done only when the last save before it in the same directory is durable; if that failed, the file
    stays. So there is never a moment without the newest file that was ever complete.

    Args:
        on_free: Called with a snapshot, in the writer's thread, when its buffer is not needed for writing any more.
        attempts: How often a save is tried.
        retry_seconds: Between two tries.

    Attributes:
        on_saved: Called with path and step as soon as a save is durable, before anything else is done.
        on_removed: Called with a path that has been removed.
    """

    def __init__(self, on_free: Callable[[Snapshot], None], *, attempts: int = 1, retry_seconds: float = 1.0) -> None:
        self.on_saved: Callable[[Path, int], None] = lambda path, step: None
        self.on_removed: Callable[[Path], None] = lambda path: None
        self._on_free = on_free
        self._attempts = attempts
        self._retry_seconds = retry_seconds
        self._copies: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._device: int | None = None
        self._last_asked: dict[Path, Path] = {}  # by directory
        self._last_asked_anywhere: Path | None = None
        self._postponed: dict[Path, list[Path]] = {}  # removals, by directory, where the last save was skipped
        self._failed_saves: set[Path] = set()
        self._written: list[Written] = []
        self._failures: list[Failure] = []

    # -- asked by the training thread --------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, path: Path) -> None:
        """Copy what is left of ``snapshot``, then write it to ``path``."""
        self._note_asked(path)
        self._start()
        self._copies.put(snapshot.copy)
        self._add(_Job("save", path, snapshot, asked=time.perf_counter(), step=snapshot.step))
        for old in self._postponed.pop(path.parent, ()):
            self.remove(old)

    def save_at_once(self, write: Callable[[], None], path: Path, step: int) -> None:
        """Let ``write`` make ``path`` in this thread; how it went is heard as of the other saves."""
        self._note_asked(path)
        begin = time.perf_counter()
        try:
            self._try(write)
        except OSError as error:
            self._note_failure(_Job("save", path, step=step), error)
            return
        seconds = time.perf_counter() - begin
        self.on_saved(path, step)
        with self._changed:
            self._failed_saves.discard(path)
            self._written.append(Written(path, step, path.stat().st_size, seconds, seconds, seconds))
        for old in self._postponed.pop(path.parent, ()):
            self.remove(old)

    def skip(self, path: Path) -> None:
        """A save to ``path`` was asked for and will not be: what is to give way to it waits for the next one."""
        self._postponed.setdefault(path.parent, [])
        self._add(_Job("skip", path))

    def prepare(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the thread that copies, when it has nothing to copy."""
        self._start()
        self._copies.put(work)

    def remove(self, path: Path) -> None:
        """Remove ``path`` after all that was asked for before, or let the next run do so if this one is killed."""
        if path.parent in self._postponed:
            self._postponed[path.parent].append(path)
            return
        successor = self._last_asked.get(path.parent, self._last_asked_anywhere)
        intention = Intention(path, successor) if successor and successor != path and self.pending(successor) else None
        self._add(_Job("remove", path, target=successor, intention=intention))

    def link(self, target: Path, link: Path) -> None:
        """Let ``link`` name ``target`` after all that was asked for before."""
        self._add(_Job("link", link, target=target))

    def pending(self, path: Path | None = None) -> bool:
        """Whether something is still to be done (with ``path``)."""
        with self._changed:
            return any(path is None or job.path == path for job in self._jobs)

    def wait(self, path: Path | None = None, timeout: float | None = None) -> bool:
        """Return when nothing is left to do (with ``path``).

        Returns:
            False if the time was over before.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(path is None or job.path == path for job in self._jobs), timeout
            )

    def take_written(self) -> list[Written]:
        """What has become durable since this was asked the last time."""
        with self._changed:
            written, self._written = self._written, []
            return written

    def take_failures(self) -> list[Failure]:
        """What has failed since this was asked the last time."""
        with self._changed:
            failures, self._failures = self._failures, []
            return failures

    def close(self) -> None:
        """Finish all that was asked for, and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._threads:
            self._copies.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        atexit.unregister(self._finish)
        self._closing = False

    # -- in the background -------------------------------------------------------------------------------------------

    def _note_asked(self, path: Path) -> None:
        self._last_asked[path.parent] = self._last_asked_anywhere = path

    def _finish(self) -> None:
        """At the end of the interpreter, where nobody asks any more."""
        self.close()
        for failure in self.take_failures():
            warnings.warn(str(failure), stacklevel=1)

    def _add(self, job: _Job) -> None:
        self._start()
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def _start(self) -> None:
        ending = self._closing and threading.current_thread() not in self._threads  # close() was interrupted
        if ending:
            for thread in self._threads:
                thread.join()
            self._closing, self._threads = False, []
        if not self._threads:
            self._copies = queue.SimpleQueue()
            if torch.cuda.is_initialized():
                self._device = torch.cuda.current_device()
            self._threads = [
                threading.Thread(target=self._copy_loop, name="checkpoint-copy", daemon=True),
                threading.Thread(target=self._job_loop, name="checkpoint-write", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
            atexit.register(self._finish)  # the threads would die with the process, and what they write with them

    def _take_device(self) -> None:
        """Each thread has a current device of its own, and would begin to use the first one."""
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def _copy_loop(self) -> None:
        self._take_device()
        while (work := self._copies.get()) is not None:
            with contextlib.suppress(Exception):  # who needs what failed here will ask, and hear, again
                work()
            del work  # else it would keep the state alive until the next one

    def _job_loop(self) -> None:
        self._take_device()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs[0]
            try:
                self._do(job)
            except BaseException as error:  # whatever it is, it must reach the user, and the next job be done
                self._note_failure(job, error)
            finally:
                del job
                with self._changed:
                    self._jobs.popleft()
                    self._changed.notify_all()

    def _do(self, job: _Job) -> None:
        if job.snapshot is not None:
            try:
                self._save(job, job.snapshot)
            finally:
                job.snapshot.cancel()
                self._on_free(job.snapshot)
            self._failed_saves.discard(job.path)
        elif job.action == "skip":
            self._failed_saves.add(job.path)
        elif job.target in self._failed_saves:  # what it was to give way to is not there
            if job.intention is not None:
                job.intention.withdraw()
        elif job.action == "link" and job.target is not None:
            durable_link(job.target, job.path)
        else:
            _remove(job)
            self.on_removed(job.path)

    def _save(self, job: _Job, snapshot: Snapshot) -> None:
        begin = time.perf_counter()
        copied = self._try(lambda: _persist(snapshot, job.path))
        now = time.perf_counter()
        nbytes = snapshot.archive.nbytes
        done = Written(job.path, snapshot.step, nbytes, copied - job.asked, now - begin, now - job.asked)
        self.on_saved(job.path, snapshot.step)
        with self._changed:
            self._written.append(done)

    def _try(self, write: Callable[[], T]) -> T:
        for _ in range(self._attempts - 1):
            try:
                return write()
            except OSError:
                time.sleep(self._retry_seconds)
        return write()

    def _note_failure(self, job: _Job, error: BaseException) -> None:
        with self._changed:
            if job.action == "save":
                self._failed_saves.add(job.path)
            self._failures.append(Failure(job.action, job.path, job.step, error))


def _remove(job: _Job) -> None:
    if job.intention is not None:
        job.intention.fulfil()
    else:
        with contextlib.suppress(OSError):
            if job.target is not None:
                hand_links_over(job.path, job.target)
        durable_remove(job.path)


def _persist(snapshot: Snapshot, path: Path) -> float:
    """Write ``snapshot`` to ``path`` while it is still being copied.

    Returns:
        When all was copied.
    """
    copied = time.perf_counter()
    file = DurableFile(path)
    try:
        for ready in snapshot.seal():
            if not snapshot.sealed:
                copied = time.perf_counter()
            image = snapshot.buffer.view  # another one at the end, if the rest did not fit
            whole = round_up(ready) if snapshot.sealed else ready
            while (left := whole - file.written) >= CHUNK_BYTES or (left and snapshot.sealed):
                file.append(image[file.written : file.written + min(left, CHUNK_BYTES)])
        snapshot.refuse_torn()
        file.commit(snapshot.archive.nbytes)
    except BaseException:
        with contextlib.suppress(OSError):
            file.abandon()
        raise
    return copied
