"""The user's parameter groups before and after a switch: members, order, options, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.engine import GrowingModule
from tests.growth.networks import Residual, arrangement_of, train

FULL = (0, 1, 2, 3)
FORMS = [(0, 1), (0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 2, 2)]
Groups = list[dict[str, Any]]


def layer_wise(network: nn.Module) -> Groups:
    """A learning rate for each layer, the deepest first."""
    layers = [{"params": list(layer.parameters()), "lr": 0.1 / (i + 1)} for i, layer in enumerate(network.layers)]
    rest = {"params": [*network.head.parameters(), *network.embed.parameters()], "lr": 0.5}
    return [*reversed(layers), rest]


def by_decay(network: nn.Module) -> Groups:
    named = list(network.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("bias") or "norm" in n], "weight_decay": 0.0},
        {"params": [p for n, p in reversed(named) if not (n.endswith("bias") or "norm" in n)], "weight_decay": 0.1},
    ]


def one_list(network: nn.Module) -> Groups:
    return [{"params": list(network.parameters())}]


GROUPINGS = [layer_wise, by_decay, one_list]


def begin(form: Sequence[int], groups: Callable[[nn.Module], Groups], **options: Any) -> tuple[GrowingModule, Any]:
    """As the callback does it: small form, the user's code over the full model, the live parameters stay."""
    network = Residual(4)
    growing = GrowingModule(network, arrangement_of(network))
    growing.restore(form, "wide")
    with growing.expanded() as names:
        optimizer = optim.AdamW(groups(network), **options)
    growing.plan_optimizers([optimizer], names)
    return growing, optimizer


def expected_names(groups: Callable[[nn.Module], Groups]) -> list[list[str]]:
    """What the user's code does with a plain full model."""
    network = Residual(4)
    names = {id(p): name for name, p in network.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups(network)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", GROUPINGS)
def test_groups_hold_the_live_parameters_in_the_users_order_g8(form: tuple[int, ...], groups: Any) -> None:
    growing, optimizer = begin(form, groups)
    full = expected_names(groups)
    live = [name for name, _ in growing.module.named_parameters()]
    assert growing.optimizer_names() == [[[name for name in group if name in live] for group in full]]
    growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")
    assert growing.optimizer_names() == [full]
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(group) for group in full]


@pytest.mark.parametrize("form", FORMS)
def test_options_of_the_groups_stay_with_them_g8(form: tuple[int, ...]) -> None:
    growing, optimizer = begin(form, layer_wise)
    rates = [group["lr"] for group in optimizer.param_groups]
    growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")
    assert [group["lr"] for group in optimizer.param_groups] == rates == [0.1 / 4, 0.1 / 3, 0.1 / 2, 0.1, 0.5]
    assert all(group["params"][0] in set(growing.module.parameters()) for group in optimizer.param_groups)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_groups_that_are_empty_for_now_do_no_harm_g8(form: tuple[int, ...], options: dict[str, bool]) -> None:
    growing, optimizer = begin(form, layer_wise, **options)
    assert any(not group["params"] for group in optimizer.param_groups)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(growing.module, optimizer, 2)
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")
    train(growing.module, optimizer, 1)
    schedule.step()
    assert all(int(state["step"]) == 3 for state in optimizer.state.values())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4 * 0.81)


def test_state_of_parameters_that_are_gone_is_forgotten_g8() -> None:
    growing, optimizer = begin((0, 1, 0, 1), one_list)
    train(growing.module, optimizer, 1)
    growing.grow_layers(FULL, FULL, state="copy")
    assert {id(p) for p in optimizer.state} == {id(p) for p in growing.module.parameters()}
    growing.grow_layers((0, 1), (0, 1), state="copy")
    assert {id(p) for p in optimizer.state} == {id(p) for p in growing.module.parameters()}


