"""Whether a checkpoint is what was written: every byte is covered by a checksum, and damage has a name."""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning_efficient.checkpointing.archive import NOTE, SEAL, SEAL_DIGITS
from lightning_efficient.core.checksum import crc32

__all__ = ["CheckpointDamagedError", "verify"]

_LOCAL_FIXED = 30


class CheckpointDamagedError(RuntimeError):
    """A checkpoint is not what was written.

    Args:
        path: Its file.
        what: What is wrong with it.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"The checkpoint '{path}' is damaged: {what}.")
        self.path = path
        self.what = what


def verify(path: Path) -> None:
    """Read a checkpoint of this package or of ``torch.save`` and compare all its checksums.

    Files of ``torch.save`` have checksums of their records only; those of this package of every byte.

    Raises:
        CheckpointDamagedError: Naming the tensor, or the part of the file, that is damaged.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CheckpointDamagedError(path, "it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            problem = _problem(file, view)
        if problem:
            raise CheckpointDamagedError(path, problem)


def _problem(file: BinaryIO, view: memoryview) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            members, comment, directory = archive.infolist(), archive.comment, archive.start_dir
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, ValueError, OverflowError, NotImplementedError):
        return "it ends too early, or its directory is not readable"
    position, frame = 0, 0
    damaged: list[str] = []
    for member in sorted(members, key=lambda m: m.header_offset):
        start = member.header_offset
        fixed = bytes(view[start : start + _LOCAL_FIXED])
        if start < position or len(fixed) < _LOCAL_FIXED:
            return "its directory is not readable"
        begin = start + _LOCAL_FIXED + sum(struct.unpack("<HH", fixed[26:30]))
        end = begin + member.file_size
        if member.compress_type != zipfile.ZIP_STORED or end > len(view):
            return f"the header of '{member.filename}' is not readable"
        frame = crc32(view[position:begin], frame)
        if crc32(view[begin:end]) != member.CRC:
            damaged.append(member.filename.split("/", 1)[-1])
        position = end
    if damaged:
        return _describe(damaged, file)
    if SEAL in bytes(view[directory:]) or any(member.filename.endswith(NOTE) for member in members):
        sealed = view[position : len(view) - len(SEAL) - SEAL_DIGITS]
        if comment != SEAL + f"{crc32(sealed, frame):0{SEAL_DIGITS}x}".encode():
            return "a header or the directory has changed"
    return None


def _describe(damaged: list[str], file: BinaryIO) -> str:
    if "data.pkl" in damaged:
        return "the structure of the state (record 'data.pkl') has changed"
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].split("/", 1)[0]
        names = _tensor_names(archive.read(f"{root}/data.pkl"))
    parts = [f"{names.get(record.removeprefix('data/'), 'no tensor')} (record '{record}')" for record in damaged]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return f"the bytes of {', '.join(parts[:3])}{more} have changed"


# -- which tensor a record belongs to ------------------------------------------------------------------------------


class _Opaque:
    """In place of any class or function of the file: it takes whatever it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Opaque:
        return object.__new__(cls)

    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.setdefault("parts", []).append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__setstate__({key: value})

    append = add = __setstate__


class _Dict(dict[Any, Any]):
    """An ordered dict, without its attributes (``state_dict._metadata``)."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(str):
    """The number of a storage."""

    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Reads the structure and runs no code of the file."""

    def find_class(self, module: str, name: str) -> Any:
        return _Dict if (module, name) == ("collections", "OrderedDict") else _Opaque

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid[2])


def _tensor_names(pickled: bytes) -> dict[str, str]:
    """Path of the first tensor that uses each storage, by the storage's number."""
    try:
        tree = _Unpickler(io.BytesIO(pickled)).load()
    except Exception:
        return {}
    names: dict[str, str] = {}
    for number, path in _storages(tree, ""):
        names.setdefault(number, path)
    return names


def _storages(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Storage):
        yield str(node), f"'{path}'"
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _storages(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(node, list | tuple | set | frozenset):
        for index, value in enumerate(node):
            yield from _storages(value, f"{path}.{index}".removeprefix("."))
    elif isinstance(node, _Opaque):
        for value in node.__dict__.get("parts", []):
            children = value if isinstance(value, tuple) else (value,)
            for child in children:
                yield from _storages(child, path)
