"""How much memory a device still has for tensors, whether the system suffers, and errors that say there was none.

``core/memory_meter.py`` measures what is in use; this is about what is left.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["empty_caches", "free_bytes", "is_out_of_memory", "memory_pressure"]

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_PRESSURE = Path("/proc/pressure/memory")
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2**63
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "MPS backend out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because it got no memory, and would work with less data.

    That is ``torch.OutOfMemoryError``, ``MemoryError``, and a ``RuntimeError`` with the words of torch's CPU allocator,
    of the CUDA driver or of one of CUDA's libraries for it. Everything else is another error.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def empty_caches(device: torch.device) -> None:
    """Give back what nobody refers to any more, and what torch's allocator keeps for later."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` could take now.

    Of a CUDA device: what the driver has, and what torch's allocator holds and has not given out (which may be in
    pieces), within the share of the device that the process is allowed. Of the host: the least of what the system has
    available, what each control group of the process leaves it (files that only cache do not count as taken), and its
    resource limits.
    """
    if device.type == "cuda":
        driver, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
        return max(0, min(driver + cached, int(allowed) - allocated))
    import psutil  # not before somebody asks

    return max(0, min([int(psutil.virtual_memory().available), *_left_by_cgroups(), *_left_by_limits()]))


def memory_pressure() -> float:
    """Percent of the last 10 s in which some process waited for memory (Linux's PSI); 0 where it is not known.

    Of the process's own control group where it has such a file, else of the whole system.
    """
    own = [folder / "memory.pressure" for folder in _groups().v2[:1]]
    for path in (*own, _PRESSURE):
        try:
            some = path.read_text().splitlines()[0]
            return float(dict(pair.split("=") for pair in some.split()[1:])["avg10"])
        except (OSError, LookupError, ValueError):
            continue
    return 0.0


@dataclass(frozen=True)
class _Groups:
    """Folders of the control groups that the process is in, each before the one around it."""

    v2: list[Path]
    limited: list[tuple[Path, str, str, str]]  # folders with a limit, and the files' and the entry's names


@functools.cache
def _groups() -> _Groups:
    """Found once: a process that is moved to another group goes on with the limits of the first."""
    folders: dict[str, list[Path]] = {"": [], "memory": []}
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in folders:
            root = _CGROUP / controllers
            # Within a container the name may be the host's, and the mount shows the group itself as its root.
            inner = root / name.lstrip("/")
            folders[controllers] = [one for one in (inner, *inner.parents) if one == root or root in one.parents]
    v2 = [(one, "memory.max", "memory.current", "inactive_file") for one in folders[""]]
    v1 = [(one, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") for one in folders["memory"]]
    return _Groups(folders[""], [names for names in (*v2, *v1) if (names[0] / names[1]).exists()])


def _left_by_cgroups() -> list[int]:
    return [left for names in _groups().limited if (left := _left(*names)) is not None]


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        allowed = int((group / limit).read_text())  # or "max"
        if allowed >= _UNLIMITED:
            return None
        used = int((group / usage).read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith(f"{reclaimable} "):
                used -= int(line.split()[1])
        return allowed - used
    except (OSError, ValueError):
        return None


def _left_by_limits() -> list[int]:
    """Of ``RLIMIT_AS`` and ``RLIMIT_DATA``, where the system tells how much of them is used."""
    try:
        import resource

        used = {}
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmSize", "VmData"):
                used[name] = int(value.split()[0]) * 1024
        limits = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
        return [
            soft - used[name]
            for name, limit in limits.items()
            if (soft := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY and name in used
        ]
    except (ImportError, OSError, ValueError):
        return []
