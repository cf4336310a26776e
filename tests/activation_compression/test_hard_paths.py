"""Saved tensors as real models have them: computed weights, odd tensors, graphs that are used in other ways."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.activation_compression.classify import Classifier
from lightning_efficient.activation_compression.layers import follow_modules
from lightning_efficient.core.torch_internals import WeakStorage
from tests.activation_compression.networks import classifier, compressed, relative_error
from tests.helpers.ranks import run_on_two_ranks

Case = tuple[Callable[[], Tensor], Sequence[Tensor], nn.Module]
"""Something to compute, what it is differentiated by, and the module whose parameters are held."""


def leaf(*shape: int, **arguments: Any) -> Tensor:
    return torch.randn(*shape, **arguments).requires_grad_()


def gradients(case: Case, chosen: Classifier | None = None) -> list[Tensor]:
    """With the same gradient of the result each time."""
    compute, leaves, module = case
    torch.manual_seed(0)
    if chosen is None:
        out = compute()
    else:
        with follow_modules(module, chosen.layers), compressed(chosen, module):
            out = compute()
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in found]


def assert_exact(case: Case, bits: int = 99) -> None:
    for found, wanted in zip(gradients(case, classifier(bits)), gradients(case), strict=True):
        assert torch.equal(found, wanted)


# -- weights that are no parameters -----------------------------------------------------------------------------------


def low_rank(x: Tensor) -> Case:
    a, b = leaf(64, 8), leaf(8, 64)
    return lambda: F.linear(x * 1, a @ b), [x, a, b], nn.Module()


def low_rank_product(on_the_left: bool) -> Case:
    x, a, b = leaf(64, 64), nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(8, 64))

    def compute() -> Tensor:
        weight = 2 * (a @ b)
        return weight @ (x * 1) if on_the_left else (x * 1) @ weight

    return compute, [x, a, b], nn.ParameterList([a, b])


def in_bfloat16(case: Case) -> Case:
    def compute() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case[0]()

    return compute, case[1], case[2]


def layer(module: nn.Module, *shape: int) -> Case:
    x = leaf(*shape)
    module.eval()  # the power iteration of spectral_norm would go on
    return lambda: module(x * 1), [x, *module.parameters()], module


def frozen(case: Case) -> Case:
    return lambda: case[0](), case[1][:1], case[2].requires_grad_(False)


def linear() -> nn.Module:
    return nn.Linear(64, 64)


WEIGHTS: dict[str, Callable[[], Case]] = {
    "weight_norm": lambda: layer(parametrizations.weight_norm(linear()), 32, 64),
    "weight_norm of a convolution": lambda: layer(parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), 4, 16, 8, 8),
    "spectral_norm": lambda: layer(parametrizations.spectral_norm(linear()), 32, 64),
    "spectral_norm of a convolution": lambda: layer(
        parametrizations.spectral_norm(nn.ConvTranspose2d(16, 16, 3)), 4, 16, 8, 8
    ),
    "orthogonal": lambda: layer(parametrizations.orthogonal(linear()), 32, 64),
    "low rank": lambda: low_rank(leaf(32, 64)),
    "low rank, many dimensions": lambda: low_rank(leaf(2, 16, 64)),
    "low rank, product": lambda: low_rank_product(False),
    "low rank, product from the left": lambda: low_rank_product(True),
    "low rank, product, autocast": lambda: in_bfloat16(low_rank_product(False)),
    "low rank, autocast": lambda: in_bfloat16(low_rank(leaf(64, 64))),
    "weight_norm, autocast": lambda: in_bfloat16(layer(parametrizations.weight_norm(linear()), 32, 64)),
    "weight_norm, frozen": lambda: frozen(layer(parametrizations.weight_norm(linear()), 32, 64)),
    "convolution, frozen, autocast": lambda: in_bfloat16(
        frozen(layer(parametrizations.weight_norm(nn.Conv1d(64, 64, 3)), 4, 64, 8))
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weight_of_a_linear_operation_is_exact_where_it_is_computed(name: str) -> None:
    """Its error would reach the gradients of all layers before; that of the input reaches the weight's only."""
    case = WEIGHTS[name]()
    assert_exact(case)
    exact, found = gradients(case), gradients(case, classifier(2))
    assert torch.equal(found[0], exact[0])
    assert relative_error(gradients(case, classifier(8)), exact) < 0.02


