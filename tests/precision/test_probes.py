"""A look at some numbers of a result against looking at all of them (P2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_efficient.precision import probes
from lightning_efficient.precision.integers import to_integers
from lightning_efficient.precision.probes import Kept, Operand, measured_result, places, probe_of
from lightning_efficient.precision.signs import Measured


@pytest.fixture(autouse=True, params=["c", "torch"])
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to look."""
    if request.param == "torch":
        with mock.patch.object(probes, "_library", return_value=None):
            yield "torch"
    elif probes._library() is None:
        pytest.skip("needs a C compiler")
    else:
        yield "c"


def error_of_some(one: Tensor, other: Tensor, bias: Tensor | None, result: Tensor, at: int) -> float | None:
    """Of a probe, the relative error."""
    off, size = probe_of(Operand(one, False), Operand(other, True), bias, result, at)
    return off / size if size else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (64, 199), (1024, 700)])
def test_the_exponent_is_that_of_a_sample_p7(shape: tuple[int, int], dtype: torch.dtype) -> None:
    result = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    assert measured_result(result).exponent in (3, 4)
    if result.numel() < 64 * 200:  # all of it
        assert measured_result(result).exponent == 7 - math.frexp(float(result.abs().max()))[1]
    assert measured_result(result.t()) == measured_result(result) or result.numel() > 64 * 200


def test_zeros_nothing_and_what_is_not_finite_p2_p8() -> None:
    assert measured_result(torch.zeros(70, 3)) == Measured(None, all_zero=True)
    assert measured_result(torch.empty(0, 3)) == Measured(None, all_zero=True)
    for bad in (math.nan, math.inf, -math.inf):
        result = torch.ones(300, 300)
        result[0, 5] = bad
        assert measured_result(result) == Measured(None, finite=False)
        assert not measured_result(torch.tensor([1.0, bad])).finite
    assert measured_result(torch.full((4,), -1e-45)).exponent == 7 + 148, "denormal numbers"


def test_of_a_large_result_few_numbers_are_looked_at() -> None:
    result, seen = torch.zeros(1 << 22), []
    for run in range(1 << 10):
        result[64 * run : 64 * run + 64] = 1
        if measured_result(result).exponent is not None:
            seen.append(run)
        result[64 * run : 64 * run + 64] = 0
    assert seen[0] == 0
    assert 2 <= len(seen) <= 10


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 2), (40, 600, 17), (16, 256, 16)])
def test_a_right_result_has_no_error_and_a_wrong_one_has_its_own_p2(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: torch.dtype | None
) -> None:
    rows, terms, columns = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, terms).to(dtype), torch.randn(terms, columns)
    added = torch.randn(columns).to(bias) if bias is not None else None
    exact = x.float() @ weight + (added.float() if added is not None else 0)
    for at in (0, 5, 123_456_789):
        assert error_of_some(x, weight, added, exact, at) == pytest.approx(0, abs=1e-5)
        assert error_of_some(x, weight, added, exact * 1.5, at) == pytest.approx(0.5, rel=1e-4)
        assert error_of_some(x, weight, added, exact.to(torch.bfloat16), at) == pytest.approx(0.002, abs=0.003)
    found = error_of_some(x, weight, added, exact * math.nan, 0)
    assert found is not None
    assert math.isnan(found)


def test_other_numbers_each_time_and_the_same_both_ways() -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (19, 37), (15, 16)):
        one, other = torch.randn(rows, 20), torch.randn(20, columns)
        wrong = one @ other + torch.randn(rows, columns)
        errors = [error_of_some(one, other, None, wrong, at) for at in range(4)]
        assert len({round(error, 6) for error in errors if error}) == (4 if rows >= 16 else 1), (
            "all that there are, where they are few"
        )
        with mock.patch.object(probes, "_library", return_value=None):
            assert errors == pytest.approx([error_of_some(one, other, None, wrong, at) for at in range(4)])
    x = torch.eye(64)
    x[5] = 3
    places = {at for at in range(64) if (error_of_some(x, torch.eye(64), None, torch.eye(64), at) or 0) > 0.1}
    assert len(places) == 16, "each row is looked at by one in four"


def test_what_is_zero_tells_nothing_and_tensors_of_any_strides_are_taken() -> None:
    assert error_of_some(torch.zeros(4, 4), torch.ones(4, 4), None, torch.ones(4, 4), 0) is None
    assert error_of_some(torch.ones(0, 4), torch.ones(4, 4), None, torch.ones(0, 4), 0) is None
    one, other = torch.randn(270, 20).t(), torch.randn(30, 270).t()
    for x, weight in ((one, other), (one.contiguous(), other), (one, other.contiguous())):
        assert error_of_some(x, weight, None, one @ other, 3) == pytest.approx(0, abs=1e-5)
        assert error_of_some(x, weight, None, one @ other * 3, 3) == pytest.approx(2, rel=1e-4)
    every_second = torch.randn(20, 540)[:, ::2]
    assert error_of_some(every_second, other, None, every_second @ other, 3) == pytest.approx(0, abs=1e-5)


def kept_of(values: Tensor, at: int) -> Kept | None:
    return to_integers(values, 5, at=at)[0].kept


def block_of(one: Tensor, other: Tensor, ats: tuple[int, int]) -> tuple[list[int], list[int], Tensor]:
    """Some columns of both, and the products of those."""
    rows, columns = list(places(one.shape[1], ats[0])), list(places(other.shape[1], ats[1]))
    return rows, columns, one.double()[:, rows].t() @ other.double()[:, columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 300, 700), (600, 600, 600), (33, 17, 1024)])
def test_columns_that_were_kept_are_looked_at_where_sums_run_over_rows(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, terms, columns = shape
    one, other = torch.randn(terms, rows).to(dtype), torch.randn(terms, columns).to(dtype)
    wrong = one.t().float() @ other.float() + torch.randn(rows, columns)
    down, across, exact = block_of(one, other, (3, 8))
    found = probe_of(Operand(one, True, kept_of(one, 3)), Operand(other, True, kept_of(other, 8)), None, wrong, 5)
    assert found.off == pytest.approx(float((wrong.double()[down][:, across] - exact).norm()), rel=1e-4)
    assert found.size == pytest.approx(float(exact.norm()), rel=1e-4)


def test_columns_that_have_changed_since_are_read_again() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(300, 512), torch.randn(300, 512)
    kept = kept_of(one, 3), kept_of(other, 8)
    result = one.t() @ other
    for changed in (one, other):
        before = changed.clone()
        changed.data.mul_(4)
        _, _, exact = block_of(one, other, (3, 8))
        found = probe_of(Operand(one, True, kept[0]), Operand(other, True, kept[1]), None, result, 5)
        assert found.size == pytest.approx(float(exact.norm()), rel=1e-4)
        assert found.off == pytest.approx(0.75 * found.size, rel=1e-3)
        changed.copy_(before)


@pytest.mark.parametrize("shape", [(20, 512), (2, 10, 512), (10, 1, 512), (512,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_any_tensor_are_multiplied(shape: tuple[int, ...], transposed: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(512, 512)
    if x.dim() == 3:  # also where a stride means nothing
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = weight.t() if transposed else weight
    kept = kept_of(weight, 3)
    for across, result in ((False, x @ weight.t()), (True, x @ weight)):
        found = probe_of(Operand(x, False), Operand(weight, across, kept), None, result, 7)
        assert found.off < 1e-4 * found.size
