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

from lightning_efficient.checkpointing.archive import NOTE, ROOT, SEAL, SEAL_DIGITS
from lightning_efficient.core.checksum import crc32

__all__ = ["CheckpointDamagedError", "tensor_names", "top_level_keys", "verify"]

_LOCAL_MAGIC, _LOCAL_FIXED = b"PK\x03\x04", 30
_FIRST_NAME = f"{ROOT}/data/".encode()
_PIECE_BYTES = 1 << 20


class CheckpointDamagedError(RuntimeError):
    """A checkpoint is not what was written.

    Args:
        path: Its file.
        what: What is wrong with it.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"The checkpoint '{path}' is damaged: {what}. AsyncCheckpointIO(resume='auto') goes on from the newest one "
            "beside it that is whole."
        )
        self.path = path
        self.what = what


def verify(path: Path) -> None:
    """Read a checkpoint and compare all checksums that it has.

    Files of this package have them for every byte; other ZIP archives, such as those of ``torch.save``, for their
    records. What is neither (``torch.save`` before torch 1.6, any other pickle) has none and passes unchecked: whether
    it is whole is for ``torch.load`` to find out.

    Raises:
        CheckpointDamagedError: Naming the tensor, or the part of the file, that is damaged.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CheckpointDamagedError(path, "it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            problem = _problem(file, view) if _is_archive(view) else None
        if problem:
            raise CheckpointDamagedError(path, problem)


def top_level_keys(path: Path) -> frozenset[Any]:
    """The keys of a checkpoint, of which no code is run; none if it is no dict or cannot be understood.

    Raises:
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        tree = _structure(_pickled(file))
    return frozenset(tree) if isinstance(tree, dict) else frozenset()


def _is_archive(view: memoryview) -> bool:
    """Whether it is one, or was: one of this package is known by its seal or its first header too."""
    sealed = bytes(view[-len(SEAL) - SEAL_DIGITS : -SEAL_DIGITS]) == SEAL
    return _LOCAL_MAGIC.startswith(bytes(view[: len(_LOCAL_MAGIC)])) or sealed or _begins_as_ours(view)


def _begins_as_ours(view: memoryview) -> bool:
    """Whether a storage comes first (not in ``torch.save``), with its size before it (not in TorchScript)."""
    header = bytes(view[: _LOCAL_FIXED + len(_FIRST_NAME)])
    return header[6:8] == b"\0\x08" and header[_LOCAL_FIXED:] == _FIRST_NAME


def _problem(file: BinaryIO, view: memoryview) -> str | None:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, ValueError, OverflowError, NotImplementedError):
        return "it ends too early, or its directory is not readable"
    members = archive.infolist()
    sealed = SEAL in bytes(view[archive.start_dir :]) or any(member.filename.endswith(NOTE) for member in members)
    ours = sealed or _begins_as_ours(view)
    if not ours and not any(member.CRC for member in members):
        return None  # torch was told to compute none: torch.serialization.set_crc32_options(False)
    position, frame = 0, 0
    damaged: list[str] = []
    for member in sorted(members, key=lambda m: m.header_offset):
        start = member.header_offset
        fixed = bytes(view[start : start + _LOCAL_FIXED])
        if start < position or len(fixed) < _LOCAL_FIXED:
            return "its directory is not readable"
        begin = start + _LOCAL_FIXED + sum(struct.unpack("<HH", fixed[26:30]))
        end = begin + member.compress_size
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if end > len(view) or (ours and not stored):
            return f"the header of '{member.filename}' is not readable"
        frame = crc32(view[position:begin], frame)
        if crc32(view[begin:end]) != member.CRC if stored else not _decompresses(archive, member):
            damaged.append(member.filename.split("/", 1)[-1])
        position = end
    if damaged:
        return _describe(damaged, file)
    if ours:
        seal = view[position : len(view) - len(SEAL) - SEAL_DIGITS]
        if archive.comment != SEAL + f"{crc32(seal, frame):0{SEAL_DIGITS}x}".encode():
            return "a header or the directory has changed"
    return None


def _decompresses(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Whether a compressed record has its checksum, as far as that can be told."""
    try:
        with archive.open(member) as record:
            while record.read(_PIECE_BYTES):
                pass
    except RuntimeError:  # encrypted, or by a method that this Python lacks
        return True
    except Exception:  # each method has its own
        return False
    return True


def _describe(damaged: list[str], file: BinaryIO) -> str:
    if "data.pkl" in damaged:
        return "the structure of the state (record 'data.pkl') has changed"
    names = {f"data/{number}": name for number, name in tensor_names(_pickled(file)).items()}
    parts = [f"{names[record]} (record '{record}')" if record in names else f"record '{record}'" for record in damaged]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return f"the bytes of {', '.join(parts[:3])}{more} have changed"


# -- what is in it, and which tensor a record belongs to ------------------------------------------------------------


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

    def __call__(self, *parts: Any, **_: Any) -> _Opaque:
        return _Opaque(*parts)

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
        if name == "getattr":  # of a class: a method of it, or a class in it, of which there may be objects
            return lambda *_: _Opaque
        return _Dict if (module, name) == ("collections", "OrderedDict") else _Opaque

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid[2])


def _pickled(file: BinaryIO) -> bytes:
    """The record ``data.pkl``; nothing if it cannot be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            return archive.read(name)
    except Exception:  # what is damaged, or is no checkpoint, can raise anything
        return b""


def _structure(pickled: bytes) -> Any:
    """What it holds, with opaque objects; None if it cannot be understood."""
    try:
        return _Unpickler(io.BytesIO(pickled)).load()
    except Exception:
        return None


def tensor_names(pickled: bytes) -> dict[str, str]:
    """Path of the first tensor that uses each storage, by the storage's number."""
    names: dict[str, str] = {}
    for number, path in _storages(_structure(pickled), ""):
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
