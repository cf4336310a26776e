"""Checkpoints on remote storage: durable on a local disk first, then uploaded in the background, whole or not."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lightning_efficient.checkpointing import remote_file
from lightning_efficient.checkpointing.leftovers import sweep
from lightning_efficient.checkpointing.remote_file import CHUNK_BYTES, is_remote
from lightning_efficient.checkpointing.retention import only_weights
from lightning_efficient.checkpointing.uploads import RemoteFailure, Uploaded, Uploads
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify
from lightning_efficient.core.buffers import HostBuffer, round_up
from lightning_efficient.core.durable_file import PREFIX, SUFFIX, DurableFile

__all__ = ["RemoteTier", "is_remote"]

_T = TypeVar("_T")


class RemoteTier:
    """Lets remote directories follow the local ones that stand before them; see :class:`~.uploads.Uploads`.

    Args:
        local_dir: Where the local files are, in a folder for each remote directory.
        attempts: How often anything is tried on the network.
        retry_seconds: Before the second try; twice as long before each further one.

    Attributes:
        drain: Returns when a local file (None: all) that was asked for is durable; whoever has them written sets it.

    Raises:
        ValueError: If ``local_dir`` is a URL.
    """

    def __init__(self, local_dir: str | Path, *, attempts: int = 4, retry_seconds: float = 1.0) -> None:
        if is_remote(local_dir):
            raise ValueError(f"local_dir={str(local_dir)!r} is a URL. Use a directory on a fast local disk.")
        self.local_dir = Path(local_dir).expanduser().absolute()
        self.drain: Callable[[Path | None], Any] = lambda path: None
        self._attempts = attempts
        self._retry_seconds = retry_seconds
        self._directories: dict[Path, str] = {}  # the remote one, by its local folder
        self._uploads = Uploads(self._put, self._remove)
        # Ordinary exit functions run after all pools of threads are closed, without which asynchronous file systems
        # cannot look up a host any more.
        register = getattr(threading, "_register_atexit", atexit.register)
        register(_finish, weakref.ref(self), os.getpid())

    # -- where things are --------------------------------------------------------------------------------------------

    def local(self, url: str) -> Path:
        """Where the local copy of a remote file is, or will be; errors as for :meth:`folder`."""
        directory, name = remote_file.split(url)
        return self.folder(directory) / name

    def folder(self, directory: str) -> Path:
        """Where the local copies of a remote directory are.

        Raises:
            ValueError: If ``directory`` is no URL, or of an unknown protocol.
            ImportError: If the protocol needs a package that is not installed, naming it.
        """
        directory = remote_file.plain(directory)
        readable = re.sub(r"[^\w.=-]+", "-", directory.split("://")[-1]).strip("-.")[-60:]
        folder = self.local_dir / f"{readable}-{hashlib.sha256(directory.encode()).hexdigest()[:8]}"
        if folder not in self._directories:
            remote_file.check(directory)
            self._directories[folder] = directory
        return folder

    # -- asked by whoever writes the local files ---------------------------------------------------------------------

    def saved(self, path: Path, step: int) -> None:
        """The local file ``path`` has become durable: upload it, if it stands for a remote one."""
        if (directory := self._directories.get(path.parent)) is not None:
            self.upload(f"{directory}/{path.name}", step)

    def removed(self, path: Path) -> None:
        """The local file ``path`` was given up: so is the remote one, if it stands for one."""
        if (directory := self._directories.get(path.parent)) is not None:
            self.remove(f"{directory}/{path.name}")

    def upload(self, url: str, step: int) -> None:
        """Make ``url`` what ``local(url)`` is now; that file may be replaced or removed as soon as this returns."""
        self._uploads.upload(url, step, self.local(url))

    def remove(self, url: str) -> None:
        """Remove a remote file when its successor is complete; it need not be there."""
        self._uploads.remove(url)

    # -- asked by anyone ---------------------------------------------------------------------------------------------

    def pending(self, url: str | None = None) -> bool:
        """Whether something is still to be done remotely (with ``url``)."""
        return self._uploads.pending(url)

    def wait(self, url: str | None = None, timeout: float | None = None) -> bool:
        """Return when nothing is left to do remotely (with ``url``).

        Returns:
            False if the time was over before.
        """
        return self._uploads.wait(url, timeout)

    def take_written(self) -> list[Uploaded]:
        """What has become complete since this was asked the last time."""
        return self._uploads.take_written()

    def take_failures(self) -> list[RemoteFailure]:
        """What has failed since this was asked the last time."""
        return self._uploads.take_failures()

    def close(self) -> None:
        """Finish all that was asked for, and end the thread; the next request begins another."""
        self._uploads.close()

    # -- loading -----------------------------------------------------------------------------------------------------

    def fetch(self, url: str) -> Path:
        """An intact local copy of a remote checkpoint, once all that was asked for with it is done.

        The copy that is there is taken if it equals the remote file, if there is no remote file, or if it is of a
        later step: then an earlier run was killed, or failed, before the upload.

        Raises:
            FileNotFoundError: If there is neither.
            CheckpointDamagedError: If what had to be taken is damaged.
        """
        local = self.local(url)
        self.drain(local)
        self.wait(url)
        system, path = self._retry(partial(remote_file.open_remote, url))
        local.parent.mkdir(parents=True, exist_ok=True)
        with remote_file.alone(local.parent):  # of the ranks of a machine one downloads
            nbytes = self._retry(partial(remote_file.size, system, path))
            if nbytes is None and not local.exists():
                raise FileNotFoundError(f"There is no checkpoint '{url}', and no copy of it in '{local.parent}'.")
            if nbytes is None or not (self._up_to_date(local, system, path) and remote_file.intact(local)):
                if nbytes is not None:
                    self._download(system, path, nbytes, local)
                verify(local)
        return local

    def newest_intact(self, directory: str, *, besides: str | None = None, complete: bool = True) -> str | None:
        """The checkpoint with the most steps whose checksums are right; its copy is then at ``local(url)``.

        Of most remote files only the end is read. Local copies count too: when a run was killed, its newest
        checkpoint may not have been uploaded.

        Args:
            directory: Where to look; not below it.
            besides: A URL that is not wanted.
            complete: Whether training must be able to go on from it, as in :func:`retention.newest_intact`.
        """
        self.drain(None)
        self.wait()
        directory = remote_file.plain(directory)
        steps: dict[str, int] = {}
        for copy in self.folder(directory).glob("*.ckpt"):
            steps[f"{directory}/{copy.name}"] = -1 if copy.is_symlink() else remote_file.step(copy)
        system, files = self._list(directory)
        for url, path in files.items():
            if url.endswith(".ckpt"):
                steps[url] = max(steps.get(url, -1), self._retry(partial(remote_file.remote_step, system, path)))
        for step, url in sorted(((step, url) for url, step in steps.items()), reverse=True):
            if step >= 0 and url != besides:
                with contextlib.suppress(CheckpointDamagedError, FileNotFoundError):
                    if not (only_weights(self.fetch(url)) and complete):
                        return url
        return None

    def checkpoints(self, directory: str) -> list[str]:
        """The URLs of the ``*.ckpt`` files of a remote directory, in no order."""
        return [url for url in self._list(remote_file.plain(directory))[1] if url.endswith(".ckpt")]

    def sweep(self, directory: str) -> list[str]:
        """Remove the unfinished files that killed runs with this ``local_dir`` left, here and in ``directory``.

        Returns:
            What was removed.
        """
        directory = remote_file.plain(directory)
        removed = [str(path) for path in sweep(self.folder(directory))]
        for url in self._list(directory)[1]:
            if remote_file.split(url)[1].startswith(self._temporary_prefix(directory)):
                self._remove(url)
                removed.append(url)
        return removed

    def _list(self, directory: str) -> tuple[Any, dict[str, str]]:
        """The files of a remote directory: path in its file system, by URL."""
        system, path = self._retry(partial(remote_file.open_remote, f"{directory}/"))
        paths = self._retry(partial(remote_file.file_paths, system, path))
        return system, {f"{directory}/{path.rpartition('/')[2]}": path for path in paths}

    def _up_to_date(self, local: Path, system: Any, path: str) -> bool:
        if not local.exists():
            return False
        with local.open("rb") as file:
            if self._retry(partial(remote_file.equal, system, path, file)):
                return True
        return remote_file.step(local) > self._retry(partial(remote_file.remote_step, system, path))

    def _download(self, system: Any, path: str, nbytes: int, local: Path) -> None:
        buffer = HostBuffer(CHUNK_BYTES)
        file = DurableFile(local)
        try:
            for start in range(0, nbytes, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, nbytes)
                piece = self._retry(partial(system.cat_file, path, start=start, end=end))
                if len(piece) != end - start:
                    raise OSError(f"'{path}' has changed while it was downloaded.")
                buffer.view[: len(piece)] = piece
                file.append(buffer.view[: round_up(len(piece))])
            file.commit(nbytes)
        except BaseException:
            file.abandon()
            raise

    # -- on the network ----------------------------------------------------------------------------------------------

    def _put(self, url: str, file: BinaryIO) -> None:
        directory, name = remote_file.split(url)
        temporary = self._temporary_prefix(directory) + name[-100:] + SUFFIX
        self._retry(partial(remote_file.put, url, temporary, file))

    def _remove(self, url: str) -> None:
        self._retry(partial(remote_file.remove, url))

    def _temporary_prefix(self, directory: str) -> str:
        """The same for all runs that use this folder of this machine, so that the next one knows what is its own."""
        own = hashlib.sha256(f"{socket.gethostname()}:{self.folder(directory)}".encode()).hexdigest()[:8]
        return f"{PREFIX}{own}-"

    def _retry(self, action: Callable[[], _T]) -> _T:
        for attempt in range(self._attempts - 1):
            try:
                return action()
            except Exception:  # what the many file systems raise has no common class
                time.sleep(self._retry_seconds * 2**attempt)
        return action()


def _finish(reference: weakref.ref[RemoteTier], process: int) -> None:
    """At the end of the interpreter; not at that of a fork of it, where there is no thread to wait for."""
    tier = reference()
    if tier is not None and os.getpid() == process:
        try:
            tier.drain(None)
        finally:
            tier.close()