def test_what_computes_a_weight_is_exact() -> None:
    class Squashed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return torch.tanh(weight) * weight

    module = linear()
    nn.utils.parametrize.register_parametrization(module, "weight", Squashed())
    x = torch.randn(32, 64)
    chosen = classifier(1)
    with follow_modules(module, chosen.layers), compressed(chosen, module, x):
        out = module(x)
    weight = module.parametrizations.weight.original  # type: ignore[union-attr, index]
    exact = torch.autograd.grad(module(x), weight, torch.ones(32, 64))
    assert torch.equal(torch.autograd.grad(out, weight, torch.ones(32, 64))[0], exact[0])


def test_a_sum_with_a_parameter_does_not_make_a_product_linear() -> None:
    bias, q, k = nn.Parameter(torch.zeros(64)), leaf(64, 64), leaf(64, 64)
    chosen = classifier(1)
    gradients((lambda: torch.addmm(bias, q * 1, k * 1), [q, k, bias], nn.Module()), chosen)
    assert {key[1:] for key in chosen.ledger.by} == {("other", "4 bits")}


FACTORIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda a: torch.linalg.solve(a, torch.eye(64)),
    "qr": lambda a: torch.linalg.qr(a).R,
    "svd": lambda a: torch.linalg.svdvals(a),
    "matrix_exp": lambda a: torch.linalg.matrix_exp(a),
    "cholesky": torch.linalg.cholesky,
}


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_factorizations_keep_what_they_need_exactly(name: str) -> None:
    """An error of 4 bits in the factors of a matrix that is nearly singular is an error of any size in its gradient."""
    a = torch.randn(64, 64)
    a = (a @ a.T / 64 + torch.eye(64)).requires_grad_()
    case = lambda: FACTORIZATIONS[name](a * 1), [a], nn.Module()
    assert_exact(case, bits=1)  # type: ignore[arg-type]
    chosen = classifier(1)
    gradients(case, chosen)  # type: ignore[arg-type]
    assert chosen.ledger.kept_bytes > 0
    assert {way for _, _, way in chosen.ledger.by} == {"raw"}


def test_a_weight_that_is_computed_is_kept_once() -> None:
    module, x = parametrizations.weight_norm(nn.Linear(256, 256)), leaf(64, 256)
    chosen = classifier(4)
    gradients((lambda: module(x * 1), [x], module), chosen)
    kept = {way: nbytes for (layer, _, way), (_, nbytes) in chosen.ledger.by.items() if not layer}
    assert kept == {"raw": 256 * 256 * 4, "4 bits": 64 * 256 * (4 / 8 + 4 / 128)}
    assert chosen.ledger.kept_bytes - sum(kept.values()) <= 256 * 4, "norms of rows"


NORMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "layer_norm of the batch": ((2048, 64), lambda x: F.layer_norm(x, (64,))),
    "root mean square": ((2048, 64), lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "channels first": ((2, 64, 32, 32), lambda x: x / (x.var(1, keepdim=True) + 1e-5).sqrt()),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_exact_also_where_a_norm_is_written_out_a4(name: str) -> None:
    shape, norm = NORMS[name]
    x, chosen = leaf(*shape), classifier(2, recompute=False)
    with compressed(chosen, nn.Module(), *([x] if "batch" in name else [])):
        out = norm(x if "batch" in name else x * 1)
    raw = sum(kept for (_, _, way), (_, kept) in chosen.ledger.by.items() if way == "raw")
    assert raw in (2048 * 4, 2 * 2048 * 4), "and nothing larger"
    lossy = sum(saved for (_, _, way), (saved, _) in chosen.ledger.by.items() if way != "raw")
    assert lossy == (0 if "batch" in name else x.nbytes)
    out.sum().backward()


# -- operations that save in their own ways ---------------------------------------------------------------------------


def product(operate: Callable[[Tensor, Tensor], Tensor], *shapes: tuple[int, ...]) -> Case:
    x, y = (leaf(*shape) for shape in shapes)
    return lambda: operate(x * 1, y * 1), [x, y], nn.Module()


def recurrent(module: nn.Module) -> Case:
    x = leaf(5, 32, 32)
    return lambda: module(x * 1)[0], [x, *module.parameters()], module


def attention() -> Case:
    module, x = nn.MultiheadAttention(64, 4, batch_first=True), leaf(2, 32, 64)
    return lambda: module(x * 1, x * 1, x * 1, need_weights=False)[0], [x, *module.parameters()], module


def bag() -> Case:
    module, tokens = nn.EmbeddingBag(100, 64, mode="mean"), torch.randint(0, 100, (64, 32))
    return lambda: module(tokens).sin(), list(module.parameters()), module


def bilinear() -> Case:
    module, x, y = nn.Bilinear(32, 32, 16), leaf(64, 32), leaf(64, 32)
    return lambda: module(x * 1, y * 1), [x, y, *module.parameters()], module


OPERATIONS: dict[str, Callable[[], Case]] = {
    "matmul": lambda: product(torch.matmul, (64, 64), (64, 32)),
    "einsum": lambda: product(partial(torch.einsum, "bik,bjk->bij"), (2, 32, 64), (2, 32, 64)),
    "bmm": lambda: product(lambda q, k: torch.bmm(q, k.transpose(1, 2)), (2, 32, 64), (2, 32, 64)),
    "Bilinear": bilinear,
    "MultiheadAttention": attention,
    "EmbeddingBag": bag,
    "ConvTranspose1d": lambda: layer(nn.ConvTranspose1d(16, 16, 3), 4, 16, 32),
    "LSTM": lambda: recurrent(nn.LSTM(32, 64)),
    "GRU": lambda: recurrent(nn.GRU(32, 64)),
    "GRU, two ways": lambda: recurrent(nn.GRU(32, 64, num_layers=2, bidirectional=True)),
    "RNN": lambda: recurrent(nn.RNN(32, 64)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_exact_without_loss_and_close_in_8_bits(name: str) -> None:
    """The gates of recurrent layers are parts of one storage, changed in place without each other's version."""
    case = OPERATIONS[name]()
    assert_exact(case)
    assert relative_error(gradients(case, classifier(8)), gradients(case)) < 0.03


# -- odd tensors ------------------------------------------------------------------------------------------------------


def edited_chunks() -> Case:
    x = leaf(64, 256)

    def compute() -> Tensor:
        one, other = (x * 1).unsafe_chunk(2, 1)
        return one.sigmoid_() + other.tanh_()  # each saves its result

    return compute, [x], nn.Module()


def complex_case(operate: Callable[[Tensor, Tensor], Tensor]) -> Case:
    x, y = leaf(64, 64, dtype=torch.complex64), leaf(64, 64, dtype=torch.complex64)
    return lambda: operate(x * 1, y * 1), [x, y], nn.Module()


def pairs_as_complex() -> Case:
    x, y = leaf(64, 64, 2), leaf(64, 64, dtype=torch.complex64)
    return lambda: torch.view_as_real(torch.view_as_complex(F.layer_norm(x * 1, (2,))) * y), [x, y], nn.Module()


def copied_weight(copy: Callable[[Tensor], Tensor]) -> Case:
    x, module = leaf(4, 16, 8, 8), nn.Conv2d(16, 16, 3)

    def compute() -> Tensor:
        weight = copy(module.weight)
        return F.conv2d(x.to(weight.dtype), weight).float()

    return compute, [x, module.weight], module


def edited_copy(weight: Tensor) -> Tensor:
    copy = weight.to(torch.bfloat16)
    with torch.no_grad():
        copy.mul_(2)
    return copy


def rows(operate: Callable[[Tensor], Tensor], *shape: int) -> Case:
    x = leaf(*shape)
    return lambda: operate(x * 1), [x], nn.Module()


TENSORS: dict[str, Callable[[], Case]] = {
    "edited chunks": edited_chunks,
    "conjugate": lambda: complex_case(lambda x, y: x.conj() * y),
    "negated": lambda: complex_case(lambda x, y: x.conj().imag * y.real),
    "as complex": pairs_as_complex,
    "weight in another layout": lambda: copied_weight(lambda w: w.to(memory_format=torch.channels_last)),
    "weight in bfloat16": lambda: copied_weight(lambda w: w.to(torch.bfloat16)),
    "copy of a weight, edited": lambda: copied_weight(edited_copy),
    "expanded": lambda: rows(lambda x: x.expand(64, 64) * x.sin().expand(64, 64), 64, 1),
    "expanded, detached": lambda: rows(lambda x: x.sin() * x.expand(64, 64).detach(), 64, 1),
    "no dimensions": lambda: rows(lambda x: x.sum() * x.mean(), 64, 64),
    "empty": lambda: rows(lambda x: x[:0].exp().sum() + x.sin().sum(), 64, 64),
    "float64": lambda: rows(lambda x: x.double().sin(), 64, 64),
    "strides": lambda: rows(lambda x: x.t()[::2, ::3].exp().sum() + x[:, 5:9].sin().sum(), 64, 64),
    "channels last": lambda: rows(
        lambda x: F.avg_pool2d(x.to(memory_format=torch.channels_last).sin()[:2].exp(), 2), 4, 16, 8, 8
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_odd_tensors_are_exact_without_loss(name: str) -> None:
    assert_exact(TENSORS[name]())


class Scaled(torch.autograd.Function):
    """Saves a tensor of any type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (other,) = ctx.saved_tensors
        return gradients[0] * (other.dequantize() if other.is_quantized else other.float()), None


@pytest.mark.parametrize("bits", [99, 4])
def test_each_version_of_a_storage_is_another_tensor(bits: int) -> None:
    x, chosen = leaf(64, 64), classifier(bits)

    def compute() -> tuple[Tensor, Tensor]:
        hidden = x * 1
        unused = hidden.sin()
        with torch.no_grad():
            hidden.add_(10)  # what was saved of it before must not be given for it
        return hidden.sin(), unused

    exact = torch.autograd.grad(compute()[0].sum(), x)[0]
    with compressed(chosen, nn.Module()):
        out, unused = compute()
    assert chosen.ledger.saved_bytes == 2 * x.nbytes
    found = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(found, exact) if bits == 99 else relative_error([found], [exact]) < 0.3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(unused.sum(), x)


def test_each_type_of_a_storage_is_another_tensor() -> None:
    """Numbers may have few bits; the same memory as integers may not."""
    x, chosen = leaf(64, 64), classifier(4)

    def compute() -> tuple[Tensor, Tensor]:
        hidden = x * 1
        return hidden.sin(), Scaled.apply(x, hidden.detach().view(torch.int32))  # type: ignore[no-untyped-call]

    exact = [torch.autograd.grad(out.sum(), x)[0] for out in compute()]
    with compressed(chosen, nn.Module()):
        outs = compute()
    assert {way for _, _, way in chosen.ledger.by} == {"4 bits", "raw"}
    found = [torch.autograd.grad(out.sum(), x)[0] for out in outs]
    assert 0 < relative_error(found[:1], exact[:1]) < 0.3
    assert torch.equal(found[1], exact[1])


TYPES = [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_any_type_is_saved_exactly(dtype: torch.dtype) -> None:
    x, other = leaf(64, 64), (torch.rand(64, 64) * 9).to(dtype)
    assert_exact((lambda: Scaled.apply(x, other), [x], nn.Module()))  # type: ignore[no-untyped-call]
    assert_exact((lambda: Scaled.apply(x[:32], other[::2]), [x], nn.Module()))  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_quantized_tensors_are_kept_as_they_are() -> None:
    x, other = leaf(64, 64), torch.quantize_per_tensor(torch.randn(64, 64), 0.1, 0, torch.quint8)
    assert_exact((lambda: Scaled.apply(x, other), [x], nn.Module()), bits=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("differentiable", [True, False])
def test_memory_that_nobody_wrote_spoils_nothing(garbage: float, differentiable: bool) -> None:
    """``[4, 4100]``: the borders of what was written are within groups of 128."""
    x = leaf(2, 4100)

    def compute() -> Tensor:
        memory = torch.full((4, 4100), garbage)
        memory[1:3] = x * 1 if differentiable else x.detach()
        return memory[1:3] * x

    case = compute, [x], nn.Module()
    chosen = classifier(8)
    assert relative_error(gradients(case, chosen), gradients(case)) < 0.01
    assert {way for _, _, way in chosen.ledger.by} == {"8 bits"}


def test_a_row_that_was_expanded_is_kept_once() -> None:
    x, table = leaf(256, 512), torch.randn(100, 512)
    chosen = classifier(99)
    gradients((lambda: x * table[5].expand(256, 512), [x], nn.Module()), chosen)
    assert chosen.ledger.kept_bytes == 512 * 4


def test_views_that_are_dense_keep_their_strides() -> None:
    x = leaf(8, 16, 16, 16)
    seen: list[tuple[int, ...]] = []
    chosen = classifier(4)

    def unpack(handle: Any) -> Tensor:
        tensor = chosen.saved.unpack(handle)
        seen.append(tensor.stride())
        return tensor

    chosen.begin([], 0)
    with saved_tensors_hooks(chosen.saved.pack, unpack), chosen.operation:
        part = (x * 1).to(memory_format=torch.channels_last)[1:2]
        out = part.sin()
    out.sum().backward()
    assert seen == [part.stride()]


def test_numbers_near_the_end_of_float16_stay_finite() -> None:
    x = (torch.rand(64, 64) * 65000).half().requires_grad_()
    assert gradients((lambda: (x * 1).sin(), [x], nn.Module()), classifier(4))[0].isfinite().all()


# -- copies of weights ------------------------------------------------------------------------------------------------


def test_autocast_uses_old_copies_after_an_update_within_a_step_and_so_do_we() -> None:
    """As in manual optimization, where one step has several updates."""
    module, x = linear(), leaf(32, 64)
    weight = module.weight.detach().clone()

    def compute() -> Tensor:
        with torch.no_grad():
            module.weight.copy_(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x.detach()).float().square().sum().backward()
            with torch.no_grad():
                module.weight.mul_(1.5)
            return module(x * 1).float()

    assert_exact((compute, [x], module))


def test_a_weight_that_is_changed_before_its_norm_is_made_again() -> None:
    """Only the linear layer is differentiated, and that never saw the weight of the norm."""
    module, x = nn.Sequential(nn.LayerNorm(64), linear()), leaf(32, 64)
    weight = module[0].weight

    def compute() -> Tensor:
        with torch.no_grad():
            weight.fill_(1)  # type: ignore[operator]
        return module(x * 1)

    found = []
    for chosen in (None, classifier(99)):
        with compressed(chosen, module) if chosen else contextlib.nullcontext():
            out = compute()
        with torch.no_grad():
            weight.fill_(3)  # type: ignore[operator]
        found.append(torch.autograd.grad(out.sum(), module[1].weight)[0])  # type: ignore[arg-type]
    assert torch.equal(*found)


def test_what_is_made_again_of_an_edited_tensor_is_refused_or_that_of_before() -> None:
    """Only the linear layer is differentiated: nobody else asks for what the norm has saved."""
    module, x = nn.Sequential(nn.LayerNorm(64), linear()), leaf(32, 64)

    def gradient(chosen: Classifier | None) -> Tensor:
        with compressed(chosen, module) if chosen else contextlib.nullcontext():
            hidden = x * 1
            out = module(hidden)
        hidden.add_(torch.arange(64.0))
        return torch.autograd.grad(out.square().sum(), module[1].weight)[0]  # type: ignore[arg-type]

    assert relative_error([gradient(classifier(8))], [gradient(None)]) < 0.02
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(classifier(99))


# -- checkpointing and other hooks ------------------------------------------------------------------------------------


def block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def keep_products(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


THROUGH: dict[str, Callable[..., Tensor]] = {
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_products)
    ),
    "nested": lambda function, x: checkpoint(
        lambda y: y + checkpoint(function, y.sin(), use_reentrant=False), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", THROUGH)
def test_checkpointing_inside(name: str) -> None:
    module, x = nn.Sequential(block(), block()), leaf(32, 64)

    def compute() -> Tensor:
        hidden = x * 1
        for part in module:
            hidden = THROUGH[name](part, hidden)
        return hidden

    case = compute, [x, *module.parameters()], module
    assert_exact(case)
    chosen = classifier(8)
    assert relative_error(gradients(case, chosen), gradients(case)) < 0.03
    assert chosen.ledger.saved_bytes <= 2 * x.nbytes


def test_reentrant_checkpointing_inside() -> None:
    module, x = nn.Sequential(block(), block()), leaf(32, 64)
    results = []
    for chosen in (None, classifier(99)):
        module.zero_grad()
        with compressed(chosen, module) if chosen else contextlib.nullcontext():
            hidden = checkpoint(module[1], checkpoint(module[0], x * 1, use_reentrant=True), use_reentrant=True)
            hidden.square().sum().backward()
        results.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_the_whole_within_a_checkpoint() -> None:
    module, x = block(), leaf(32, 64)

    def inner(y: Tensor) -> Tensor:
        with compressed(classifier(99), module):
            return module(y)

    exact = gradients((lambda: module(x * 1), [x], module))
    found = gradients((lambda: checkpoint(inner, x * 1, use_reentrant=False), [x], module))
    assert torch.equal(found[0], exact[0])


@contextlib.contextmanager
def own_hooks() -> Iterator[None]:
    with saved_tensors_hooks(lambda tensor: tensor.double(), lambda tensor: tensor.float()):
        yield


@pytest.mark.parametrize("hooks", [save_on_cpu, own_hooks])
def test_hooks_of_the_user_inside_and_around(hooks: Callable[[], Any]) -> None:
    module, x = block(), leaf(32, 64)

    def inside() -> Tensor:
        hidden = module(x * 1)
        with hooks():
            hidden = module(hidden)
        return module(hidden)

    case = inside, [x, *module.parameters()], module
    assert_exact(case)
    with hooks():
        found = gradients(case, classifier(99))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(case), strict=True))


# -- graphs that are used in other ways -------------------------------------------------------------------------------


def test_several_results_again_and_in_other_threads() -> None:
    module, x = block(), leaf(32, 64)
    chosen = classifier(4)
    with compressed(chosen, module):
        hidden = module(x * 1)
        results = hidden.sin().sum(), hidden.cos().sum()
    found: list[tuple[Tensor, ...]] = []

    def differentiate() -> None:
        found.append(torch.autograd.grad(results, list(module.parameters()), retain_graph=True))

    threads = [threading.Thread(target=differentiate) for _ in range(3)]
    differentiate()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("operate", [F.gelu, F.silu, torch.tanh, torch.sigmoid], ids=lambda f: f.__name__)
def test_a_gradient_penalty_of_a_streamed_function_is_exact_without_loss(operate: Callable[[Tensor], Tensor]) -> None:
    x = leaf(1 << 19)

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(operate(x * 1).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    assert_exact((penalty, [x], nn.Module()))
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        gradients((penalty, [x], nn.Module()), classifier(4))


def test_a_gradient_penalty_inside_the_step() -> None:
    module, x = nn.Sequential(linear(), nn.Tanh(), linear()), leaf(32, 64)

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean()

    assert_exact((penalty, list(module.parameters())[:1], module))


def test_parts_without_gradients_and_tensors_of_inference() -> None:
    module, x = block(), leaf(32, 64)

    def compute() -> Tensor:
        with torch.no_grad():
            teacher = module(x)
        return (module(x) - teacher * 2).square()

    assert_exact((compute, list(module.parameters()), module))
    with torch.inference_mode():
        frozen = torch.randn(32, 64)
    for chosen in (None, classifier(4)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            gradients((lambda: x * frozen, [x], nn.Module()), chosen)
    assert_exact((lambda: x * 2 + frozen, [x], nn.Module()))


# -- changes in place -------------------------------------------------------------------------------------------------


def after(change: Callable[[Tensor], Any]) -> Callable[[Tensor, nn.Parameter], Tensor]:
    def compute(x: Tensor, weight: nn.Parameter) -> Tensor:
        hidden = x * 1
        out = hidden * hidden
        change(hidden)
        return out

    return compute


def change_weight(x: Tensor, weight: nn.Parameter) -> Tensor:
    out = F.linear(x * 1, weight)
    with torch.no_grad():
        weight.add_(1)
    return out


REFUSED: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "itself": after(lambda hidden: hidden.mul_(2)),
    "a view": after(lambda hidden: hidden[0].zero_()),
    "by index": after(lambda hidden: hidden.__setitem__((slice(None), 0), 0)),
    "detached": after(lambda hidden: hidden.detach().add_(1)),
    "a result": lambda x, weight: torch.exp(x * 1).add_(1),
    "a weight": change_weight,
    "a copy of a weight": lambda x, weight: (
        lambda copy: (F.linear((x * 1).bfloat16(), copy), copy.detach().add_(1))[0]
    )(weight.to(torch.bfloat16)),
    "a part": lambda x, weight: (lambda parts: (parts[0].sin(), parts[0].add_(1))[0])((x * 1).unsafe_chunk(2)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("bits", [None, 99, 4])
def test_changes_that_autograd_refuses_are_refused(name: str, bits: int | None) -> None:
    x, module = leaf(64, 64), linear()
    case = lambda: REFUSED[name](x, module.weight), [x], module  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(case, None if bits is None else classifier(bits))


def residual(hidden: Tensor) -> Tensor:
    saved = torch.sigmoid(hidden)  # its result, not its input
    hidden += saved.detach() * 2
    hidden[:, 0] = 0
    return hidden * saved


def test_changes_that_autograd_permits_are_permitted() -> None:
    module, x = nn.Conv2d(4, 4, 3), leaf(4, 4, 16, 16)
    assert_exact((lambda: residual(F.relu_(module(x * 1)) * 1), [x, *module.parameters()], module))


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[WeakStorage]:
    """Of all that was given to autograd."""
    seen: list[WeakStorage] = []
    from lightning_efficient.activation_compression.store import SavedTensors

    unpack = SavedTensors.unpack

    def noting(self: SavedTensors, handle: Any) -> Tensor:
        tensor = unpack(self, handle)
        seen.append(WeakStorage(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(SavedTensors, "unpack", noting)
    return seen


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("bits", [99, 4])
def test_nothing_is_left_after_backward_where_a_branch_was_not_used(bits: int, decoded: list[WeakStorage]) -> None:
    x, chosen = leaf(64, 64), classifier(bits)
    with compressed(chosen, nn.Module()):
        hidden = x * 1
        out, unused = hidden.sin(), hidden.cos()
        del hidden
    del unused
    out.sum().backward()
    del out
    assert decoded
    assert [storage for storage in decoded if storage.get() is not None] == []
    assert chosen.ledger.live_bytes == 0


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("bits", [99, 4])
def test_a_backward_pass_within_the_step_frees_at_once(bits: int) -> None:
    """As in manual optimization; what may be made again of it does not hold it."""
    module, x, chosen = block(), leaf(64, 64), classifier(bits)
    with compressed(chosen, module):
        for _ in range(2):
            out = module(x * 1).square().sum()
            assert chosen.ledger.live_bytes > 0
            out.backward()
            del out
            assert chosen.ledger.live_bytes == 0


@pytest.mark.usefixtures("_no_collection")
def test_an_exception_in_forward_leaves_nothing() -> None:
    module, x, chosen = block(), leaf(64, 64), classifier(4)

    def step() -> None:
        out = module(x * 1)
        assert chosen.ledger.live_bytes > 0
        raise KeyError(out.shape)

    with pytest.raises(KeyError), compressed(chosen, module):
        step()
    chosen.end()
    assert chosen.operation.name == ""
    gc.collect()  # the traceback is a cycle
    assert chosen.ledger.live_bytes == 0
    assert_exact((lambda: module(x * 1), [x], module))


# -- in a Trainer -----------------------------------------------------------------------------------------------------


class Small(pl.LightningModule):
    """A block, on the same numbers in each run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = block(), block()
        self.losses: list[float] = []
        self.scale = 1.0

    def loss(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) - x).square().mean() * self.scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(2)), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithLBFGS(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Adversarial(Small):
    """Two optimizers, two backward passes in a step, the second through the layers that the first has changed."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        one, other = self.optimizers()  # type: ignore[misc]
        generated = self.first(batch)
        critic = self.second(generated.detach()).square().mean() - self.second(batch).square().mean()
        other.zero_grad()
        self.manual_backward(critic)
        other.step()
        loss = self.second(generated).square().mean()
        self.toggle_optimizer(one)
        one.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        one.step()
        self.untoggle_optimizer(one)
        self.losses += [float(critic.detach()), float(loss.detach())]

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


class Overflowing(Small):
    """The gradients of one batch are infinite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.scale = 1e7 if batch_idx == 2 else 1.0
        return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))


def trained(model: Small, bits: Any, **arguments: Any) -> tuple[Small, pl.Trainer]:
    plugin = [] if bits is None else [ActivationCompressionPlugin(bits=bits)]
    arguments = {key: value() if callable(value) else value for key, value in arguments.items()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=plugin, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(model)
    return model, trainer


RUNS: dict[str, tuple[type[Small], dict[str, Any]]] = {
    "LBFGS": (WithLBFGS, {}),
    "two optimizers": (Adversarial, {}),
    "two optimizers, bf16-mixed": (Adversarial, {"precision": "bf16-mixed"}),
    "the last accumulation is short": (Small, {"accumulate_grad_batches": 2}),
    "bf16-true": (Small, {"precision": "bf16-true"}),
    "16-mixed, gradients overflow": (Overflowing, {"plugins": lambda: [half()]}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_plain_ones_without_loss_and_close_in_8_bits(name: str) -> None:
    cls, arguments = RUNS[name]
    plain, trainer = trained(cls(), None, **arguments)
    for bits in ("lossless", 8):
        model, other = trained(cls(), bits, **arguments)
        assert other.global_step == trainer.global_step
        if bits == 8:  # LBFGS takes differences of gradients, so that its way is another one
            assert model.losses[-1] == pytest.approx(plain.losses[-1], rel=0.05)
        else:
            assert model.losses == plain.losses
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        scaler = getattr(other.precision_plugin, "scaler", None)
        if scaler is not None:
            assert scaler.get_scale() == trainer.precision_plugin.scaler.get_scale()  # type: ignore[attr-defined]
            assert scaler.get_scale() < 2.0 ** (8 + 10 // 2), "some steps were skipped"


class WithTable(Small):
    """Its table of positions is no buffer."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.take(torch.randn(32, 64))

    def take(self, positions: Tensor) -> None:
        self.positions = positions

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(self.first(x) * self.positions)


class WithBuffer(WithTable):
    def take(self, positions: Tensor) -> None:
        self.register_buffer("positions", positions)


@pytest.mark.parametrize("cls", [WithTable, WithBuffer])
def test_buffers_and_tables_that_are_mere_attributes_are_held_anyway(cls: type[Small]) -> None:
    _, trainer = trained(cls(), 4)
    rows = [row for row in trainer.callbacks[0].summary().splitlines() if "(training step) | other |" in row]  # type: ignore[attr-defined]
    assert sum(float(row.split("|")[4]) for row in rows) == 32 * 64 * 4 / 1024, "what is squared, not the table"


# -- two ranks --------------------------------------------------------------------------------------------------------


class Sharded(nn.Module):
    """Norms are shards of their own: what follows them is differentiated when their weights are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(8, 32, 3, padding=1), nn.LayerNorm(64), linear()
        self.inner = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        return self.head(self.norm(hidden + self.inner(hidden)))


def sharded(rank: int) -> dict[tuple[str, int], tuple[float, int]]:
    """Error of the gradients, and bytes of what was kept that has as many numbers as a weight."""
    results = {}
    for way in ("ddp", "fsdp2", "fsdp2, autocast", "fsdp2, bfloat16"):
        runs = {}
        for bits in (None, 99, 4):
            torch.manual_seed(0)
            model: nn.Module = Sharded()
            if way == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bfloat16" in way else None)
                for part in (*model.children(), model):
                    fully_shard(part, reshard_after_forward=True, mp_policy=policy)
            x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(rank))
            chosen = None if bits is None else classifier(bits)
            runs[bits] = list[Tensor]()
            for _ in range(2):
                model.zero_grad()
                with (
                    compressed(chosen, model, x) if chosen else contextlib.nullcontext(),
                    torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in way),
                ):
                    loss = model(x).float().square().mean()
                loss.backward()
                for parameter in model.parameters():
                    gradient: Any = parameter.grad
                    runs[bits].append(gradient.clone() if way == "ddp" else gradient.full_tensor())
            if chosen is not None:
                kept = sum(nbytes for (_, kind, way), (_, nbytes) in chosen.ledger.by.items() if kind == "linear")
                results[way, bits] = relative_error(runs[bits], runs[None]), kept
    return results


def test_shards_and_copies_of_the_model_on_two_ranks(tmp_path: Path) -> None:
    for results in run_on_two_ranks(sharded, tmp_path):
        assert len(results) == 8
        for (way, bits), (error, kept) in results.items():
            assert error < 0.2 if bits == 4 else error == 0, way
            # Of what linear operations save, these are kept: the copy of the batch that autocast makes, and the input
            # of the first linear layer; no weight, which would be 32 KiB.
            assert kept < 4 * 32 * 64 * 4 + 4 * 8 * 64 * 4 + 1, way
