"""Streamed parameters: results are those of the plain module, bit for bit, within the budget."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.core.torch_internals import innermost_saved_tensors_hooks
from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.offload.streaming.streaming import ParameterStream
from tests.offload.memory_tier import MemoryTier
from tests.offload.streamed import (
    Convolutions,
    Shared,
    assert_ordinary,
    held_bytes,
    mlp,
    same_as_plain,
    stream_of,
)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_o6_an_mlp(share: float, early: bool) -> None:
    stream = same_as_plain(mlp(), (torch.randn(3, 8),), share=share, early=early)
    assert stream.statistics.prefetched > stream.statistics.fetches // 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_o6_a_gpt_with_tied_embeddings(tied: bool, share: float) -> None:
    model = ByteTransformer(layers=4, width=16, heads=2, context=8, dropout=0.1, tied=tied, vocabulary=32)
    same_as_plain(model, (torch.randint(32, (2, 8)),), share=share)


def test_o6_a_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    same_as_plain(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (torch.randn(2, 5, 16),))


def test_o6_the_fast_path_of_an_encoder_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(1), fast(*a))[1])
    stream = stream_of(model, MemoryTier())
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(model(x), expected)
        stream.end_step()
        assert torch.equal(model(x), expected)
    assert len(calls) == 12
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    stream.end_step()
    assert held_bytes(model) == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_o6_convolutions_with_batch_norm(memory_format: torch.memory_format) -> None:
    model = Convolutions().to(memory_format=memory_format)
    x = torch.randn(2, 4, 6, 6).to(memory_format=memory_format)
    strides = [parameter.stride() for parameter in model.parameters()]
    same_as_plain(model, (x,), share=0.4)
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_o6_an_lstm() -> None:
    same_as_plain(nn.LSTM(6, 8, num_layers=2), (torch.randn(4, 2, 6),), share=1, loss=lambda o: o[0].pow(2).mean())


def test_o6_parameters_in_one_memory_move_together() -> None:
    """As cuDNN wants the weights of a recurrent layer."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(24)
            self.first, self.second = nn.Parameter(memory[:16].view(4, 4)), nn.Parameter(memory[16:])
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x @ self.first) * self.second.view(2, 4).sum(0)

    same_as_plain(Flat(), (torch.randn(2, 4),), share=1)


def test_o6_attention_uses_its_childs_parameters() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x, x, x)[0]
            return self.second(x, x, x)[0]

    same_as_plain(Two(), (torch.randn(2, 3, 8),), share=0.6)


def test_o6_shared_layers_and_parameters_of_other_modules() -> None:
    same_as_plain(Shared(), (torch.randn(2, 8),), share=0.9)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, inside: bool) -> None:
        super().__init__()
        self.blocks = mlp(5)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.use_reentrant = use_reentrant
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):

            def functional(x: Tensor, block: Any = block, norm: Any = norm) -> Tensor:
                x = F.gelu(F.linear(norm(x), block[0].weight, block[0].bias))
                return F.linear(x, block[2].weight, block[2].bias)

            run = functional if self.inside else (lambda x, block=block, norm=norm: block(norm(x)))
            x = x + checkpoint(run, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_o6_activation_checkpointing(use_reentrant: bool, inside: bool) -> None:
    same_as_plain(Checkpointed(use_reentrant, inside), (torch.randn(3, 8),), share=0.5)


def test_o6_frozen_parts() -> None:
    model = mlp()
    for parameter in model[:3].parameters():
        parameter.requires_grad_(False)
    same_as_plain(model, (torch.randn(2, 8),), share=0.3)


def test_o6_a_few_parameters_of_many() -> None:
    model = mlp()
    plain, x = copy.deepcopy(model), torch.randn(2, 8)
    tier = MemoryTier()
    stream = ParameterStream(model, {"1.0.weight": tier, "4.2.weight": tier}, budget_bytes=600)
    assert stream.units == {"1.0": 512, "4.2": 512}
    assert torch.equal(model(x), plain(x))
    stream.end_step()
    assert sum(not one.untyped_storage().nbytes() for one in model.parameters()) == 2
    stream.detach()
    assert_ordinary(model)


def test_o6_several_forwards_then_one_backward() -> None:
    same_as_plain(mlp(), (torch.randn(2, 8), torch.randn(3, 8)), call=lambda m, a, b: torch.cat([m(a), m(b), m(a)]))


def test_o6_a_graph_that_is_kept_outlives_the_step() -> None:
    model = mlp()
    plain, x = copy.deepcopy(model), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.3)
    losses = [one(x).pow(2).sum() for one in (plain, model)]
    for _ in range(2):
        for loss in losses:
            loss.backward(retain_graph=True)
        stream.end_step()
        assert held_bytes(model) == 0
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_o6_gradients_of_gradients() -> None:
    model = mlp(3)
    plain, x = copy.deepcopy(model), torch.randn(2, 8, requires_grad=True)
    stream = stream_of(model, MemoryTier(), 1)
    for one in (plain, model):
        (gradient,) = torch.autograd.grad(one(x).pow(2).sum(), x, create_graph=True)
        (gradient.norm() - 1).pow(2).backward()
        del gradient
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(plain.parameters(), model.parameters(), strict=True)
        if a.grad is not None
    )
    stream.end_step()
    assert held_bytes(model) == 0


