"""What may be in a tier while a run has something there already (O5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.offload import tier_set
from lightning_efficient.offload.placement import Attribute, Room, Rules, keep_or_replan, plan
from lightning_efficient.offload.tier_set import TierSet
from lightning_efficient.offload.tiers.host import HostTier

MIB = 1 << 20


class Unlocked(HostTier):
    """For there is no GPU."""

    def __init__(self, budget_bytes: int, **_: Any) -> None:
        super().__init__(budget_bytes)


def test_state_in_host_memory_is_not_what_others_took_o5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda": 0, "cpu": 100 * MIB}
    monkeypatch.setattr(tier_set, "free_bytes", lambda device: free[device.type])
    monkeypatch.setattr(tier_set, "HostTier", Unlocked)
    tiers = TierSet(torch.device("cuda"), tmp_path, {}, host_share=1)
    items = [Attribute("optimizer_state", f"{index}.weight", 10 * MIB, index) for index in range(7)]

    def rooms(*placed: Any) -> list[Room]:
        return tiers.rooms([], [], *placed)

    placement = plan(items, rooms(), Rules({}))
    assert placement.used("host") == 70 * MIB
    host = tiers.get("host")
    records = host.reserve([10 * MIB] * 8, versioned=False)
    assert rooms(placement) == rooms()  # reserved is not taken
    before = rooms()
    for count, record in enumerate(records[:7], 1):
        host.write(record, torch.zeros(10 * MIB, dtype=torch.uint8)).wait()
        free["cpu"] = (100 - 10 * count) * MIB
        assert rooms(placement) == before
    assert keep_or_replan(placement, items, rooms(placement), Rules({})) is placement
    host.write(records[7], torch.zeros(10 * MIB, dtype=torch.uint8)).wait()  # of what no plan counts: activations
    free["cpu"] -= 10 * MIB
    assert rooms(placement)[1].nbytes == before[1].nbytes - 10 * MIB
    host.release(records)
    assert host.taken_bytes == 0
    tiers.close()


def test_what_moves_is_counted_for_memory_too_o4(tmp_path: Path) -> None:
    tiers = TierSet(torch.device("cpu"), tmp_path, {"host": 8 * MIB}, host_share=1)
    host, data = tiers.get("host"), torch.zeros(2 * MIB, dtype=torch.uint8)
    [record] = host.reserve([data.nbytes], versioned=False)
    before = tiers.totals()
    host.write(record, data).wait()
    for _ in range(2):
        host.read(record, data).wait()
    moved = {name: value - before[name] for name, value in tiers.totals().items()}
    found = tiers.measurements(moved)
    assert found.pop("host_read_gigabytes_per_second") == pytest.approx(4 * MIB / moved["host_read_ms"] / 1e6)
    assert found.pop("host_write_gigabytes_per_second") == pytest.approx(2 * MIB / moved["host_written_ms"] / 1e6)
    amounts = {"host_bytes": 2, "host_read_bytes": 4, "host_written_bytes": 2}
    amounts |= {"total_host_read_bytes": 4, "total_host_written_bytes": 2}
    assert found == {name: amount * MIB for name, amount in amounts.items()}
    tiers.close()
