"""Kernels for guarded products give what the eager code gives: interpreted, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lightning_efficient.precision.device import kernels_on
from lightning_efficient.precision.formats import format_named
from tests.helpers.interpreter import ended
from tests.precision.device_checks import CHECKS

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """By check."""
    return ended("tests.precision.device_checks")


@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter_kernels_give_what_the_eager_code_gives_p3(check: str, wrong: dict[str, str]) -> None:
    assert check not in wrong, wrong[check]


@pytest.mark.slow
@with_triton
def test_the_compiler_takes_the_kernels_for_a_gpu_without_one() -> None:
    assert ended("tests.precision.device_compiled", interpret=False) == {}


@pytest.mark.gpu
@on_gpu
@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu_kernels_give_what_the_eager_code_gives_p3(check: str) -> None:
    CHECKS[check]("cuda")


@pytest.mark.parametrize("low", ["int8", "fp8", "bfp16"])
def test_a_cpu_has_none(low: str) -> None:
    assert kernels_on(torch.device("cpu"), format_named(low)) is None
