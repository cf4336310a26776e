"""The sources of Python's own standard library, as a text that is on every machine: no download."""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus", "is_validation", "load_corpus"]

# Other people's packages, caches, and what distributions of Python often ship apart or leave out.
_EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
)
_SEPARATOR = b"\0"  # occurs in no source file: Python itself refuses one


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two disjoint parts, and what it was made of.

    Attributes:
        train: uint8 ``[train_bytes]``: the training files, joined by a zero byte.
        validation: uint8 ``[validation_bytes]``: the other files, likewise; about 1 file in 20.
        sha256: Of all paths and contents: two runs with equal hashes saw the same text.
        files: How many files both parts hold.
        python_version: Of the interpreter whose library this is.
    """

    train: Tensor
    validation: Tensor
    sha256: str
    files: int
    python_version: str


@functools.cache
def load_corpus() -> Corpus:
    """Read the standard library of the running interpreter.

    A file's side of the split depends on nothing but its path, so that it is the same on every machine and survives
    the coming and going of other files.

    Raises:
        FileNotFoundError: If the interpreter ships without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    validation: list[bytes] = []
    digest = hashlib.sha256()
    for name in sorted(_source_files(root)):
        content = (root / name).read_bytes()
        digest.update(name.encode() + _SEPARATOR + content + _SEPARATOR)
        (validation if is_validation(name) else train).append(content)
    if not train or not validation:
        raise FileNotFoundError(
            f"Found {len(train)} training and {len(validation)} validation files of Python source below {root}. "
            "The demo task reads the standard library's sources: use a Python that ships them as files."
        )
    return Corpus(
        train=_join(train),
        validation=_join(validation),
        sha256=digest.hexdigest(),
        files=len(train) + len(validation),
        python_version=platform.python_version(),
    )


def is_validation(name: str) -> bool:
    """Whether the file with this relative posix path is held out: 1 in 20, by the hash of the path."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20 == 0


def _source_files(root: Path) -> Iterator[str]:
    """The relative posix paths of the library's source files, in no particular order."""
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            yield relative.as_posix()


def _join(contents: list[bytes]) -> Tensor:
    """One uint8 tensor of all contents; a bytearray, for torch warns of memory that it may not write to."""
    return torch.frombuffer(bytearray(_SEPARATOR.join(contents)), dtype=torch.uint8)
