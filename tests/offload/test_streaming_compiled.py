"""Streamed parameters of modules that are compiled, and of regions around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.demos.model import ByteTransformer
from tests.offload.memory_tier import MemoryTier
from tests.offload.streamed import (
    Shared,
    assert_ordinary,
    held_bytes,
    mlp,
    stream_of,
)


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.block = torch.compile(mlp(2), backend="aot_eager", fullgraph=True)
        self.last = mlp(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_o6_a_compiled_module_is_one_unit() -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # of other tests
    model, x = Compiled(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    tier = MemoryTier()
    stream = stream_of(model, tier, 0.7)
    assert "block" in stream.units
    for _ in range(3):
        model.zero_grad()
        plain.zero_grad()
        for one in (plain, model):
            one(x).pow(2).sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        stream.end_step()
        assert held_bytes(model) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2  # the plain one and ours
    stream.detach()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_o6_blocks_that_are_compiled_in_place() -> None:
    torch._dynamo.reset()
    compiled: list[Any] = []
    model = ByteTransformer(layers=3, width=16, heads=2, context=8, vocabulary=32)
    plain, x = copy.deepcopy(model), torch.randint(32, (2, 8))
    for block in model.blocks:
        block.compile(backend=lambda graph, inputs: (compiled.append(graph), graph)[1])
    stream = stream_of(model, MemoryTier(), 0.7)
    for _ in range(2):
        for one in (plain, model):
            one.zero_grad()
            one(x).square().mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        stream.end_step()
        assert held_bytes(model) == 0
    assert len(compiled) in (1, 3)  # the blocks have their code in common
    stream.detach()
    assert_ordinary(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_o6_streamed_parts_of_a_larger_region_that_is_compiled() -> None:
    torch._dynamo.reset()
    model, x = Shared(), torch.randn(2, 8)
    plain, region = copy.deepcopy(model), torch.compile(model, backend="aot_eager")
    stream = stream_of(model, MemoryTier(), 0.9)
    for _ in range(2):
        for one, call in ((plain, plain), (model, region)):
            one.zero_grad()
            call(x).square().mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        stream.end_step()
        assert held_bytes(model) == 0