def test_o6_backward_may_enter_a_part_by_the_side() -> None:
    """A loss of what a module keeps, as of a mixture of experts."""

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(4)
            self.side = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.side = self.layers[1](x).square().mean()
            return self.layers(x)

    same_as_plain(Side(), (torch.randn(2, 8),), call=lambda m, x: m(x).sum() + m.side)


def test_o6_methods_that_are_no_forward_and_modules_alone() -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        y = model[2][0].forward(x)  # type: ignore[index]
        return model[1](x).sum() + F.linear(y, model[0][0].weight.t()).sum()  # type: ignore[index]

    same_as_plain(mlp(), (torch.randn(2, 8),), call=call)


def test_o6_validation_between_steps() -> None:
    model = mlp()
    plain, x = copy.deepcopy(model), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.4)
    for _ in range(2):
        stream.begin_step()
        model(x).sum().backward()
        stream.end_step()
        stream.begin_step(gradients=False)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        stream.end_step()
    assert stream.statistics.prefetched == stream.statistics.fetches  # begin_step begins with the first


def test_o6_no_part_is_fetched_twice_that_could_have_stayed() -> None:
    model, x = mlp(), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 1.0)
    model(x).sum().backward()
    assert stream.statistics.fetches == len(list(model.parameters()))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_o6_all_is_well_after_an_exception(where: str) -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    stream = stream_of(model, MemoryTier(), 0.4)

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    handle = model[3][1].register_forward_hook(
        lambda m, a, y: y.register_hook(fail) and None if where == "backward" else fail()
    )
    with pytest.raises(ValueError, match="on purpose"):
        model(x).sum().backward()
    assert innermost_saved_tensors_hooks() is None
    stream.end_step()
    assert held_bytes(model) == 0
    handle.remove()
    model.zero_grad()
    for one in (plain, model):
        one(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_o6_an_interrupt_leaves_no_hooks_after_the_step() -> None:
    model, x = mlp(), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.4)
    model[3][1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    stream.end_step()
    assert innermost_saved_tensors_hooks() is None
    assert held_bytes(model) == 0


def test_o6_outer_hooks_for_saved_tensors_see_all_but_parameters() -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    packed: list[Tensor] = []
    stream = stream_of(model, MemoryTier(), 0.4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t):
        y = model(x)
    y.sum().backward()
    plain(x).sum().backward()
    assert len(packed) == 18  # the input of each layer
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    stream.detach()
    assert_ordinary(model)


def test_o6_what_is_changed_in_place_between_forward_and_backward_is_noticed() -> None:
    model, x = mlp(), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.4)
    loss = model(x).sum()
    with torch.no_grad():
        model[2][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace operation: the parameter '2.0.weight'"):
        loss.backward()
    stream.end_step()

    y = torch.ones(2, 8, requires_grad=True).exp()
    loss = model(y).sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"inplace operation: a torch.float32 tensor"):
        loss.backward()


def test_what_is_not_streamed_is_passed_over() -> None:
    model = mlp()
    stream = ParameterStream(model, {"0.0.weight": MemoryTier()}, budget_bytes=1 << 20)
    with stream.ensure(model[1].parameters()):
        stream.changed(model[1][0].weight)
    assert stream.statistics.fetches == 0


def test_parameters_without_numbers_have_no_memory_to_stream() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.empty = nn.Parameter(torch.empty(0, 3))
    stream = stream_of(model, MemoryTier(), 1)
    assert model.empty.sum() == 0
    assert model(torch.ones(1, 3)).shape == (1, 3)
    stream.detach()


def test_nothing_placed_is_nothing_done() -> None:
    model = mlp()
    stream = ParameterStream(model, {}, budget_bytes=1)
    model(torch.randn(2, 8)).sum().backward()
    stream.end_step()
    stream.detach()
    assert_ordinary(model)


def test_units_by_name() -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier(), 0.4, units=["2", "4"])
    assert stream.units["2"] == stream.units["4"] == 1120
    assert "2.0" not in stream.units
    assert "3.0" in stream.units
    same_as_plain(mlp(), (torch.randn(2, 8),), units=["2", "4"])


def test_it_leaves_no_references() -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier())
    model(torch.randn(2, 8)).sum().backward()
    stream.detach()
    reference = weakref.ref(stream)
    del stream
    gc.collect()
    assert reference() is None


def test_o6_one_operation_with_parameters_of_two_parts() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.third(x) @ (self.first.weight @ self.second.weight)

    same_as_plain(Product(), (torch.randn(2, 8),), share=0.7)


def test_o6_threads() -> None:
    model = mlp()
    plain, inputs = copy.deepcopy(model), [torch.randn(4, 8) for _ in range(4)]
    stream = stream_of(model, MemoryTier(), 1.0)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: (y := model(x), torch.autograd.grad(y.sum(), model[0][0].weight)[0]), inputs))
    for x, (y, gradient) in zip(inputs, results, strict=True):
        expected = plain(x)
        assert torch.equal(y, expected)
        assert torch.equal(gradient, torch.autograd.grad(expected.sum(), plain[0][0].weight)[0])
    stream.end_step()
    assert held_bytes(model) == 0


def test_o6_a_graph_can_be_used_after_the_stream_is_gone() -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    stream = stream_of(model, MemoryTier(), 0.4)
    losses = [one(x).sum() for one in (plain, model)]
    stream.detach()
    assert_ordinary(model)
    for loss in losses:
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_o6_under_autocast() -> None:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    same_as_plain(mlp(), (torch.randn(2, 8),), call=call)
