"""Small networks of repeated layers, and the reference computations that several test files compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.growth.arrangement import LayerArrangement
from lightning_efficient.growth.form import describe
from lightning_efficient.growth.layers import find_stacks


class Layer(nn.Module):
    """``x + tanh(linear(norm(x)))``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class BatchNormLayer(nn.Module):
    """A layer with persistent running statistics and one buffer that is not saved."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)
        self.register_buffer("scratch", torch.rand(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Residual(nn.Module):
    """``head(layers(embed(x)))`` from 3 features to 2; ``reentrant`` recomputes each layer in the backward."""

    def __init__(
        self, depth: int, width: int = 4, layer: Callable[[int], nn.Module] = Layer, reentrant: bool | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.layers = nn.ModuleList(layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


class NormalisedByBatch(nn.Module):
    """Running statistics inside and a buffer that is not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hparams = {"width": width}
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.net.register_buffer("scratch", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hparams = {"width": width}
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(6, width))
        self.embed = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        return self.head(self.norm(x).tanh().mean(1))


def arrangement_of(module: nn.Module, layers: str | Sequence[str] | None = None) -> LayerArrangement:
    return LayerArrangement(module, find_stacks(module, layers))


def untied(module: nn.Module) -> nn.Module:
    """A copy in which nothing is shared: the same classes and the same values, each parameter an object of its own."""
    twin = copy.deepcopy(module)
    for sub in twin.modules():
        for name, parameter in sub._parameters.items():
            if parameter is not None:
                sub._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return twin


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def bytes_held(parameters: Iterable[nn.Parameter]) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    return sum(storages.values())


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, features: int = 3) -> None:
    """Some steps on random inputs in the module's dtype."""
    dtype = next(module.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(5, features, dtype=dtype)).square().sum().backward()
        optimizer.step()


def checkpoint_of(growing: Any, mode: str | None, prefix: str = "", **extra: Any) -> dict[str, Any]:
    """What ``load_grown`` reads of a Lightning checkpoint."""
    form = describe(growing)
    form["stacks"] = [[(prefix + parent).rstrip("."), keys] for parent, keys in form["stacks"]]
    weights = {prefix + name: value.clone() for name, value in growing.module.state_dict().items()}
    state = {"format": 1, **form, "mode": mode, "width_settings": None, "phase": 0, **extra}
    state["phases"] = [form["leaders"], list(range(growing.full_depth))] if growing.leaders else [[]]
    return {"state_dict": weights, "growth_form": state}
