"""File systems of tests: a cloud whose network does what a test wants, and a directory seen as a bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

__all__ = ["Bucket", "Cloud", "Network", "TransactionCloud", "content", "everything", "seen", "until"]


class Network:
    """What happens to the writes of a cloud."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fails: list[BaseException | None] = []  # one for each write, in turn
        self.swallows = 0  # bytes of each write, without a word
        self.writes: list[str] = []
        self.reads = 0


class _CloudFile(MemoryFile):
    def write(self, piece: Any) -> int:
        network = Cloud.network
        network.writes.append(self.path)
        assert network.gate.wait(30)
        if network.fails and (error := network.fails.pop(0)) is not None:
            super().write(piece[: len(piece) // 2])
            raise error
        return super().write(piece[: len(piece) - network.swallows])


class Cloud(MemoryFileSystem):
    """A store in which files that are being written can be seen."""

    protocol = "cloud"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    network = Network()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.rpartition("://")[2])

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **options)
        file = _CloudFile(self, self._strip_protocol(path))
        if not self._intrans:
            file.commit()
        return file

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        Cloud.network.reads += 1
        return super().cat_file(path, start, end, **options)

    def rm_file(self, path: str) -> None:
        if "-tmp" not in path:
            Cloud.network.writes.append(f"-{path}")
        super().rm_file(path)


class TransactionCloud(Cloud):
    """The same, written to in transactions, as S3."""

    protocol = ("cloudtx", "memory")  # type: ignore[assignment]


class Bucket(DirFileSystem):
    """A directory, as it is seen from a root."""

    protocol = "bucket"
    root: ClassVar[Path]

    def __init__(self, **options: Any) -> None:
        super().__init__(path=str(self.root), fs=LocalFileSystem(), **options)


fsspec.register_implementation("cloud", Cloud, clobber=True)
fsspec.register_implementation("cloudtx", TransactionCloud, clobber=True)
fsspec.register_implementation("bucket", Bucket, clobber=True)


def seen(run: str) -> list[str]:
    """The names that others can see in a cloud's directory, without the temporary ones."""
    return sorted(name for name in everything(run) if not name.startswith("."))


def everything(run: str) -> list[str]:
    path = "/" + run.rpartition("://")[2]
    return sorted(key.removeprefix(path + "/") for key in list(Cloud.store) if key.startswith(path + "/"))


def content(url: str) -> bytes:
    system, path = fsspec.url_to_fs(url)
    return bytes(system.cat_file(path))


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
