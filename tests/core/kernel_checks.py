"""The kernels against the eager code, bit for bit; run by ``test_kernels.py``: C, Triton on a GPU or interpreted.

As a program: all of them in the interpreter, and a line of JSON that says what went wrong in which.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from lightning_efficient.core import quantization
from lightning_efficient.core.kernels import host
from lightning_efficient.core.quantization import (
    Code,
    Quantized,
    Rounding,
    dequantize,
    dequantized_pieces,
    quantize,
)
from lightning_efficient.core.random import TABLE
from tests.helpers.interpreter import look_once, say_what_went_wrong

CODES: list[Code] = [*range(1, 9), "fp8"]
KEY = 0xFEDCBA9876543210  # more than a signed word holds


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """NaN is NaN here."""
    if a is None or b is None:
        return a is b
    if a.dtype.is_floating_point:
        a, b = a.float().nan_to_num(12345.0), b.float().nan_to_num(12345.0)
    return torch.equal(a.cpu(), b.cpu())


def _compare(x: Tensor, where: str, code: Code, group_size: int = 128, rounding: Rounding = "dither") -> None:
    """Encode and decode ``x`` both ways; ``where``: "c", or a device for Triton."""
    device = "cpu" if where == "c" else where
    kernels = host if where == "c" else importlib.import_module("lightning_efficient.core.kernels.quantization")

    def encoded(values: Tensor) -> Quantized:
        found = quantize(values, code, group_size=group_size, rounding=rounding, key=KEY, nonfinite="propagate")
        assert found is not None
        return found

    with mock.patch.object(quantization, "kernels_for", return_value=None):
        eager = encoded(x)
        expected = dequantize(eager)
    with mock.patch.object(quantization, "kernels_for", return_value=kernels):
        kernel = encoded(x.to(device))
        decoded = dequantize(kernel)
    what = f"{code=} {x.numel()=} {x.dtype=} {group_size=} {rounding=}"
    assert _same(eager.scale, kernel.scale), f"scale: {what}"
    assert _same(eager.minimum, kernel.minimum), f"minimum: {what}"
    assert _same(eager.payload, kernel.payload), f"codes: {what}"
    assert _same(expected, decoded), f"decoded: {what}"
    pieces = torch.empty_like(decoded)
    for which, numbers in dequantized_pieces(kernel):
        pieces[which] = numbers
    assert _same(expected, pieces), f"in pieces: {what}"


def _numbers(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 3 + 1).to(dtype)


def every_number_of_bits(device: str) -> None:
    for code in CODES:
        _compare(_numbers(8 * 128), device, code)


def every_rounding(device: str) -> None:
    for rounding in ("nearest", "dither", "stochastic"):
        for code in (1, 3, 8):
            _compare(_numbers(2 * 8 * 64), device, code, 64, rounding)


def every_type(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for code in (3, 8, "fp8"):
            _compare(_numbers(8 * 128, dtype), device, code)
            _compare(_numbers(77, dtype), device, code)


def ragged_tails(device: str) -> None:
    """A part of a group, groups that are no whole number of eighths, both."""
    for count in (1, 63, 64, 128, 3 * 128 + 64, 8 * 128 + 1, 11 * 128 + 77):
        for code in (3, 4, "fp8"):
            _compare(_numbers(count), device, code)


def large_groups(device: str) -> None:
    for code in (3, "fp8"):
        _compare(_numbers(5000), device, code, 2048)
        _compare(_numbers(8 * 1024), device, code, 1024)
    _compare(_numbers(20_000), device, 4, 8192)


def several_chunks(device: str) -> None:
    for count in (2 * TABLE, TABLE + 8 * 1024, TABLE + 1024 + 1):
        _compare(_numbers(count), device, 4, 1024)


def numbers_of_all_sizes(device: str) -> None:
    x = _numbers(8 * 128)
    for size in (0.0, 1e-41, 1e-36, 1e-20, 1e37):
        for code in (1, 4, 8, "fp8"):
            _compare(x * size, device, code)
    for other in (torch.full_like(x, 1234.567), 1e6 + x, 1 + 1e-7 * x, torch.relu(x - 1), 0.0 - torch.relu(x)):
        for code in (2, 8, "fp8"):
            _compare(other, device, code)


def what_is_not_finite(device: str) -> None:
    for count in (8 * 128, 5 * 128 + 9):
        x = _numbers(count)
        x[3], x[-1], x[200], x[300], x[301] = torch.inf, torch.nan, -torch.inf, 3.3e38, -3.3e38
        for code in (1, 3, 4, 8, "fp8"):
            _compare(x, device, code)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        every_number_of_bits, every_rounding, every_type, ragged_tails, large_groups, several_chunks,
        numbers_of_all_sizes, what_is_not_finite,
    )
}  # fmt: skip


if __name__ == "__main__":
    look_once()
    say_what_went_wrong({name: functools.partial(check, "cpu") for name, check in CHECKS.items()})
