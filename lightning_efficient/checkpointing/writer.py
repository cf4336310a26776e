"""Snapshots become files in the background, in the order in which they were taken, and nothing is lost silently."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_efficient.checkpointing.durable_file import DurableFile, Intention, durable_link, durable_remove
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.buffers import round_up

__all__ = ["BackgroundWriter", "Failure", "Written"]


CHUNK_BYTES = 8 << 20


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

    action: Literal["save", "remove", "link"]
    path: Path
    step: int | None
    cause: BaseException

    def __str__(self) -> str:
        what = {"save": "saved", "remove": "removed", "link": "made a link"}[self.action]
        at = f" of step {self.step}" if self.step is not None else ""
        return f"'{self.path}'{at} could not be {what}: {type(self.cause).__name__}: {self.cause}"


@dataclass
class _Job:
    action: Literal["save", "remove", "link"]
    path: Path
    snapshot: Snapshot | None = None
    target: Path | None = None
    intention: Intention | None = None
    asked: float = 0.0


class BackgroundWriter:
    """Does saves, removals and links one after another, in the order in which they were asked for.

    A removal is done only when the last save before it in the same directory is durable; if that failed, the file
    stays. So there is never a moment without the newest file that was ever complete.

    Args:
        on_free: Called with a snapshot, in the writer's thread, when its buffer is not needed for writing any more.
        attempts: How often a save is tried.
        retry_seconds: Between two tries.
    """

    def __init__(self, on_free: Callable[[Snapshot], None], *, attempts: int = 1, retry_seconds: float = 1.0) -> None:
        self._on_free = on_free
        self._attempts = attempts
        self._retry_seconds = retry_seconds
        self._copies: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._last_asked: dict[Path, Path] = {}  # by directory
        self._failed_saves: set[Path] = set()
        self._written: list[Written] = []
        self._failures: list[Failure] = []

    # -- asked by the training thread --------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, path: Path) -> None:
        """Copy what is left of ``snapshot``, then write it to ``path``."""
        self._last_asked[path.parent] = path
        self._start()
        self._copies.put(snapshot.copy)
        self._add(_Job("save", path, snapshot, asked=time.perf_counter()))

    def prepare(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the thread that copies, when it has nothing to copy."""
        self._start()
        self._copies.put(work)

    def remove(self, path: Path) -> None:
        """Remove ``path`` after all that was asked for before, or let the next run do so if this one is killed."""
        successor = self._last_asked.get(path.parent)
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
        atexit.unregister(self.close)
        self._closing = False

    # -- in the background -------------------------------------------------------------------------------------------

    def _add(self, job: _Job) -> None:
        self._start()
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def _start(self) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._copy_loop, name="checkpoint-copy", daemon=True),
                threading.Thread(target=self._job_loop, name="checkpoint-write", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)  # the threads would die with the process, and what they write with them

    def _copy_loop(self) -> None:
        while (work := self._copies.get()) is not None:
            with contextlib.suppress(Exception):  # who needs what failed here will ask, and hear, again
                work()

    def _job_loop(self) -> None:
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
        elif job.target in self._failed_saves:  # what it was to give way to is not there
            if job.intention is not None:
                job.intention.withdraw()
        elif job.action == "link" and job.target is not None:
            durable_link(job.target, job.path)
        else:
            _remove(job)

    def _save(self, job: _Job, snapshot: Snapshot) -> None:
        for attempt in range(1, self._attempts + 1):
            begin = time.perf_counter()
            try:
                copied = _persist(snapshot, job.path)
            except OSError:
                if attempt == self._attempts:
                    raise
                time.sleep(self._retry_seconds)
                continue
            now = time.perf_counter()
            nbytes = snapshot.archive.nbytes
            done = Written(job.path, snapshot.step, nbytes, copied - job.asked, now - begin, now - job.asked)
            with self._changed:
                self._written.append(done)
            return

    def _note_failure(self, job: _Job, error: BaseException) -> None:
        if job.snapshot is not None:
            self._failed_saves.add(job.path)
        failure = Failure(job.action, job.path, job.snapshot.step if job.snapshot else None, error)
        with self._changed:
            self._failures.append(failure)


def _remove(job: _Job) -> None:
    if job.intention is not None:
        job.intention.fulfil()
    else:
        durable_remove(job.path)


def _persist(snapshot: Snapshot, path: Path) -> float:
    """Write ``snapshot`` to ``path`` while it is still being copied.

    Returns:
        When all was copied.
    """
    image, nbytes = snapshot.buffer.view, snapshot.archive.nbytes
    copied = time.perf_counter()
    file = DurableFile(path)
    try:
        for ready in snapshot.seal():
            if not snapshot.sealed:
                copied = time.perf_counter()
            whole = ready if ready < nbytes else round_up(nbytes)
            while (left := whole - file.written) >= CHUNK_BYTES or (left and ready == nbytes):
                file.append(image[file.written : file.written + min(left, CHUNK_BYTES)])
        file.commit(nbytes)
    except BaseException:
        with contextlib.suppress(OSError):
            file.abandon()
        raise
    return copied
