"""What cannot be widened is refused by name, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.growth.narrow import build_narrow, narrow_arguments
from lightning_efficient.growth.width import WidthError, plan_width
from tests.growth.wide_networks import TOKENS, NanoGpt, byte_transformer, nano_gpt, outside_of


class Recurrent(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 4 * k)
        self.lstm = nn.LSTM(4 * k, 4 * k)


class Experts(nn.Module):
    """Weights of several experts in one tensor of three axes."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(5, 4 * k, 8 * k))


class NoNormBeforeHead(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 4 * k)
        self.head = nn.Linear(4 * k, TOKENS, bias=False)
        self.head.weight = self.embed.weight


class NormOfEmbeddingsOnly(nn.Module):
    """BERT's layout without a head transform: the only norm outside the layers stands before them."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8 * k)
        self.norm = nn.LayerNorm(8 * k)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(8 * k, 2 * k, 8 * k, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8 * k, TOKENS, bias=False)
        self.head.weight = self.embed.weight


def refusal(narrow: nn.Module, wide: nn.Module, factor: int = 2, **options: Any) -> str:
    with pytest.raises(WidthError) as caught:
        plan_width(narrow, wide, factor, after_layers=outside_of(narrow), **options)
    return str(caught.value)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_an_axis_that_is_no_multiple_is_named_g4() -> None:
    message = refusal(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 6)))
    assert "'0.weight' has shape (4, 3) in the narrow model and (6, 3) in the wide one" in message
    assert "by the factor 2" in message


def test_a_growth_by_another_factor_is_named_g4() -> None:
    assert "by the factor 3" in refusal(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 8)), 3)


def test_a_model_of_other_depth_is_refused_by_its_extra_parameters_g4() -> None:
    message = refusal(byte_transformer(layers=1)(1), byte_transformer(layers=2)(2))
    assert "other parameters" in message
    assert "blocks.1." in message


def test_models_of_equal_width_are_refused_g4() -> None:
    assert "as wide as the wide one" in refusal(byte_transformer()(1), byte_transformer()(1))


# -- kinds of parameters -----------------------------------------------------------------------------------------------


def test_recurrent_layers_are_refused_g4() -> None:
    message = refusal(Recurrent(1), Recurrent(2))
    assert "'lstm.weight_ih_l0' belongs to a recurrent layer (LSTM)" in message


def test_an_axis_of_unknown_meaning_is_refused_g4() -> None:
    message = refusal(Experts(1), Experts(2))
    assert "'experts' (Experts, shape (5, 4, 8)) grows along axis 1" in message


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_whose_groups_do_not_grow_is_refused_g4(groups: int) -> None:
    """Copies lie side by side, so the groups of the wide one hold other channels than those of the narrow one."""

    def build(k: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(3, 8 * k, 1), nn.Conv1d(8 * k, 8 * k, 1, groups=groups), nn.Conv1d(8 * k, 3, 1))

    assert "'1.weight'" in refusal(build(1), build(2))


# -- the tied head -----------------------------------------------------------------------------------------------------


def test_a_tied_head_without_a_norm_is_refused_g4() -> None:
    message = refusal(NoNormBeforeHead(1), NoNormBeforeHead(2))
    assert "no norm stands before it" in message
    assert "readout" in message


def test_a_norm_before_the_layers_is_not_taken_for_the_one_before_the_head_g4_g7() -> None:
    assert "no norm stands before it" in refusal(NormOfEmbeddingsOnly(1), NormOfEmbeddingsOnly(2))


def test_a_norm_without_parameters_cannot_share_the_copies_out_g4() -> None:
    build = nano_gpt(affine=False)
    assert "readout='ln_f' has no scale along the width" in refusal(build(1), build(2), readout="ln_f")


def test_readout_that_names_a_linear_map_is_refused_g4() -> None:
    """Only a norm can share the copies out; a linear map would lose its input axis."""
    message = refusal(nano_gpt()(1), nano_gpt()(2), readout="attn.c_proj")
    assert "attn.c_proj" in message


def test_readout_that_names_nothing_is_refused_g4() -> None:
    assert "readout='ln_x' has no scale along the width" in refusal(nano_gpt()(1), nano_gpt()(2), readout="ln_x")


# -- sections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [5, [4, 3, 3]])
def test_sections_that_do_not_divide_the_outputs_are_refused_g4(sections: Any) -> None:
    message = refusal(nano_gpt()(1), nano_gpt()(2), sections={"c_attn": sections})
    weights = [1] * 5 if sections == 5 else sections
    assert f"'attn.c_attn.weight' has 24 outputs, which the sections {weights} do not divide" in message


# -- the narrow model's arguments --------------------------------------------------------------------------------------


def test_known_widths_are_found_and_divided_g4() -> None:
    given = {"width": 64, "heads": 4, "kv_heads": None, "layers": 8, "dropout": 0.1, "d_model": 32, "n_head": True}
    assert narrow_arguments(given, 2) == {"width": 32, "heads": 2, "d_model": 16}


def test_a_width_that_cannot_be_divided_is_named_g4() -> None:
    with pytest.raises(WidthError, match=r"\{'heads': 3\} cannot be divided by factor=2"):
        narrow_arguments({"width": 64, "heads": 3}, 2)


def test_a_module_without_known_widths_says_what_to_do_g4() -> None:
    with pytest.raises(WidthError, match=r"\['size'\] is known to be a width. Say .*'arguments': \{'size': 32\}"):
        narrow_arguments({"size": 64}, 2)
    with pytest.raises(WidthError, match=r"\[\] is known to be a width. Call save_hyperparameters.*'d_model'"):
        narrow_arguments({}, 2)


def test_unknown_arguments_of_the_constructor_are_refused_g4() -> None:
    with pytest.raises(WidthError, match=r"names \['breadth'\], but NanoGpt accepts .*'width'"):
        build_narrow(NanoGpt(8, 2), {}, 2, {"breadth": 4}, None)


@pytest.mark.parametrize("build", [3, "tests.growth.wide_networks.TOKENS"])
def test_build_that_is_no_function_is_refused_g4(build: Any) -> None:
    with pytest.raises(WidthError, match="not a function"):
        build_narrow(NanoGpt(8, 2), {}, 2, None, build)


@pytest.mark.parametrize("how", ["arguments", "found", "build", "path"])
def test_the_narrow_model_is_built_without_moving_the_random_stream_g4(how: str) -> None:
    options: dict[str, tuple[dict[str, int] | None, str | Callable[[], nn.Module] | None]] = {
        "arguments": ({"width": 8, "heads": 1}, None),
        "found": (None, None),
        "build": (None, lambda: NanoGpt(8, 1)),
        "path": (None, "tests.growth.test_width_errors.eight_wide"),
    }
    arguments, build = options[how]
    wide = NanoGpt(16, 2)
    state = torch.get_rng_state()
    narrow = build_narrow(wide, {"width": 16, "heads": 2, "unused": 1}, 2, arguments, build)
    assert torch.equal(torch.get_rng_state(), state)
    assert narrow.wte.embedding_dim == 8


def eight_wide() -> nn.Module:
    return NanoGpt(8, 1)
