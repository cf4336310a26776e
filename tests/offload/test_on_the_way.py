"""What the strategy holds beside what it places is within the budget: planned, and as the system counts it."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LambdaCallback

from benchmarks.bounded import _Arm, _bounded_run
from lightning_efficient import OffloadStrategy
from lightning_efficient.core import freed_memory
from lightning_efficient.core.buffers import PAGE
from lightning_efficient.offload.feasible import check_way, plan_with_window, share_room
from lightning_efficient.offload.on_the_way import OnTheWay, disk_buffer_bytes
from lightning_efficient.offload.placement import Attribute, Kind, Placement, Room, Rules
from lightning_efficient.offload.tiers.disk import DiskTier
from tests.helpers.fitting import assert_same_tree, make_trainer
from tests.offload.test_feasible import LARGE, REST, Uneven, fitted

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")

MIB = 1 << 20
AT_ONCE = {f"{index}": [f"{index}.weight"] for index in range(8)}
BUDGETS = range(2 * MIB, 64 * MIB, 700_001)
STATE = {"optimizer_state": "disk"}
ALL = dict.fromkeys(("parameter", "gradient", "optimizer_state", "activation"), "disk")


def attributes(size: int = MIB) -> list[Attribute]:
    weights = [(f"{index}.weight", size, index) for index in range(8)]
    kinds: list[tuple[Kind, int]] = [("parameter", 1), ("gradient", 1), ("optimizer_state", 2)]
    found = [Attribute(kind, name, n * times, i) for kind, times in kinds for name, n, i in weights]
    return [*found, Attribute("activation", "*", 0)]


def planned(budget: int, place: dict[str, Any], given: int | None = None) -> tuple[Placement, OnTheWay, int, int]:
    way = OnTheWay(given, on_host=False, disk_buffer_bytes=disk_buffer_bytes(budget))
    rooms = [Room("host", budget), Room("disk", None)]
    placement = plan_with_window(attributes(), rooms, Rules(place), AT_ONCE, way)
    check_way(placement, way)
    window, staging = share_room(placement, AT_ONCE, way)
    return placement, way, window, staging


@pytest.mark.parametrize("place", [{}, STATE, {"optimizer_state": "disk", "parameter": "disk"}, ALL])
def test_it_all_fits_whatever_the_budget_is_o8(place: dict[str, Any]) -> None:
    trained, least, refused = 0, [], []
    for budget in BUDGETS:
        try:
            placement, way, window, staging = planned(budget, place)
        except ValueError as error:
            refused.append(str(error))
            continue
        trained += 1
        assert placement.used("host") + window + way.total(placement, staging) <= budget
        if way.kinds(placement) >= {"optimizer_state"}:
            assert staging >= 2 * MIB  # one record
            least.append(staging)
    assert trained + len(refused) == len(BUDGETS)
    assert all("Give memory_budget at least" in text for text in refused)
    assert len(refused) < 30
    if place == STATE:
        assert max(least) > 4 * min(least)  # less as memory is short


def test_what_is_given_counts_as_it_is_o8() -> None:
    placement, _, _, staging = planned(40 * MIB, STATE, given=20 * MIB)
    assert staging == 20 * MIB
    assert placement.used("host") == 16 * MIB
    with pytest.raises(ValueError, match=r"memory_budget allows 30 MiB .* 20 MiB at least \(staging=20,971,520 bytes"):
        planned(30 * MIB, {**STATE, "parameter": "host", "gradient": "host"}, given=20 * MIB)
    planned(36 * MIB, {**STATE, "parameter": "host", "gradient": "host"}, given=20 * MIB)


def test_more_room_for_what_moves_sends_no_parameter_away_o5() -> None:
    placement, _, window, staging = planned(18 * MIB, {**STATE, "gradient": "host"})
    assert {row.tier for row in placement.rows if row.attribute.kind == "parameter"} == {"host"}
    assert (window, staging) == (0, 2 * MIB)


@pytest.mark.parametrize("place", [STATE, ALL])
def test_it_trains_with_what_is_said_to_be_enough_o8(place: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="memory_budget allows 20 KiB") as told:
        fitted(place=place, memory_budget={"host": 20 << 10})
    enough = int(str(told.value).split("at least ")[-1].split(" bytes")[0].replace(",", ""))
    trainer, ours = fitted(place=place, memory_budget={"host": enough})
    session = trainer.strategy._session
    assert session.staging_bytes < 2 * LARGE + 2 * PAGE
    assert_same_tree(ours, fitted()[1], "weights")
    with pytest.raises(ValueError, match="memory_budget allows"):
        fitted(place=place, memory_budget={"host": enough - 1})


class Notes(pl.Callback):
    """What the strategy has while it trains."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        session = trainer.strategy._session  # type: ignore[attr-defined]
        self.cap, self.disk = session._staging._pool.cap_bytes, session.tiers.get("disk")
        self.told = session.ways()[0]


@pytest.mark.parametrize(("budget", "where"), [(None, "beside"), ({"host": 8 * MIB}, "within")])
def test_the_start_says_whether_it_is_within_the_budget_o8(budget: Any, where: str) -> None:
    notes = Notes()
    strategy = OffloadStrategy(offload_dir="swap", place=STATE, memory_budget=budget)
    make_trainer(notes, max_steps=1, strategy=strategy).fit(Uneven())
    assert notes.told.endswith(f"{where} the budget")
    assert isinstance(notes.disk, DiskTier)
    assert notes.cap == (256 * MIB if budget is None else notes.cap)
    assert notes.cap <= 256 * MIB if budget is None else notes.cap + LARGE + REST < 8 * MIB


@pytest.mark.parametrize(("budget", "asked"), [(None, 0), ({"disk": "1GiB"}, 0), ("64MiB", 1), ({"host": "64MiB"}, 1)])
def test_the_c_library_is_asked_only_where_there_is_a_budget(
    budget: Any, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(freed_memory, "_set", lambda *values: told.append(values))
    strategy = OffloadStrategy(offload_dir="swap", place=STATE, memory_budget=budget)
    make_trainer(max_steps=1, strategy=strategy).fit(Uneven())
    assert len(told) == 2 * asked  # as it begins and as it ends


@pytest.mark.parametrize(("times", "kept"), [(3, False), (5, True)])
def test_where_all_fits_with_what_is_freed_the_c_library_keeps_it(
    times: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To have pages made anew takes a step of a small model a third longer."""
    told: list[int] = []
    monkeypatch.setattr(freed_memory, "_set", lambda mapped, _: told.append(mapped))
    while_training: list[int] = []
    look = LambdaCallback(on_train_batch_start=lambda *_: while_training.extend(told))
    needed = 4 * 4 * sum(parameter.numel() for parameter in Uneven().parameters())
    strategy = OffloadStrategy(offload_dir="swap", memory_budget={"host": times * needed})
    make_trainer(look, max_steps=1, strategy=strategy).fit(Uneven())
    assert while_training == ([] if kept else [freed_memory._MAPPED])
    assert told == ([] if kept else [freed_memory._MAPPED, freed_memory._LEARNT])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of resident memory")
def test_resident_memory_is_within_budget_and_64_mb_o8(tmp_path: Path) -> None:
    largest, layers = 4 * 1024 * 1024, 24  # AdamW needs 384 MiB
    arm = _Arm(("optimizer_state", "gradient", "parameter"), 6 * largest, limited=False)
    process = multiprocessing.get_context("spawn").Process(target=_bounded_run, args=(tmp_path, arm, 1024, layers, 2))
    process.start()
    process.join()
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["losses"]) == 2
    assert found["grown"] <= arm.budget + 64 * 10**6
