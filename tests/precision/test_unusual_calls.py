"""Calls that few bits must not get wrong, though their tensors lie, live or change in unusual ways."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_efficient.core.torch_internals import in_backward
from lightning_efficient.precision import kinds
from lightning_efficient.precision.device import eager
from lightning_efficient.precision.formats import format_named
from lightning_efficient.precision.guarded_call import Call
from tests.precision.device_network import LEARNING, Run
from tests.precision.test_engine import LowBits, learnt, plain


def low(device: bool) -> Run:
    """In a step in which all that it has learnt is computed in few bits."""
    run = Run(eager if device else None)
    for _ in range(LEARNING + 1):
        *_, retries = run.step()
        assert not retries
    run.engine.begin(99)
    run.operations.begin(run.net)
    return run


@pytest.mark.parametrize("low", ["int8", "bfp16"])
@pytest.mark.parametrize("shape", [(64, 24), (4, 16, 24)])
def test_a_result_may_be_changed_in_place(low: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(24, 32), nn.ReLU(inplace=True), nn.Linear(32, 4)), torch.randn(shape)
    bits = LowBits(module, low)
    learnt(bits, lambda: module(x).square().sum())
    _, gradients = plain(module, lambda: module(x).square().sum())
    _, near = bits.step(lambda: module(x).square().sum())
    assert bits.nodes["0"].products["forward"].status.low == 1
    for name, gradient in gradients.items():
        assert float((near[name] - gradient).norm() / gradient.norm()) < 0.06, name


def test_a_device_too_gives_results_that_may_be_changed_in_place() -> None:
    run = low(device=True)
    with run.operations:
        run.net.two(run.net.one(torch.randn(3, 16, 24)).relu_()).sum().backward()
    assert run.net.one.weight.grad is not None


@pytest.mark.parametrize("width", [23, 25, 129])
@pytest.mark.parametrize("low", ["int8", "int8-row", "int8-block", "bfp16", "fp8", "fp16"])
def test_an_input_of_another_width_is_refused_when_all_is_learnt_too(low: str, width: int) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24)
    bits = LowBits(module, low)
    learnt(bits, lambda: module(x).square().sum())
    wrong = torch.randn(64, width)
    with pytest.raises(RuntimeError, match=r"multiplied|must match|size"):
        bits.step(lambda: module(wrong).square().sum())


@pytest.mark.parametrize("where", ["every other", "one for all", "one for each row"])
def test_a_bias_lies_anywhere(where: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32, bias=False), torch.randn(64, 24)
    module.many = nn.Parameter(torch.randn(64, 64))
    biases = {
        "every other": lambda: module.many[0, ::2],
        "one for all": lambda: module.many[0, :1],
        "one for each row": lambda: module.many[:, :32],
    }

    def loss() -> Tensor:
        return F.linear(x, module.weight, biases[where]()).square().sum()

    bits = LowBits(module)
    learnt(bits, loss)
    value, gradients = plain(module, loss)
    found, near = bits.step(loss)
    assert not bits.engine.retries
    assert float((found - value).abs() / value) < 0.03
    for name, gradient in gradients.items():
        assert float((near[name] - gradient).norm() / gradient.norm()) < 0.06, name


@pytest.mark.parametrize("device", [False, True])
def test_what_inference_mode_changes_in_place_is_seen(device: bool) -> None:
    run = low(device)
    with torch.inference_mode(), run.operations:
        x = torch.randn(48, 24)
        first = F.linear(x, run.net.one.weight).clone()
        x.mul_(1.15)  # which no probe takes for a failure
        second = F.linear(x, run.net.one.weight)
    run.engine.refresh(wait=True)
    assert not run.engine.retries
    assert float((first * 1.15 - second).norm() / second.norm()) < 0.02


def test_memory_of_sums_that_inference_mode_made_is_used_behind_it() -> None:
    from lightning_efficient.precision import integers, tiles

    for scratch in (integers._scratch, tiles._scratch):
        scratch._memory = torch.empty(0, dtype=torch.int8)
    codes = torch.ones(4, 4, dtype=torch.int8)
    with torch.inference_mode():
        integers.multiply(codes, codes, 0, dtype=torch.bfloat16)
    assert torch.equal(integers.multiply(codes, codes, 0, dtype=torch.bfloat16).float(), torch.full((4, 4), 4.0))


@pytest.mark.parametrize("device", [False, True])
def test_weights_that_an_optimizer_changes_without_a_trace(device: bool) -> None:
    run = low(device)
    with run.operations:
        x = torch.randn(48, 24)
        before = F.linear(x, run.net.one.weight).detach()
        run.net.one.weight.data.mul_(1.15)  # which no probe takes for a failure
        run.engine.weights_changed()
        after = F.linear(x, run.net.one.weight).detach()
    run.engine.refresh(wait=True)
    assert not run.engine.retries
    assert float((before * 1.15 - after).norm() / after.norm()) < 0.02


def test_of_calls_that_share_a_layer_none_is_computed_again_in_bits_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(16, 16), torch.randn(64, 16, requires_grad=True)
    inner: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: inner.append(output.detach().clone()))
    true, count = kinds.MatMul.in_integers, [0]

    def spoilt(self: Any, role: str, *arguments: Any) -> Tensor | None:
        found = true(self, role, *arguments)
        if role == "forward" and found is not None:
            count[0] += 1
            return found.mul_(2.0**12) if count[0] in (1, 3) else found  # again, as it may be wrong both times
        return found

    def loss() -> Tensor:
        one = checkpoint(module, x, use_reentrant=False)
        return (one.sum() + module(x * 0.5).sum()).square()

    bits = LowBits(module, return_after=1)
    learnt(bits, loss)
    for _ in range(20):  # so that one failure is rare
        bits.step(loss)
    assert not bits.engine.retries
    count[0] = 0
    monkeypatch.setattr(kinds.MatMul, "in_integers", spoilt)
    inner.clear()
    with set_checkpoint_early_stop(False):
        bits.step(loss)
    assert bits.engine.retries
    assert len(inner) == 3
    assert float(inner[-1].abs().max()) < 100


def test_of_parts_that_look_alike_none_is_computed_again_in_bits_that_were_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ x.transpose(1, 2)).softmax(-1) @ x

    torch.manual_seed(0)
    one, other, x = Mixing(), Mixing(), torch.randn(4, 6, 24, requires_grad=True)
    again: list[tuple[str, bool]] = []
    true = Call.forward

    def forward(self: Call, *arguments: Any) -> Tensor:
        if in_backward():
            again.append((self.node.name, self.node.last_low))
        return true(self, *arguments)

    def loss() -> Tensor:
        return other(checkpoint(one, x, use_reentrant=False)).square().mean()

    bits = LowBits(nn.ModuleList([one, other]))
    learnt(bits, loss)
    monkeypatch.setattr(Call, "forward", forward)
    with set_checkpoint_early_stop(False):
        bits.step(loss)
        assert [low for _, low in again] == [True, True]
        again.clear()
        bits.nodes["matmul#1"].products["forward"].status._left = 1  # it has to wait; others that look alike need not
        bits.step(loss)
    assert bits.nodes["matmul#3"].products["forward"].status.low == 2
    assert [low for _, low in again] == [False, True]


def test_codes_are_gone_when_backward_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Linear(24, 32), torch.randn(64, 24)
    calls: list[weakref.ref[Call]] = []
    true = Call.forward

    def forward(self: Call, *arguments: Any) -> Tensor:
        calls.append(weakref.ref(self))
        return true(self, *arguments)

    monkeypatch.setattr(Call, "forward", forward)
    bits = LowBits(module)
    bits.engine.begin(0)
    bits.operations.begin(module)
    with bits.operations:
        loss = module(x).sum()
        call = calls[0]()
        assert call is not None
        assert call.left is not None
        loss.backward()
    gc.collect()
    assert call.left is None
    assert loss.isfinite()


@pytest.mark.parametrize("device", [False, True])
def test_codes_of_what_is_no_parameter_go_with_it(device: bool) -> None:
    run = low(device)
    known = run.device.codes._weights if run.device is not None else run.engine._weights
    with run.operations:
        x = torch.randn(48, 24)
        hidden = run.net.one(x)
        result = hidden @ hidden.t()
        assert len(known) == 2
        result.sum().backward()
    del result, hidden
    gc.collect()
    assert list(known) == [id(run.net.one.weight)]


@pytest.mark.parametrize("low", ["int8-row", "int8-block", "bfp16", "fp8", "fp16"])
@pytest.mark.parametrize("gradient", [False, True])
def test_numbers_that_hardly_are_any_become_zeros_not_nan(low: str, gradient: bool) -> None:
    values = torch.zeros(4, 256)
    values[0, 0] = 1e-44
    encoded = format_named(low).encode(values, gradient=gradient)
    assert encoded.decoded().isfinite().all()
    values[1, 128:] = torch.randn(128)
    decoded = format_named(low).encode(values, gradient=gradient).decoded().float()
    assert float((decoded - values)[1].norm() / values.norm()) < 0.1
