"""Cutting, sharing, growing and unsharing layers in place: values, objects, names and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.growth.arrangement import LayerArrangement, group_sizes
from lightning_efficient.growth.checks import check_depth_can_change, check_layers_still_equal
from lightning_efficient.growth.layers import find_stacks
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.sharing import sharing_leaders
from tests.growth.networks import Layer, Residual, arrangement_of, bytes_held, copied, same

FULL = tuple(range(6))
SHARED = [(0,) * 6, (0, 1, 0, 1, 0, 1), (0, 0, 2, 2, 4, 4), (0, 0, 0, 3, 4, 4)]


def classes_that_run(module: nn.Module, batch: Tensor) -> tuple[list[str], Tensor]:
    """The computation graph as the modules see it: path and class of each call, in order; and the output."""
    calls: list[str] = []
    handles = [
        sub.register_forward_pre_hook(lambda sub, args, path=path: calls.append(f"{path}:{type(sub).__name__}"))
        for path, sub in module.named_modules()
    ]
    output = module(batch)
    for handle in handles:
        handle.remove()
    return calls, output


# -- sharing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaders", SHARED)
def test_sharers_are_one_object_g1(net: Residual, leaders: tuple[int, ...]) -> None:
    arrangement_of(net).arrange(leaders)
    for i, leader in enumerate(leaders):
        assert net.layers[i] is not net.layers[leader] or i == leader
        for name, parameter in net.layers[i].named_parameters():
            assert parameter is net.layers[leader].get_parameter(name)


@pytest.mark.parametrize("leaders", SHARED)
def test_shared_model_has_all_state_dict_keys_and_the_memory_of_its_leaders_g1(
    net: Residual, leaders: tuple[int, ...]
) -> None:
    keys, full_bytes = list(net.state_dict()), bytes_held(net.layers.parameters())
    arrangement_of(net).arrange(leaders)
    assert list(net.state_dict()) == keys
    assert bytes_held(net.layers.parameters()) == full_bytes * len(set(leaders)) // 6


@pytest.mark.parametrize("leaders", SHARED)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_unsharing_changes_no_bit_of_the_output_and_runs_the_same_graph_g2(leaders: tuple[int, ...], kind: str) -> None:
    model = ByteTransformer(layers=6, width=8, heads=2, context=5, vocabulary=11, kind=kind)
    tokens = torch.randint(0, 11, (2, 5))
    arrangement = arrangement_of(model)
    arrangement.arrange(leaders)
    calls, output = classes_that_run(model, tokens)
    arrangement.arrange(FULL)
    calls_after, output_after = classes_that_run(model, tokens)
    assert calls_after == calls
    assert torch.equal(output_after, output)
    assert len({id(p) for p in model.blocks.parameters()}) == 6 * len(list(model.blocks[0].parameters()))


def test_unsharing_in_two_stages_changes_no_bit_g2(net: Residual, batch: Tensor) -> None:
    arrangement = arrangement_of(net)
    arrangement.arrange(sharing_leaders(6, "cycle", 1))
    output = net(batch)
    for leaders in (sharing_leaders(6, "cycle", 3), FULL):
        arrangement.arrange(leaders)
        assert torch.equal(net(batch), output)


def test_leaders_keep_their_object_and_others_get_new_memory_g2(shared_net: tuple) -> None:
    network, arrangement = shared_net
    leaders = [network.layers[i].linear.weight for i in (0, 1)]
    arrangement.arrange(FULL)
    assert [network.layers[i].linear.weight for i in (0, 1)] == leaders
    assert len({layer.linear.weight.data_ptr() for layer in network.layers}) == 6


def test_one_transfer_for_each_distinct_parameter_g2(shared_net: tuple) -> None:
    network, arrangement = shared_net
    transfers = arrangement.arrange(FULL)
    assert {id(t.target) for t in transfers} == {id(p) for p in network.layers.parameters()}
    assert len(transfers) == len({id(t.target) for t in transfers})
    assert all(t.operator.exact_copy for t in transfers)


@pytest.mark.parametrize(("leaders", "scale"), [((0, 1, 0, 1, 0, 1), 1), (FULL, 1 / 3), ((0, 1, 2, 1, 2, 1), None)])
def test_summed_gradient_scales_by_the_sizes_of_the_groups_g2(
    shared_net: tuple, leaders: tuple[int, ...], scale: float | None
) -> None:
    network, arrangement = shared_net
    transfers = arrangement.arrange(leaders, leaders, summed_gradient=True)
    gradient = {id(t.target): t.operator.gradient for t in transfers}
    for i, leader in enumerate(leaders):
        expected = leaders.count(leader) / 3 if scale is None else scale
        assert gradient[id(network.layers[i].linear.weight)] == pytest.approx(expected, rel=1e-15)


def test_group_sizes() -> None:
    assert group_sizes((0, 1, 0, 1, 0, 5)) == {0: 3, 1: 2, 5: 1}


# -- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEPTH_OPERATORS)
@pytest.mark.parametrize(("old", "new"), [(1, 6), (2, 4), (2, 6), (3, 5), (4, 6), (5, 6)])
def test_grown_layers_are_exact_copies_by_the_map_g3(net: Residual, name: str, old: int, new: int) -> None:
    arrangement = arrangement_of(net)
    arrangement.arrange(tuple(range(old)))
    sources = [copied(layer.state_dict()) for layer in net.layers]
    assert len(sources) == old
    around = copied(net.embed.state_dict())
    arrangement.arrange(tuple(range(new)), DEPTH_OPERATORS[name](old, new))
    assert len(net.layers) == new
    for i, source in enumerate(DEPTH_OPERATORS[name](old, new)):
        assert same(net.layers[i].state_dict(), sources[source]), (i, source)
    assert same(net.embed.state_dict(), around)
    assert len({p.data_ptr() for p in net.layers.parameters()}) == 4 * new


def test_interleave_overwrites_existing_parameters_with_the_values_before_g3(net: Residual) -> None:
    """Targets that are sources of others too: layer 1 is overwritten by 0, and is itself the source of 2 and 3."""
    arrangement = arrangement_of(net)
    arrangement.arrange((0, 1, 2))
    objects = [layer.linear.weight for layer in net.layers]
    values = [weight.detach().clone() for weight in objects]
    arrangement.arrange(FULL, (0, 0, 1, 1, 2, 2))
    assert [net.layers[i].linear.weight for i in range(3)] == objects
    assert all(torch.equal(net.layers[i].linear.weight, values[i // 2]) for i in range(6))


def test_a_permutation_of_live_layers_is_simultaneous_g3(net: Residual) -> None:
    values = [layer.linear.weight.detach().clone() for layer in net.layers]
    arrangement_of(net).arrange(FULL, (5, 4, 3, 2, 1, 0))
    assert all(torch.equal(net.layers[i].linear.weight, values[5 - i]) for i in range(6))


def test_shallow_model_is_the_plain_shallow_model_g3(net: Residual, batch: Tensor) -> None:
    full = copied(net.state_dict())
    arrangement_of(net).arrange((0, 1))
    plain = Residual(2).double()
    plain.load_state_dict({name: full[name] for name in plain.state_dict()})
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net(batch), plain(batch))


def test_layers_that_are_not_live_take_no_memory_g3() -> None:
    network = Residual(6, width=32)
    arrangement = arrangement_of(network)
    layers = arrangement.layers[0]
    arrangement.arrange((0, 1))
    for layer in layers[2:]:
        assert all(p.untyped_storage().nbytes() == p.element_size() for p in layer.parameters())
    assert arrangement.depth == 2


def test_embed_and_head_in_one_sequential_stay_at_its_ends_g3() -> None:
    model = nn.Sequential(nn.Linear(3, 4), *(Layer(4) for _ in range(4)), nn.Linear(4, 2))
    arrangement = arrangement_of(model)
    check_depth_can_change(arrangement)
    arrangement.arrange((0,))
    assert list(model._modules) == ["0", "1", "5"]
    assert model(torch.randn(2, 3)).shape == (2, 2)
    arrangement.arrange(tuple(range(4)))
    assert list(model._modules) == list("012345")
    assert list(model.state_dict())[-1] == "5.bias"


def test_torchs_own_encoder_shrinks_and_grows_g7() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    arrangement = arrangement_of(model)
    check_depth_can_change(arrangement)
    keys = list(model.state_dict())
    arrangement.arrange((0,))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), model.layers[0](x))
    arrangement.arrange(tuple(range(4)))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), model.layers[3](model.layers[2](model.layers[1](model.layers[0](x)))))


def test_encoder_and_decoder_grow_together_g7(batch: Tensor) -> None:
    model = nn.ModuleDict({"encoder": Residual(4), "decoder": Residual(4)}).double()
    arrangement = arrangement_of(model, "layers.*")
    arrangement.arrange((0, 1))
    assert (len(model["encoder"].layers), len(model["decoder"].layers)) == (2, 2)
    arrangement.arrange((0, 1, 2, 3))
    for side in model.values():
        assert same(side.layers[3].state_dict(), side.layers[1].state_dict())
    assert not torch.equal(model["encoder"].layers[3].linear.weight, model["decoder"].layers[3].linear.weight)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_stacks_of_different_length_are_refused() -> None:
    model = nn.ModuleDict({"encoder": Residual(2), "decoder": Residual(3)})
    with pytest.raises(ValueError, match=r"same number of layers, got encoder\.layers.*2 layers.*3 layers"):
        arrangement_of(model, "layers.*")


def test_a_list_that_goes_on_after_the_layers_is_refused_for_depth() -> None:
    model = Residual(3)
    model.layers.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'layers' \(ModuleList\) holds other modules after the repeated layers"):
        check_depth_can_change(arrangement_of(model))


def test_layers_held_as_attributes_are_refused_for_depth() -> None:
    model = nn.Module()
    model.first, model.second = Layer(4), Layer(4)
    with pytest.raises(ValueError, match=r"'' \(Module\) holds them as attributes"):
        check_depth_can_change(arrangement_of(model))


def test_lazy_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(3))
    stacks = [type(find_stacks(Residual(2))[0])("", ("0", "1"))]
    with pytest.raises(ValueError, match=r"'0\.weight' is a lazy parameter"):
        LayerArrangement(model, stacks)


def test_sharded_parameters_are_refused_by_name() -> None:
    model = Residual(2)
    model.layers[1].linear.weight.placements = ("a DTensor has these",)
    with pytest.raises(ValueError, match=r"'layers\.1\.linear\.weight' is sharded"):
        arrangement_of(model)


def test_a_class_that_others_changed_in_the_live_layers_is_noticed(net: Residual) -> None:
    arrangement = arrangement_of(net)
    arrangement.arrange((0, 1))
    check_layers_still_equal(arrangement)
    net.layers[1].linear = nn.Sequential(net.layers[1].linear)
    with pytest.raises(ValueError, match=r"'layers\.1' no longer has the structure of 'layers\.0'"):
        check_layers_still_equal(arrangement)


def test_a_network_that_an_earlier_run_left_shortened_is_refused_g3() -> None:
    """Nobody else could know that layers are missing."""
    network = Residual(4)
    arrangement = arrangement_of(network)
    arrangement.arrange((0, 1))
    with pytest.raises(ValueError, match=r"'layers' was left with 2 of its 4 layers"):
        arrangement_of(network)
    arrangement.arrange((0, 1, 2, 3))
    arrangement_of(network)
