"""The gradient of the wide model against what is done to the optimizer's statistics, and how copies part ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_efficient.growth import width
from lightning_efficient.growth.moments import transfer_state
from lightning_efficient.growth.operators import Transfer
from lightning_efficient.growth.width import Widened, plan_width
from tests.growth.wide_networks import (
    Build,
    ConvNet,
    Plain,
    PlainTied,
    byte_transformer,
    fill,
    images,
    outside_of,
    randomised,
    tokens,
    widened,
)

Optimizer = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda p: optim.AdamW(p, 3e-3),
    "sgd_momentum": lambda p: optim.SGD(p, 3e-3, momentum=0.9),
}
# Each channel is normalised by itself, or not at all.
WITHOUT_LAYER_NORM: dict[str, tuple[Build, Callable[[int], Tensor], dict[str, str]]] = {
    "untied": (Plain, tokens, {}),
    "tied": (PlainTied, tokens, {"readout": "final"}),
    "batch_norm": (ConvNet, images, {}),
}
WITH_LAYER_NORM = {
    f"{norm}_{'tied' if tied else 'untied'}": byte_transformer(norm=norm, tied=tied)
    for norm in ("layernorm", "rmsnorm")
    for tied in (True, False)
}


def backward(module: nn.Module, batch: Tensor, seed: int = 0) -> None:
    module.zero_grad()
    output = module(batch)
    target = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(seed))
    (output - target).square().mean().backward()


def train(module: nn.Module, optimizer: optim.Optimizer, batch: Callable[[int], Tensor], steps: int = 4) -> None:
    for step in range(steps):
        backward(module, batch(step), step)
        optimizer.step()


def gradient_error(operator: Widened, narrow: Tensor, wide: Tensor) -> float:
    return ((operator.moment(narrow, 1) - wide).norm() / wide.norm().clamp_min(1e-9)).item()


def total_over_copies(operator: Widened, gradient: Tensor) -> Tensor:
    """The gradient of a narrow weight of which each wide copy is the same function: summed over the copies written."""
    if operator.written is None or operator.readout:
        return gradient
    axis = operator.written
    size = sum(axis.sections)
    shape = list(gradient.shape)
    shape[axis.dim] = size
    return gradient.new_zeros(shape).index_add_(axis.dim, axis.source(), gradient)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("network", WITHOUT_LAYER_NORM)
def test_gradients_of_all_copies_are_exact_where_nothing_mixes_channels_g4(
    network: str, factor: int, optimizer: str
) -> None:
    """``a' p = p``: at every depth copy ``c`` gets ``p_c`` of the narrow gradient, after training as before it."""
    build, batch, options = WITHOUT_LAYER_NORM[network]
    narrow, wide = randomised(build(1)), build(factor).double()
    plan = plan_width(narrow, wide, factor, after_layers=outside_of(narrow), **options)
    train(narrow, OPTIMIZERS[optimizer](narrow.parameters()), batch)
    fill(narrow, wide, plan)
    backward(narrow, batch(9))
    backward(wide, batch(9))
    for name, operator in plan.items():
        error = gradient_error(operator, narrow.get_parameter(name).grad, wide.get_parameter(name).grad)
        if narrow.get_parameter(name).grad.norm() > 1e-9:  # a bias before a batch norm has none
            assert error < 1e-10, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", WITHOUT_LAYER_NORM)
