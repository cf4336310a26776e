"""Numbers in few bits, against their stated bounds and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from lightning_efficient.core.quantization import (
    Code,
    dequantize,
    dequantized_pieces,
    pack_bits,
    quantize,
    unpack_bits,
)
from lightning_efficient.core.random import TABLE, mix, noise_at, noise_table

ROUNDINGS = ["nearest", "dither", "stochastic"]


def cases() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, generator=generator)
    return {
        "normal": normal,
        "one": normal[:1],
        "less than a group": normal[:77],
        "chunks": torch.randn(3 * TABLE + 129, generator=generator),
        "zeros": torch.zeros(300),
        "equal": torch.full((300,), 1234.567),
        "far from zero": 1e6 + normal,
        "far below zero": -1e6 + normal,
        "hardly different": 1.0 + normal * 1e-7,
        "large": normal * 1e37,
        "small": normal * 1e-36,
        "denormal": normal * 1e-41,
        "a lone one": torch.cat([normal * 1e-3, torch.tensor([1e4])]),
        "sparse": torch.relu(normal),
    }


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("case", cases())
def test_the_error_never_exceeds_its_bound_a4(case: str, bits: int, rounding: str) -> None:
    x = cases()[case]
    for group_size in (64, 128, 4096):
        encoded = quantize(x, bits, group_size=group_size, rounding=rounding, key=bits)
        assert encoded is not None
        decoded = dequantize(encoded)
        bound = encoded.bound().repeat_interleave(group_size)[: x.numel()]
        assert decoded.shape == x.shape
        assert ((decoded.double() - x.double()).abs() <= bound.double()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_types_come_back_as_they_were_a4(dtype: torch.dtype, bits: int) -> None:
    for x in (cases()["chunks"].to(dtype), (cases()["chunks"] * 0.05 + 5).to(dtype)):
        encoded = quantize(x, bits)
        assert encoded is not None
        decoded = dequantize(encoded)
        assert decoded.dtype == dtype
        bound = encoded.bound().repeat_interleave(128)[: x.numel()]
        assert ((decoded.float() - x.float()).abs() <= bound).all()


def test_the_bound_is_what_the_bits_allow_a4() -> None:
    """Not wider than it has to be: within 1.5 % of an ideal quantizer's."""
    x = cases()["chunks"][: 3 * TABLE]
    groups = x.view(-1, 128)
    ideal = (groups.amax(1) - groups.amin(1)) / 15 / 2
    encoded = quantize(x, 4)
    assert encoded is not None
    assert (encoded.bound() / ideal).mean() < 1.015


