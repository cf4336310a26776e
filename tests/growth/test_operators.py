"""The maps from shallow to deep, against their definitions in the papers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_efficient.growth.operators import DEPTH_OPERATORS, Scaled, Transfer, hollow, like

SIZES = [(old, new) for old in range(1, 13) for new in range(old, 13)]
"""Growth never shrinks."""


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_stack_repeats_the_whole_model_g3(old: int, new: int) -> None:
    """Gong et al. 2019, Alg. 1: the small model on top of itself, until there are enough layers."""
    expected: list[int] = []
    while len(expected) < new:
        expected += list(range(old))
    assert DEPTH_OPERATORS["stack"](old, new) == tuple(expected[:new])


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_interleave_is_the_floor_of_the_relative_place_g3(old: int, new: int) -> None:
    """In integers: the largest ``j`` with ``j / old <= i / new``."""
    expected = tuple(max(j for j in range(old) if j * new <= i * old) for i in range(new))
    assert DEPTH_OPERATORS["interleave"](old, new) == expected


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_middle_repeats_one_block_between_first_and_last_layers_g3(old: int, new: int) -> None:
    block = max(1, old // 2)
    head = list(range((old - block) // 2))
    repeated = list(range(len(head), len(head) + block))
    tail = list(range(len(head) + block, old))
    expected = [*head, *(repeated * new)[: new - len(head) - len(tail)], *tail]
    assert DEPTH_OPERATORS["middle"](old, new) == tuple(expected)


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("name", DEPTH_OPERATORS)
def test_every_layer_is_used_and_none_is_invented_g3(name: str, old: int, new: int) -> None:
    sources = DEPTH_OPERATORS[name](old, new)
    assert len(sources) == new
    assert set(sources) == set(range(old))
    assert sources[0] == 0


@pytest.mark.parametrize("name", DEPTH_OPERATORS)
@pytest.mark.parametrize("depth", range(1, 13))
def test_no_growth_changes_nothing_g3(name: str, depth: int) -> None:
    assert DEPTH_OPERATORS[name](depth, depth) == tuple(range(depth))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_interleave_keeps_the_order_and_spreads_evenly_g3(old: int, new: int) -> None:
    sources = DEPTH_OPERATORS["interleave"](old, new)
    counts = [sources.count(i) for i in range(old)]
    assert list(sources) == sorted(sources)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("old", "new"), [(o, n) for o, n in SIZES if o > 1])
def test_middle_keeps_first_and_last_g3(old: int, new: int) -> None:
    sources = DEPTH_OPERATORS["middle"](old, new)
    assert (sources[0], sources[-1]) == (0, old - 1)


@pytest.mark.parametrize(("factor", "order", "expected"), [(1, 2, 3.0), (0.5, 1, 1.5), (0.5, 2, 0.75), (0.5, 0, 3.0)])
def test_scaled_is_homogeneous(factor: float, order: int, expected: float) -> None:
    source = torch.full((2,), 3.0)
    moment = Scaled(factor).moment(source, order)
    assert moment.tolist() == [expected] * 2
    assert moment.data_ptr() != source.data_ptr()
    assert torch.equal(Scaled(factor).weight(source), source)


def test_transfer_has_nothing_to_do_only_for_the_same_object_unscaled() -> None:
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert Transfer(one, one, Scaled()).nothing_to_do
    assert not Transfer(one, other, Scaled()).nothing_to_do
    assert not Transfer(one, one, Scaled(0.5)).nothing_to_do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hollow_has_the_looks_but_no_memory(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(1000, 10, dtype=dtype), requires_grad=False)
    parameter.no_decay = True
    stand_in = hollow(parameter)
    assert (stand_in.shape, stand_in.dtype, stand_in.requires_grad) == (parameter.shape, dtype, False)
    assert stand_in.no_decay
    assert stand_in.untyped_storage().nbytes() == dtype.itemsize
    assert isinstance(stand_in, nn.Parameter)


def test_like_keeps_attributes_and_requires_grad() -> None:
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    parameter.optim = {"lr": 0.1}
    new = like(parameter, torch.ones(3))
    assert not new.requires_grad
    assert new.optim is parameter.optim
