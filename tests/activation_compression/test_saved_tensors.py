"""What is kept instead of saved tensors: exact where it must be, once, checked for changes, freed at its last use."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.activation_compression.classify import FP8, Classifier
from lightning_efficient.activation_compression.store import Handle
from lightning_efficient.core.torch_internals import WeakStorage
from tests.activation_compression.networks import (
    ConvNet,
    classifier,
    compressed,
    gradients,
    language_loss,
    relative_error,
)

Case = tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, ...]]


def conv_case() -> Case:
    torch.manual_seed(0)
    model, images, labels = ConvNet(), torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    return model, lambda: F.cross_entropy(model(images), labels), (images, labels)


CASES: dict[str, Callable[[], Case]] = {
    "gelu": language_loss,
    "dropout": lambda: language_loss(dropout=0.2),
    "rmsnorm, swiglu, grouped queries": lambda: language_loss(norm="rmsnorm", mlp="swiglu", heads=4, kv_heads=2),
    "encoder": lambda: language_loss(kind="encoder", tied=False),
    "convolutions": conv_case,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.mark.parametrize("recompute", [True, False])
def test_lossless_is_bit_exact_a4(case: Case, recompute: bool) -> None:
    model, loss, batch = case
    exact = gradients(model, loss)
    chosen = classifier(recompute=recompute)
    for found, wanted in zip(gradients(model, loss, chosen, *batch), exact, strict=True):
        assert torch.equal(found, wanted)
    assert all(kept <= saved for saved, kept in chosen.ledger.by.values())


def test_fewer_bits_keep_less_and_err_more_a1(case: Case) -> None:
    model, loss, batch = case
    exact = gradients(model, loss)
    errors, kept = [0.0], [math.inf]
    for bits, limit in ((8, 0.02), (4, 0.2), (2, 0.8)):
        chosen = classifier(bits)
        errors.append(relative_error(gradients(model, loss, chosen, *batch), exact))
        kept.append(chosen.ledger.kept_bytes)
        assert errors[-2] < errors[-1] < limit
        assert kept[-1] < kept[-2]


def test_floats_of_8_bits_err_less_than_4_bits_and_more_than_8(case: Case) -> None:
    model, loss, batch = case
    exact = gradients(model, loss)
    chosen = classifier(FP8)
    error = relative_error(gradients(model, loss, chosen, *batch), exact)
    assert "fp8" in {way for _, _, way in chosen.ledger.by}
    eight, four = (relative_error(gradients(model, loss, classifier(bits), *batch), exact) for bits in (8, 4))
    assert eight < error < four
    gc.collect()
    assert chosen.ledger.live_bytes == 0


def test_floats_of_8_bits_will_do_for_who_demands_5_bits_and_not_6() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    for demanded, expected in ((5, {"fp8"}), (6, {"fp8", "6 bits"})):
        chosen = classifier(FP8)
        with compressed(chosen, nn.Module()):
            hidden = x * 1.0
            first = hidden.exp() * hidden
            chosen.rates.bits = demanded  # type: ignore[attr-defined]
            out = (first + hidden.sin()).sum()
        assert {way for _, _, way in chosen.ledger.by if "exact" not in way} == expected
        out.backward()


@pytest.mark.parametrize(
    ("error_bound", "dtype"),
    [(1e-4, torch.float32), (1e-2, torch.float32), (1.0, torch.float32), (0.02, torch.bfloat16)],
)
def test_no_decoded_number_is_off_by_more_than_the_bound_a4(case: Case, error_bound: float, dtype: torch.dtype) -> None:
    model, loss, batch = case
    chosen = classifier(4, error_bound=error_bound)
    seen: dict[int, Tensor] = {}
    pack, unpack = chosen.saved.pack, chosen.saved.unpack
    torch.manual_seed(0)
    chosen.begin([*model.parameters(), *model.buffers(), *batch], 0)

    def noting(tensor: Tensor) -> Handle:
        handle = pack(tensor)
        if handle.record is not None and chosen.operation.name not in ("relu", "relu_"):  # those ask for signs only
            seen[id(handle)] = tensor.detach().clone()
        return handle

    def comparing(handle: Handle) -> Tensor:
        tensor = unpack(handle)
        if id(handle) in seen and tensor.is_floating_point():
            assert ((tensor.double() - seen[id(handle)].double()).abs() <= error_bound).all()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(noting, comparing),
        chosen.operation,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        value = loss() + F.linear(5 + 0.3 * torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)).mean()
    chosen.end()
    assert any(tensor.dtype == dtype for tensor in seen.values())
    value.backward()


def test_all_is_freed_after_backward(case: Case) -> None:
    model, loss, batch = case
    chosen = classifier(4)
    gradients(model, loss, chosen, *batch)
    gc.collect()
    assert chosen.ledger.live_bytes == 0


def test_a_graph_that_nobody_differentiates_is_freed_too(case: Case) -> None:
    model, loss, batch = case
    chosen = classifier(4)
    with compressed(chosen, model, *batch):
        value = loss()
    assert chosen.ledger.live_bytes > 0
    del value
    gc.collect()
    assert chosen.ledger.live_bytes == 0


def test_an_edit_in_place_still_raises(case: Case) -> None:
    """Autograd checks this only where there are no hooks."""
    for bits in (99, 4):
        weight = nn.Parameter(torch.randn(64, 64))
        x = torch.randn(64, 64)
        with compressed(classifier(bits), nn.ParameterList([weight])):
            hidden = F.linear(x, weight)
            out = F.linear(hidden, weight).exp()
        hidden.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_an_edit_of_a_parameter_or_of_the_batch_still_raises() -> None:
    for edited in (0, 1):
        weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)
        with compressed(classifier(4), nn.ParameterList([weight]), x):
            out = F.linear(F.linear(x, weight), weight)
        with torch.no_grad():
            (weight, x)[edited].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_parameters_buffers_and_batch_take_nothing() -> None:
    model, loss, batch = language_loss()
    chosen = classifier(99, recompute=False)
    with compressed(chosen, model, *batch):
        value = loss()
    kept = chosen.ledger.live_bytes
    saved: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        again = loss()
    assert kept == sum(saved.values()), "each storage once, and none of parameters, buffers, batch"
    del value, again


def test_views_of_one_storage_are_kept_once() -> None:
    """Queries, keys and values are three views of the same memory."""
    chosen = classifier(4)
    x = torch.randn(2, 64, 3 * 64, requires_grad=True)
    with compressed(chosen, nn.Module()):
        qkv = x * 1.0
        queries, keys, values = (part.view(2, 64, 2, 32).transpose(1, 2) for part in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(queries, keys, values)
    (name, entry), *others = [(key, value) for key, value in chosen.ledger.by.items() if "bits" in key[2]]
    assert name[1:] == ("attention", "4 bits")
    assert not others
    assert entry[0] == qkv.nbytes + out.nbytes
    out.sum().backward()


def test_a_small_view_does_not_pin_what_it_is_a_view_of() -> None:
    chosen = classifier(99)
    x = torch.randn(100_000, requires_grad=True)
    with compressed(chosen, nn.Module()):
        large = x * 2
        out = large[:100].exp().sum() + large[500:600].sin().sum()
    assert chosen.ledger.live_bytes < 2000
    expected = torch.autograd.grad((x[:100] * 2).exp().sum() + (x[500:600] * 2).sin().sum(), x)[0]
    out.backward()
    assert torch.equal(x.grad, expected)


def test_masks_take_one_bit_and_are_exact() -> None:
    chosen = classifier(4)
    x = torch.randn(128, 128, requires_grad=True)
    for operate in (lambda: F.relu(x * 1.0), lambda: F.dropout(x * 1.0, 0.3), lambda: torch.where(x > 0, x, x * 0.5)):
        torch.manual_seed(3)
        expected = torch.autograd.grad(operate().sum(), x)[0]
        torch.manual_seed(3)
        with compressed(chosen, nn.Module()):
            out = operate()
        assert {key[2] for key in chosen.ledger.by} == {"1 bit, exact"}
        assert chosen.ledger.live_bytes == x.numel() // 8
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
        del out


def test_pooling_indices_are_narrowed() -> None:
    chosen = classifier(4)
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    expected = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0]
    with compressed(chosen, nn.Module(), x):
        out = F.max_pool2d(x, 2)
    assert chosen.ledger.live_bytes == 4 * 8 * 16 * 16 * 2  # int16 of int64
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_kept_exactly(value: float) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    weights = torch.randn(64, 64)
    with torch.no_grad():
        x[3, 4] = value
    expected = torch.autograd.grad(((x * 1.0) * weights * x).sum(), x)[0]
    with compressed(classifier(4), nn.Module(), weights):
        out = ((x * 1.0) * weights * x).sum()
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], expected, rtol=0, atol=0, equal_nan=True)


def test_a_graph_can_be_kept_and_used_again(case: Case) -> None:
    model, loss, batch = case
    with compressed(classifier(4), model, *batch, key=1):
        value = loss()
    parameters = list(model.parameters())
    first = torch.autograd.grad(value, parameters, retain_graph=True)
    second = torch.autograd.grad(value, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_gradients_are_exact_or_refused() -> None:
    for bits in (99, 4):
        x = torch.randn(64, 64, requires_grad=True)
        with compressed(classifier(bits), nn.Module()):
            out = (x * 1.0).sigmoid().square().sum()
        if bits == 4:
            with pytest.raises(RuntimeError, match="gradients of gradients"):
                torch.autograd.grad(out, x, create_graph=True)
            continue
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        expected = torch.autograd.functional.hvp(lambda y: y.sigmoid().square().sum(), x, torch.ones_like(x))[1]
        assert torch.allclose(second, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_inside_keeps_its_inputs_only(reentrant: bool) -> None:
    model, _, (tokens, targets) = language_loss(layers=4)
    blocks = model.blocks

    def loss(through: Callable[..., Tensor]) -> Tensor:
        hidden = model.token_embedding(tokens)
        for block in blocks:
            hidden = through(block, hidden)
        return F.cross_entropy(model.head(model.final_norm(hidden)).flatten(0, 1), targets.flatten())

    def checkpointed(block: nn.Module, hidden: Tensor) -> Tensor:
        return checkpoint(block, hidden, use_reentrant=reentrant)

    exact = gradients(model, lambda: loss(lambda block, hidden: block(hidden)))
    lossless = gradients(model, lambda: loss(checkpointed), classifier(99), tokens, targets)
    assert all(torch.equal(a, b) for a, b in zip(lossless, exact, strict=True))
    chosen = classifier(8)
    assert relative_error(gradients(model, lambda: loss(checkpointed), chosen, tokens, targets), exact) < 0.05
    assert sum(saved for saved, _ in chosen.ledger.by.values()) < 12 * tokens.numel() * 64 * 4
    chosen = classifier(2)
    gradients(model, lambda: loss(checkpointed), chosen, tokens, targets)
    inputs = {way: saved for (_, kind, way), (saved, _) in chosen.ledger.by.items() if kind == "checkpoint" and saved}
    assert inputs == {"8 bits": 4 * tokens.numel() * 64 * 4}, "errors of them are in all that is made again"


class Cubed(torch.autograd.Function):
    """One of the user's, which saves as checkpointing does: no operation is called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x.square()