@pytest.mark.parametrize("rounding", ["dither", "stochastic"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_are_zero_on_average(rounding: str, bits: int) -> None:
    x = cases()["normal"]
    draws = []
    for key in range(512):
        encoded = quantize(x, bits, rounding=rounding, key=key)
        assert encoded is not None
        draws.append(dequantize(encoded).double() - x.double())
    errors = torch.stack(draws)
    errors = errors[:, errors.abs().amax(0) < 6 * errors.std(0)]  # else one draw in thousands is large: too few draws
    assert errors.shape[1] > 900
    score = errors.mean(0) / (errors.std(0) / len(draws) ** 0.5)
    assert score.abs().max() < 4.5, "of 1000 means the largest is within 4.5 standard errors"
    assert abs(score.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("rounding", "low", "high"), [("nearest", 11, 13), ("dither", 11.5, 12.5), ("stochastic", 5, 7)]
)
def test_the_variance_is_that_of_the_table(rounding: str, low: float, high: float) -> None:
    x = cases()["chunks"]
    encoded = quantize(x, 4, rounding=rounding, key=5)
    assert encoded is not None
    scale = encoded.scale.double().repeat_interleave(128)[: x.numel()]
    variance = ((dequantize(encoded).double() - x.double()) / scale).square().mean()
    assert low < 1 / variance < high


def test_errors_of_neighbours_and_of_keys_are_independent() -> None:
    x = cases()["chunks"]
    first, second = (dequantize(quantize(x, 3, key=key)) - x for key in (1, 2))  # type: ignore[arg-type]

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    for shift in (1, 2, 64, 128, 256, 1024):
        assert abs(correlation(first[:-shift], first[shift:])) < 0.01
    assert abs(correlation(first, second)) < 0.01
    assert abs(correlation(first, x)) < 0.01


@pytest.mark.parametrize("what", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_encoded(what: float) -> None:
    x = cases()["chunks"].clone()
    x[70_000] = what
    assert quantize(x, 4) is None


@pytest.mark.parametrize("bits", [*range(1, 9), "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(bits: Code, dtype: torch.dtype) -> None:
    """Not the numbers beside it either, which share bytes with it."""
    x = cases()["chunks"].to(dtype)
    broken = x.clone()
    broken[[130, 70_000, TABLE + 5, 3 * TABLE + 128]] = torch.tensor(
        [torch.inf, torch.nan, -torch.inf, torch.inf], dtype=dtype
    )
    broken[256 : 256 + 2] = torch.tensor([-3.3e38, 3.3e38], dtype=dtype)  # farther apart than float32 can say
    encoded, whole = quantize(broken, bits, nonfinite="propagate"), quantize(x, bits, nonfinite="propagate")
    assert encoded is not None
    assert whole is not None
    found, expected = dequantize(encoded), dequantize(whole)
    groups = [1, 70_000 // 128, TABLE // 128, 3 * TABLE // 128 + 1] + ([2] if bits != "fp8" else [])
    for group in groups:
        assert found[group * 128 : (group + 1) * 128].isnan().all()
        found[group * 128 : (group + 1) * 128] = expected[group * 128 : (group + 1) * 128]
        assert encoded.bound()[group].isnan()
    if bits == "fp8":
        found[256:384] = expected[256:384]
    assert torch.equal(found, expected)
    asked = quantize(x, bits)
    assert asked is not None
    assert torch.equal(dequantize(asked), expected)


def test_numbers_too_far_apart_for_one_bit_are_refused() -> None:
    """Their spread is a float32, and what their scale is rounded up to is not."""
    x = cases()["normal"].clone()
    x[:2] = torch.tensor([0.0, 3.4e38])
    assert quantize(x, 1) is None


def test_floats_of_8_bits_are_the_nearest_ones_by_brute_force_a4() -> None:
    """Every float of e4m3 times the scale is tried."""
    floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    floats = floats[floats.isfinite()]
    x = torch.cat([cases()["normal"][:256] * size for size in (1.0, 1e-5, 1e30, 1e-30)])
    encoded = quantize(x, "fp8")
    assert encoded is not None
    near = (x.double()[:, None] - floats * encoded.scale.double().repeat_interleave(128)[:, None]).abs().amin(1)
    error = (dequantize(encoded).double() - x.double()).abs()
    assert (error <= near * (1 + 1e-6) + x.double().abs() * 2.0**-22).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*cases(), "largest", "least"])
def test_the_error_of_floats_of_8_bits_never_exceeds_its_bounds_a4(case: str, dtype: torch.dtype) -> None:
    extremes = {"largest": torch.finfo(dtype).max, "least": torch.finfo(dtype).smallest_normal * 2.0**-5}
    sign = 2.0 * (torch.arange(300) % 3 > 0) - 1
    x = (cases()[case] if case in cases() else sign.double() * extremes[case]).to(dtype)
    for group_size in (64, 128, 4096):
        encoded = quantize(x, "fp8", group_size=group_size)
        if encoded is None:
            assert not x.isfinite().all(), "too large for float16"
            return
        decoded, scale = dequantize(encoded), encoded.scale.double().repeat_interleave(group_size)[: x.numel()]
        assert decoded.dtype == dtype
        assert decoded.isfinite().all()
        error, size = (decoded.double() - x.double()).abs(), x.double().abs()
        own = 0 if dtype == torch.float32 else decoded.double().abs() * torch.finfo(dtype).eps + 2.0**-25
        of_group = encoded.bound().double().repeat_interleave(group_size)[: x.numel()]
        assert (error <= of_group).all()
        assert (error <= torch.maximum(size / 16, scale / 1024) * (1 + 2.0**-12) + own).all()


def test_floats_of_8_bits_take_a_byte_and_a_scale() -> None:
    x = cases()["chunks"][: 2 * TABLE]
    encoded = quantize(x, "fp8", rounding="dither")
    assert encoded is not None
    assert encoded.minimum is None
    assert encoded.nbytes == 2 * TABLE + 2 * TABLE // 128 * 2
    again = torch.cat([numbers.clone() for _, numbers in dequantized_pieces(encoded)])
    assert torch.equal(again, dequantize(encoded))
    bounded = quantize(torch.cat([x, torch.full((128,), 1e4)]), "fp8", error_bound=0.2)
    assert bounded is not None
    assert bounded.outliers is not None
    assert (dequantize(bounded)[: x.numel()] - x).abs().max() <= 0.2


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_and_come_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (64 * 37,), dtype=torch.uint8)
    packed = torch.empty(codes.numel() * bits // 8, dtype=torch.uint8)
    pack_bits(codes, bits, packed)
    again = torch.full_like(codes, 255)
    unpack_bits(packed, bits, again)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_it_takes_the_bytes_that_it_should(bits: int) -> None:
    encoded = quantize(cases()["chunks"][: 2 * TABLE], bits)
    assert encoded is not None
    assert encoded.nbytes == 2 * TABLE * bits // 8 + 2 * TABLE // 128 * 4


def test_groups_past_an_error_bound_are_kept_as_they_are_a4() -> None:
    x = cases()["chunks"].clone()
    x[300], x[-1] = 1e4, -1e4
    encoded = quantize(x, 4, error_bound=0.5)
    assert encoded is not None
    assert encoded.outliers is not None
    assert encoded.outliers[0].numel() < 10
    decoded = dequantize(encoded)
    assert (decoded - x).abs().max() <= 0.5
    assert torch.equal(decoded[256:384], x[256:384])
    assert decoded[-1] == x[-1]
    assert torch.equal(encoded.bound()[encoded.outliers[0]], torch.zeros(encoded.outliers[0].numel()))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("error_bound", [1e-6, 1e-3, 0.05, 10.0])
@pytest.mark.parametrize("case", cases())
def test_a_bound_alone_holds_always_a4(case: str, error_bound: float, rounding: str) -> None:
    x = cases()[case]
    encoded = quantize(x, None, error_bound=error_bound, rounding=rounding)
    if encoded is None:
        return
    assert ((dequantize(encoded).double() - x.double()).abs() <= error_bound).all()
    assert encoded.nbytes < x.nbytes or x.numel() < 64


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("dtype", "error_bound", "spread"), [(torch.bfloat16, 0.02, 0.08), (torch.float16, 0.003, 0.02)]
)
def test_a_bound_holds_after_the_rounding_to_the_type_too_a4(
    dtype: torch.dtype, error_bound: float, spread: float, rounding: str
) -> None:
    """Next to five the numbers of bfloat16 are 0.031 apart: what was off by 0.019 is off by that."""
    x = (cases()["chunks"] * spread + 5).to(dtype)
    encoded = quantize(x, None, error_bound=error_bound, rounding=rounding)
    assert encoded is not None
    assert ((dequantize(encoded).double() - x.double()).abs() <= error_bound).all()
    assert encoded.nbytes < 0.7 * x.nbytes, "not kept as they were"


@pytest.mark.parametrize("error_bound", [1.0, 0.4, 0.2, 0.1, 0.05, 0.02])
def test_a_bound_alone_takes_the_fewest_bytes_a4(error_bound: float) -> None:
    x = cases()["chunks"]
    found = quantize(x, None, error_bound=error_bound)
    assert found is not None
    every = [quantize(x, bits, error_bound=error_bound) for bits in range(1, 9)]
    assert found.nbytes <= 1.001 * min(encoded.nbytes for encoded in every if encoded is not None)


def test_a_bound_that_is_too_tight_and_none_at_all() -> None:
    x = cases()["chunks"]
    assert quantize(x, None, error_bound=1e-7) is None
    with pytest.raises(ValueError, match="Give bits, or an error_bound"):
        quantize(x, None)


def test_a_key_says_it_all_and_the_users_generator_is_left_alone() -> None:
    x, state = cases()["chunks"], torch.get_rng_state()
    noise_table.cache_clear()
    first, second, other = (dequantize(quantize(x, 3, key=key)) for key in (7, 7, 8))  # type: ignore[arg-type]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_table_is_uniform() -> None:
    once = noise_table(torch.device("cpu"))[:TABLE].double()
    assert torch.equal(once.sort().values, (torch.arange(TABLE).double() + 0.5) / TABLE)
    assert abs(torch.corrcoef(torch.stack([once[:-1], once[1:]]))[0, 1]) < 0.02


def test_offsets_look_random() -> None:
    offsets = [noise_at(key, counter) for key in range(100) for counter in range(100)]
    assert len(set(offsets)) > 9000  # of 10 000 draws of 65536: 9276 on average
    assert mix(0, 0) == 0xE220A8397B1DCDAF  # SplitMix64's first number for seed 0
