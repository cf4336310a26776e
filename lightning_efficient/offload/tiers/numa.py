"""Memory on a chosen NUMA node: the far socket, or memory behind CXL, which Linux shows as a node without processors.

(Linux, ``mbind(2)`` and Documentation/admin-guide/mm/numa_memory_policy; COARSE, Wang et al. 2021, for a tier of
cache-coherent memory.) The system calls are made directly, so that no library is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["bind", "check_node", "cpuless_nodes", "free_bytes", "memory_nodes", "node_of"]

_NODES = Path("/sys/devices/system/node")
_NUMBERS = {  # of mbind and get_mempolicy
    "x86_64": (237, 239),
    "aarch64": (235, 236),
    "riscv64": (235, 236),
    "loongarch64": (235, 236),
    "ppc64le": (259, 260),
    "s390x": (268, 269),
}
_BIND = 2  # MPOL_BIND: from this node, and from no other
_MOVE = 2  # MPOL_MF_MOVE: what is there already moves
_NODE, _ADDR = 1, 2  # MPOL_F_NODE, MPOL_F_ADDR: the node of the page at an address


def memory_nodes() -> list[int]:
    """The nodes of this machine that have memory; none where the system does not say."""
    return _listed("has_memory")


def cpuless_nodes() -> list[int]:
    """Those of them without processors, such as memory behind CXL."""
    return sorted(set(memory_nodes()) - set(_listed("has_cpu")))


def free_bytes(node: int) -> int | None:
    """Memory of a node that is free, or holds files that are on a disk too; None where the system does not say."""
    try:
        text = (_NODES / f"node{node}" / "meminfo").read_text()
    except OSError:
        return None
    amounts = {name: int(amount) << 10 for name, amount in re.findall(r"Node \d+ ([\w()]+):\s+(\d+) kB", text)}
    return sum(amounts.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))


def check_node(node: int) -> None:
    """Whether memory can be had on a node.

    Raises:
        TierError: If there is no such node with memory, or the system does not allow to choose one.
    """
    nodes = memory_nodes()
    if isinstance(node, bool) or not isinstance(node, int) or (nodes and node not in nodes):
        raise TierError(
            f"numa_node={node!r}: this machine has memory on the nodes {nodes}"
            + (f", of which {cpuless_nodes()} have no processors" if cpuless_nodes() else "")
            + ". Name one of them (`numactl --hardware` shows them), or None for whichever is nearest."
        )
    probe = ctypes.create_string_buffer(2 * _PAGE)
    bind(-(-ctypes.addressof(probe) // _PAGE) * _PAGE, _PAGE, node, move=False)


def bind(address: int, nbytes: int, node: int, *, move: bool = True) -> None:
    """Take the pages of some memory from one node only, from now on.

    Args:
        address: Of the first page.
        nbytes: A whole number of pages.
        node: With memory.
        move: Also move pages that have been used already.

    Raises:
        TierError: If the system does not allow it.
    """
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << (node % 64)
    arguments = (
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_long(_BIND),
        mask,
        ctypes.c_ulong(words * 64 + 1),  # the system counts one more than there are
        ctypes.c_uint(_MOVE if move else 0),
    )
    code = _call(0, *arguments)
    if code:
        raise TierError(code, f"memory cannot be taken from NUMA node {node} ({os.strerror(code)}). {_advice(code)}")


def node_of(address: int) -> int:
    """The node that the page at an address is on; it is used if it has not been before.

    Raises:
        TierError: If the system does not say.
    """
    ctypes.c_char.from_address(address).value  # noqa: B018  # a page that was never used is nowhere
    node = ctypes.c_int(-1)
    arguments = (ctypes.byref(node), None, ctypes.c_ulong(0), ctypes.c_void_p(address), ctypes.c_ulong(_NODE | _ADDR))
    code = _call(1, *arguments)
    if code:
        raise TierError(code, f"it cannot be seen which NUMA node memory is on ({os.strerror(code)}). {_advice(code)}")
    return node.value


def _listed(name: str) -> list[int]:
    """Numbers that the system lists as ``0-2,5``."""
    text = ""
    with contextlib.suppress(OSError):
        text = (_NODES / name).read_text().strip()
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _call(which: int, *arguments: Any) -> int:
    """The error of a system call, or 0."""
    numbers = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or numbers is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(numbers[which]), *arguments) else 0


def _advice(code: int) -> str:
    if code == errno.EPERM:
        return (
            "A container's seccomp profile often forbids it: start the container with CAP_SYS_NICE "
            "(`--cap-add SYS_NICE`), or bind the whole process from outside (`numactl --membind`)"
        )
    if code == errno.EINVAL:
        return "The process may not use that node: look at its cpuset (`Mems_allowed_list` in /proc/self/status)"
    if code == errno.ENOSYS:
        return "This system has no such call: leave the node to it (numa_node=None)"
    return "Leave the node to the system (numa_node=None), or name another"


_PAGE = os.sysconf("SC_PAGE_SIZE")
