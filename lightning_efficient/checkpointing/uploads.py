"""What is to be done on remote storage: in which order, what of it is not needed any more, and what became of it."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lightning_efficient.checkpointing import remote_file

__all__ = ["RemoteFailure", "Uploaded", "Uploads"]


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint that is complete on the remote storage.

    Attributes:
        url: Of the file.
        step: Of the run.
        nbytes: Size of the file.
        upload_seconds: From its turn until it was complete.
        seconds: From the request, which comes when the local file is durable, until it was complete.
    """

    url: str
    step: int
    nbytes: int
    upload_seconds: float
    seconds: float


@dataclass(frozen=True)
class RemoteFailure:
    """Something that could not be done; what was under ``url`` before is still there.

    Attributes:
        action: ``"upload"`` or ``"remove"``.
        url: What should have been written or removed.
        step: Of the run, of an upload.
        cause: What went wrong in the last try.
    """

    action: Literal["upload", "remove"]
    url: str
    step: int | None
    cause: BaseException

    def __str__(self) -> str:
        at = f" of step {self.step}" if self.step is not None else ""
        what = {"upload": "uploaded", "remove": "removed"}[self.action]
        return f"'{self.url}'{at} could not be {what}: {type(self.cause).__name__}: {self.cause}"


@dataclass(eq=False)
class _Upload:
    url: str
    step: int
    file: BinaryIO = field(init=False)  # open: it stays what was asked for, whatever becomes of its name
    state: Literal["asked", "running", "done", "failed"] = "asked"
    asked: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class _Removal:
    url: str
    successor: _Upload | None  # what must be complete before

    @property
    def state(self) -> str:
        return "done" if self.successor is None else self.successor.state


class Uploads:
    """Uploads and removals of remote files, done one after another in one thread, as fast as the network is.

    Uploads are done in the order in which they were asked for. A removal is done when the last upload asked for before
    it (to the same directory, if there was one) is complete; if that failed, the remote file stays. What is removed or
    replaced before its upload has begun is not uploaded: no more is ever waiting than what is to be kept.

    Args:
        put: Makes a remote file what an open local one is, whole or not at all.
        remove: Removes a remote file, which need not be there.
    """

    def __init__(self, put: Callable[[str, BinaryIO], Any], remove: Callable[[str], Any]) -> None:
        self._put, self._remove = put, remove
        self._uploads: deque[_Upload] = deque()
        self._removals: list[_Removal] = []
        self._last_asked: dict[str, _Upload] = {}  # by remote directory
        self._last_asked_anywhere: _Upload | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._uploaded: list[Uploaded] = []
        self._failures: list[RemoteFailure] = []

    def upload(self, url: str, step: int, local: Path) -> None:
        """Make ``url`` what ``local`` is now; that file may be replaced or removed as soon as this returns."""
        job = _Upload(url, step)
        with self._changed:
            self._last_asked[remote_file.split(url)[0]] = self._last_asked_anywhere = job
            try:
                job.file = local.open("rb")
            except OSError as error:
                self._note_failure(job, error)
                return
            self._give_up(url, job)
            self._removals = [removal for removal in self._removals if removal.url != url]
            self._uploads.append(job)
            self._wake()

    def remove(self, url: str) -> None:
        """Remove a remote file when its successor is complete; it need not be there."""
        with self._changed:
            successor = self._last_asked.get(remote_file.split(url)[0], self._last_asked_anywhere)
            if successor is not None and successor.url != url and successor.state != "failed":
                self._give_up(url, successor)
            self._removals.append(_Removal(url, successor))
            self._wake()

    def _give_up(self, url: str, instead: _Upload) -> None:
        """Do not begin to upload ``url``, which is not wanted any more; what waited for it waits for ``instead``."""
        for job in [job for job in self._uploads if job.url == url and job.state == "asked"]:
            self._uploads.remove(job)
            job.file.close()
            for removal in self._removals:
                if removal.successor is job:
                    removal.successor = instead

    def pending(self, url: str | None = None) -> bool:
        """Whether something is still to be done remotely (with ``url``)."""
        with self._changed:
            jobs: list[_Upload | _Removal] = [*self._uploads, *self._removals]
            return any(url is None or job.url == url for job in jobs)

    def wait(self, url: str | None = None, timeout: float | None = None) -> bool:
        """Return when nothing is left to do remotely (with ``url``).

        Returns:
            False if the time was over before.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending(url), timeout)

    def take_written(self) -> list[Uploaded]:
        """What has become complete since this was asked the last time."""
        with self._changed:
            uploaded, self._uploaded = self._uploaded, []
            return uploaded

    def take_failures(self) -> list[RemoteFailure]:
        """What has failed since this was asked the last time."""
        with self._changed:
            failures, self._failures = self._failures, []
            return failures

    def close(self) -> None:
        """Finish all that was asked for, and end the thread; the next request begins another."""
        with self._changed:
            thread, self._closing = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        self._closing = False

    # -- in the background -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="checkpoint-upload", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            try:
                if isinstance(job, _Upload):
                    self._upload(job)
                else:
                    self._remove(job.url)
            except BaseException as error:  # whatever it is, it must reach the user, and the next job be done
                self._note_failure(job, error)
            finally:
                self._done(job)

    def _next(self) -> _Upload | _Removal | None:
        """What to do now, or None when all is done and the thread shall end."""
        with self._changed:
            while True:
                # What should have taken their place is not there.
                self._removals = [removal for removal in self._removals if removal.state != "failed"]
                self._changed.notify_all()
                for removal in self._removals:
                    if removal.state == "done":
                        return removal
                if self._uploads:
                    self._uploads[0].state = "running"
                    return self._uploads[0]
                if self._closing:
                    self._thread = None
                    return None
                self._changed.wait()

    def _upload(self, job: _Upload) -> None:
        begin = time.perf_counter()
        self._put(job.url, job.file)
        now = time.perf_counter()
        nbytes = os.fstat(job.file.fileno()).st_size
        with self._changed:
            job.state = "done"
            self._uploaded.append(Uploaded(job.url, job.step, nbytes, now - begin, now - job.asked))

    def _note_failure(self, job: _Upload | _Removal, error: BaseException) -> None:
        with self._changed:
            if isinstance(job, _Upload):
                job.state = "failed"
                self._failures.append(RemoteFailure("upload", job.url, job.step, error))
            else:
                self._failures.append(RemoteFailure("remove", job.url, None, error))

    def _done(self, job: _Upload | _Removal) -> None:
        with self._changed:
            if isinstance(job, _Upload):
                self._uploads.remove(job)
                job.file.close()
            elif job in self._removals:  # and not overtaken by a new file of this name
                self._removals.remove(job)
            self._changed.notify_all()
