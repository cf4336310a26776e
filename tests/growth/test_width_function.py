"""The wide model computes what the narrow one did, in float64, for every kind of network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient.growth.width import mixing, plan_width, shares
from tests.growth.wide_networks import (
    Build,
    ConvNet,
    CrossAttention,
    Plain,
    PlainTied,
    TorchEncoder,
    TwoTables,
    byte_transformer,
    fill,
    images,
    nano_gpt,
    outside_of,
    randomised,
    tokens,
    widened,
)

FACTORS = [2, 3]


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def assert_preserved(build: Build, factor: int, **options: Any) -> None:
    narrow, wide, _ = widened(build, factor, **options)
    error = relative_error(narrow(tokens()), wide(tokens()))
    assert error < 1e-12


# -- the blocks of shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", range(2, 9))
def test_shares_are_stationary_under_the_mixing_and_uneven_g4(factor: int) -> None:
    p, a = shares(factor), mixing(factor)
    torch.testing.assert_close(a.sum(1), torch.ones(factor, dtype=torch.float64))
    torch.testing.assert_close(a.T @ p, p)
    torch.testing.assert_close(p.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (p[1:] - p[:-1]).min() > 0
    assert (a > 0).all()


# -- function ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_byte_transformer_g4_g7(kind: str, norm: str, mlp: str, kv_heads: int | None, tied: bool, factor: int) -> None:
    assert_preserved(byte_transformer(kind=kind, norm=norm, mlp=mlp, kv_heads=kv_heads, tied=tied), factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("tie", ["module", "untied"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_query_key_value_g4(tie: str, transposed: bool, factor: int) -> None:
    assert_preserved(nano_gpt(tie=tie, transposed=transposed), factor)


@pytest.mark.parametrize("factor", FACTORS)
def test_fused_projection_of_another_name_by_sections_g4(factor: int) -> None:
    assert_preserved(nano_gpt(name="mixed"), factor, sections={"mixed": 3})


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["mixed", "c_attn"])
def test_fused_grouped_query_attention_by_relative_sections_g4(name: str, factor: int) -> None:
    assert_preserved(nano_gpt(name=name, kv_heads=1), factor, sections={name: [2, 1, 1]})


def test_a_fused_projection_that_is_not_named_does_change_the_function_g4() -> None:
    """The control: the fused network would notice a wrong rule."""
    narrow, wide, _ = widened(nano_gpt(name="mixed"), 2)
    assert relative_error(narrow(tokens()), wide(tokens())) > 1e-3


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_g4_g7(norm_first: bool, factor: int) -> None:
    assert_preserved(lambda k: TorchEncoder(k, norm_first), factor)


@pytest.mark.parametrize("factor", FACTORS)
def test_torchs_attention_over_keys_that_do_not_grow_g4(factor: int) -> None:
    assert_preserved(CrossAttention, factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("build", [Plain, PlainTied])
def test_networks_without_layer_norm_g4(build: Build, factor: int) -> None:
    assert_preserved(build, factor, **({"readout": "final"} if build is PlainTied else {}))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("training", [True, False])
def test_convolutional_network_with_batch_norm_g4_g7(training: bool, factor: int) -> None:
    narrow, wide, _ = widened(ConvNet, factor)
    narrow.train(training), wide.train(training)
    assert relative_error(narrow(images()), wide(images())) < 1e-12


@pytest.mark.parametrize("factor", FACTORS)
def test_a_classifier_keeps_its_bias_g4(factor: int) -> None:
    narrow, wide, plan = widened(lambda k: TorchEncoder(k, True), factor)
    assert plan["head.bias"].exact_copy
    assert torch.equal(wide.head.bias, narrow.head.bias)


@pytest.mark.parametrize("factor", FACTORS)
def test_an_embedding_shared_by_two_tables_is_no_tied_head_g4_g7(factor: int) -> None:
    assert_preserved(TwoTables, factor)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_head_tied_inside_forward_is_preserved_where_readout_names_its_norm_g4(factor: int) -> None:
    """``F.linear(x, wte.weight)`` cannot be seen from outside; naming the norm is all that a user can do."""
    assert_preserved(nano_gpt(tie="functional"), factor, readout="ln_f")


@pytest.mark.parametrize("factor", FACTORS)
def test_readout_may_be_named_where_it_would_be_found_g4(factor: int) -> None:
    assert_preserved(nano_gpt(), factor, readout="ln_f")


def test_growth_can_be_repeated_g4() -> None:
    """Once wide, the network can be the narrow one of the next growth."""
    narrow, wide, _ = widened(byte_transformer(), 2)
    wider = byte_transformer()(4).double()
    fill(wide, wider, plan_width(wide, wider, 2, after_layers=outside_of(wide)))
    assert relative_error(narrow(tokens()), wider(tokens())) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_dtype_and_are_new_tensors_g4(dtype: torch.dtype) -> None:
    narrow, wide = randomised(byte_transformer()(1)).to(dtype), byte_transformer()(2)
    for name, operator in plan_width(narrow, wide, 2, after_layers=outside_of(narrow)).items():
        source = narrow.get_parameter(name).detach()
        for made in (operator.weight(source), operator.moment(source, 1), operator.moment(source, 0)):
            assert (made.dtype, made.shape) == (dtype, wide.get_parameter(name).shape), name
            assert made.is_contiguous()
            assert made.data_ptr() != source.data_ptr()


def test_function_is_preserved_only_where_heads_grow_with_the_width_g4() -> None:
    """The control for attention: the same width with heads twice as large scales the scores differently."""

    def same_heads(k: int) -> nn.Module:
        return byte_transformer(heads=2)(1) if k == 1 else byte_transformer(heads=1)(2)

    narrow, wide, _ = widened(same_heads, 2)
    assert relative_error(narrow(tokens()), wide(tokens())) > 1e-3
