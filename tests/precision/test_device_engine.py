"""Guarded products on a device: as the immediate engine's, and nobody waits (P2-P4, P10); here with the eager code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_efficient.precision.device import eager, engine, kernels_on, rows
from lightning_efficient.precision.device.engine import DeviceEngine
from lightning_efficient.precision.device.gate import Gate
from lightning_efficient.precision.device.rows import Reason
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import format_named
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.status import ReturnPolicy
from tests.precision.device_network import FAULTS, LEARNING, Run, alike, compare

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_with_faults_of_all_kinds_it_decides_as_the_immediate_engine_p2_p3_p4_p10() -> None:
    assert compare(eager, faults=FAULTS) > 50


@pytest.mark.parametrize("options", [{"low": "fp8"}, {"stochastic": True}])
def test_floats_of_eight_bits_and_noise_are_the_same_too_p5(options: dict[str, object]) -> None:
    immediate, other = Run(None, **options), Run(eager, **options)  # type: ignore[arg-type]
    for _ in range(LEARNING + 2):
        result, gradients, retries = immediate.step()
        found, near, again = other.step()
        assert retries == again == []
        torch.testing.assert_close(found, result, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            assert float((near[name] - gradient).norm() / gradient.norm()) < 1e-4, name
    assert all(node.products[role].status.low == 2 for node in other.nodes.values() for role in ROLES)


def test_unprotected_it_looks_at_nothing_but_what_is_not_finite() -> None:
    run = Run(eager, protect=False)
    for fault in [""] * LEARNING + ["outlier", "jump", "nan"]:
        *_, retries = run.step(fault)
        assert bool(retries) == (fault == "nan")
    assert "look" in run.calls  # in pre-learning
    assert run.calls["look"] == 9 * LEARNING


def test_a_step_later_the_host_knows_and_leaves_the_low_product_out() -> None:
    run = Run(eager)
    for _ in range(LEARNING + 1):
        run.step(wait=False)
    *_, retries = run.step("outlier", wait=False)
    assert retries == []  # nobody has waited
    before = dict(run.calls)
    *_, retries = run.step(wait=False)
    assert retries == []  # a copy of the step before is under way
    assert run.calls["again"] - before["again"] == 9
    before = dict(run.calls)
    *_, retries = run.step(wait=False)
    assert any(retry.node == "one" and retry.role == "forward" for retry in retries)
    statuses = [node.products[role].status for node in run.nodes.values() for role in ROLES]
    assert not any(status.held for status in statuses), "until someone asks"
    skipped = 9 - (run.calls["again"] - before["again"])
    assert skipped > 0
    assert run.calls["decide"] - before["decide"] == 9
    run.engine.refresh()
    held = {(node.name, role) for node in run.nodes.values() for role in ROLES if node.products[role].status.held}
    held |= {(name, role) for name, which in held if which == "forward" for role in ROLES}  # gradients go along
    assert len(held) == skipped


def test_the_state_is_the_same_whenever_the_host_looks() -> None:
    """And what it leaves out, which other kernels compute, to other last digits."""
    late, prompt = Run(eager), Run(eager)
    for fault in [""] * (LEARNING + 2) + ["outlier", *[""] * 8, "jump", *[""] * 8]:
        late.step(fault, wait=False)
        prompt.step(fault, wait=True)
    late.engine.refresh(wait=True)
    for name, node in late.nodes.items():
        alike(node, prompt.nodes[name], name)
    assert late.calls == prompt.calls


def test_it_goes_on_from_a_checkpoint() -> None:
    run, other = Run(eager), Run(eager)
    for fault in [""] * (LEARNING + 2) + ["outlier"]:
        run.step(fault, wait=False)
    run.engine.refresh(wait=True)  # as the plugin does that writes one
    other.number = run.number
    other.engine.run.high_in_a_row = run.engine.run.high_in_a_row
    for name, node in run.nodes.items():
        fresh = other.nodes[name] = Node(name, node.kind, run.policy)
        fresh.load_state_dict(node.state_dict())
    run.engine.retries.clear()
    for _ in range(6):
        before = dict(run.calls), dict(other.calls)
        result, _, retries = run.step(wait=False)
        found, _, again = other.step(wait=False)
        assert retries == again == []
        assert torch.equal(result, found)
        low = [
            calls["again"] - old.get("again", 0) for calls, old in zip((run.calls, other.calls), before, strict=True)
        ]
        assert low[0] == low[1]  # also what the host leaves out is the same
    for goes_on in (run, other):
        goes_on.engine.refresh(wait=True)
    for name, node in run.nodes.items():
        assert node.state_dict() == other.nodes[name].state_dict()


class Mixed(nn.Module):
    """What has kernels, and what has none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(12, 12), nn.Conv1d(6, 6, 3, padding=1)
        self.heads = nn.Parameter(torch.randn(4, 12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.conv(self.linear(x)), self.heads)


def test_what_has_no_kernels_stays_high_and_says_so() -> None:
    run = Run(eager)
    run.net = Mixed()  # type: ignore[assignment]
    run.engine.begin(0)
    run.operations.begin(run.net)
    with run.operations:
        run.net(torch.randn(4, 6, 12)).sum().backward()
    why = {name: node.why_high for name, node in run.nodes.items()}
    assert why == {"linear": "", "conv": "no kernels in few bits for it on this device", "heads": why["conv"]}
    assert all(run.nodes["heads"].products[role].low_pays is False for role in ROLES)


def test_a_format_without_kernels_is_refused_with_words() -> None:
    host = Engine(format_named("bfp16"), torch.float32, stochastic=False, protect=True, seed=0)
    with pytest.raises(ValueError, match=r"bfp16.*int8 and fp8"):
        DeviceEngine(host, CPU, eager, stochastic=False, protect=True, seed=0)


@pytest.mark.parametrize("fault", ["", "outlier"])
def test_what_checkpointing_computes_again_is_as_before(fault: str) -> None:
    run = Run(eager)
    for _ in range(LEARNING):
        run.step()
    outputs: list[Tensor] = []
    run.net.one.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    plain = run.net.forward
    run.net.forward = lambda x: checkpoint(plain, x, use_reentrant=False)  # type: ignore[method-assign]
    before = run.nodes["one"].products["forward"].status.low
    with set_checkpoint_early_stop(False):
        run.step(fault)
    assert len(outputs) == 2
    assert torch.equal(*outputs)
    assert run.nodes["one"].products["forward"].status.low == before + (not fault)


@pytest.mark.parametrize("operations", [None, eager])
def test_of_a_layer_called_twice_nothing_is_computed_again_in_fewer_bits_than_at_first(operations: Any) -> None:
    """The first call fails, and the second is in low bits, for the layer need not wait."""
    run, policy = Run(operations), ReturnPolicy(return_after=3, retry_rate=1.0)
    run.operations._make = lambda name, kind: run.nodes.setdefault(name, Node(name, kind, policy))
    outputs: list[Tensor] = []
    run.net.one.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))

    fault = False

    def part(x: Tensor) -> Tensor:
        first = run.net.one(torch.where(torch.arange(24) == 3, x * 1e5, x) if fault else x)
        return first + run.net.one(x)

    run.net.forward = lambda x: run.net.two(checkpoint(part, x, use_reentrant=False))  # type: ignore[method-assign]
    with set_checkpoint_early_stop(False):
        for _ in range(LEARNING + 3):
            run.step()
        status = run.nodes["one"].products["forward"].status
        before, fault = (status.low, status.retries), True
        outputs.clear()
        run.step()
    assert (status.low, status.retries) == (before[0] + 1, before[1] + 1)
    assert len(outputs) == 4
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[1], outputs[3])  # not known to be another one than the first
    torch.testing.assert_close(outputs[1], outputs[3], rtol=0.05, atol=0.05)


