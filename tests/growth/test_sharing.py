"""Who shares with whom, and the mean gradient, against a model of equal weights in which nothing is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.growth.sharing import MeanGradient, neighbours, sharing_leaders, split_groups
from tests.growth.networks import Residual, arrangement_of, untied

# -- leaders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "unit", "expected"),
    [
        ("cycle", 1, (0, 0, 0, 0, 0, 0)),
        ("cycle", 2, (0, 1, 0, 1, 0, 1)),
        ("cycle", 3, (0, 1, 2, 0, 1, 2)),
        ("cycle", 6, (0, 1, 2, 3, 4, 5)),
        ("sequence", 1, (0, 1, 2, 3, 4, 5)),
        ("sequence", 2, (0, 0, 2, 2, 4, 4)),
        ("sequence", 3, (0, 0, 0, 3, 3, 3)),
        ("all", 1, (0, 0, 0, 0, 0, 0)),
        ("all", 5, (0, 0, 0, 0, 0, 0)),
    ],
)
def test_leaders_of_six_layers_g1(pattern: str, unit: int, expected: tuple[int, ...]) -> None:
    assert sharing_leaders(6, pattern, unit) == expected


@pytest.mark.parametrize("pattern", ["cycle", "sequence"])
@pytest.mark.parametrize("depth", range(1, 13))
def test_leaders_lead_themselves_and_groups_are_equal_g1(pattern: str, depth: int) -> None:
    for unit in (u for u in range(1, depth + 1) if depth % u == 0):
        leaders = sharing_leaders(depth, pattern, unit)
        assert all(leaders[leader] == leader <= i for i, leader in enumerate(leaders))
        assert len({leaders.count(leader) for leader in leaders}) == 1
        assert len(set(leaders)) == (unit if pattern == "cycle" else depth // unit)


@pytest.mark.parametrize("unit", [0, -1, 4, 7])
def test_a_unit_that_does_not_divide_the_layers_is_refused_g1(unit: int) -> None:
    with pytest.raises(ValueError, match=rf"unit={unit} does not divide the 6 layers; use one of \[1, 2, 3, 6\]"):
        sharing_leaders(6, "cycle", unit)


# -- splitting groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaders", "low", "expected"),
    [
        ((0, 0, 0, 0), [], (0, 0, 0, 0)),
        ((0, 0, 0, 0), [(0, 1)], (0, 1, 1, 1)),
        ((0, 0, 0, 0), [(1, 2)], (0, 0, 2, 2)),
        ((0, 0, 0, 0), [(0, 1), (1, 2), (2, 3)], (0, 1, 2, 3)),
        ((0, 1, 0, 1, 0, 1), [(0, 2)], (0, 1, 2, 1, 2, 1)),
        ((0, 1, 0, 1, 0, 1), [(3, 5)], (0, 1, 0, 1, 0, 5)),
        ((0, 1, 1, 1), [(2, 3)], (0, 1, 1, 3)),
    ],
)
def test_groups_split_where_neighbours_disagree_g5(
    leaders: tuple[int, ...], low: list[tuple[int, int]], expected: tuple[int, ...]
) -> None:
    agreement = {pair: 0.1 if pair in low else 0.9 for pair in neighbours(leaders)}
    assert split_groups(leaders, agreement, below=0.5) == expected


def test_a_pair_that_was_not_measured_does_not_split_g5() -> None:
    assert split_groups((0, 0, 0), {}, below=0.5) == (0, 0, 0)


@pytest.mark.parametrize(
    ("leaders", "pairs"),
    [
        ((0, 1, 2), [(0, 1), (1, 2)]),
        ((0, 0, 0), [(0, 1), (1, 2)]),
        ((0, 1, 0, 1), [(0, 2), (1, 3)]),
        ((0, 0, 2, 3), [(0, 1)]),
        ((0,), []),
    ],
)
def test_neighbours_share_or_where_none_do_succeed_g5(leaders: tuple[int, ...], pairs: list[tuple[int, int]]) -> None:
    assert neighbours(leaders) == pairs


# -- the mean gradient -------------------------------------------------------------------------------------------------

PATTERNS = [("cycle", 2), ("sequence", 3), ("all", 1)]
RECOMPUTED = [None, False, True]


def backwards(module: nn.Module, batches: list[Tensor]) -> None:
    module.zero_grad()
    for x in batches:
        module(x.requires_grad_()).square().sum().backward()  # reentrant checkpoints need an input that requires grad


@pytest.mark.parametrize(("pattern", "unit"), PATTERNS)
@pytest.mark.parametrize("reentrant", RECOMPUTED)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_mean_gradient_is_the_mean_over_an_untied_model_g1(
    pattern: str, unit: int, reentrant: bool | None, accumulated: int
) -> None:
    network = Residual(6, reentrant=reentrant).double()
    arrangement = arrangement_of(network)
    arrangement.arrange(sharing_leaders(6, pattern, unit))
    reference = untied(network)
    MeanGradient().attach(arrangement)
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(accumulated)]
    backwards(network, batches)
    backwards(reference, batches)
    for i, leader in enumerate(arrangement.leaders):
        members = [k for k, who in enumerate(arrangement.leaders) if who == leader]
        for name, parameter in network.layers[i].named_parameters():
            gradients = [reference.layers[k].get_parameter(name).grad for k in members]
            torch.testing.assert_close(parameter.grad, torch.stack(gradients).mean(0), rtol=0, atol=1e-12)
    for name in ("embed.weight", "head.bias"):
        torch.testing.assert_close(network.get_parameter(name).grad, reference.get_parameter(name).grad)


def test_groups_of_unequal_size_are_each_divided_by_their_own_g1(net: Residual, batch: Tensor) -> None:
    arrangement = arrangement_of(net)
    arrangement.arrange((0, 0, 0, 3, 4, 4))
    backwards(net, [batch])
    sums = {i: net.layers[i].linear.weight.grad.clone() for i in (0, 3, 4)}
    MeanGradient().attach(arrangement)
    backwards(net, [batch])
    for i, size in ((0, 3), (3, 1), (4, 2)):
        torch.testing.assert_close(net.layers[i].linear.weight.grad * size, sums[i], rtol=1e-14, atol=0)


def test_removing_it_gives_back_sums_and_attaching_twice_divides_once_g1(shared_net: tuple, batch: Tensor) -> None:
    network, arrangement = shared_net
    backwards(network, [batch])
    summed = network.layers[0].linear.weight.grad.clone()
    mean = MeanGradient()
    mean.attach(arrangement)
    mean.attach(arrangement)
    backwards(network, [batch])
    torch.testing.assert_close(network.layers[0].linear.weight.grad * 3, summed, rtol=1e-14, atol=0)
    mean.remove()
    mean.remove()
    backwards(network, [batch])
    assert torch.equal(network.layers[0].linear.weight.grad, summed)


def test_frozen_shared_parameters_are_left_alone_g1(shared_net: tuple, batch: Tensor) -> None:
    network, arrangement = shared_net
    network.layers[0].linear.requires_grad_(False)
    MeanGradient().attach(arrangement)
    backwards(network, [batch])
    assert network.layers[0].linear.weight.grad is None
    assert network.layers[0].norm.weight.grad is not None


def test_parameters_that_the_user_tied_across_all_layers_keep_their_sum_g1(net: Residual, batch: Tensor) -> None:
    """A bias that all layers share by design is not ours to average."""
    for layer in net.layers:
        layer.linear.bias = net.layers[0].linear.bias
    arrangement = arrangement_of(net)
    arrangement.arrange((0,) * 6)
    backwards(net, [batch])
    summed = net.layers[0].linear.bias.grad.clone()
    MeanGradient().attach(arrangement)
    backwards(net, [batch])
    assert torch.equal(net.layers[0].linear.bias.grad, summed)
