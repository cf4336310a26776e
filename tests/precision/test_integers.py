"""Integers with a shared exponent against exact arithmetic (P5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_efficient.precision import integers, tiles
from lightning_efficient.precision.integers import (
    LARGEST,
    largest_magnitude,
    multiply,
    to_integers,
    with_shared_exponent,
)
from lightning_efficient.precision.probes import Kept, places
from lightning_efficient.precision.signs import Measured, shared_exponent


@pytest.fixture(autouse=True, params=["tiles", "c", "torch"])
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ways to compute."""
    if request.param == "tiles":
        if tiles._library() is None:
            pytest.skip("needs a processor with AMX, and a C compiler that knows it")
        yield "tiles"
        return
    with mock.patch.object(tiles, "_library", return_value=None):
        if request.param == "torch":
            with mock.patch.object(integers, "_library", return_value=None):
                yield "torch"
        elif integers._library() is None:
            pytest.skip("needs a C compiler")
        else:
            yield "c"


def encoded(values: Tensor) -> tuple[Tensor, int]:
    exponent = shared_exponent(largest_magnitude(values), 8) or 0
    return to_integers(values, exponent)[0].codes, exponent


@pytest.mark.parametrize("scale", [1.0, 3e-5, 7e4, 2.0**-120, 1e-40, 5e37])
def test_a_code_is_the_nearest_multiple_of_the_exponents_step_p5(scale: float) -> None:
    values = torch.randn(300, 47) * scale
    codes, exponent = encoded(values)
    steps = values.double() * math.ldexp(1.0, exponent)
    assert codes.double().abs().max() >= 63
    assert torch.equal(codes.double(), steps.round().clamp(-LARGEST, LARGEST))


def test_what_is_beyond_becomes_the_largest_code_p9() -> None:
    codes = to_integers(torch.tensor([1000.0, -1000.0, 126.6, 0.0]), 0)[0].codes
    assert codes.tolist() == [LARGEST, -LARGEST, LARGEST, 0]


def test_rounding_at_random_is_right_on_average_p5() -> None:
    values = torch.full((1 << 15,), 3.3)
    codes = to_integers(values, 0, key=7)[0].codes.float()
    assert set(codes.unique().tolist()) == {3.0, 4.0}
    assert float(codes.mean()) == pytest.approx(3.3, abs=0.02)