def test_the_gate_leaves_alone_what_few_bits_take_longer_for() -> None:
    for pays, low in ((True, 1.0), (False, 3.0)):
        times = iter([low, low, low, 3.0] * 9)  # two operands at a half each, all else, high bits
        slow = Run(eager)
        assert slow.device is not None
        slow.device._gate = Gate(lambda function, times=times: (function(), next(times))[1])  # type: ignore[misc]
        slow.step()
        assert {slow.nodes[name].products[role].low_pays for name in slow.nodes for role in ROLES} == {pays}
        assert slow.nodes["one"].products["forward"].status.low == 0
        for _ in range(LEARNING):
            slow.step()
        assert slow.nodes["one"].products["forward"].status.low == pays
        assert slow.calls.get("again", 0) >= 9 * pays


def test_tables_and_slots_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_NODES", 2)
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    run = Run(eager)
    assert run.device is not None
    run.device.codes.measured = torch.zeros(8, 8, dtype=torch.int64)
    run.net = layers  # type: ignore[assignment]
    x = torch.randn(48, 16, requires_grad=True)
    for number in range(LEARNING + 1):
        run.engine.learning = number < LEARNING
        run.engine.begin(number)
        run.operations.begin(layers)
        with run.operations:
            layers(x).square().sum().backward()
    run.engine.refresh(wait=True)
    assert {node.products[role].status.low for node in run.nodes.values() for role in ROLES} == {1}