def test_a_function_of_the_users_is_not_taken_for_checkpointing() -> None:
    x, chosen = torch.randn(64, 64, requires_grad=True), classifier(2)
    with compressed(chosen, nn.Module()):
        out = Cubed.apply(x * 1)  # type: ignore[no-untyped-call]
    assert set(chosen.ledger.by) == {("", "other", "4 bits")}
    out.sum().backward()


def test_autocast_keeps_no_copies_of_weights() -> None:
    model, loss, batch = language_loss()

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    exact = gradients(model, mixed)
    chosen = classifier(99)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, mixed, chosen, *batch), exact, strict=True))
    assert relative_error(gradients(model, mixed, classifier(8), *batch), exact) < 0.05


def test_the_copy_of_a_weight_that_autocast_makes_takes_nothing() -> None:
    """Nor does the batch; and that is all that a linear layer saves."""
    layer, x = nn.Linear(256, 256), torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for chosen in (None, classifier(99)):
        with compressed(chosen, layer, x) if chosen else contextlib.nullcontext(), torch.autocast("cpu"):
            out = layer(x)
        if chosen is not None:
            assert chosen.ledger.live_bytes == 0
        results.append(torch.autograd.grad(out.float().square().sum(), [x, layer.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_block_is_freed_when_backward_has_passed_it() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
    chosen, x, live = classifier(4), torch.randn(64, 64), list[int]()
    with compressed(chosen, blocks, x):
        hidden = x
        for block in blocks:
            hidden = block(hidden)
            hidden.register_hook(lambda _: live.append(chosen.ledger.live_bytes))
        loss = hidden.square().mean()
    forward = chosen.ledger.live_bytes
    del hidden
    loss.backward()
    assert len(live) == 4
    assert forward > live[0] > live[1] > live[2] > live[3] > chosen.ledger.live_bytes == 0


def test_the_users_random_numbers_are_the_same() -> None:
    model, loss, batch = language_loss(dropout=0.5)
    torch.manual_seed(0)
    plain = loss().detach()
    torch.manual_seed(0)
    with compressed(classifier(2), model, *batch):
        value = loss()
    assert torch.equal(value.detach(), plain)


def test_a_seed_and_a_step_say_it_all(case: Case) -> None:
    model, loss, batch = case
    runs = [gradients(model, loss, classifier(3), *batch, key=key) for key in (5, 5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_sparse_tensors_and_subclasses_are_kept_as_they_are() -> None:
    class Labelled(Tensor):
        pass

    dense = torch.randn(64, 64, requires_grad=True)
    sparse = torch.eye(64).to_sparse()
    labelled = torch.randn(64, 64).as_subclass(Labelled)
    exact = torch.autograd.grad((torch.sparse.mm(sparse, dense) * labelled).sum(), dense)[0]
    with compressed(classifier(2), nn.Module(), sparse, labelled):
        out = (torch.sparse.mm(sparse, dense) * labelled).sum()
    assert torch.equal(torch.autograd.grad(out, dense)[0], exact)


@pytest.mark.parametrize("operate", [F.gelu, F.silu, F.relu, torch.tanh, torch.sigmoid], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bits", [99, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_functions_are_the_same_piece_by_piece(
    operate: Callable[[Tensor], Tensor], bits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 300_000, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 300_000, dtype=dtype)
    out = operate(x * 1.0)
    exact = torch.autograd.grad(out, x, upstream)[0]
    with compressed(classifier(bits), nn.Module()):
        found = operate(x * 1.0)
    assert "Streamed" in found.grad_fn.name()  # type: ignore[union-attr]
    assert torch.equal(found, out)
    gradient = torch.autograd.grad(found, x, upstream, retain_graph=True)[0]
    if bits == 99 or operate is F.relu:
        assert torch.equal(gradient, exact)
    assert relative_error([gradient], [exact]) < 0.03
    assert torch.equal(torch.autograd.grad(found, x, upstream.t().contiguous().t())[0], gradient)


def test_a_streamed_function_of_a_part_of_a_storage() -> None:
    """The first half lies at the beginning of what is kept, which has more numbers than it."""
    x = torch.randn(2, 600_000, requires_grad=True)

    def out() -> Tensor:
        first, second = (x * 1.0).split(1)
        return F.gelu(first) * F.silu(second)

    exact = torch.autograd.grad(out().sum(), x)[0]
    for bits in (99, 8):
        with compressed(classifier(bits), nn.Module()):
            found = out().sum()
        assert relative_error([torch.autograd.grad(found, x)[0]], [exact]) < (0.01 if bits == 8 else 1e-7)


def test_a_mask_of_booleans_is_not_held_beside_its_bits() -> None:
    x, seen = torch.randn(128, 128, requires_grad=True), list[WeakStorage]()
    with compressed(classifier(4), nn.Module()):
        mask = x.detach() > 0
        seen.append(WeakStorage(mask.untyped_storage()))
        out = torch.where(mask, x, 0.0)
        del mask
    assert seen[0].get() is None
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], (x > 0).float())


def test_the_time_of_pieces_is_counted() -> None:
    x, chosen = torch.randn(600_000, requires_grad=True), classifier(4)
    with compressed(chosen, nn.Module()):
        out = F.gelu(x * 1.0)
    assert chosen.ledger.encode_seconds > 0
    out.sum().backward()
    assert chosen.ledger.decode_seconds > 0


def test_a_streamed_function_is_checked_for_edits_too() -> None:
    x = torch.randn(600_000, requires_grad=True)
    with compressed(classifier(4), nn.Module()):
        hidden = x * 1.0
        out = F.gelu(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_activation_checkpointing_of_a_streamed_function() -> None:
    x = torch.randn(600_000, requires_grad=True)
    exact = torch.autograd.grad(F.gelu(x * 2).sum(), x)[0]
    with compressed(classifier(4), nn.Module(), x):
        out = checkpoint(lambda y: F.gelu(y * 2), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], exact)


def test_frozen_layers_and_tied_weights() -> None:
    model, loss, batch = language_loss(tied=True)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    exact = gradients(model, loss)
    found = gradients(model, loss, classifier(99), *batch)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def _ways(chosen: Classifier) -> set[str]:
    return {way for _, _, way in chosen.ledger.by}


def test_results_of_cheap_operations_are_made_again() -> None:
    model, loss, batch = language_loss()
    with_it, without = classifier(4), classifier(4, recompute=False)
    for chosen in (with_it, without):
        gradients(model, loss, chosen, *batch)
    assert "recomputed" in _ways(with_it)
    assert "recomputed" not in _ways(without)

    def kept(chosen: Classifier) -> int:
        return sum(nbytes for _, nbytes in chosen.ledger.by.values())

    assert kept(with_it) < 0.75 * kept(without)


def test_only_where_infinity_breaks_the_step_anyway_nobody_asks_for_it() -> None:
    chosen, needs = classifier(4), dict[str, bool]()
    pack = chosen.saved.pack

    def noting(tensor: Tensor) -> Handle:
        name = chosen.operation.name
        needs[name] = chosen.operation.needs_finite and needs.get(name, True)
        return pack(tensor)

    x, weight = torch.randn(2, 64, 64, requires_grad=True), nn.Parameter(torch.randn(64, 64))
    with torch.autograd.graph.saved_tensors_hooks(noting, chosen.saved.unpack), chosen.operation:
        hidden = F.gelu(F.layer_norm(F.linear(x, weight), (64,))) @ weight * x
        out = F.scaled_dot_product_attention(hidden, hidden, hidden)
        out = F.log_softmax(torch.logaddexp(out, x).logsumexp(0), -1) + F.elu(out)
        assert all(needs[name] for name in ("linear", "layer_norm", "gelu", "scaled_dot_product_attention"))
        assert not any(needs[name] for name in ("logaddexp", "logsumexp", "log_softmax", "elu", "mul"))
        mask = torch.zeros(64, 64, requires_grad=True)
        for arguments, keywords in (((mask,), {}), ((), {"attn_mask": mask})):
            needs.clear()
            F.scaled_dot_product_attention(hidden, hidden, hidden, *arguments, **keywords)
            assert not needs["scaled_dot_product_attention"], "learned biases may be minus infinity"
