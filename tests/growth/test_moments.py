"""Optimizer state through a switch, against an unshared run with equal weights and equal gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_efficient.growth.moments import transfer_state, unsupported_optimizer
from lightning_efficient.growth.operators import Scaled, Transfer
from tests.growth.networks import Layer, Residual, arrangement_of, train

Build = Callable[[list[nn.Parameter]], optim.Optimizer]

# No epsilon, or one that no float64 sees: it is what is not homogeneous in the gradient.
ELEMENTWISE: dict[str, Build] = {
    "sgd": lambda p: optim.SGD(p, 0.01, momentum=0.9),
    "sgd_nesterov": lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.01, eps=0.0),
    "adam_amsgrad": lambda p: optim.Adam(p, 0.01, eps=0.0, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, 0.01, eps=0.0),
    "adamw_foreach": lambda p: optim.AdamW(p, 0.01, eps=0.0, foreach=True),
    "adamw_fused": lambda p: optim.AdamW(p, 0.01, eps=0.0, fused=True),
    "nadam": lambda p: optim.NAdam(p, 0.01, eps=0.0),
    "radam": lambda p: optim.RAdam(p, 0.01, eps=0.0),
    "adamax": lambda p: optim.Adamax(p, 0.01, eps=0.0),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, eps=0.0, centered=True, momentum=0.9),
    "adagrad": lambda p: optim.Adagrad(p, 0.01, eps=0.0),
    "adadelta": lambda p: optim.Adadelta(p, eps=1e-30),
    "rprop": lambda p: optim.Rprop(p, 0.01),
    "asgd": lambda p: optim.ASGD(p, 0.01, lambd=0.0, t0=3),
    "muon": lambda p: optim.Muon(p, 0.01, weight_decay=0.0),
}
FACTORED: dict[str, Build] = {"adafactor": lambda p: optim.Adafactor(p, 0.01)}
FOLLOWS_THE_WEIGHT = {"ax"}
SHARERS = 3


@dataclass
class Slots:
    """A parameter that three layers share, and the three that it becomes."""

    shared: nn.Parameter
    copies: list[nn.Parameter]

    def transfers(self, gradient: float) -> list[Transfer]:
        return [Transfer(self.shared, copy, Scaled(gradient)) for copy in self.copies]


@pytest.fixture
def slots() -> Slots:
    shared = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    return Slots(shared, [shared, *(nn.Parameter(shared.detach().clone()) for _ in range(SHARERS - 1))])


def run(optimizer: optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> dict[str, Any]:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return dict(optimizer.state[parameter])


def gradients(shape: tuple[int, ...] = (3, 4), steps: int = 5) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(steps)]


def assert_state_equal(state: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert set(state) == set(expected)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(state[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert state[key] == value, key


# -- unsharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, *FACTORED])
def test_after_the_mean_gradient_state_is_copied_bit_for_bit_g8(name: str, slots: Slots) -> None:
    optimizer = (ELEMENTWISE | FACTORED)[name]([slots.shared])
    before = {
        k: v.clone() if isinstance(v, Tensor) else v for k, v in run(optimizer, slots.shared, gradients()).items()
    }
    transfer_state([optimizer], slots.transfers(1.0), "copy")
    assert set(optimizer.state) == set(slots.copies)
    for copy in slots.copies:
        assert_state_equal(optimizer.state[copy], before, rtol=0, atol=0)
    tensors = [v for copy in slots.copies for v in optimizer.state[copy].values() if isinstance(v, Tensor)]
    assert len({v.data_ptr() for v in tensors}) == len(tensors)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_after_the_summed_gradient_state_is_that_of_an_unshared_run_g8(name: str, slots: Slots) -> None:
    """All sharers see the same gradients; then the sum is ``n`` times each, and m/n and v/n^2 are exact."""
    lone = nn.Parameter(slots.shared.detach().clone())
    history = gradients()
    optimizer, unshared = ELEMENTWISE[name]([slots.shared]), ELEMENTWISE[name]([lone])
    run(optimizer, slots.shared, [SHARERS * g for g in history])
    expected = run(unshared, lone, history)
    weight_like = {key: optimizer.state[slots.shared][key].clone() for key in FOLLOWS_THE_WEIGHT & set(expected)}
    transfer_state([optimizer], slots.transfers(1 / SHARERS), "copy")
    for copy in slots.copies:
        assert_state_equal(optimizer.state[copy], {**expected, **weight_like}, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "muon"])
def test_the_next_step_is_that_of_an_unshared_run_g8(name: str, slots: Slots) -> None:
    lone = nn.Parameter(slots.shared.detach().clone())
    history = gradients()
    optimizer, unshared = ELEMENTWISE[name]([slots.shared]), ELEMENTWISE[name]([lone])
    run(optimizer, slots.shared, [SHARERS * g for g in history[:-1]])
    run(unshared, lone, history[:-1])
    transfer_state([optimizer], slots.transfers(1 / SHARERS), "copy")
    optimizer.param_groups[0]["params"] = slots.copies
    with torch.no_grad():
        for parameter in (*slots.copies, lone):
            parameter.zero_()
    for copy in slots.copies:
        copy.grad = history[-1].clone()
    optimizer.step()
    run(unshared, lone, history[-1:])
    for copy in slots.copies:
        torch.testing.assert_close(copy, lone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_scalar_parameters_are_scaled_too_g8(amsgrad: bool) -> None:
    """A gate of ReZero has a state without dimensions, as ``step`` has; it is no step count."""
    shared, copy = nn.Parameter(torch.tensor(1.0).double()), nn.Parameter(torch.tensor(1.0).double())
    optimizer = optim.AdamW([shared], amsgrad=amsgrad)
    before = {k: v.clone() for k, v in run(optimizer, shared, gradients((), 3)).items()}
    transfer_state([optimizer], [Transfer(shared, copy, Scaled(0.5))], "copy")
    assert optimizer.state[copy]["step"] == before["step"] == 3
    torch.testing.assert_close(optimizer.state[copy]["exp_avg"], before["exp_avg"] / 2)
    torch.testing.assert_close(optimizer.state[copy]["exp_avg_sq"], before["exp_avg_sq"] / 4)


@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_adafactor_says_what_to_do_where_it_must_be_scaled_g8(shape: tuple[int, ...]) -> None:
    shared, copy = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    optimizer = optim.Adafactor([shared], 0.01)
    shared.grad = torch.randn(shape)
    optimizer.step()
    with pytest.raises(ValueError, match=r"Adafactor keeps '\w+' of shape .* Use optimizer_state='reset'"):
        transfer_state([optimizer], [Transfer(shared, copy, Scaled(0.5))], "copy")
    transfer_state([optimizer], [Transfer(shared, copy, Scaled(0.5))], "reset")


def test_state_of_an_unknown_optimizer_is_copied_but_not_scaled_g8(slots: Slots) -> None:
    class Mystery(optim.SGD):
        pass

    optimizer = Mystery([slots.shared], 0.1)
    optimizer.state[slots.shared] = {"aura": torch.ones(3, 4), "note": "text"}
    transfer_state([optimizer], slots.transfers(1.0), "copy")
    assert optimizer.state[slots.copies[1]]["note"] == "text"
    with pytest.raises(ValueError, match="Mystery keeps 'aura' of shape"):
        transfer_state([optimizer], slots.transfers(0.5), "copy")


# -- depth -------------------------------------------------------------------------------------------------------------


def test_moments_follow_the_map_where_targets_are_sources_too_g3() -> None:
    """Interleave 0, 1 -> 0, 0, 1, 1: the state of layer 1 is read before it is overwritten."""
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    optimizer = optim.AdamW(network.parameters())
    train(network, optimizer, 3)
    before = [optimizer.state[layer.linear.weight]["exp_avg"].clone() for layer in network.layers]
    transfer_state([optimizer], arrangement.arrange((0, 1, 2, 3), (0, 0, 1, 1)), "copy")
    for i, layer in enumerate(network.layers):
        assert torch.equal(optimizer.state[layer.linear.weight]["exp_avg"], before[i // 2])


def test_a_source_without_state_leaves_its_target_without_g3() -> None:
    """Layer 0 never got a gradient; layer 1 takes its weights, and must not keep moments of other weights."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([one, two])
    two.grad = torch.ones(2)
    optimizer.step()
    transfer_state([optimizer], [Transfer(one, two, Scaled())], "copy")
    assert two not in optimizer.state


