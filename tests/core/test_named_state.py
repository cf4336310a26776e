"""Optimizer state by name: in whatever order parameters come, each gets its own moments back."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn, optim

from lightning_efficient.core.named_state import GroupPlan, group_names, reorder_state

NAMES = list("abcdef")


def parameters() -> dict[str, nn.Parameter]:
    """All of one shape: what a load by position mixes up without a word."""
    return {name: nn.Parameter(torch.zeros(2)) for name in NAMES}


def build(named: dict[str, nn.Parameter], groups: list[list[str]]) -> optim.Optimizer:
    return optim.AdamW([{"params": [named[n] for n in group], "lr": 0.1 * (i + 1)} for i, group in enumerate(groups)])


def trained(groups: list[list[str]]) -> tuple[optim.Optimizer, dict[str, nn.Parameter]]:
    """The first moment of each parameter tells its name."""
    named = parameters()
    optimizer = build(named, groups)
    for i, parameter in enumerate(named.values()):
        parameter.grad = torch.full((2,), 10.0 * (i + 1))
    optimizer.step()
    return optimizer, named


def ids(named: dict[str, nn.Parameter]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in named.items()}


def moments(optimizer: optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, int]:
    return {name: round(optimizer.state[p]["exp_avg"][0].item()) for name, p in named.items() if p in optimizer.state}


OWN = {name: i + 1 for i, name in enumerate(NAMES)}


def test_a_load_by_position_is_silently_wrong_and_one_by_name_is_right_g8() -> None:
    saved, named = trained([NAMES])
    state, before = saved.state_dict(), group_names(saved, ids(named))
    present = parameters()
    backwards = build(present, [NAMES[::-1]])

    backwards.load_state_dict(copy.deepcopy(state))  # no error, no warning
    assert moments(backwards, present) == dict(zip(NAMES[::-1], OWN.values(), strict=True))

    backwards.load_state_dict(reorder_state(state, before, group_names(backwards, ids(present))))
    assert moments(backwards, present) == OWN


@pytest.mark.parametrize("seed", range(20))
def test_any_order_within_groups_is_restored_g8(seed: int) -> None:
    chance = random.Random(seed)
    cut = chance.randint(0, len(NAMES))
    order = chance.sample(NAMES, len(NAMES))
    groups = [order[:cut], order[cut:]]
    saved, named = trained(groups)
    shuffled = [chance.sample(group, len(group)) for group in groups]
    present = parameters()
    now = build(present, shuffled)
    state = saved.state_dict()
    untouched = copy.deepcopy(state)
    now.load_state_dict(reorder_state(state, group_names(saved, ids(named)), group_names(now, ids(present))))
    assert moments(now, present) == OWN
    assert [group["lr"] for group in now.param_groups] == [group["lr"] for group in saved.param_groups]
    assert state["param_groups"] == untouched["param_groups"]
    assert list(state["state"]) == list(untouched["state"])


def test_parameters_without_state_stay_without_g8() -> None:
    saved, named = trained([NAMES])
    del saved.state[named["c"]]
    present = parameters()
    now = build(present, [["c", "a", "b", "f", "e", "d"]])
    now.load_state_dict(
        reorder_state(saved.state_dict(), group_names(saved, ids(named)), group_names(now, ids(present)))
    )
    assert moments(now, present) == {name: value for name, value in OWN.items() if name != "c"}


def test_tensors_are_not_copied() -> None:
    saved, _ = trained([NAMES])
    state = saved.state_dict()
    result = reorder_state(state, [NAMES], [NAMES[::-1]])
    assert result["state"][0]["exp_avg"] is state["state"][5]["exp_avg"]


def test_names_that_torch_keeps_are_reordered_too_g8() -> None:
    named = parameters()
    optimizer = optim.AdamW(named.items())
    result = reorder_state(optimizer.state_dict(), [NAMES], [NAMES[::-1]])
    assert result["param_groups"][0]["param_names"] == NAMES[::-1]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([["a", "b", "c"], ["d", "e", "x"]], r"group 1 .* only there \['f'\], only here \['x'\]"),
        ([["a", "b"], ["c", "d", "e", "f"]], r"group 0 .* only there \['c'\], only here \[\]"),
        ([["a", "b", "d"], ["c", "e", "f"]], r"group 0 .* only there \['c'\], only here \['d'\]"),
        ([NAMES], r"has 2 parameter groups, the present one 1"),
    ],
)
def test_other_groups_are_refused_naming_parameters_g8(now: list[list[str]], message: str) -> None:
    saved, _ = trained([["a", "b", "c"], ["d", "e", "f"]])
    with pytest.raises(ValueError, match=message):
        reorder_state(saved.state_dict(), [["a", "b", "c"], ["d", "e", "f"]], now)


def test_parameters_without_a_name_in_two_groups_are_not_confused_g8() -> None:
    """Such as those of two loss modules that are no children of the model."""
    groups = [["a", "b", "c"], ["d", "e", "f"]]
    saved, named = trained(groups)
    known = {i: name for i, name in ids(named).items() if name not in ("a", "d")}
    names = group_names(saved, known)
    present = parameters()
    now = build(present, groups)
    now.load_state_dict(reorder_state(saved.state_dict(), names, names))
    assert moments(now, present) == OWN


# -- the plan of groups ------------------------------------------------------------------------------------------------


def test_plan_gives_each_group_its_live_parameters_in_its_order_g8() -> None:
    named = parameters()
    optimizer = build(named, [["c", "a"], ["f", "b"]])
    plan = GroupPlan(optimizer, ids(named))
    replaced = {"a": nn.Parameter(torch.ones(2)), "b": named["b"], "c": named["c"]}
    plan.apply(replaced)
    assert group_names(optimizer, ids(replaced)) == [["c", "a"], ["b"]]
    plan.apply(named)
    assert group_names(optimizer, ids(named)) == [["c", "a"], ["f", "b"]]


def test_plan_forgets_the_state_of_parameters_that_left_and_no_other_g8() -> None:
    optimizer, named = trained([NAMES])
    plan = GroupPlan(optimizer, ids(named))
    plan.apply({name: p for name, p in named.items() if name != "b"})
    assert set(moments(optimizer, named)) == set(NAMES) - {"b"}


def test_plan_keeps_parameters_without_a_name_at_their_place_g8() -> None:
    named = parameters()
    optimizer = build(named, [["a", "b", "c"]])
    known = {i: name for i, name in ids(named).items() if name != "b"}
    GroupPlan(optimizer, known).apply({"c": named["c"]})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(named["b"]), id(named["c"])]
    assert group_names(optimizer, known) == [["<unnamed 0.0>", "c"]]
