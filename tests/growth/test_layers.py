"""Finding the repeated layers: by structure, by name, and what is said where it cannot be done."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.growth.layers import LayerStack, find_stacks, signature
from tests.growth.networks import Layer, Residual


class MixtureLayer(nn.Module):
    """Fewer layers than experts in each."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(4, experts)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))


class EncoderDecoder(nn.Module):
    def __init__(self, encoder: int, decoder: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(4) for _ in range(encoder))})
        self.decoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(4) for _ in range(decoder))})


def stack(parent: str, *keys: object) -> LayerStack:
    return LayerStack(parent, tuple(map(str, keys)))


# -- without a name ----------------------------------------------------------------------------------------------------


def test_finds_the_blocks_of_a_decoder_g7() -> None:
    model = ByteTransformer(layers=3, width=8, heads=2, context=4)
    assert find_stacks(model) == [stack("blocks", 0, 1, 2)]


def test_finds_the_layers_of_torchs_own_encoder_g7() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False))
    assert find_stacks(model) == [stack("1.layers", 0, 1, 2, 3)]


def test_finds_layers_between_embed_and_head_in_one_sequential_g7() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), *(Layer(4) for _ in range(3)), nn.Linear(4, 9))
    assert find_stacks(model) == [stack("", 1, 2, 3)]


def test_finds_deeply_nested_layers_with_names_like_hugging_faces_g7() -> None:
    encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(4) for _ in range(3))})
    model = nn.ModuleDict({"bert": nn.ModuleDict({"embeddings": nn.Embedding(9, 4), "encoder": encoder})})
    assert find_stacks(model) == [stack("bert.encoder.layer", 0, 1, 2)]
    assert find_stacks(model, "encoder.layer.*") == find_stacks(model)


def test_experts_are_not_chosen_over_the_layers_that_hold_them() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(MixtureLayer(experts=8) for _ in range(2))})
    assert find_stacks(model) == [stack("layers", 0, 1)]


def test_of_several_runs_the_longest_wins() -> None:
    assert find_stacks(EncoderDecoder(2, 3)) == [stack("decoder.layer", 0, 1, 2)]


@pytest.mark.parametrize("wide_first", [True, False])
def test_of_equally_long_runs_the_one_with_the_most_parameters_wins(wide_first: bool) -> None:
    runs = OrderedDict(wide=nn.ModuleList(Layer(8) for _ in range(3)), slim=nn.ModuleList(Layer(4) for _ in range(3)))
    model = nn.ModuleDict(OrderedDict(sorted(runs.items(), reverse=wide_first)))
    assert find_stacks(model) == [stack("wide", 0, 1, 2)]


def test_siblings_without_parameters_are_no_layers() -> None:
    with pytest.raises(ValueError, match=r"No repeated layers were found in Sequential.*layers='encoder\.layer\.\*'"):
        find_stacks(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(2, 2)))


def test_equal_modules_that_are_not_consecutive_are_no_run() -> None:
    with pytest.raises(ValueError, match="No repeated layers"):
        find_stacks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["layer.*", "encoder.layer.*", ["encoder.layer.*", "layer.[0-1]"]])
def test_pattern_matches_from_the_end_component_by_component(pattern: str | list[str]) -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(4) for _ in range(2))})})
    assert find_stacks(model, pattern) == [stack("encoder.layer", 0, 1)]


def test_pattern_gives_one_stack_for_each_parent_g7() -> None:
    found = find_stacks(EncoderDecoder(2, 2), "layer.*")
    assert found == [stack("encoder.layer", 0, 1), stack("decoder.layer", 0, 1)]
    assert find_stacks(EncoderDecoder(2, 3), ["encoder.layer.*", "decoder.layer.*"])[1] == stack(
        "decoder.layer", 0, 1, 2
    )


def test_pattern_may_name_some_of_the_layers() -> None:
    assert find_stacks(Residual(6), "layers.[1-4]") == [stack("layers", 1, 2, 3, 4)]


def test_one_list_registered_under_two_names_is_one_stack() -> None:
    """A module that keeps an alias (``self.layers = self.backbone.layers``) has its layers once."""
    model = nn.Module()
    model.backbone = Residual(3)
    model.layers = model.backbone.layers
    assert len(find_stacks(model, "layers.*")) == 1


def test_pattern_without_a_match_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"layers='blocks\.\*' matches no module.*layers\.\{0\.\.2\} \(3 layers\)"):
        find_stacks(Residual(3), "blocks.*")


def test_pattern_with_one_match_is_refused_by_its_path() -> None:
    with pytest.raises(ValueError, match=r"only one layer, 'layers\.1'"):
        find_stacks(Residual(3), "layers.1")


def test_layers_with_others_between_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in 'layers' are not consecutive.*'0', '2'"):
        find_stacks(Residual(3), "layers.[02]")


@pytest.mark.parametrize(
    ("replacement", "difference"),
    [
        (Layer(8), r"in 'norm': parameters .*8.* instead of .*4"),
        (nn.Linear(4, 4), "Linear instead of Layer"),
        (nn.Sequential(OrderedDict(norm=nn.LayerNorm(4))), "Sequential instead of Layer"),
    ],
)
def test_unequal_layers_are_refused_naming_path_and_difference(replacement: nn.Module, difference: str) -> None:
    model = Residual(3)
    model.layers[2] = replacement
    with pytest.raises(ValueError, match=rf"'layers\.2' differs in structure from 'layers\.0' \({difference}"):
        find_stacks(model, "layers.*")


def test_a_child_more_is_named() -> None:
    model = Residual(3)
    model.layers[1].gate = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'layers\.1' differs.*child 'gate' is in only one of them"):
        find_stacks(model, "layers.*")


def test_a_missing_bias_makes_layers_unequal() -> None:
    assert signature(nn.Linear(2, 2)) != signature(nn.Linear(2, 2, bias=False))
    assert signature(nn.Linear(2, 2)) == signature(nn.Linear(2, 2))
    assert signature(nn.BatchNorm1d(2)) != signature(nn.BatchNorm1d(2, track_running_stats=False))


def test_paths_and_text_of_a_stack() -> None:
    assert stack("a.b", 0, 1).path(1) == "a.b.1"
    assert stack("", 3, 4).path(0) == "3"
    assert str(stack("a", 0, 1, 2)) == "a.{0..2} (3 layers)"
