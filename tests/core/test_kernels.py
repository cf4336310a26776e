"""The kernels give the bits that the eager code gives: C, and Triton's, interpreted, and on a GPU if there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_efficient.activation_compression import records
from lightning_efficient.activation_compression.records import two_valued
from lightning_efficient.core.kernels import host, kernels_for
from lightning_efficient.core.quantization import Code, dequantize, quantize
from tests.activation_compression.networks import classifier, compressed
from tests.core.kernel_checks import CHECKS
from tests.helpers.interpreter import ROOT, ended

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """By check."""
    return ended("tests.core.kernel_checks")


@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter_kernels_give_the_bits_of_the_eager_code_a4(check: str, wrong: dict[str, str]) -> None:
    assert check not in wrong, wrong[check]


def test_triton_is_not_imported_before_there_is_a_tensor_for_it() -> None:
    """Nor are kernels: what imports Lightning may import Triton itself."""
    code = """if True:
        import sys
        import lightning.pytorch, torch
        before = "triton" in sys.modules
        import lightning_efficient, lightning_efficient.precision.engine
        import lightning_efficient.core.quantization as q
        q.quantize(torch.ones(64), 4)
        kernels = {f"lightning_efficient.{name}" for name in ("core.kernels.quantization", "precision.device.kernels")}
        print(not before and "triton" in sys.modules or bool(kernels & {*sys.modules}))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


with_c = pytest.mark.skipif(not host.available(torch.float32), reason="needs a C compiler")


@with_c
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("check", CHECKS)
def test_in_c_kernels_give_the_bits_of_the_eager_code_a4(check: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        CHECKS[check]("c")
    finally:
        torch.set_num_threads(before)


@with_c
@pytest.mark.parametrize("numel", [1, 7, 64, 65, 8 * 4096 + 3, 100_001])
def test_in_c_two_values_take_the_bits_that_they_take_in_torch_and_come_back(numel: int) -> None:
    values = torch.where(torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.3, -1.5, 2.25)
    found = two_valued(values)
    with mock.patch.object(records, "kernels_for", return_value=None):
        eager = two_valued(values)
        assert found is not None
        assert eager is not None
        assert torch.equal(found.packed, eager.packed)
        assert torch.equal(found.decode(), values)
    assert torch.equal(found.decode(), values)


@with_c
@pytest.mark.parametrize("third", [0.0, float("nan")])
@pytest.mark.parametrize("where", [1, 4999, 9998])
def test_in_c_a_third_value_anywhere_is_seen(third: float, where: int) -> None:
    values = torch.ones(9999)
    values[::2] = 2.0
    values[where] = third
    assert two_valued(values) is None


def test_there_are_no_kernels_for_other_tensors() -> None:
    assert kernels_for(torch.ones(64, dtype=torch.float64)) is None
    assert kernels_for(nn.Parameter(torch.ones(64))) is None


@pytest.mark.gpu
@on_gpu
@with_triton
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu_kernels_give_the_bits_of_the_eager_code_a4(check: str) -> None:
    CHECKS[check]("cuda")


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_more_than_2_to_the_31_numbers_keep_their_bound_a4() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("needs 32 GiB of GPU memory")
    x = torch.randn((1 << 31) + 1000 * 128 + 5, device="cuda", dtype=torch.bfloat16)
    encoded = quantize(x, 4)
    assert encoded is not None
    decoded = dequantize(encoded)
    for part in (slice(0, 1 << 20), slice((1 << 31) - 1000, None)):
        assert ((decoded[part].float() - x[part].float()).abs() <= encoded.bound().max() + 0.04).all()


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _language_like(x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    hidden = F.gelu(F.linear(F.layer_norm(x, (256,)), weight))
    heads = hidden.view(4, 64, 4, 64).transpose(1, 2)
    return F.relu(F.scaled_dot_product_attention(heads, heads, heads) * 2.0).sum()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("bits", [2, 4, 8, 5.5])
def test_on_a_gpu_nothing_waits_for_the_device(bits: float) -> None:
    x = torch.randn(4, 64, 256, device="cuda", requires_grad=True)
    weight = nn.Parameter(torch.randn(256, 256, device="cuda"))

    def step() -> None:
        with compressed(classifier(bits), nn.ParameterList([weight])):
            loss = _language_like(x * 1.0, weight)
        loss.backward()

    step()  # kernels are compiled, and the table of noise goes to the device
    with never_waiting():
        step()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("bits", [1, 3, 4, 8, "fp8"])
def test_on_a_gpu_encoding_by_itself_waits_for_nothing(bits: Code) -> None:
    x = torch.randn(3 * (1 << 18) + 200, device="cuda")
    quantize(x, bits)
    with never_waiting():
        encoded = quantize(x, bits, nonfinite="propagate")
        assert encoded is not None
        dequantize(encoded)


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_a_broken_activation_makes_gradients_nan_and_log_space_stays_exact() -> None:
    weight = nn.Parameter(torch.randn(256, 256, device="cuda"))
    x = torch.randn(64, 256, device="cuda")
    x[3, 4] = torch.inf
    with compressed(classifier(4), nn.ParameterList([weight])):
        out = F.linear(x * nn.Parameter(torch.ones((), device="cuda")), weight).sum()
    out.backward()
    assert weight.grad is not None
    assert weight.grad.isnan().any()
    logits = torch.randn(64, 256, device="cuda", requires_grad=True)
    possible = torch.rand(64, 256, device="cuda") < 0.5
    with compressed(classifier(4), nn.Module()):
        value = torch.logsumexp(logits.masked_fill(~possible, -torch.inf) * 1.0, -1).sum()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()
