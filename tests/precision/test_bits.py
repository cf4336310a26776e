"""Few bits where they are enough, more where their error is too large (P12)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.precision.bits import AdaptiveBits
from lightning_efficient.precision.signs import quantization_error
from tests.precision.test_engine import LowBits, learnt, plain


@pytest.mark.parametrize(("error", "few"), [(0.0299, True), (0.0301, False)])
def test_an_error_just_over_the_limit_takes_more_bits_p12(error: float, few: bool) -> None:
    bits = AdaptiveBits()
    bits.look(0, error, 3)
    assert bits.few is few


def test_a_steady_tensor_is_looked_at_rarely_and_another_often_p12() -> None:
    steady, moving, wrong = AdaptiveBits(), AdaptiveBits(), AdaptiveBits()
    steady.look(7, 0.0, 3)
    assert steady.due == 207
    for batch, exponent in enumerate((3, 8)):
        moving.look(batch, 0.0, exponent)
    wrong.look(7, 0.2, 3)
    assert moving.due == 2  # 0.1 / (0.04 * 4.8) - 2, and one at least
    assert wrong.due == 8
    steady.look(207, 0.01, 3)
    assert steady.due == 207 + 8  # 0.1 / (100 * 0.01 ** 2) - 2


def test_zeros_tell_nothing_p12() -> None:
    bits = AdaptiveBits()
    bits.look(3, None, None)
    assert bits.state_dict() == AdaptiveBits().state_dict()


def heavy(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Most numbers vanish in 8 bits beside the largest."""
    values = torch.randn(shape, generator=generator)
    values[0, 0] = 3000.0
    return values


def test_only_products_of_the_tensor_that_needs_it_have_more_bits_p12() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8))
    x, outliers = torch.randn(64, 24), heavy((64, 24), generator)
    scaled = quantization_error(float(outliers.abs().sum()), 3000.0)
    assert scaled is not None
    assert scaled > 0.03
    bits = LowBits(module, adaptive=True)
    learnt(bits, lambda: module(x).square().mean())
    bits.step(lambda: module(x).square().mean())
    assert all(node.products["forward"].status.low == 1 for node in bits.nodes.values()), "few are enough"
    for node in bits.nodes.values():  # all else is healthy
        for tracker in node.tensors.values():
            tracker.limits.underflow = tracker.limits.exponent_range = 1000.0
        node.bits["input"].due = 0
        for product in node.products.values():
            product.allowed = product.result.limits.exponent_range = 1000.0
    value, gradients = bits.step(lambda: module(outliers).square().mean())
    first = bits.nodes["0"]
    assert not first.bits["input"].few
    assert first.bits["weight"].few
    assert not bits.engine.retries
    assert first.products["forward"].status.low == 1
    assert first.needs_more("grad_weight", bits.engine.batch - 1)
    exact, plain_gradients = plain(module, lambda: module(outliers).square().mean())
    assert float((value - exact).abs() / exact) < 0.03
    name = "0.weight"
    assert float((gradients[name] - plain_gradients[name]).norm() / plain_gradients[name].norm()) < 0.03


def test_what_is_known_is_kept_p12() -> None:
    one, other = AdaptiveBits(), AdaptiveBits()
    one.look(4, 0.1, 5)
    other.load_state_dict(one.state_dict())
    for bits in (one, other):
        bits.look(9, 0.01, 7)
    assert one.state_dict() == other.state_dict()
    careful = AdaptiveBits()
    careful.agree([max(pair) for pair in zip(one.agreed(), AdaptiveBits().agreed(), strict=True)])
    assert careful.few is one.few
