"""A plan leaves room for what is in use at a time, or says before the first step what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import OffloadStrategy
from lightning_efficient.core.buffers import PAGE
from lightning_efficient.offload.feasible import plan_with_window, window_bytes
from lightning_efficient.offload.placement import Attribute, Room, Rules
from lightning_efficient.offload.streaming.sub_modules import used_at_once
from lightning_efficient.offload.tier_set import TierSet
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.updates.subset_step import state_bytes
from tests.helpers.fitting import assert_same_tree, make_trainer

MIB = 1 << 20
SIZES = {"a.weight": 3 * MIB, "b.weight": 5 * MIB, "c.weight": 2 * MIB, "d.bias": 1024}
AT_ONCE = {name.split(".")[0]: [name] for name in SIZES}


def parameters(**others: int) -> list[Attribute]:
    return [
        *(Attribute("parameter", name, nbytes, i) for i, (name, nbytes) in enumerate(SIZES.items())),
        *(Attribute("optimizer_state", name, 2 * nbytes, i) for i, (name, nbytes) in enumerate(SIZES.items())),
    ]


def rooms(budget: int | None) -> list[Room]:
    return [Room("host", budget), Room("disk", None)]


def here(placement: Any, kind: str = "parameter") -> set[str]:
    return {row.attribute.name for row in placement.rows if row.attribute.kind == kind and row.tier == "host"}


def test_what_fits_stays_as_without_a_window_o5() -> None:
    placement = plan_with_window(parameters(), rooms(11 * MIB), Rules({}), AT_ONCE)
    assert here(placement) == set(SIZES)
    assert window_bytes(placement) == 0


@pytest.mark.parametrize("budget", [5 * MIB + 1024, 6 * MIB, 7 * MIB, 8 * MIB, 9 * MIB, 10 * MIB])
def test_where_it_does_not_the_largest_module_has_room_o5(budget: int) -> None:
    placement = plan_with_window(parameters(), rooms(budget), Rules({}), AT_ONCE)
    away = [size for name, size in SIZES.items() if name not in here(placement)]
    assert away
    assert window_bytes(placement) >= max(away)
    assert placement.used("host") + window_bytes(placement) <= budget
    assert window_bytes(placement) >= min(2 * max(away), sum(away), budget - 1024)
    assert placement.rooms[0].nbytes == budget


def test_rules_leave_room_for_the_window_too_o5() -> None:
    placement = plan_with_window(parameters(), rooms(14 * MIB), Rules({"parameter:b.*": "disk"}), AT_ONCE)
    assert "b.weight" not in here(placement)
    assert window_bytes(placement) == 5 * MIB


def test_a_budget_that_is_too_small_names_the_module_and_what_is_enough_o5() -> None:
    with pytest.raises(ValueError, match=r"memory_budget allows 5 MiB of host memory.*module 'b' uses .*5 MiB") as told:
        plan_with_window(parameters(), rooms(5 * MIB), Rules({}), AT_ONCE)
    assert f"at least {5 * MIB + 1024:,} bytes" in str(told.value)
    rules = Rules({"a.*": "host", "c.*": "host"})
    with pytest.raises(ValueError, match=rf"at least {15 * MIB + 5 * MIB + 1024:,} bytes"):
        plan_with_window(parameters(), rooms(6 * MIB), rules, AT_ONCE)


def test_modules_that_use_the_parameters_of_others_count_as_one() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.MultiheadAttention(8, 2), nn.Sequential(nn.Linear(8, 8)))
    model.append(nn.Linear(8, 5, bias=False))
    model[3].weight = model[0].weight
    found = used_at_once(model)
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert found == {
        "0": ["0.weight"],
        "1": [f"1.{name}" for name in attention],
        "2.0": ["2.0.weight", "2.0.bias"],
        "3": ["0.weight"],
    }


class Uneven(pl.LightningModule):
    """One layer is as large as all others together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(*[nn.Linear(192, 192, bias=False) for _ in range(4)])
        self.large = nn.Linear(192, 768, bias=False)
        self.last = nn.Linear(768, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.last(self.large(self.first(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(12, 192, generator=generator)), batch_size=4)


LARGE = 4 * 192 * 768
REST = 4 * (768 * 4 + 4)  # the last layer stays: it is small


def fitted(**arguments: Any) -> tuple[pl.Trainer, dict[str, Any]]:
    extra = {"strategy": OffloadStrategy(offload_dir="swap", **arguments)} if arguments else {}
    trainer = make_trainer(max_steps=3, **extra)
    module = Uneven()
    trainer.fit(module)
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


def least_budget(**arguments: Any) -> int:
    """What the error about a budget that is too small says is enough."""
    with pytest.raises(ValueError, match=r"memory_budget .*module 'large' .* on its way needs") as told:
        fitted(memory_budget={"host": LARGE + REST}, **arguments)
    return int(str(told.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("schedule", ["in_backward", "under_forward", "after_backward"])
@pytest.mark.parametrize("spare", [0, 100_000, LARGE - 20_000])
def test_it_trains_with_the_least_budget_o6(spare: int, schedule: str) -> None:
    least = least_budget(schedule=schedule)
    assert 3 * LARGE + REST < least < 8 * LARGE  # the module, the record of its state, and what else moves
    trainer, ours = fitted(memory_budget={"host": least + spare}, schedule=schedule)
    assert "| parameter | forward to update | disk |" in trainer.strategy.placement()
    assert_same_tree(ours, fitted()[1], "weights")
    values = trainer.strategy.measurements()
    assert values["offload/parameter_resident_bytes"] <= LARGE + spare
    assert values["offload/parameter_resident_bytes"] + values["offload/staging_bytes"] <= least + spare - REST


def test_with_less_it_is_said_before_the_first_step_o6() -> None:
    with pytest.raises(ValueError, match=r"memory_budget .*module 'large' .* at least"):
        fitted(memory_budget={"host": least_budget() - 1})


def test_a_place_without_room_is_said_before_the_first_step_o2() -> None:
    needed = 2 * (LARGE + 4 * 4 * 192 * 192)  # whole pages as they are
    rules = {"optimizer_state": "disk", "optimizer_state:large.*": "numa:0", "optimizer_state:first.*": "numa:0"}
    told = r"memory_budget\['numa:0'\] allows 1.5 MiB, and .* would go there by place\['optimizer_state:first\.\*'\]"
    with pytest.raises(ValueError, match=rf"{told}.* {needed:,} bytes"):
        fitted(place=rules, memory_budget={"numa:0": 3 << 19})
    with pytest.raises(ValueError, match=rf"{needed:,} bytes"):
        fitted(place=rules, memory_budget={"numa:0": needed - 1})
    fitted(place=rules, memory_budget={"numa:0": needed})


def test_what_rules_keep_where_it_is_used_has_room_too_o2() -> None:
    told = r"memory_budget\['host'\] allows 1 MiB, and .* would go there by place\['optimizer_state'\]"
    with pytest.raises(ValueError, match=told):
        fitted(place={"optimizer_state": "host", "parameter": "host"}, memory_budget={"host": "1MiB"})


def test_a_numa_node_without_a_budget_has_what_is_free_o9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TierSet, "_free_bytes", lambda *_: 1 << 20)
    with pytest.raises(ValueError, match=r"numa:0 has 1 MiB free, and 2\.28 MiB would go there .*\. Place less"):
        fitted(place={"optimizer_state": "numa:0"}, memory_budget={"host": "1GiB"})


def test_what_is_free_on_a_node_is_its_automatic_budget_o9(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(numa, "check_node", lambda node: None)
    monkeypatch.setattr(numa, "free_bytes", lambda node: 6 << 20)
    given = OffloadStrategy(memory_budget={"numa:0": "auto", "disk": "auto"}).settings.budgets
    rooms = TierSet(torch.device("cpu"), tmp_path, given, host_share=2).rooms([], [])
    assert [(room.tier, room.nbytes) for room in rooms[1:]] == [("numa:0", 3 << 20), ("disk", None)]


@pytest.mark.parametrize("budget", [{"device": 1, "host": 3}, {"host": 1, "device": 3}])
def test_on_a_cpu_the_least_of_what_is_given_for_its_memory_counts(budget: dict[str, int], tmp_path: Path) -> None:
    given = OffloadStrategy(memory_budget=budget).settings.budgets  # type: ignore[arg-type]
    assert TierSet(torch.device("cpu"), tmp_path, given, host_share=1).rooms([], [])[0].nbytes == 1


def test_staging_that_is_too_small_is_said_in_setup_o4() -> None:
    with pytest.raises(ValueError, match=rf"staging=4,096 bytes .* of 'large.weight' .*{2 * LARGE:,} bytes") as told:
        fitted(place={"optimizer_state": "disk"}, staging=4096)
    assert f"better {4 * LARGE:,}" in str(told.value)
    fitted(place={"optimizer_state": "disk"}, staging=2 * LARGE)
    fitted(place={"optimizer_state": "host"}, staging=4096)


def test_room_for_records_is_counted_in_pages() -> None:
    """A cap between a record and its pages is too small, and nobody waits for what cannot come."""
    with pytest.raises(ValueError, match="staging=") as told:
        fitted(place={"optimizer_state:last.bias": "disk"}, staging=PAGE - 1)
    assert "'last.bias'" in str(told.value)


@pytest.mark.parametrize(("optimizer", "share"), [("AdamW", 8.0), ("SGD", 0.0), ("Adafactor", 2 * 4 / 64)])
def test_the_size_of_state_is_found_from_small_stand_ins(optimizer: str, share: float) -> None:
    parameter = nn.Parameter(torch.randn(64, 64))
    made = getattr(torch.optim, optimizer)([parameter], lr=0.1)
    assert state_bytes(made, made.param_groups[0], parameter) == pytest.approx(share * 64 * 64)