def test_steps_may_overlap() -> None:
    """Backward of a forward before the step's begin: what was measured is measured again."""
    weight, x = nn.Parameter(torch.randn(20, 24)), torch.randn(48, 24, requires_grad=True)
    run = Run(eager)
    run.operations.begin(run.net)
    with run.operations:
        result = F.linear(x, weight)
        run.engine.begin(5)
        other = F.linear(x * 1e-3, weight)
        result.sum().backward()
    expected = torch.ones(48, 20).t() @ x.detach()
    assert float((weight.grad - expected).norm() / expected.norm()) < 0.02  # type: ignore[operator]
    assert other.isfinite().all()


REASONS = [
    (rows.NOT_FINITE, 0), (rows.ZERO, 1), (rows.OVER, 2), (rows.UNDER, 1), (rows.OFF, 2), (rows.VARIES, 3),
    (rows.APART, 0), (rows.PROBED, 3),
]  # fmt: skip


@pytest.mark.parametrize(("sign", "whose"), REASONS)
@pytest.mark.parametrize("role", ROLES)
def test_a_reason_is_read_as_it_was_written(sign: int, whose: int, role: str) -> None:
    reason = Reason(rows.OPERAND * whose + sign, 0.25, 0.125)
    text = reason.text(role)  # type: ignore[arg-type]
    again = Reason.of(text, role)  # type: ignore[arg-type]
    assert again.code == reason.code
    assert again.text(role) == text  # type: ignore[arg-type]


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("low", ["int8", "fp8"])
def test_on_a_gpu_no_product_waits_for_the_device(low: str) -> None:
    kernels = kernels_on(torch.device("cuda"), format_named(low))
    if kernels is None:
        pytest.skip(f"this GPU multiplies no {low}")
    run = Run(kernels, low, "cuda")
    for _ in range(LEARNING + 2):
        run.step()
    x = torch.randn(48, 24, device="cuda")
    run.engine.learning = False
    run.engine.begin(99)
    run.operations.begin(run.net)
    with never_waiting(), run.operations:
        run.net(x).square().mean().backward()


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_a_recorded_step_decides_anew_each_time() -> None:
    kernels = kernels_on(torch.device("cuda"), format_named("int8"))
    if kernels is None:
        pytest.skip("this GPU multiplies no int8")
    run = Run(kernels, "int8", "cuda")
    for _ in range(LEARNING + 2):
        run.step()
    x, graph = torch.randn(48, 24, device="cuda"), torch.cuda.CUDAGraph()
    run.engine.learning = False

    def step() -> None:
        run.engine.begin(0)
        run.operations.begin(run.net)
        with run.operations:
            run.net(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    for fault in ("", "outlier", ""):
        x.normal_()
        if fault:
            x[:, 3] *= 1e5
        graph.replay()
        run.engine.refresh(wait=True)
        status = run.nodes["one"].products["forward"].status
        assert (status.retries > 0) == (fault != "" or status.held)
