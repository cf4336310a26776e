"""Guarded products: right in high bits, near in low ones, computed again where a sign shows (P1-P4, P10)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_efficient.precision import kinds
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import Encoded, SharedExponent, format_named
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.operations import Operations
from lightning_efficient.precision.product_times import ProductTimes
from lightning_efficient.precision.status import ReturnPolicy


class LowBits:
    """An engine, its nodes, and steps."""

    def __init__(
        self,
        module: nn.Module,
        low: str = "int8",
        *,
        protect: bool = True,
        return_after: int = 20,
        adaptive: bool = False,
    ) -> None:
        self.module, self.nodes = module, dict[str, Node]()
        self.engine = Engine(
            format_named(low), torch.float32, stochastic=False, protect=protect, seed=0, adaptive=adaptive
        )
        policy = ReturnPolicy(return_after)

        def make(name: str, kind: str) -> Node:
            return self.nodes.setdefault(name, Node(name, kind, policy, adaptive=adaptive))

        self.operations = Operations(self.engine, make, lambda name: True)
        self.number = 0

    def step(self, loss: Callable[[], Tensor], *, learning: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        self.engine.learning = learning
        self.engine.begin(self.number)
        self.operations.begin(self.module)
        self.number += 1
        for parameter in self.module.parameters():
            parameter.grad = None
        with self.operations:
            value = loss()
            value.backward()
        gradients = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}
        return value.detach(), gradients


def plain(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in module.parameters():
        parameter.grad = None
    value = loss()
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Products(nn.Module):
    """A weight for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 32)
        self.plain = nn.Parameter(torch.randn(32, 16) / 6)
        self.bias = nn.Parameter(torch.randn(16))
        self.heads = nn.Parameter(torch.randn(2, 8, 12) / 3)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.same = nn.Conv2d(2, 4, 3, padding="same", dilation=2, groups=2)
        self.up = nn.ConvTranspose1d(8, 3, 4, stride=2, output_padding=1)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)


