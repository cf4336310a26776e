"""What multiplies matrices and stays in high bits is listed, with how often and why; nothing is left out silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.precision.operations import Operations
from lightning_efficient.precision.precision import RollbackPrecision
from tests.helpers.fitting import fit
from tests.helpers.models import SilentModel
from tests.precision.test_engine import LowBits
from tests.technique_settings import demo_model


class Marked(Tensor):
    """A subclass."""


W = nn.Parameter(torch.randn(8, 8))
FIXED = torch.randn(8, 8)
ONE_FUNCTION = "it is one function, whose products are not seen"
SMALL: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "float64": (lambda x: x.double() @ W.double(), "matmul", "its numbers are float64"),
    "complex": (lambda x: (x.cfloat() @ W.cfloat()).abs(), "matmul", "its numbers are complex64"),
    "subclass": (lambda x: x @ W.as_subclass(Marked), "matmul", "Marked is not a plain tensor"),
    "no gradient": (lambda x: F.linear(FIXED, FIXED), "linear", "nothing in it needs a gradient"),
    "sparse": (lambda x: FIXED.to_sparse() @ x, "matmul", "its layout is sparse_coo"),
    "layer of one": (lambda x: F.linear(x, W[0]), "linear", "it is a product with a vector"),
    "bias for each row": (lambda x: F.linear(x, W, FIXED), "linear", "what is added is not a bias"),
    "empty": (lambda x: x[:0] @ W, "weight", "there is nothing in it"),
    "types": (lambda x: _raised(lambda: x.bfloat16() @ W), "weight", "its tensors are of several types"),
    "vector": (lambda x: x @ W[0], "matmul", "it is a product with a vector"),
    "mv": (lambda x: torch.mv(x, W[0]), "mv", ONE_FUNCTION),
    "factors": (lambda x: torch.addmm(W[0], x, W, alpha=2), "addmm", "it has factors"),
    "no bias": (lambda x: torch.addmm(FIXED, x, W), "addmm", "what is added is not a bias"),
    "einsum": (lambda x: torch.einsum("ij,jk,kl->il", x, W, W), "einsum",
               "it is not a product of two matrices, or of batches of them"),
    "no batch": (lambda x: F.conv1d(x, W[:, :, None]), "conv1d", "its input has no dimension for the batch"),
    "uneven": (lambda x: F.conv1d(x[None], W[:, :, None].expand(8, 8, 2), padding="same"), "conv1d",
               "its padding differs between both sides"),
    "baddbmm": (lambda x: torch.baddbmm(x[None], x[None], W[None]), "baddbmm", ONE_FUNCTION),
    "bilinear": (lambda x: nn.Bilinear(8, 8, 2)(x, x), "bilinear", ONE_FUNCTION),
    "gru": (lambda x: nn.GRU(8, 4)(x)[0], "gru", ONE_FUNCTION),
    "rnn": (lambda x: nn.RNN(8, 4)(x)[0], "rnn_tanh", ONE_FUNCTION),
    "lstm cell": (lambda x: nn.LSTMCell(8, 4)(x)[0], "lstm_cell", ONE_FUNCTION),
    "dispatcher": (lambda x: torch.ops.aten.baddbmm.default(x[None], x[None], W[None]), "baddbmm", ONE_FUNCTION),
    "transform": (lambda x: torch.func.vmap(lambda row: row[None] @ W)(x), "weight",
                  "it is within a transform of torch.func"),
}  # fmt: skip


def _raised(call: Callable[[], Tensor]) -> Tensor:
    """What torch refuses it still refuses."""
    with pytest.raises(RuntimeError, match="dtype"):
        call()
    return W.sum()


class Holder(nn.Module):
    """Has the weight, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = W


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", SMALL)
def test_what_is_not_covered_is_listed_with_its_reason(case: str) -> None:
    call, name, reason = SMALL[case]
    module = nn.ModuleDict({"weight": Holder()})
    bits = LowBits(module)
    x = torch.randn(8, 8, requires_grad=True)
    bits.step(lambda: call(x).float().sum() + x.sum())
    assert bits.operations.skipped == {name: 1}
    assert bits.operations.reasons == {name: reason}
    assert not bits.nodes


@pytest.mark.parametrize("call", [
    lambda x: torch.nn.functional.linear(weight=W, input=x), lambda x: torch.ops.aten.linear(x, W),
    lambda x: torch.ops.aten.linear.default(x, W), lambda x: torch.ops.aten.mm(x, W), lambda x: W.__rmatmul__(x),
    lambda x: torch.matmul(x, other=W), lambda x: torch.mm(input=x, mat2=W), lambda x: x.matmul(W),
    lambda x: torch.addmm(input=W[0], mat1=x, mat2=W),
])  # fmt: skip
def test_a_product_is_covered_by_whatever_name_it_is_called(call: Callable[[Tensor], Tensor]) -> None:
    bits = LowBits(nn.ModuleDict({"layer": Holder()}))
    bits.step(lambda: call(torch.randn(8, 8, requires_grad=True)).sum())
    assert list(bits.nodes) == ["layer"]
    assert not bits.operations.skipped


def test_what_a_compiler_only_looks_at_is_not_counted() -> None:
    bits = LowBits(nn.Linear(8, 8))
    bits.step(lambda: F.linear(torch.randn(2, 8, device="meta"), torch.randn(4, 8, device="meta")).new_zeros(
        (), device="cpu", requires_grad=True))  # fmt: skip
    assert not bits.operations.skipped


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_the_map_has_what_is_excluded_and_what_torchscript_runs(tmp_path: Path) -> None:
    module = demo_model(SilentModel, layers=1)
    block = module.model.blocks[0]
    block.mlp = torch.jit.script(block.mlp)
    plugin = RollbackPrecision(high="fp32", pre_learning_steps=1, exclude=["*.query"])
    fit(None, module=module, plugins=[plugin], root=tmp_path, max_steps=2)
    rows = {row["operation"]: row for row in plugin.precision_map() if row["product"] == "all"}
    assert {name: (row["high"], row["last reason"]) for name, row in rows.items()} == {
        "model.blocks.0.attention.query": (2, "it is excluded"),
        "model.blocks.0.mlp": (1, "it is a module of TorchScript"),
        "scaled_dot_product_attention": (2, ONE_FUNCTION),
    }
    assert {row["bits"] for row in rows.values()} == {"high, not covered"}


def test_what_is_written_elsewhere_has_no_gradient_and_is_not_counted() -> None:
    operations: Operations = LowBits(nn.Linear(8, 8)).operations
    with operations, torch.no_grad():
        torch.mm(FIXED, FIXED, out=torch.empty(8, 8))
    assert not operations.skipped


def test_parameters_that_are_there_only_while_their_module_computes_have_their_names() -> None:
    """As with FSDP2, which puts another parameter in the place of each module's for that long."""

    class Fleeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            at_rest, self.weight = self.weight, nn.Parameter(self.weight.detach().clone())
            try:
                return F.linear(x, self.weight)
            finally:
                self.weight = at_rest

    module = nn.Sequential(Fleeting(), Fleeting(), Fleeting())
    bits = LowBits(module)
    bits.operations.begin(module)
    with bits.operations:
        module(torch.randn(4, 8))
    assert list(bits.nodes) == ["0", "1", "2"]
