"""Where checkpoints are, as users name them: in local directories, or behind a local tier on remote storage."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

from lightning_efficient.checkpointing import remote_file
from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.leftovers import sweep
from lightning_efficient.checkpointing.remote import RemoteTier
from lightning_efficient.checkpointing.remote_file import is_remote
from lightning_efficient.checkpointing.retention import newest_intact
from lightning_efficient.checkpointing.uploads import RemoteFailure, Uploaded
from lightning_efficient.checkpointing.writer import Written

__all__ = ["Places"]


class Places:
    """The local file of each path or URL, and what is done remotely for it.

    Args:
        engine: Writes the local files.
        local_dir: Of the local tier; None: there is none, and URLs are refused.

    Raises:
        ValueError: If ``local_dir`` is a URL.
    """

    def __init__(self, engine: CheckpointEngine, local_dir: str | None) -> None:
        self._engine = engine
        self._newest: dict[str, str] = {}  # what was written last, by directory
        self._tier = None if local_dir is None else RemoteTier(local_dir)
        if self._tier is not None:
            self._tier.drain = engine.drain
            engine.follow(self._tier.saved, self._tier.removed)

    def file(self, path: str | os.PathLike[str]) -> Path:
        """The local file that stands for ``path``.

        Raises:
            ValueError: For a URL, if there is no local tier, or it is of an unknown protocol.
            ImportError: If its protocol needs a package that is not installed.
        """
        if is_remote(path):
            return self._remote(str(path)).local(str(path))
        return Path(str(path).removeprefix("file://")).absolute()

    def fetch(self, path: str | os.PathLike[str]) -> Path:
        """The local file, once everything that was asked for with it is done; downloaded if need be.

        Raises:
            FileNotFoundError: For a URL of nothing.
            CheckpointDamagedError: If what was downloaded is damaged.
        """
        if is_remote(path):
            return self._remote(str(path)).fetch(str(path))
        file = self.file(path)
        self._engine.drain(file)
        return file

    def newest_intact_beside(self, path: str | os.PathLike[str], *, complete: bool) -> Path | None:
        """The intact checkpoint with the most steps in the directory of ``path``, other than that."""
        if is_remote(path):
            tier, url = self._remote(str(path)), str(path)
            other = tier.newest_intact(url.rpartition("/")[0], besides=url, complete=complete)
            return None if other is None else tier.local(other)
        file = self.file(path)
        return newest_intact(file.parent, besides=file, complete=complete)

    def exists(self, path: str) -> bool:
        """Whether it is there, or a storage that cannot be asked may have it."""
        if is_remote(path):
            with contextlib.suppress(Exception):
                return remote_file.size(*remote_file.open_remote(path)) is not None
            return True
        return self.file(path).exists()

    def pending(self, path: str | None = None) -> bool:
        """Whether something is still to be done (with ``path``), here or remotely."""
        if self._engine.pending(None if path is None else self.file(path)):
            return True
        return self._tier is not None and self._tier.pending(path)  # is asked before it is done here

    def sweep(self, directory: str) -> list[str]:
        """Remove what killed runs left unfinished in ``directory``; a storage that cannot be asked keeps it.

        Returns:
            What was removed.
        """
        if not is_remote(directory):
            return [str(path) for path in sweep(self.file(directory))]
        tier = self._remote(f"{directory}/")
        tier.folder(directory)  # says what cannot be
        try:
            return tier.sweep(directory)
        except Exception as error:  # who may write there may not be allowed to list it
            warnings.warn(f"What killed runs left in '{directory}' could not be looked for: {error}", stacklevel=2)
            return []

    def wait(self, path: str | os.PathLike[str]) -> None:
        """Return when a file that is there is on the remote storage too."""
        if is_remote(path):
            self._remote(str(path)).wait(str(path))

    def take_written(self) -> list[Written | Uploaded]:
        """What has become durable here, and complete remotely, since this was asked the last time."""
        written, uploaded = self._engine.take_written(), [] if self._tier is None else self._tier.take_written()
        self._newest |= {str(one.path.parent): str(one.path) for one in written}
        self._newest |= {remote_file.split(one.url)[0]: one.url for one in uploaded}
        return [*written, *uploaded]

    def newest_beside(self, path: str) -> str | None:
        """What was written last to the directory of ``path``, if it is still there."""
        directory = remote_file.split(path)[0] if is_remote(path) else str(self.file(path).parent)
        newest = self._newest.get(directory)
        return newest if newest is not None and self.exists(newest) else None

    def take_failures(self) -> list[RemoteFailure]:
        """What has failed remotely since this was asked the last time."""
        return [] if self._tier is None else self._tier.take_failures()

    def close(self) -> None:
        """Finish all that was asked for, here and remotely."""
        self._engine.close()
        if self._tier is not None:
            self._tier.close()

    def _remote(self, url: str) -> RemoteTier:
        if self._tier is None:
            raise ValueError(
                f"'{url}' is on remote storage, to which AsyncCheckpointIO uploads what it wrote to a local disk. "
                "Say where these may be with local_dir='...', or save to a local directory."
            )
        return self._tier
