"""Kernels for guarded products give what the eager code gives: interpreted, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_efficient.precision.device import kernels_on
from lightning_efficient.precision.formats import format_named
from tests.precision.device_checks import CHECKS

ROOT = Path(__file__).parent.parent.parent
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """By check."""
    return interpreted()


def interpreted(*arguments: str) -> dict[str, str]:
    """What goes wrong, in another process, for Triton asks once, when it is imported, whether to interpret."""
    return run("tests.precision.device_checks", *arguments, interpret="1")


def run(program: str, *arguments: str, interpret: str) -> dict[str, str]:
    """The line that a program ends with."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter_kernels_give_what_the_eager_code_gives_p3(check: str, wrong: dict[str, str]) -> None:
    assert check not in wrong, wrong[check]


@pytest.mark.slow
@with_triton
def test_hundreds_of_products_are_decided_by_the_kernel_as_by_the_rules_p2_p4_p10() -> None:
    assert interpreted("4") == {}


@pytest.mark.slow
@with_triton
def test_the_compiler_takes_the_kernels_for_a_gpu_without_one() -> None:
    assert run("tests.precision.device_compiled", interpret="0") == {}


@pytest.mark.gpu
@on_gpu
@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu_kernels_give_what_the_eager_code_gives_p3(check: str) -> None:
    CHECKS[check]("cuda")


def test_triton_is_not_imported_before_there_is_a_tensor_for_it() -> None:
    code = """if True:
        import sys
        import lightning.pytorch  # which may import it itself
        before = "triton" in sys.modules
        import lightning_efficient, lightning_efficient.precision.engine
        print(not before and "triton" in sys.modules or "lightning_efficient.precision.device.kernels" in sys.modules)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("low", ["int8", "fp8", "bfp16"])
def test_a_cpu_has_none(low: str) -> None:
    assert kernels_on(torch.device("cpu"), format_named(low)) is None
