"""C that is compiled where it runs: for the processor at hand, once, and kept in the user's cache.

Nothing needs it. Where there is no C compiler there is None instead of a library, and who asked does the work with
torch's operations. Where the cache cannot be written, each process compiles for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["OFF", "compiled", "in_team", "in_threads"]

OFF = "LIGHTNING_EFFICIENT_NATIVE"
"""Environment variable; "0": compile nothing."""

_FLAGS = (
    "-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing",
)  # fmt: skip
_FASTER = (("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"), ())  # the first that is understood
_PATIENCE = 120  # seconds
_log = logging.getLogger(__name__)


@cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The library of a C file; None where it cannot be had."""
    if os.environ.get(OFF) == "0" or sys.platform == "win32":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        _log.info("There is no C compiler: %s is done with torch's operations, which take longer.", source.name)
        return None
    try:
        path = _built(source, compiler)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut off, say, when the disk was full
            path.unlink()
            return ctypes.CDLL(str(_built(source, compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{source.name} could not be compiled by {compiler} ({error}): it is done with torch's operations, which "
            f"take longer. {OFF}=0 in the environment keeps us from trying.",
            stacklevel=2,
        )
        return None


def _built(source: Path, compiler: str) -> Path:
    code = source.read_bytes()
    key = repr((code, compiler, _FLAGS, _FASTER, platform.machine(), _processor())).encode()
    name = f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.so"
    folder = _folder()
    path = folder / name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as own:  # another process may be doing the same
        new = Path(own) / name
        said = ""
        for faster in _FASTER:
            command = [compiler, *_FLAGS, *faster, "-o", str(new), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
            if done.returncode == 0:
                new.replace(path)
                return path
            said = said or done.stderr.strip()
    raise RuntimeError(said.splitlines()[0] if said else "it said nothing")


def _folder() -> Path:
    """Of the user's, or, where that cannot be written, of this process."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_efficient"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="lightning_efficient-")


def _processor() -> str:
    """What it can do, for a home folder may be shared by machines of several kinds."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


class _Pools(threading.local):
    """A pool for each thread that asks, of as many as torch uses; none is inherited by a forked process."""

    def __init__(self) -> None:
        self.made: tuple[int, int, ThreadPoolExecutor] | None = None

    def get(self, threads: int) -> ThreadPoolExecutor:
        if self.made is None or self.made[:2] != (os.getpid(), threads):
            self.made = os.getpid(), threads, ThreadPoolExecutor(threads, "lightning_efficient")
        return self.made[2]


_pools = _Pools()
_imported_by = os.getpid()


@cache
def _gnu() -> Callable[..., None] | None:
    """``GOMP_parallel`` of the OpenMP library that torch computes with; None where that is not GNU's."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = {Path(line.rpartition(" ")[2]) for line in lines if line.endswith(".so") or ".so." in line}
        found = {path for path in mapped if path.name.startswith("libgomp")}
        own = {path for path in found if path.is_relative_to(Path(torch.__file__).parent)}
        if not own and any(path.name.startswith(("libiomp", "libomp")) for path in mapped):
            return None
        [place] = own or found  # other packages bring theirs along
        parallel = ctypes.CDLL(str(place)).GOMP_parallel
        parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return parallel  # type: ignore[no-any-return]
    return None


def in_threads(work: Callable[[int, int], object], count: int) -> None:
    """Do ``work(first, last)`` for all of ``range(count)``, in as many threads as torch uses.

    It is worth it for work that lets go of the interpreter's lock.
    """
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        work(0, count)
        return
    ends = [count * part // threads for part in range(threads + 1)]
    others = [_pools.get(torch.get_num_threads()).submit(work, *ends[part : part + 2]) for part in range(1, threads)]
    try:
        work(*ends[:2])
    finally:
        wait(others)  # what they write to must be there until they end, also where this thread is interrupted
    for other in others:
        other.result()


def in_team(function: Any, job: Any, parts: int) -> None:
    """Call a C function with the address of ``job`` in as many of torch's threads as there are ``parts`` for.

    Torch's stay awake for a while behind each of its operations: a thread of another library would have to wait for a
    processor, and a Python thread for the interpreter's lock besides.

    Args:
        function: ``void function(struct job *)``, of a library; it takes one part after another until none is left.
        job: A ``ctypes.Structure``, what it works on. More threads may come than have something to do: the one that
            finds ``seats`` threads before it, which it counts in ``came``, has to go.
        parts: How many threads have something to do at most.
    """
    threads = job.seats = max(1, min(torch.get_num_threads(), parts))
    if threads == 1:
        function(ctypes.byref(job))
        return
    parallel = _gnu() if os.getpid() == _imported_by else None  # a forked process has the library, but no threads
    if (
        parallel is not None
    ):  # all of torch's: GNU's ends those that a smaller team leaves out, and torch makes them anew
        every = torch.get_num_threads()
        parallel(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(job), every, 0)
    else:
        in_threads(lambda *_: function(ctypes.byref(job)), threads)