def test_frozen_parameters_that_the_user_left_out_stay_out_g8() -> None:
    def without_norms(network: nn.Module) -> Groups:
        return [{"params": [p for n, p in network.named_parameters() if "norm" not in n]}]

    growing, optimizer = begin((0, 1), without_norms)
    growing.grow_layers(FULL, (0, 1, 0, 1), state="copy")
    assert growing.optimizer_names() == [expected_names(without_norms)]
    assert len(optimizer.param_groups[0]["params"]) == 4 + 2 * 4


def test_parameters_of_others_stay_where_they_are_g8() -> None:
    """A loss with a parameter of its own, which no name of the module reaches."""
    network, temperature = Residual(4), nn.Parameter(torch.ones(1))
    growing = GrowingModule(network, arrangement_of(network))
    growing.restore((0, 1), "wide")
    with growing.expanded() as names:
        optimizer = optim.AdamW([{"params": [temperature, *network.parameters()]}])
    growing.plan_optimizers([optimizer], names)
    assert optimizer.param_groups[0]["params"][0] is temperature
    growing.grow_layers(FULL, (0, 1, 0, 1), state="copy")
    assert optimizer.param_groups[0]["params"][0] is temperature
    assert len(optimizer.param_groups[0]["params"]) == 1 + len(list(network.parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_names_that_torch_keeps_beside_the_parameters_stay_right_g8(form: tuple[int, ...]) -> None:
    """``AdamW(model.named_parameters())`` keeps ``param_names``; they go into every checkpoint."""
    network = Residual(4)
    growing = GrowingModule(network, arrangement_of(network))
    growing.restore(form, "wide")
    with growing.expanded() as names:
        optimizer = optim.AdamW(network.named_parameters())
    growing.plan_optimizers([optimizer], names)
    for _ in range(2):
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in network.named_parameters()]
        growing.grow_layers(FULL, [i % len(growing.leaders) for i in range(4)], state="copy")


def test_two_optimizers_each_keep_their_own_g8() -> None:
    network = Residual(4)
    growing = GrowingModule(network, arrangement_of(network))
    growing.restore((0, 0, 0, 0), "wide")
    with growing.expanded() as names:
        layers = optim.SGD(network.layers.parameters(), 0.1)
        rest = optim.AdamW([*network.embed.parameters(), *network.head.parameters()])
    growing.plan_optimizers([layers, rest], names)
    growing.grow_layers(FULL, FULL, state="copy")
    assert {id(p) for p in layers.param_groups[0]["params"]} == {id(p) for p in network.layers.parameters()}
    assert len(rest.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("form", FORMS)
def test_a_switch_tells_by_name_what_it_did_g8(form: tuple[int, ...]) -> None:
    growing, _ = begin(form, one_list)
    before = {name for name, _ in growing.module.named_parameters()}
    change = growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")
    after = {name for name, _ in growing.module.named_parameters()}
    assert set(change.added) == after - before
    assert change.removed == change.replaced == ()


def test_sizes_count_what_is_live_g1() -> None:
    growing, optimizer = begin((0, 0, 0, 0), one_list)
    layer = sum(p.numel() for p in growing.module.layers[0].parameters())
    around = sum(p.numel() for m in (growing.module.embed, growing.module.head) for p in m.parameters())
    train(growing.module, optimizer, 1)
    shared = growing.sizes()
    growing.grow_layers(FULL, FULL, state="copy")
    full = growing.sizes()
    assert (shared["parameters"], full["parameters"]) == (layer + around, 4 * layer + around)
    assert full["gradient_bytes"] == full["all_reduce_bytes"] == 4 * full["parameters"]
    tensors = len(list(growing.module.parameters()))
    assert full["optimizer_state_bytes"] == 8 * full["parameters"] + 4 * tensors


def test_growing_what_cannot_grow_is_refused() -> None:
    with pytest.raises(ValueError, match="no repeated layers"):
        GrowingModule(Residual(1), None).grow_layers((0,), (0,), state="copy")
    with pytest.raises(ValueError, match="no narrow twin"):
        GrowingModule(Residual(1), None).grow_width(state="copy")
    assert isinstance(arrangement_of(Residual(2)), LayerArrangement)
