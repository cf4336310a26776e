"""Numbers in few bits, against their stated bounds and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from lightning_efficient.core.quantization import dequantize, pack_bits, quantize, unpack_bits
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
    x = cases()["chunks"].to(dtype)
    encoded = quantize(x, bits)
    assert encoded is not None
    decoded = dequantize(encoded)
    assert decoded.dtype == dtype
    bound = encoded.bound().repeat_interleave(128)[: x.numel()] + decoded.float().abs() * torch.finfo(dtype).eps
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
