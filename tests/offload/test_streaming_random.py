"""Streamed parameters in random programs: whatever modules do in whatever order, results are the same."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.offload.streaming.streaming import ParameterStream
from tests.offload.memory_tier import MemoryTier
from tests.offload.streamed import held_bytes, step_each


class Program(nn.Module):
    """Ten random operations, the same ones for the same ``seed``."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = 0
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(5)
        )
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(8))
        self.embedding = nn.Embedding(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        choice = random.Random(self.seed)
        for _ in range(10):
            block, attention = choice.choice(list(self.blocks)), choice.choice(list(self.attentions))

            def functional(x: Tensor, block: nn.Module = block) -> Tensor:
                return F.linear(F.linear(x, block[1].weight), block[3].weight)  # type: ignore[index]

            match choice.randrange(8):
                case 0:
                    change = block(x)
                case 1:
                    change = checkpoint(block, x, use_reentrant=choice.random() < 0.5)
                case 2:
                    change = checkpoint(functional, x, use_reentrant=choice.random() < 0.5)
                case 3:
                    change = attention(x, x, x, need_weights=choice.random() < 0.5)[0]
                case 4:
                    change = self.recurrent(x)[0]
                case 5:
                    change = self.convolution(x.transpose(1, 2)).transpose(1, 2) * self.scale
                case 6:
                    change = F.linear(x, self.embedding.weight.t()) + self.embedding(torch.arange(3))
                case _:
                    change = x @ (block[1].weight.t() @ block[3].weight.t())
            x = x + change.tanh()
        return x


@pytest.mark.parametrize("seed", range(12))
def test_o6_o8_random_programs(seed: int) -> None:
    choice = random.Random(seed)
    torch.manual_seed(seed)
    model = Program()
    for parameter in model.parameters():
        parameter.requires_grad_(choice.random() < 0.8)
    plain = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters() if choice.random() < 0.9]
    budget = int(sum(one.nbytes for one in model.parameters()) * choice.choice([0.45, 0.6, 0.8]))
    stream = ParameterStream(model, dict.fromkeys(names, MemoryTier(early=seed % 2 == 0)), budget_bytes=budget)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01, foreach=False) for one in (plain, model)]
    for step in range(4):
        model.seed = plain.seed = 10 * seed + step // 2  # each twice
        outputs = []
        x = torch.randn(2, 3, 8)
        for one, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(one(x.clone().requires_grad_()))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name
        optimizers[0].step()
        step_each(optimizers[1], stream)
        outputs.clear()
        if choice.random() < 0.7:
            stream.end_step()
            assert held_bytes(model) == sum(one.nbytes for name, one in model.named_parameters() if name not in names)
    assert stream.statistics.peak_bytes <= budget
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    stream.detach()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