OPERATIONS: dict[str, Callable[[Products, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "linear without bias": lambda m, x: F.linear(x, m.linear.weight),
    "matmul": lambda m, x: m.linear.weight @ m.plain.T.new_ones(24, 5) @ torch.ones(5, 16),
    "matrix at the right": lambda m, x: x @ m.linear.weight.T,
    "mm": lambda m, x: torch.mm(x.reshape(-1, 24), m.linear.weight.t()),
    "addmm": lambda m, x: torch.addmm(m.bias, x.reshape(-1, 24)[:, :16] @ m.plain.t(), m.plain),
    "bmm": lambda m, x: torch.bmm(x[:2, :, :8], m.heads),
    "broadcast": lambda m, x: torch.matmul(x[:2, None, :, :8], m.heads),
    "einsum": lambda m, x: torch.einsum("bth,hbd->tbd", x[:2, :, :8], m.heads.permute(1, 0, 2)),
    "einsum of heads": lambda m, x: torch.einsum("bti,nij->bntj", x[..., :8], m.heads),
    "convolution": lambda m, x: m.conv(x),
    "same convolution": lambda m, x: m.same(x.reshape(-1, 2, 6, 12)),
    "transposed convolution": lambda m, x: m.up(m.conv(x)),
    "attention": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("low", ["int8", "bfp16", "bf16"])
def test_high_bits_are_exact_and_low_bits_near_p1_p5(operation: str, low: str) -> None:
    torch.manual_seed(0)
    module, x = Products(), torch.randn(4, 6, 24)

    def loss() -> Tensor:
        return OPERATIONS[operation](module, x).square().sum()

    value, gradients = plain(module, loss)
    bits = LowBits(module, low)
    found, exact = bits.step(loss, learning=True)
    torch.testing.assert_close(found, value)
    assert exact.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(exact[name], gradient, rtol=1e-4, atol=1e-4)
    found, near = bits.step(loss)
    assert bits.nodes
    assert not bits.engine.retries
    low_counts = [node.products["forward"].status.low for node in bits.nodes.values()]
    assert all(low_counts)
    assert float((found - value).abs() / value.abs()) < 0.05
    for name, gradient in gradients.items():
        assert float((near[name] - gradient).norm() / gradient.norm()) < 0.06, name


def test_names_are_those_of_modules_and_of_operations() -> None:
    module, x = Products(), torch.randn(4, 6, 24)
    bits = LowBits(module)
    bits.step(lambda: (module.linear(x) @ module.plain).sum() + torch.bmm(x[:2, :, :8], module.heads * 2).sum())
    assert list(bits.nodes) == ["linear", "plain", "matmul#1"]


@pytest.mark.parametrize("kind", ["scaled_dot_product_attention", "lstm"])
def test_what_is_not_covered_is_counted(kind: str) -> None:
    module = nn.LSTM(4, 4)
    x = torch.randn(3, 2, 4, requires_grad=True)
    bits = LowBits(module)
    bits.step(lambda: (module(x)[0] if kind == "lstm" else F.scaled_dot_product_attention(x, x, x)).sum())
    assert bits.operations.skipped[kind] == 1
    assert not bits.nodes


def learnt(bits: LowBits, loss: Callable[[], Tensor]) -> None:
    for _ in range(3):
        bits.step(loss, learning=True)


@pytest.mark.parametrize("role", ROLES)
def test_a_spoilt_low_product_is_computed_again_in_high_bits_p2_p3(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24)

    def loss() -> Tensor:
        return module(x * scale).square().sum()

    scale = nn.Parameter(torch.ones(()))
    bits = LowBits(module)
    learnt(bits, loss)
    value, gradients = plain(module, loss)
    true = kinds.MatMul.in_integers

    def spoilt(self: kinds.MatMul, which: str, *arguments: object) -> Tensor | None:
        found = true(self, which, *arguments)  # type: ignore[arg-type]
        return found if which != role or found is None else found.mul_(2.0**12)

    monkeypatch.setattr(kinds.MatMul, "in_integers", spoilt)
    found, near = bits.step(loss)
    (retry,) = bits.engine.retries
    assert (retry.node, retry.role) == ("weight", role)
    assert "result" in retry.reason
    assert float((found - value).abs() / value) < 0.03
    for name, gradient in gradients.items():
        assert float((near[name] - gradient).norm() / gradient.norm()) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_through_high_bits_and_stays_so_p2(bad: float) -> None:
    module, x = nn.Linear(24, 32), torch.randn(64, 24)
    bits = LowBits(module)
    learnt(bits, lambda: module(x).sum())
    x[3, 4] = bad
    value, _ = bits.step(lambda: module(x).sum())
    assert not value.isfinite()
    assert "not finite" in bits.engine.retries[0].reason


def test_those_behind_a_failure_run_high_and_come_back_p4_p10(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    x = torch.randn(64, 16)
    bits = LowBits(module, return_after=3)
    learnt(bits, lambda: module(x).square().sum())
    node = bits.nodes["1"]
    monkeypatch.setattr(node, "sign_of_operands", lambda *arguments: "made up")
    bits.step(lambda: module(x).square().sum())
    highs = {name: node.products["forward"].status.high - 3 for name, node in bits.nodes.items()}
    assert highs["0"] == 0
    assert highs["1"] == 1
    assert node.products["forward"].status.retries == 1
    assert node.products["forward"].status.held


@pytest.mark.parametrize("reason", ["a sign", "a wait"])
def test_gradients_of_what_failed_in_forward_are_in_high_bits_p4(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples that are scaled apart the gradients are too, the other way round, and no sign tells."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(64, 16)
    bits = LowBits(module, return_after=1)  # all others are back at once
    learnt(bits, lambda: module(x).square().sum())
    forward = bits.nodes["1"].products["forward"].status
    if reason == "a sign":
        true = bits.nodes["1"].sign_of_operands
        monkeypatch.setattr(
            bits.nodes["1"], "sign_of_operands", lambda role, *a: "made up" if role == "forward" else true(role, *a)
        )
    else:
        monkeypatch.setattr(forward, "_left", 2)
    low = {role: product.status.low for role, product in bits.nodes["1"].products.items()}
    bits.step(lambda: module(x).square().sum())
    assert {role: product.status.low for role, product in bits.nodes["1"].products.items()} == low
    assert bits.nodes["0"].products["grad_weight"].status.low > 0, "those of others are not"
    monkeypatch.undo()
    for _ in range(3):
        bits.step(lambda: module(x).square().sum())
    assert all(product.status.low > low[role] for role, product in bits.nodes["1"].products.items()), "and come back"


@pytest.mark.parametrize("role", ["grad_input", "grad_weight"])
def test_gradients_that_are_wrong_but_no_larger_are_seen_p2(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24, requires_grad=True)
    bits = LowBits(module)
    learnt(bits, lambda: module(x).square().sum())
    true = kinds.MatMul.in_integers

    def wrong(self: kinds.MatMul, which: str, *arguments: object) -> Tensor | None:
        found = true(self, which, *arguments)  # type: ignore[arg-type]
        return found if which != role or found is None else found.flip(0, 1)

    monkeypatch.setattr(kinds.MatMul, "in_integers", wrong)
    bits.step(lambda: module(x).square().sum())
    (retry,) = bits.engine.retries
    assert retry.role == role
    assert "computed exactly" in retry.reason


def test_results_are_looked_at_elsewhere_in_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, seen = nn.Linear(24, 32), torch.randn(64, 24), list[int]()
    monkeypatch.setattr(kinds.MatMul, "probe", lambda self, *arguments: seen.append(arguments[-2]))
    bits = LowBits(module)
    bits.engine.learning = True
    for batch in range(3):
        bits.engine.begin(0, batch)
        bits.operations.begin(module)
        with bits.operations:
            module(x)
    assert seen[1:] == [seen[0] + 1, seen[0] + 2]


def test_unprotected_low_bits_look_at_nothing() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24)
    bits = LowBits(module, protect=False)
    learnt(bits, lambda: module(x).sum())
    x[:, 3] *= 1e6
    bits.step(lambda: module(x).sum())
    assert not bits.engine.retries
    assert bits.nodes["weight"].products["forward"].status.low == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_as_before(reentrant: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(64, 16, requires_grad=True)
    outputs: list[Tensor] = []
    module[2].register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    bits = LowBits(module)

    def loss() -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant).square().sum()

    learnt(bits, loss)
    counts = bits.nodes["2"].products["forward"].status.low
    outputs.clear()
    with set_checkpoint_early_stop(False):
        bits.step(loss)
    assert len(outputs) == 2
    assert torch.equal(*outputs)
    assert bits.nodes["2"].products["forward"].status.low == counts + 1


def test_gradients_of_gradients_are_refused() -> None:
    module, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    bits = LowBits(module)
    bits.operations.begin(module)
    with bits.operations:
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)  # of the weight alone
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
        module.requires_grad_(False)
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        assert not gradient.requires_grad, "it depends on nothing"


def test_small_gradients_are_kept_in_fp16_p11() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24)

    def loss() -> Tensor:
        return module(x).square().sum() * 1e-12

    bits = LowBits(module, "fp16")
    learnt(bits, loss)
    _, gradients = plain(module, loss)
    _, near = bits.step(loss)
    assert not bits.engine.retries
    for name, gradient in gradients.items():
        assert float((near[name] - gradient).norm() / gradient.norm()) < 1e-3


@pytest.mark.parametrize("protect", [True, False])
def test_the_last_exponent_is_the_next_guess_and_changes_no_result(
    protect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(24, 32), torch.randn(64, 24)
    bits, blind = LowBits(module, protect=protect), LowBits(module, protect=protect)
    guesses: list[int | None] = []
    true = SharedExponent.encode

    def encode(self: SharedExponent, values: Tensor, *, guess: int | None = None, **rest: object) -> Encoded:
        guesses.append(guess)
        return true(self, values, guess=guess, **rest)  # type: ignore[arg-type]

    def without(self: SharedExponent, values: Tensor, *, guess: int | None = None, **rest: object) -> Encoded:
        return true(self, values, **rest)  # type: ignore[arg-type]

    for number, factor in enumerate((1.0, 1.0, 4.0, 4.0)):
        scaled, learning = x * factor, number == 0
        monkeypatch.setattr(SharedExponent, "encode", encode)
        found = bits.step(lambda: module(scaled).square().mean(), learning=learning)  # noqa: B023
        monkeypatch.setattr(SharedExponent, "encode", without)
        exact = blind.step(lambda: module(scaled).square().mean(), learning=learning)  # noqa: B023
        assert torch.equal(found[0], exact[0])
        assert all(torch.equal(found[1][name], gradient) for name, gradient in exact[1].items())
    inputs, weights, gradients = guesses[::3], guesses[1::3], guesses[2::3]
    assert inputs[0] is weights[0] is gradients[0] is None
    assert inputs[1] == inputs[2] == inputs[3] + 2  # type: ignore[operator]
    assert len({*weights[1:]}) == 1
    assert gradients[1] == gradients[2] == gradients[3] + 2  # type: ignore[operator]


# -- what it cost and saved --------------------------------------------------------------------------------------------


def test_products_are_held_against_those_in_high_bits_x5() -> None:
    times, node = ProductTimes(), Node("a", "linear", ReturnPolicy(20))
    product = node.products["forward"]
    times.low(product, 5.0)  # with which it cannot be compared
    assert (times.cost, times.gain) == (0.0, 0.0)
    for high in (9.0, 1.0, 2.0):
        times.learnt(product, high, 0.5)
    assert times.cost == 1.5
    times.low(product, 0.5)
    times.low(product, 2.25)
    times.failed(0.25)
    assert (times.cost, times.gain) == (2.0, 1.5)
    assert "high_times" not in node.state_dict()["products"]["forward"], "clocks differ between equal runs"


def test_each_product_is_timed_x5() -> None:
    module, x = nn.Linear(16, 16), torch.randn(4, 16)
    bits = LowBits(module)
    bits.step(lambda: module(x).square().sum(), learning=True)
    learnt = bits.engine.times.cost
    assert learnt > 0
    assert bits.engine.times.gain == 0
    bits.step(lambda: module(x).square().sum())
    assert bits.engine.times.cost + bits.engine.times.gain > learnt
    for node in bits.nodes.values():
        node.stay_high("it was told to")
    before = bits.engine.times.cost
    bits.step(lambda: module(x).square().sum())
    assert bits.engine.times.cost > before  # looking for operations takes time, also of those that are left alone
