"""Each format's numbers, against brute force over all that it has (P5)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_efficient.precision.formats import FORMATS, format_named


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """How far each value is from the nearest number of a grid."""
    return (values[:, None] - grid[None]).abs().amin(1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 130), (11,), (4, 1)])
def test_shapes_stay_and_numbers_are_near_p5(name: str, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    encoded = FORMATS[name].encode(values)
    decoded = encoded.decoded().float()
    assert decoded.shape == values.shape
    bound = {"fp8": 2**-4, "fp16": 2**-11, "bf16": 2**-8}.get(name, 2**-6) * float(values.abs().max())
    assert float((decoded - values).abs().max()) <= bound
    assert encoded.measured.finite
    assert not encoded.measured.all_zero


@pytest.mark.parametrize(("name", "size"), [("int8-row", 160), ("int8-block", 128), ("bfp16", 16)])
def test_each_block_has_the_exponent_of_its_largest_number_p5(name: str, size: int) -> None:
    values = torch.randn(4, 160) * torch.logspace(-3, 3, 160)
    decoded = FORMATS[name].encode(values).decoded()
    for row, given in zip(decoded, values, strict=True):
        for block, numbers in zip(row.split(size), given.split(size), strict=True):
            step = 2.0 ** (math.frexp(float(numbers.abs().max()))[1] - 7)
            codes = torch.arange(-127, 128) * step
            assert nearest(block, codes).max() == 0
            assert torch.allclose((block - numbers).abs(), nearest(numbers, codes), atol=1e-12)


@pytest.mark.parametrize(("gradient", "kind"), [(False, torch.float8_e4m3fn), (True, torch.float8_e5m2)])
def test_fp8_has_the_type_that_its_role_needs_p5(gradient: bool, kind: torch.dtype) -> None:
    values = torch.randn(500) * 0.01
    decoded = FORMATS["fp8"].encode(values, gradient=gradient).decoded()
    grid = torch.arange(256, dtype=torch.uint8).view(kind).float()
    grid = grid[grid.isfinite()]
    largest = math.frexp(float(values.abs().max()))[1]
    scale = 2.0 ** (math.frexp(torch.finfo(kind).max)[1] - 1 - largest)
    assert nearest(decoded * scale, grid).max() == 0
    assert torch.equal((decoded - values).abs() * scale, nearest(values * scale, grid))


def test_fp16_says_what_is_beyond_it_p9() -> None:
    encoded = FORMATS["fp16"].encode(torch.tensor([1.0, 7e4, 2.0, 3.0]))
    assert encoded.measured.overflow == 0.25


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_gradients_in_fp16_have_a_scale_of_their_own_p11(size: float) -> None:
    values = torch.randn(64, 64) * size
    encoded = FORMATS["fp16"].encode(values, gradient=True)
    assert (encoded.measured.overflow, encoded.measured.underflow) == (0, 0)
    assert float((encoded.decoded() - values).abs().max()) <= 2**-11 * float(values.abs().max())
    assert encoded.values is not None
    assert 0.5 <= float(encoded.values.abs().max()) < 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_number_of_few_bits_p2(name: str, bad: float) -> None:
    encoded = FORMATS[name].encode(torch.tensor([1.0, bad]))
    assert not encoded.measured.finite
    with pytest.raises(RuntimeError, match="not finite"):
        encoded.decoded()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_are_zeros_p8(name: str) -> None:
    encoded = FORMATS[name].encode(torch.zeros(3, 20))
    assert encoded.measured.all_zero
    assert not encoded.decoded().any()


@pytest.mark.parametrize("name", ["int8", "int8-row", "bfp16"])
def test_rounding_at_random_is_right_on_average_p5(name: str) -> None:
    values = torch.full((64, 1024), 3.3)
    values[:, ::16] = 100.0
    decoded = FORMATS[name].encode(values, key=5).decoded()[:, 1::16]
    assert decoded.unique().tolist() == [3.0, 4.0]
    assert float(decoded.mean()) == pytest.approx(3.3, abs=0.03)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match=r"low='int4' is no format; there are int8, int8-row"):
        format_named("int4")