def test_only_the_optimizer_that_holds_a_source_takes_its_targets_g8(slots: Slots) -> None:
    mine, other = optim.AdamW([slots.shared]), optim.AdamW([nn.Parameter(torch.ones(1))])
    run(mine, slots.shared, gradients(steps=1))
    transfer_state([mine, other], slots.transfers(1.0), "copy")
    assert len(mine.state) == SHARERS
    assert len(other.state) == 0


# -- fresh state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, *FACTORED])
def test_reset_leaves_what_a_new_optimizer_would_have_g8(name: str, slots: Slots) -> None:
    build = (ELEMENTWISE | FACTORED)[name]
    optimizer = build([slots.shared])
    run(optimizer, slots.shared, gradients())
    transfer_state([optimizer], slots.transfers(1.0), "reset")
    fresh = build(slots.copies)
    for copy in slots.copies:
        assert (copy in optimizer.state) == (copy in fresh.state)
        if copy in fresh.state:
            assert_state_equal(optimizer.state[copy], fresh.state[copy], rtol=0, atol=0)
    optimizer.param_groups[0]["params"] = slots.copies
    for copy in slots.copies:
        copy.grad = torch.ones_like(copy)
    optimizer.step()


def test_reset_gives_adagrad_its_initial_accumulator_g8(slots: Slots) -> None:
    optimizer = optim.Adagrad([slots.shared], 0.01, initial_accumulator_value=0.25)
    run(optimizer, slots.shared, gradients())
    transfer_state([optimizer], slots.transfers(1.0), "reset")
    assert all(torch.equal(optimizer.state[c]["sum"], torch.full_like(c, 0.25)) for c in slots.copies)


def test_reset_touches_only_the_layers_g8() -> None:
    network = Residual(4, layer=Layer)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 0, 0, 0))
    optimizer = optim.AdamW(network.parameters())
    train(network, optimizer, 2)
    transfer_state([optimizer], arrangement.arrange((0, 1, 2, 3)), "reset")
    assert {id(p) for p in optimizer.state} == {id(p) for m in (network.embed, network.head) for p in m.parameters()}


# -- what cannot be followed -------------------------------------------------------------------------------------------


def test_unsupported_optimizers_say_why() -> None:
    class ZeroRedundancyOptimizer(optim.SGD):
        """Stands for torch's, which needs a process group."""

    parameters = [nn.Parameter(torch.ones(1))]
    assert unsupported_optimizer(optim.LBFGS(parameters)) == "keeps one flat history over all parameters"
    assert "partitions its parameters" in str(unsupported_optimizer(ZeroRedundancyOptimizer(parameters, 0.1)))
    assert "`state`" in str(unsupported_optimizer(object()))
    assert unsupported_optimizer(optim.AdamW(parameters)) is None
    assert math.isfinite(parameters[0].item())