def test_state_grown_from_narrow_steps_is_that_of_wide_steps_at_fixed_weights_g4(network: str, optimizer: str) -> None:
    """With a learning rate of zero both models stand still: then even the state after growth has a reference."""
    build, batch, options = WITHOUT_LAYER_NORM[network]
    narrow, wide, plan = widened(build, 2, **options)
    optimizers = []
    for module in (narrow, wide):
        optimizers.append(OPTIMIZERS[optimizer](module.parameters()))
        optimizers[-1].param_groups[0]["lr"] = 0.0
        train(module, optimizers[-1], batch)
    pairs = {n: (narrow.get_parameter(n), nn.Parameter(wide.get_parameter(n).detach().clone())) for n in plan}
    transfer_state([optimizers[0]], [Transfer(*pairs[name], plan[name]) for name in plan], "copy")
    for name, (_, target) in pairs.items():
        for key, value in optimizers[1].state[wide.get_parameter(name)].items():
            grown = optimizers[0].state[target][key]
            torch.testing.assert_close(
                grown, value, rtol=1e-9, atol=1e-14, msg=lambda text, at=f"{name}, {key}: ": at + text
            )


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("network", WITH_LAYER_NORM)
def test_the_total_over_copies_is_exact_in_every_network_g4(network: str, factor: int) -> None:
    """A layer norm moves gradient from copy to copy, but loses none of it."""
    narrow, wide, plan = widened(WITH_LAYER_NORM[network], factor)
    backward(narrow, tokens())
    backward(wide, tokens())
    for name, operator in plan.items():
        gradient = narrow.get_parameter(name).grad
        expected = total_over_copies(operator, operator.moment(gradient, 1))
        total = total_over_copies(operator, wide.get_parameter(name).grad)
        error = (total - expected).norm().item()
        assert error < 1e-10 * gradient.norm() + 1e-14, name


@pytest.mark.parametrize("network", WITH_LAYER_NORM)
def test_a_layer_norm_makes_the_shares_approximate_g4(network: str) -> None:
    """Its backward subtracts means over all copies, which are shared evenly, not by ``p``.

    ``dx_c = (p_c dy - (mean(dy) + x mean(x dy)) / k) / sigma``. So the transferred statistics are near the true ones
    where a norm lies between a parameter and the loss, not equal to them; they are exact behind the last norm.
    """
    narrow, wide, plan = widened(WITH_LAYER_NORM[network], 2)
    backward(narrow, tokens())
    backward(wide, tokens())
    errors = {
        name: gradient_error(operator, narrow.get_parameter(name).grad, wide.get_parameter(name).grad)
        for name, operator in plan.items()
        if narrow.get_parameter(name).grad.norm() > 1e-9  # a bias of the keys has none
    }
    behind = {name: error for name, error in errors.items() if name.startswith("final_norm") or name == "head.weight"}
    assert behind
    assert all(error < 1e-10 for error in behind.values()), behind
    assert 1e-3 < max(errors.values()) < 0.25, errors
    even = (
        0.5 * torch.cat([narrow.position_embedding.weight.grad] * 2, 1) - wide.position_embedding.weight.grad
    ).norm()
    assert errors["position_embedding.weight"] < even / wide.position_embedding.weight.grad.norm()


# -- copies part ways --------------------------------------------------------------------------------------------------


def hidden_difference(wide: nn.Module) -> float:
    """The largest relative difference between the two copies of any MLP's hidden units."""
    found: list[float] = []

    def compare(module: nn.Module, args: Any, output: Tensor) -> None:
        one, other = output.detach().chunk(2, dim=-1)
        found.append(((one - other).norm() / one.norm()).item())

    handles = [block.mlp.up.register_forward_hook(compare) for block in wide.blocks]
    wide(tokens())
    for handle in handles:
        handle.remove()
    return max(found)


@pytest.mark.parametrize("network", WITH_LAYER_NORM)
def test_copies_part_ways_g4(network: str) -> None:
    _, wide, _ = widened(WITH_LAYER_NORM[network], 2)
    assert hidden_difference(wide) < 1e-12
    train(wide, optim.AdamW(wide.parameters(), 3e-3), tokens, steps=20)
    assert hidden_difference(wide) > 0.01


@pytest.mark.parametrize("network", WITH_LAYER_NORM)
def test_with_even_shares_copies_stay_equal_which_is_the_control_g4(
    network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "shares", lambda factor: torch.full((factor,), 1 / factor, dtype=torch.float64))
    _, wide, _ = widened(WITH_LAYER_NORM[network], 2)
    train(wide, optim.AdamW(wide.parameters(), 3e-3), tokens, steps=20)
    assert hidden_difference(wide) < 1e-9
