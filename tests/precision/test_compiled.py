"""What ``torch.compile`` took decides as what it did not: no graph break, no graph for a decision, the same bits."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lightning_efficient.precision import compiled
from lightning_efficient.precision.nodes import ROLES
from lightning_efficient.precision.precision import RollbackPrecision
from tests.helpers.fitting import fit
from tests.helpers.models import SilentModel
from tests.precision.test_engine import LowBits, plain
from tests.technique_settings import demo_model

# dynamo looks at the gradients of what goes into a graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class All(nn.Module):
    """Each operation once, on sequences ``[batch, 6, 24]``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(24, 24), nn.Parameter(torch.randn(24, 24) / 5)
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.conv, self.image = nn.Conv1d(24, 24, 3, padding=1), nn.Conv2d(1, 2, 3, padding="same")
        self.up = nn.ConvTranspose1d(24, 24, 3, padding=1)
        self.tied = nn.Linear(24, 24, bias=False)
        self.tied.weight = self.linear.weight
        self.bilinear = nn.Bilinear(24, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = x + F.linear(x, self.plain) + x @ self.plain + torch.addmm(self.linear.bias, x[:, 0], self.plain)[:, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        weights = torch.matmul(x, x.transpose(1, 2)).softmax(-1)
        x = x + torch.bmm(weights, x) + torch.einsum("btu,bui->bti", weights, x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2) + self.image(x[:, None]).sum(1)
        x = x + self.up(x.transpose(1, 2)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(x, x, x) + self.bilinear(x.float(), x.float()).sum(-1, keepdim=True)
        return self.tied(x)


class Attending(nn.Module):
    """Two products of matrices without a parameter, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)


def decisions(bits: LowBits) -> dict[str, Any]:
    """Of each product: how often low and high, and how often computed again; and why."""
    found = {
        (name, role): (status.low, status.high, status.retries, status.reason)
        for name, node in bits.nodes.items()
        for role in ROLES
        for status in (node.products[role].status,)
    }
    return found | {"retries": list(bits.engine.retries)}


def run(
    module: nn.Module, call: Callable[[Tensor], Tensor], *, low: str = "int8", autocast: bool = False, steps: int = 8,
    batches: Callable[[int], int] = lambda step: 4,
) -> tuple[LowBits, list[Tensor], list[dict[str, Tensor]]]:  # fmt: skip
    """Three steps in which limits are learnt; in one behind them there are numbers that are much too large."""
    torch.manual_seed(1)
    bits, losses, gradients = LowBits(module, low, return_after=3), [], []
    for step in range(steps):
        x = torch.randn(batches(step), 6, 24)
        if step == 4:
            x[0, :, 3] *= 1e5
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, found = bits.step(lambda x=x: call(x), learning=step < 3)  # type: ignore[misc]
        losses.append(loss)
        gradients.append(found)
    return bits, losses, gradients


def assert_same(one: Any, other: Any) -> None:
    (bits, losses, gradients), (others, other_losses, other_gradients) = one, other
    assert decisions(others) == decisions(bits)
    assert list(others.nodes) == list(bits.nodes)
    for step, (mine, theirs) in enumerate(zip(losses, other_losses, strict=True)):
        assert torch.equal(mine, theirs), step
        for name, gradient in gradients[step].items():
            assert torch.equal(gradient, other_gradients[step][name]), (step, name)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph_decides_as_no_graph_bit_for_bit(autocast: bool) -> None:
    torch.manual_seed(0)
    module = Attending() if autocast else All()  # torch itself adds up gradients in another order, in 16 bits

    def loss(x: Tensor) -> Tensor:
        return module(x).float().square().mean()

    eager = run(module, loss, autocast=autocast)
    graph = run(module, torch.compile(loss, backend="aot_eager", fullgraph=True), autocast=autocast)
    assert graphs() == 1, "neither a retry nor the end of pre-learning makes another"
    assert eager[0].engine.retries
    assert_same(eager, graph)
    assert graph[0].operations.reasons == eager[0].operations.reasons
    assert compiled.pending() == 0


def test_one_graph_serves_all_layers_of_a_kind_each_with_its_name() -> None:
    """Names in the graph would make one for each layer, and torch gives up after eight."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Attending() for _ in range(10)))
    eager = run(module, lambda x: module(x).square().mean())
    for layer in module:
        layer.compile(backend="aot_eager", fullgraph=True)
    graph = run(module, lambda x: module(x).square().mean())
    assert graphs() == 2, "one for the first, whose input needs no gradient"
    assert {"0.key", "9.value", "matmul#1", "matmul#20"} <= set(graph[0].nodes)
    assert_same(eager, graph)


@pytest.mark.parametrize("where", ["inside", "around", "no graph"])
def test_what_checkpointing_computes_again_is_as_before(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has no parameter, by which it would be known again."""
    torch.manual_seed(0)
    module = nn.Sequential(*(Attending() for _ in range(3)))
    seen: list[tuple[str, bool]] = []
    true = compiled.Call.forward

    def forward(self: compiled.Call, *arguments: Any) -> Tensor:
        result = true(self, *arguments)
        seen.append((self.node.name, self.node.last_low))
        return result

    monkeypatch.setattr(compiled.Call, "forward", forward)

    def layers(x: Tensor) -> Tensor:
        for layer in module:
            x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
        return x.square().mean()

    call = torch.compile(layers, backend="aot_eager", fullgraph=True) if where == "inside" else layers
    if where == "around":
        for layer in module:
            layer.compile(backend="aot_eager", fullgraph=True)
    usual = run(module, lambda x: module(x).square().mean(), steps=4)
    bits, losses, gradients = run(module, call, steps=4)
    assert_same(usual, (bits, losses, gradients))
    assert len(bits.nodes) == 12, "there is none that is only computed again"
    last = seen[-2 * len(bits.nodes) :]
    assert all(low for _, low in last[: len(bits.nodes)])
    assert sorted(last[: len(bits.nodes)]) == sorted(last[len(bits.nodes) :])


def test_another_size_of_batch_makes_one_more_graph_at_most() -> None:
    torch.manual_seed(0)
    module = Attending()

    def loss(x: Tensor) -> Tensor:
        return module(x).square().mean()

    def batches(step: int) -> int:
        return (4, 4, 6, 4, 4, 8, 7, 5)[step]

    eager = run(module, loss, batches=batches)
    graph = run(module, torch.compile(loss, backend="aot_eager", fullgraph=True), batches=batches)
    assert graphs() == 2
    assert_same(eager, graph)


def test_what_forward_keeps_is_gone_where_backward_never_comes() -> None:
    module, x = nn.Linear(24, 24), torch.randn(8, 24)
    function = torch.compile(module, backend="aot_eager")
    bits = LowBits(module)
    bits.step(lambda: function(x).sum(), learning=True)
    with bits.operations:
        kept = function(x)
        assert compiled.pending() == 1
        with torch.no_grad():
            function(x)
    assert compiled.pending() == 1
    assert graphs() == 2, "one of them without gradients"
    LowBits(module).step(lambda: function(x).sum())
    assert graphs() == 2, "another plugin needs none of its own"
    del kept
    gc.collect()
    assert compiled.pending() == 0


def test_backward_does_without_what_forward_kept() -> None:
    """As where hooks keep saved tensors elsewhere, and with them that by which backward finds it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    def elsewhere(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda kept: kept):
            return function(x).square().mean()

    function = torch.compile(module, backend="aot_eager")
    usual = run(module, lambda x: function(x).square().mean())
    other = run(module, elsewhere)
    assert compiled.pending() == 0
    assert_same(usual, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_takes_no_part_is_in_graphs_as_torch_computes_it(autocast: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(24, 24), nn.Conv1d(6, 6, 3)), torch.randn(4, 6, 24)
    function = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradients = plain(module, lambda: function(x).float().square().mean())
        bits = LowBits(module)
        bits.operations._takes_part = lambda name: False
        found, others = bits.step(lambda: function(x).float().square().mean())
    assert torch.equal(found, value)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-6)
    assert not bits.nodes
    assert bits.operations.reasons == {"0": "it is excluded", "1": "it is excluded"}


def test_gradients_of_gradients_are_refused() -> None:
    module, x = nn.Linear(24, 24), torch.randn(8, 24, requires_grad=True)
    bits = LowBits(module)
    bits.operations.begin(module)
    for backend in ("eager", "aot_eager"):
        with bits.operations:
            loss = torch.compile(module, backend=backend)(x).square().sum()
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            with pytest.raises(RuntimeError, match=r"double backward|differentiable once"):
                gradient.sum().backward()


@pytest.mark.parametrize("graph", [False, True])
def test_transforms_of_functions_stay_in_high_bits_and_are_listed(graph: bool) -> None:
    module, x = nn.Linear(24, 24), torch.randn(8, 24)
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, weights, (x,)).square().mean()

    def each(x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        return found

    expected = each(x)
    bits = LowBits(module)
    bits.operations.begin(module)
    with bits.operations:
        found = torch.compile(each, backend="aot_eager", fullgraph=True)(x) if graph else each(x)
    torch.testing.assert_close(found, expected)
    assert not bits.nodes
    assert set(bits.operations.reasons.values()) <= {
        "it is within a transform of torch.func", "nothing in it needs a gradient"
    }  # fmt: skip
    assert bits.operations.reasons


def test_the_operations_keep_what_torch_asks_of_them() -> None:
    module = nn.Linear(24, 16)
    bits = LowBits(module)
    bits.operations.begin(module)
    x = torch.randn(2, 4, 24, requires_grad=True)
    arguments = (x, module.weight, module.bias, "linear", [], torch.float32, "linear", 1, 0)
    torch.library.opcheck(compiled.low_product, arguments, test_utils=("test_schema", "test_faketensor"))
    token = compiled.low_product(*arguments)[1]
    for needed in ([True, True, True], [False, True, False]):
        back = (torch.randn(2, 4, 16), x, module.weight, token, "linear", [], True, needed, 1)
        torch.library.opcheck(compiled.low_product_backward, back, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("what", ["network", "module"])
def test_a_trainer_has_the_same_map_whether_compiled_or_not(what: str, tmp_path: Path) -> None:
    maps, losses = [], []
    for backend in (None, "aot_eager"):
        plugin = RollbackPrecision(high="fp32", pre_learning_steps=2, only_if_faster=False)
        module = demo_model(SilentModel, layers=2)
        if backend is not None and what == "network":
            module.model = torch.compile(module.model, backend=backend)
        whole = torch.compile(module, backend=backend) if backend is not None and what == "module" else None
        run = fit(None, module=module, compiled=whole, plugins=[plugin], root=tmp_path, max_steps=6)
        maps.append([{**row, "high": 0} if "not covered" in row["bits"] else row for row in plugin.precision_map()])
        losses.append(run.losses)
    assert maps[0] == maps[1]
    assert {"model.blocks.0.mlp.up", "scaled_dot_product_attention"} <= {row["operation"] for row in maps[0]}
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_decisions() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Attending(), nn.Linear(24, 24))

    def loss(x: Tensor) -> Tensor:
        return module(x).square().mean()

    eager = run(module, loss, steps=6)
    graph = run(module, torch.compile(loss, fullgraph=True), steps=6)
    assert graphs() == 1
    assert compiled.pending() == 0
    assert [retry.node for retry in graph[0].engine.retries] == [retry.node for retry in eager[0].engine.retries]
    assert list(graph[0].nodes) == list(eager[0].nodes)
    for one, other in zip(eager[1], graph[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
