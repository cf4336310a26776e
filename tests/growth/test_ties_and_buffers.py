"""What hangs on layers besides weights: buffers, ties inside and across layers, flags and attributes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.demos.model import ByteTransformer
from tests.growth.networks import BatchNormLayer, Layer, Residual, arrangement_of

FULL = (0, 1, 2, 3)


class TiedInside(nn.Module):
    """Two linear maps with one weight."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Biased(nn.Module):
    """A layer with a relative bias that the model may tie across all layers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.relative = nn.Embedding(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) + self.relative.weight[0]


def tied_across() -> Residual:
    network = Residual(4, layer=Biased).double()
    for layer in network.layers:
        layer.relative.weight = network.layers[0].relative.weight
    return network


def batchnorm_net() -> Residual:
    """Each layer has statistics of its own."""
    network = Residual(4, layer=BatchNormLayer)
    for i, layer in enumerate(network.layers):
        layer.norm.running_mean.fill_(i)
        layer.norm.num_batches_tracked.fill_(10 + i)
        layer.scratch.fill_(i)
    return network


def means(network: Residual) -> list[float]:
    return [layer.norm.running_mean[0].item() for layer in network.layers]


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_sharing_and_unsharing_leave_each_layer_its_own_statistics_g2() -> None:
    network = batchnorm_net()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 0, 0, 0))
    assert means(network) == [0, 1, 2, 3]
    arrangement.arrange((0, 1, 0, 1))
    arrangement.arrange(FULL)
    assert means(network) == [0, 1, 2, 3]


@pytest.mark.parametrize(("source", "expected"), [((0, 1, 0, 1), [0, 1, 0, 1]), ((0, 0, 1, 1), [0, 0, 1, 1])])
def test_running_statistics_follow_the_weights_into_new_layers_g3(source: tuple[int, ...], expected: list[int]) -> None:
    network = batchnorm_net()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    arrangement.arrange(FULL, source)
    assert means(network) == expected
    assert [layer.norm.num_batches_tracked.item() - 10 for layer in network.layers] == expected
    assert len({layer.norm.running_mean.data_ptr() for layer in network.layers}) == 4


def test_buffers_that_are_not_saved_stay_with_their_layer_g3() -> None:
    network = batchnorm_net()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    arrangement.arrange(FULL)
    assert [layer.scratch.item() for layer in network.layers] == [0, 1, 2, 3]


def test_new_layers_take_dtype_and_device_of_their_source_g3() -> None:
    network = batchnorm_net()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    network.double()
    arrangement.arrange(FULL)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float64, torch.int64}
    assert network(torch.randn(5, 3).double()).dtype == torch.float64


def test_evaluation_mode_of_a_part_of_a_layer_follows_g3() -> None:
    """Frozen statistics: the norms are in evaluation mode while the rest trains."""
    network = batchnorm_net().train()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    for layer in network.layers:
        layer.norm.eval()
    arrangement.arrange(FULL)
    assert [layer.norm.training for layer in network.layers] == [False] * 4
    assert all(layer.training for layer in network.layers)


# -- ties --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [(0, 1), (0, 0, 0, 0), (0, 1, 0, 1)])
def test_ties_inside_a_layer_stay_ties_g7(first: tuple[int, ...]) -> None:
    network = Residual(4, layer=TiedInside)
    arrangement = arrangement_of(network)
    arrangement.arrange(first)
    assert all(layer.up.weight is layer.down.weight for layer in network.layers)
    arrangement.arrange(FULL)
    assert all(layer.up.weight is layer.down.weight for layer in network.layers)
    assert len({id(layer.up.weight) for layer in network.layers}) == 4


def test_ties_inside_a_layer_stay_ties_where_values_are_overwritten_g7() -> None:
    network = Residual(4, layer=TiedInside)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    values = [layer.up.weight.detach().clone() for layer in network.layers]
    arrangement.arrange(FULL, (0, 0, 1, 1))
    for i, layer in enumerate(network.layers):
        assert layer.up.weight is layer.down.weight
        assert torch.equal(layer.up.weight, values[i // 2])


@pytest.mark.parametrize("first", [(0, 1), (0, 0, 0, 0), (0, 1, 0, 1)])
def test_a_parameter_that_the_user_tied_across_all_layers_stays_one_g7(first: tuple[int, ...]) -> None:
    network = tied_across()
    shared = network.layers[0].relative.weight
    arrangement = arrangement_of(network)
    arrangement.arrange(first)
    arrangement.arrange(FULL)
    assert all(layer.relative.weight is shared for layer in network.layers)
    assert len({id(layer.linear.weight) for layer in network.layers}) == 4


def test_tied_embedding_and_head_stay_tied_g7() -> None:
    model = ByteTransformer(layers=4, width=8, heads=2, context=4, tied=True)
    table = model.token_embedding.weight
    arrangement = arrangement_of(model)
    for leaders in ((0, 1), FULL, (0, 0, 0, 0), FULL):
        arrangement.arrange(leaders)
        assert model.head.weight is model.token_embedding.weight is table


def test_a_tie_to_the_outside_of_the_first_layer_only_does_not_leave_new_layers_unfilled_g7() -> None:
    """Layers 2 and 3 have weights of their own; they must get values from layers 0 and 1 as all others do."""
    network = Residual(4, layer=Biased).double()
    network.outside = nn.Parameter(network.layers[0].linear.weight.detach().clone())
    network.layers[0].linear.weight = network.outside
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    arrangement.arrange(FULL)
    assert torch.equal(network.layers[2].linear.weight, network.layers[0].linear.weight)
    assert torch.equal(network.layers[3].linear.weight, network.layers[1].linear.weight)


# -- flags and attributes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [(0, 1), (0, 1, 0, 1)])
def test_python_attributes_of_parameters_follow_g8(first: tuple[int, ...]) -> None:
    network = Residual(4)
    for layer in network.layers:
        layer.linear.weight.no_decay = True
    arrangement = arrangement_of(network)
    arrangement.arrange(first)
    arrangement.arrange(FULL)
    assert all(layer.linear.weight.no_decay for layer in network.layers)
    assert not hasattr(network.layers[3].norm.weight, "no_decay")


@pytest.mark.parametrize("first", [(0, 1), (0, 1, 0, 1)])
def test_frozen_layers_grow_into_frozen_layers_g8(first: tuple[int, ...]) -> None:
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange(first)
    network.layers[0].linear.requires_grad_(False)
    arrangement.arrange(FULL)
    flags = [layer.linear.weight.requires_grad for layer in network.layers]
    assert flags == [False, True, False, True]


def test_requires_grad_follows_where_values_are_overwritten_g8() -> None:
    """As for new layers: layer 1 becomes a copy of the frozen layer 0, layers 2 and 3 of the live layer 1."""
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    network.layers[0].linear.requires_grad_(False)
    arrangement.arrange(FULL, (0, 0, 1, 1))
    assert [layer.linear.weight.requires_grad for layer in network.layers] == [False, False, True, True]


def test_attributes_of_layer_objects_stay_their_own_g3() -> None:
    """Such as ``layer_idx``: layers share parameters, never modules."""
    network = Residual(4, layer=Layer)
    for i, layer in enumerate(network.layers):
        layer.layer_idx = i
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 0, 0, 0))
    arrangement.arrange((0, 1))
    arrangement.arrange(FULL)
    assert [layer.layer_idx for layer in network.layers] == [0, 1, 2, 3]
