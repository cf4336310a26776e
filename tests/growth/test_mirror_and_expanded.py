"""Averaged copies that change with the model, and the full model as the user's ``configure_optimizers`` sees it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from tests.growth.networks import BatchNormLayer, Residual, arrangement_of, bytes_held, copied, same
from tests.growth.test_ties_and_buffers import TiedInside, tied_across

FULL = (0, 1, 2, 3)
EARLIER = [(0, 1), (0, 0, 0, 0), (0, 1, 0, 1), FULL]


def drift(module: torch.nn.Module) -> None:
    """The averaged values are never those of the model."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def grown_twin(network: Residual, arrangement: LayerArrangement, twin: Residual) -> Residual:
    """A mirrored twin, after both have grown."""
    mirrored = arrangement.mirror(twin)
    drift(twin)
    depth = arrangement.depth
    source = DEPTH_OPERATORS["stack"](depth, 4)
    arrangement.arrange(FULL, source)
    mirrored.arrange(FULL, source)
    return twin


# -- mirrors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EARLIER)
@pytest.mark.parametrize("taken_when", ["complete", "in_this_form"])
def test_a_mirrored_copy_takes_the_same_form_g8(form: tuple[int, ...], taken_when: str, batch: Tensor) -> None:
    network = Residual(4, layer=BatchNormLayer).double()
    arrangement = arrangement_of(network)
    twin = copy.deepcopy(network) if taken_when == "complete" else None
    arrangement.arrange(form)
    twin = twin or copy.deepcopy(network)
    mirrored = arrangement.mirror(twin)
    assert mirrored.leaders == form
    assert list(twin.state_dict()) == list(network.state_dict())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in network.named_parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    assert twin(batch).shape == (5, 2)


@pytest.mark.parametrize("form", EARLIER[:3])
def test_a_mirrored_copy_grows_from_its_own_values_g8(form: tuple[int, ...], batch: Tensor) -> None:
    network = Residual(4).double()
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    twin = copy.deepcopy(network)
    mirrored = arrangement.mirror(twin)
    drift(twin)
    values = [copied(layer.state_dict()) for layer in twin.layers]
    output = twin(batch)
    source = DEPTH_OPERATORS["stack"](len(form), 4)
    arrangement.arrange(FULL, source)
    mirrored.arrange(FULL, source)
    for i in range(4):
        assert same(twin.layers[i].state_dict(), values[source[i]])
    if len(form) == 4:
        assert torch.equal(twin(batch), output)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in network.parameters()}
    assert len({p.data_ptr() for p in twin.layers.parameters()}) == 16


def test_mirroring_leaves_the_module_as_it_was_g8(batch: Tensor) -> None:
    network = Residual(4).double()
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    before, output = dict(network.named_parameters()), network(batch)
    twin = copy.deepcopy(network)
    grown_twin(network, arrangement, twin)
    assert all(network.get_parameter(name) is parameter for name, parameter in before.items())
    assert torch.equal(network(batch), network(batch))
    assert output.shape == (5, 2)


@pytest.mark.parametrize("form", EARLIER[:3])
def test_ties_inside_layers_of_a_mirrored_copy_stay_ties_g8(form: tuple[int, ...]) -> None:
    network = Residual(4, layer=TiedInside).double()
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    twin = grown_twin(network, arrangement, copy.deepcopy(network))
    assert all(layer.up.weight is layer.down.weight for layer in twin.layers)


@pytest.mark.parametrize("form", EARLIER[:3])
def test_a_parameter_tied_across_layers_is_tied_in_the_mirrored_copy_g8(form: tuple[int, ...]) -> None:
    """A relative bias that all layers use: the copy's new layers must use the copy's one, with its values."""
    network = tied_across()
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    twin = grown_twin(network, arrangement, copy.deepcopy(network))
    shared = twin.layers[0].relative.weight
    assert shared is not network.layers[0].relative.weight
    assert all(layer.relative.weight is shared for layer in twin.layers)


def test_layers_that_are_one_module_object_can_be_mirrored_g7() -> None:
    """ALBERT: one layer, registered six times. There is nothing to tie, and nothing may break."""
    network = Residual(4)
    network.layers = torch.nn.ModuleList([network.layers[0]] * 4)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 0, 0, 0))
    twin = copy.deepcopy(network)
    assert arrangement.mirror(twin).leaders == (0, 0, 0, 0)


@pytest.mark.parametrize("form", EARLIER[:3])
def test_averaged_copies_take_every_form_of_the_growing_module_g8(form: tuple[int, ...], batch: Tensor) -> None:
    network, twin = Residual(4).double(), Residual(4).double()
    growing = GrowingModule(network, arrangement_of(network))
    for _ in range(2):  # a copy that is known already is not taken twice
        growing.mirror([twin])
    growing.restore(form, "wide")
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in network.named_parameters()]
    output = twin(batch)
    growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in network.named_parameters()]
    assert torch.equal(twin.layers[3].linear.weight, twin.layers[3 % len(form)].linear.weight) or len(form) == 4
    assert torch.equal(twin(batch), output) or len(form) == 2
    assert not torch.equal(twin.layers[0].linear.weight, network.layers[0].linear.weight)


# -- the full model, for the user's eyes -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EARLIER)
def test_expanded_shows_every_parameter_once_under_its_full_name_g8(form: tuple[int, ...]) -> None:
    network = Residual(4)
    full = [(name, p.shape) for name, p in network.named_parameters()]
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    held = bytes_held(network.parameters())
    with arrangement.expanded() as names:
        assert [(name, p.shape) for name, p in network.named_parameters()] == full
        assert [names[id(p)] for p in network.parameters()] == [name for name, _ in full]
        assert bytes_held(network.parameters()) <= held + 64 * len(full)


@pytest.mark.parametrize("form", EARLIER)
@pytest.mark.parametrize("fails", [False, True])
def test_expanded_gives_the_form_back_also_after_an_error_g8(form: tuple[int, ...], fails: bool, batch: Tensor) -> None:
    network = Residual(4).double()
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    before, output = dict(network.named_parameters(remove_duplicate=False)), network(batch)
    try:
        with arrangement.expanded():
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = dict(network.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(network(batch), output)


def test_live_parameters_are_themselves_in_the_expanded_model_g8() -> None:
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1, 0, 1))
    live = dict(network.named_parameters())
    with arrangement.expanded():
        assert all(network.get_parameter(name) is parameter for name, parameter in live.items())
        assert network.layers[2].linear.weight is not network.layers[0].linear.weight


@pytest.mark.parametrize("form", EARLIER)
def test_ties_inside_layers_are_seen_as_ties_in_the_expanded_model_g8(form: tuple[int, ...]) -> None:
    """``named_parameters`` of the full model names a tied weight once; so must it here."""
    network = Residual(4, layer=TiedInside)
    full = [name for name, _ in network.named_parameters()]
    arrangement = arrangement_of(network)
    arrangement.arrange(form)
    with arrangement.expanded():
        assert [name for name, _ in network.named_parameters()] == full
