"""Memory of a chosen NUMA node, where this machine lets it be chosen."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import TierError
from tests.offload.tier_model import noise, read, run_against_model, write


def a_node() -> int:
    nodes = numa.memory_nodes()
    if not nodes:
        pytest.skip("the system does not say which NUMA nodes there are")
    try:
        numa.check_node(nodes[0])
    except TierError as error:
        pytest.skip(f"the system does not let a node be chosen: {error}")
    return nodes[0]


def policy_at(address: int) -> tuple[int, set[int]]:
    """The policy of the memory at an address, and its nodes, as the system has them."""
    mode, words = ctypes.c_int(-1), 64
    mask = (ctypes.c_uint64 * words)()
    bits, where, at = ctypes.c_ulong(64 * words), ctypes.c_void_p(address), ctypes.c_ulong(2)  # MPOL_F_ADDR
    assert numa._call(1, ctypes.byref(mode), mask, bits, where, at) == 0
    return mode.value, {64 * word + bit for word in range(words) for bit in range(64) if mask[word] >> bit & 1}


def test_the_pages_of_a_tier_are_on_its_node_o9() -> None:
    node = a_node()
    tier = HostTier("64MiB", numa_node=node)
    assert tier.name == f"numa:{node}"
    record = tier.reserve([5 * PAGE], versioned=True)[0]
    write(tier, record, noise(5 * PAGE, 0))
    mapped = tier.mapped(record)
    try:
        found = {numa.node_of(mapped.data_ptr() + page * PAGE) for page in range(5)}
    except TierError as error:
        pytest.skip(f"the system does not say where pages are: {error}")
    assert found == {node}
    assert policy_at(mapped.data_ptr()) == (2, {node})  # MPOL_BIND
    other = HostBuffer(PAGE)
    assert policy_at(other.address)[0] != 2
    run_against_model(tier, 0, steps=60)
    tier.close()


def test_memory_that_is_in_use_keeps_its_bytes_when_it_is_bound() -> None:
    node = a_node()
    buffer = HostBuffer(8 * PAGE)
    buffer.tensor.copy_(noise(8 * PAGE, 0))
    numa.bind(buffer.address, buffer.nbytes, node)
    assert torch.equal(buffer.tensor, noise(8 * PAGE, 0))


def test_a_node_that_is_not_there_is_named() -> None:
    a_node()
    for node in (4711, -1, True):
        with pytest.raises(TierError, match=rf"numa_node={node}: this machine has memory on the nodes \["):
            HostTier("1MiB", numa_node=node)


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EPERM, "cap-add SYS_NICE"), (errno.EINVAL, "cpuset"), (errno.ENOSYS, "numa_node=None")]
)
def test_what_to_do_where_it_is_not_allowed(monkeypatch: pytest.MonkeyPatch, code: int, advice: str) -> None:
    monkeypatch.setattr(numa, "_call", lambda *_: code)
    monkeypatch.setattr(numa, "memory_nodes", lambda: [0])
    with pytest.raises(TierError, match=advice) as told:
        HostTier("1MiB", numa_node=0)
    assert told.value.errno == code
    buffer = HostBuffer(1)
    with pytest.raises(TierError, match="cannot be seen"):
        numa.node_of(buffer.address)


def test_a_machine_without_the_calls_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "pdp11")
    monkeypatch.setattr(numa, "memory_nodes", lambda: [0])
    with pytest.raises(TierError, match="no such call"):
        HostTier("1MiB", numa_node=0)


def test_nodes_are_read_as_the_system_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    assert numa.memory_nodes() == []
    assert numa.free_bytes(0) is None
    (tmp_path / "has_memory").write_text("0-2,5\n")
    (tmp_path / "has_cpu").write_text("0,1\n")
    assert numa.memory_nodes() == [0, 1, 2, 5]
    assert numa.cpuless_nodes() == [2, 5]
    (tmp_path / "node5").mkdir()
    (tmp_path / "node5" / "meminfo").write_text(
        "Node 5 MemFree:  100 kB\nNode 5 Inactive(file):  20 kB\nNode 5 X: 7 kB\n"
    )
    assert numa.free_bytes(5) == 120 << 10
    with pytest.raises(TierError, match=r"nodes \[0, 1, 2, 5\], of which \[2, 5\] have no processors"):
        numa.check_node(3)


def test_a_node_without_room_is_told_when_room_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    node = a_node()
    tier = HostTier("1GiB", numa_node=node)

    def little(_: Any) -> int:
        return 3 * PAGE

    monkeypatch.setattr(numa, "free_bytes", little)
    with pytest.raises(TierError, match=rf"NUMA node {node} has 12,288 bytes free, and 16,384"):
        tier.reserve([2 * PAGE], versioned=True)
    record = tier.reserve([PAGE], versioned=True)[0]
    write(tier, record, noise(PAGE, 0))
    assert torch.equal(read(tier, record), noise(PAGE, 0))
    tier.close()
