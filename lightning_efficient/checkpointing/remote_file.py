"""A file on remote storage, through fsspec: whole or not there, and told from another by its last bytes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import get_filesystem_class  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from lightning_efficient.checkpointing.retention import step_of
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify

CHUNK_BYTES = 16 << 20
TAIL_BYTES = 64 << 10  # that tell one checkpoint from another
DIRECTORY_BYTES = 4 << 20  # at the end, that list what some 50,000 tensors are
_MOST_PARTS = 9_000  # S3 takes 10,000

# Where a file that is written in a transaction appears in one stroke. The transactions of others are not good enough
# (fsspec's local one may copy from another disk, Azure's has no effect): there a temporary file is renamed.
_APPEAR_AT_ONCE = {"s3", "s3a", "gs", "gcs", "memory"}


def is_remote(path: object) -> bool:
    """Whether ``path`` is a URL of something else than the local file system."""
    return "://" in str(path) and not str(path).startswith("file://")


def plain(directory: str) -> str:
    """So that ``/name`` can be appended: ``memory:/`` for the root of a file system."""
    stripped = directory.rstrip("/")
    return stripped if "://" in stripped else f"{stripped}/"


def split(url: str) -> tuple[str, str]:
    directory, _, name = url.rpartition("/")
    return plain(directory), name


def check(directory: str) -> None:
    if not is_remote(f"{directory}/"):
        raise ValueError(f"'{directory}' is no URL of a remote directory. Use one like 's3://bucket/run'.")
    protocol = directory.rpartition("::")[2].partition(":/")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        raise ImportError(f"'{directory}' needs a driver that is not installed: {error}.") from error
    except ValueError as error:
        raise ValueError(
            f"'{directory}' has the protocol '{protocol}', which fsspec does not know. Use one that it knows, like s3, "
            "gs, abfs, hdfs or sftp."
        ) from error


def open_remote(url: str) -> tuple[Any, str]:
    """A file system and the path in it.

    It is a new object each time: a transaction holds for all that is written through an object, whoever writes, and one
    whose connection is lost may never get it back.
    """
    system, path = url_to_fs(url, skip_instance_cache=True)
    return system, path


def size(system: Any, path: str) -> int | None:
    """In bytes; None if there is no such file."""
    system.invalidate_cache()
    try:
        return int(system.info(path)["size"])
    except FileNotFoundError:
        return None


def file_paths(system: Any, directory: str) -> list[str]:
    try:
        entries = system.ls(directory, detail=True)
    except FileNotFoundError:
        return []
    return [entry["name"] for entry in entries if entry["type"] == "file"]


def equal(system: Any, path: str, file: BinaryIO) -> bool:
    """Whether size and last bytes are the same: a checkpoint ends with the checksums of all that is before."""
    nbytes = os.fstat(file.fileno()).st_size
    start = max(0, nbytes - TAIL_BYTES)
    file.seek(start)
    return size(system, path) == nbytes and system.cat_file(path, start=start, end=nbytes) == file.read()


def put(url: str, temporary: str, file: BinaryIO) -> None:
    """Upload ``file`` so that nobody ever sees a part of it under ``url``.

    Args:
        url: Where to.
        temporary: Name for a file beside it, if one is needed.
        file: Seekable.
    """
    system, path = open_remote(url)
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    if protocols & _APPEAR_AT_ONCE:
        with system.transaction:
            _copy(file, system, path)
    else:
        directory, slash, _ = path.rpartition("/")
        if directory:
            system.makedirs(directory, exist_ok=True)
        unfinished = f"{directory}{slash}{temporary}"
        try:
            _copy(file, system, unfinished)
            _require_equal(system, unfinished, file)
            system.mv(unfinished, path)
        except BaseException:
            with contextlib.suppress(Exception):
                system.rm_file(unfinished)
            raise
    _require_equal(system, path, file)


def _copy(file: BinaryIO, system: Any, path: str) -> None:
    block = max(CHUNK_BYTES, os.fstat(file.fileno()).st_size // _MOST_PARTS)
    file.seek(0)
    with system.open(path, "wb", block_size=block) as target:
        while piece := file.read(CHUNK_BYTES):
            target.write(piece)


def _require_equal(system: Any, path: str, file: BinaryIO) -> None:
    if not equal(system, path, file):
        nbytes = os.fstat(file.fileno()).st_size
        raise OSError(f"'{path}', of {size(system, path)} bytes, is not what was uploaded, of {nbytes} bytes.")


def remove(url: str) -> None:
    system, path = open_remote(url)
    with contextlib.suppress(FileNotFoundError):
        system.rm_file(path)


def remote_step(system: Any, path: str) -> int:
    nbytes = size(system, path) or 0
    return step(io.BytesIO(system.cat_file(path, start=max(0, nbytes - DIRECTORY_BYTES), end=nbytes)))


def step(file: Path | BinaryIO) -> int:
    """The step of a checkpoint, of which the end is enough; -1 if there is none to be read."""
    step = step_of(file)
    return -1 if step is None else step


def intact(path: Path) -> bool:
    try:
        verify(path)
    except (CheckpointDamagedError, OSError):
        return False
    return True


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks here: then each does it for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