def test_what_is_encoded_stays_as_it_is() -> None:
    values = torch.randn(300, 47)
    before = values.clone()
    encoded(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("numel", [1, 4095, 4097, (1 << 18) + 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [None, 3])
def test_both_ways_give_the_same_codes_p5(numel: int, dtype: torch.dtype, key: int | None) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    codes = to_integers(values, 5, key=key)[0].codes
    with mock.patch.object(integers, "_library", return_value=None):
        assert torch.equal(to_integers(values, 5, key=key)[0].codes, codes)
        assert largest_magnitude(values) == float(values.abs().max())


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Torch's threads and default type."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 1024), (70, 5000), (3, 11, 700), (1, 512)])
@pytest.mark.parametrize("threads", [1, 2])
def test_columns_are_kept_as_they_are(shape: tuple[int, ...], dtype: torch.dtype, threads: int, by: str) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.set_num_threads(threads)
    for at in (0, 7, 123_456_789):
        for default in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            found = to_integers(values, 5, at=at)[0]
            assert torch.equal(found.codes, to_integers(values, 5)[0].codes)
            assert found.kept is not None
            assert found.kept.at == at
            assert (found.kept.columns is None) == (by == "torch")
            if found.kept.columns is not None:
                these = list(places(shape[-1], at))
                assert torch.equal(found.kept.columns, values.reshape(-1, shape[-1])[:, these].float())


def test_of_some_tensors_no_columns_are_kept() -> None:
    for values in (torch.randn(1024), torch.randn(32, 511), torch.randn(0, 1024), torch.randn(1024, 1024).t()):
        assert to_integers(values, 5, at=1)[0].kept == Kept(1)
    assert to_integers(torch.randn(32, 1024), 5)[0].kept is None


def test_what_is_counted_p9(by: str) -> None:
    values = torch.tensor([0.0, 0.0, 0.4, -0.4, 127.4, 128.0, -300.0, 1.0])
    _, measured = to_integers(values, 0)
    assert measured.overflow == pytest.approx(2 / 8)
    assert measured.underflow == pytest.approx(2 / 6)
    before, after = float(values.abs().sum()), 3 * 127.0 + 1
    assert measured.error == pytest.approx(math.log2(abs(before - after) / before + 1), rel=1e-5)
    assert not measured.all_zero
    assert to_integers(torch.zeros(70), 3)[1] == Measured(None, all_zero=True)
    assert to_integers(torch.empty(0), 3)[1] == Measured(None, all_zero=True)
    assert to_integers(torch.full((100,), 1e-45), 0)[1].underflow == 1, "denormal numbers"


def test_of_large_tensors_a_sample_is_looked_at_p9(by: str) -> None:
    """Runs of 64 numbers, one in 17, whatever the threads and pieces; both of each two rows."""
    for rows, columns in ((300, 1000), (1 << 12, 64), (100, 4096)):
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 20
        values[::2] *= 4
        _, measured = to_integers(values, 0)
        some = values.view(-1)[: values.numel() // 64 * 64].view(-1, 64)[::17]
        gone, before = (some.abs() <= 0.5) & (some != 0), float(some.abs().double().sum())
        after = float(some.round().clamp(-127, 127).abs().double().sum())
        assert measured.underflow == pytest.approx(float(gone.double().mean()), rel=1e-6)
        assert measured.overflow == pytest.approx(float((some.abs() > 127.5).double().mean()), rel=1e-6)
        assert measured.error == pytest.approx(math.log2(abs(before - after) / before + 1), abs=1e-6)
        exact = float(((values.abs() < 0.5) & (values != 0)).double().mean())
        assert measured.underflow == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("guess", [None, 5, 4, 6, -3, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guess_of_the_exponent_changes_nothing_p5(guess: int | None, dtype: torch.dtype) -> None:
    values = (torch.randn((1 << 18) + 77, generator=torch.Generator().manual_seed(0)) / 2).to(dtype)
    assert shared_exponent(float(values.abs().max()), 8) == 5
    found = with_shared_exponent(values, guess=guess)
    assert found is not None
    expected = to_integers(values, 5)
    assert found[0].exponent == 5
    assert torch.equal(found[0].codes, expected[0].codes)
    assert found[1] == expected[1]


def test_a_right_guess_saves_a_pass_over_memory(by: str) -> None:
    if by == "torch":
        pytest.skip("it has no use for a guess")
    library, passes = integers._library(), list[str]()

    def counting(name: str, *arguments: object) -> float:
        passes.append(name)
        return getattr(library, name)(*arguments)

    counted = mock.Mock(
        largest=lambda *arguments: counting("largest", *arguments),
        quantize_all=lambda *arguments: counting("quantize_all", *arguments),
    )
    with mock.patch.object(integers, "_library", return_value=counted):
        for guess in (5, None, 4):
            with_shared_exponent(torch.tensor([1.0, 3.0]), guess=guess)
    assert passes == ["quantize_all", "largest", "quantize_all", "quantize_all", "quantize_all"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("guess", [None, 5])
def test_what_is_not_finite_has_no_exponent_p2(bad: float, guess: int | None) -> None:
    values = torch.ones(5000)
    values[4500] = bad
    assert with_shared_exponent(values, guess=guess) is None


def test_zeros_and_nothing_have_any_exponent() -> None:
    for values in (torch.zeros(70), torch.empty(0)):
        found = with_shared_exponent(values, guess=3)
        assert found is not None
        assert found[1] == Measured(None, all_zero=True)
        assert not found[0].codes.any()


@pytest.mark.parametrize("bias", [False, True])
def test_results_of_16_bits_are_those_of_32_rounded(bias: bool) -> None:
    one, other = torch.randn(64, 128), torch.randn(96, 128) * 1e-3
    (a, qa), (b, qb) = encoded(one), encoded(other)
    added = torch.randn(96) if bias else None
    if added is not None:
        added[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    for exponent in (qa + qb, qa + qb - 130, qa + qb + 140):
        exact = multiply(a, b.t(), exponent, added)
        found = multiply(a, b.t(), exponent, added, torch.bfloat16)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.nan_to_num(7e30), exact.to(torch.bfloat16).nan_to_num(7e30))
        assert torch.equal(found.isnan(), exact.isnan())
        again = multiply(b, a.t(), exponent, None, torch.bfloat16)
        assert found.data_ptr() != again.data_ptr()


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


@pytest.mark.parametrize("terms", [1, 63, 65, 128, 200])
@pytest.mark.parametrize("across", [False, True])
def test_shapes_that_do_not_fit_are_refused(terms: int, across: bool) -> None:
    other = torch.ones(32, 64, dtype=torch.int8).t() if across else torch.ones(64, 32, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=rf"\[8, {terms}\] and \[64, 32\] cannot be multiplied"):
        multiply(torch.ones(8, terms, dtype=torch.int8), other, 0)


def test_one_pair_of_codes_serves_the_three_products_of_a_layer_p5() -> None:
    x, w, g = torch.randn(40, 24), torch.randn(32, 24), torch.randn(40, 32)
    (xq, qx), (wq, qw), (gq, qg) = encoded(x), encoded(w), encoded(g)
    xd, wd, gd = (codes.double() * math.ldexp(1.0, -q) for codes, q in ((xq, qx), (wq, qw), (gq, qg)))
    assert torch.equal(multiply(xq, wq.t(), qx + qw), (xd @ wd.t()).float())
    assert torch.equal(multiply(gq, wq, qg + qw), (gd @ wd).float())
    assert torch.equal(multiply(gq.t(), xq, qg + qx), (gd.t() @ xd).float())


@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 32, 16), (16, 1, 8), (16, 32, 1), (1, 4, 1), (1, 1, 5)])
def test_views_of_one_row_or_column_p5(rows: int, terms: int, columns: int) -> None:
    """Torch 2.13's kernel takes a transposed column for something else, and leaves the result as the memory was."""
    one = torch.randint(-LARGEST, LARGEST + 1, (terms, rows), dtype=torch.int8).t()
    other = torch.randint(-LARGEST, LARGEST + 1, (columns, terms), dtype=torch.int8).t()
    for a, b in ((one, other), (one, other.contiguous()), (one.clone(), other)):
        assert torch.equal(multiply(a, b, 0).double(), a.double() @ b.double())


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
