"""Streamed parameters: what cannot work is refused by name."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.offload.streaming.residency import BudgetError
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.tiers.tier import TierError
from tests.offload.memory_tier import MemoryTier
from tests.offload.streamed import (
    Convolutions,
    assert_ordinary,
    held_bytes,
    mlp,
    stream_of,
)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: m.share_memory(),
        lambda m: m[0].half(),
        lambda m: m._apply(lambda t: t * 2),
    ],
)
def test_a_change_of_all_parameters_is_refused_before_anything_changes(change: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    model.register_buffer("buffer", torch.zeros(1))
    stream = stream_of(model, MemoryTier())
    with pytest.raises(RuntimeError, match=r"is streamed: modules with such parameters cannot be moved"):
        change(model)
    assert model.buffer.dtype == torch.float32
    assert model.buffer.device.type == "cpu"
    stream.detach()
    assert model.double()[0][0].weight.dtype == torch.float64


def test_a_change_of_layout_is_refused() -> None:
    model = Convolutions()
    stream_of(model, MemoryTier(), 1)
    model.to(memory_format=torch.contiguous_format)
    with pytest.raises(RuntimeError, match="is streamed"):
        model.to(memory_format=torch.channels_last)


def test_copies_and_pickles_are_refused() -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier(), 1)
    for act in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot be (copied or )?pickled"):
            act(model)
    stream.detach()
    copy.deepcopy(model)


def test_functional_calls_use_the_tensors_that_they_are_given() -> None:
    model, x = mlp(), torch.randn(2, 8)
    others = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    stream_of(model, MemoryTier(), 0.4)
    assert torch.equal(torch.func.functional_call(model, others, x), torch.func.functional_call(plain, others, x))


def test_transforms_of_functions_need_their_parameters_there() -> None:
    model, x = mlp(2), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    stream = stream_of(model, MemoryTier(), 1)
    with pytest.raises(RuntimeError, match=r"cannot be used within torch.func transforms .* stream.ensure"):
        torch.func.grad(lambda x: model(x).sum())(x)
    with stream.ensure(model.parameters()):
        found = torch.func.grad(lambda x: model(x).sum())(x)
    assert torch.equal(found, torch.func.grad(lambda x: plain(x).sum())(x))


def test_the_memory_cannot_be_exchanged() -> None:
    model = mlp()
    stream_of(model, MemoryTier())
    with pytest.raises(RuntimeError, match=r"'0.0.weight' is streamed: its memory cannot be exchanged"):
        model[0][0].weight.data = torch.zeros(16, 8)


def test_what_must_be_there_at_once_has_to_fit() -> None:
    model, x = mlp(), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.2)
    message = r"'0.0.weight' is needed, and 6720 bytes .*; but memory_budget leaves 1344"
    with pytest.raises(BudgetError, match=message), stream.ensure(model.parameters()):
        pass
    stream.end_step()
    assert held_bytes(model) == 0
    model(x)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (mlp, {"budget_bytes": 0}, r"budget_bytes=0 must be positive"),
        (mlp, {"budget_bytes": 300}, r"Module '0.0' needs 576 bytes of parameters at once, more than budget_bytes=300"),
        (mlp, {"units": ["nothing"]}, r"units: 'nothing' is not a module"),
        (mlp, {"units": ["0.1"]}, r"units: module '0.1' has no parameter that is placed"),
        (
            lambda: nn.ModuleDict({"a": nn.ModuleList(mlp())}),
            {"units": ["a"]},
            r"units: 'a' is a ModuleList, which is ne",
        ),
        (lambda: torch.jit.script(mlp(1)), {}, r"Module '' is a torch.jit.ScriptModule"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_work_is_refused(build: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(build(), MemoryTier(), **options)


def with_parameter(parameter: nn.Parameter, other: Tensor | None = None) -> nn.Module:
    module = nn.Module()
    module.weight = parameter
    if isinstance(other, nn.Parameter):
        module.other = other
    elif other is not None:
        module.register_buffer("other", other)
    return module


class Special(nn.Parameter):
    pass


MEMORY = torch.zeros(8)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (mlp(1), "nothing", r"placed: 'nothing' is not a parameter"),
        (nn.BatchNorm1d(3), "running_mean", r"placed: 'running_mean' is a buffer"),
        (with_parameter(nn.Parameter(torch.zeros(2, device="meta"))), "weight", r"'weight' is on the meta device"),
        (with_parameter(Special(torch.zeros(2))), "weight", r"'weight' is a Special; only plain"),
        (with_parameter(nn.Parameter(torch.zeros(2).share_memory_())), "weight", r"'weight' is in memory shared betwe"),
        (
            with_parameter(nn.Parameter(torch.frombuffer(bytearray(8), dtype=torch.float32))),
            "weight",
            r"did not allocate",
        ),
        (with_parameter(nn.Parameter(torch.zeros(8)[2:])), "weight", r"'weight' is a view into 32 bytes of memory"),
        (with_parameter(nn.Parameter(torch.zeros(4).expand(3, 4))), "weight", r"'weight' is a view into 16 bytes"),
        (with_parameter(nn.Parameter(MEMORY), MEMORY[2:]), "weight", r"'weight' shares its memory with 'other'"),
        (with_parameter(nn.Parameter(MEMORY), nn.Parameter(MEMORY[2:])), "weight", r"'weight' shares its memory with"),
    ],
)
def test_what_cannot_be_streamed_is_named(module: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterStream(module, {name: MemoryTier()}, budget_bytes=1 << 20)


def test_one_stream_and_one_tier_for_one_memory() -> None:
    model = mlp()
    stream_of(model, MemoryTier())
    with pytest.raises(ValueError, match=r"'0.0.weight' is streamed already"):
        stream_of(model, MemoryTier())
    memory = torch.zeros(8)
    module = with_parameter(nn.Parameter(memory[:4]), nn.Parameter(memory[4:]))
    with pytest.raises(ValueError, match="'weight' and 'other' share memory, so they need the same tier"):
        ParameterStream(module, {"weight": MemoryTier(), "other": MemoryTier()}, budget_bytes=99)


def test_a_tier_without_room_leaves_the_module_as_it_was() -> None:
    model = mlp()
    expected = copy.deepcopy(model)
    tier = MemoryTier()
    tier.broken = {"write"}
    with pytest.raises(TierError, match="write failed"):
        stream_of(model, tier)
    assert_ordinary(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_parameter_that_outlives_its_stream_says_so() -> None:
    model = mlp(1)
    parameter = model[0][0].weight
    stream_of(model, MemoryTier(), 1)
    del model
    gc.collect()
    assert parameter.shape == (16, 8)
    with pytest.raises(RuntimeError, match=r"shape \[16, 8\] was streamed, and its ParameterStream is gone"):
        parameter.sum()
