"""Integers with a shared exponent against exact arithmetic (P5)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_efficient.precision.integers import LARGEST, largest_magnitude, multiply, to_integers
from lightning_efficient.precision.signs import shared_exponent


def encoded(values: Tensor) -> tuple[Tensor, int]:
    exponent = shared_exponent(largest_magnitude(values), 8) or 0
    return to_integers(values, exponent).codes, exponent


@pytest.mark.parametrize("scale", [1.0, 3e-5, 7e4, 2.0**-120, 1e-40, 1e38])
def test_a_code_is_the_nearest_multiple_of_the_exponents_step_p5(scale: float) -> None:
    values = torch.randn(300, 47) * scale
    codes, exponent = encoded(values)
    steps = values.double() * math.ldexp(1.0, exponent)
    assert codes.double().abs().max() >= 63
    assert torch.equal(codes.double(), steps.round().clamp(-LARGEST, LARGEST))


def test_what_is_beyond_becomes_the_largest_code_p9() -> None:
    codes = to_integers(torch.tensor([1000.0, -1000.0, 126.6, 0.0]), 0).codes
    assert codes.tolist() == [LARGEST, -LARGEST, LARGEST, 0]


def test_rounding_at_random_is_right_on_average_p5() -> None:
    noise = torch.rand(1 << 15, generator=torch.Generator().manual_seed(0))
    values = torch.full((1 << 15,), 3.3)
    codes = to_integers(values, 0, noise=noise).codes.float()
    assert set(codes.unique().tolist()) == {3.0, 4.0}
    assert float(codes.mean()) == pytest.approx(3.3, abs=0.02)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 5, 3), (64, 128, 96), (33, 257, 70_000 // 33)])
def test_products_are_exact_but_for_one_rounding_p5(rows: int, terms: int, columns: int, bias: bool) -> None:
    one, other = torch.randn(rows, terms), torch.randn(columns, terms) * 1e-3
    (a, qa), (b, qb) = encoded(one), encoded(other)
    added = torch.randn(columns) if bias else None
    exact = (a.double() @ b.double().t()) * math.ldexp(1.0, -(qa + qb))
    result = multiply(a, b.t(), qa + qb, added)
    assert result.dtype == torch.float32
    if added is None:
        assert torch.equal(result, exact.float())
    else:
        torch.testing.assert_close(result, (exact + added.double()).float(), rtol=2e-7, atol=1e-7)


def test_one_pair_of_codes_serves_the_three_products_of_a_layer_p5() -> None:
    x, w, g = torch.randn(40, 24), torch.randn(32, 24), torch.randn(40, 32)
    (xq, qx), (wq, qw), (gq, qg) = encoded(x), encoded(w), encoded(g)
    xd, wd, gd = (codes.double() * math.ldexp(1.0, -q) for codes, q in ((xq, qx), (wq, qw), (gq, qg)))
    assert torch.equal(multiply(xq, wq.t(), qx + qw), (xd @ wd.t()).float())
    assert torch.equal(multiply(gq, wq, qg + qw), (gd @ wd).float())
    assert torch.equal(multiply(gq.t(), xq, qg + qx), (gd.t() @ xd).float())


def test_sums_of_more_terms_than_32_bits_hold_are_taken_in_parts() -> None:
    terms = 140_000
    one = torch.full((17, terms), LARGEST, dtype=torch.int8)
    other = torch.full((terms, 32), LARGEST, dtype=torch.int8)
    assert torch.all(multiply(one, other, 0) == float(LARGEST * LARGEST * terms))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_p2(bad: float) -> None:
    values = torch.ones(5)
    values[3] = bad
    assert not math.isfinite(largest_magnitude(values))
    assert largest_magnitude(torch.empty(0)) == 0
