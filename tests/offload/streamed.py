"""Modules and checks for the tests of streamed parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_efficient.core.torch_internals import innermost_saved_tensors_hooks
from lightning_efficient.offload.streaming.instance_methods import InstanceMethod
from lightning_efficient.offload.streaming.streaming import ParameterStream
from tests.offload.memory_tier import MemoryTier


def stream_of(module: nn.Module, tier: MemoryTier, share: float = 0.5, **options: Any) -> ParameterStream:
    """All parameters streamed, with a budget that is a part of their bytes."""
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    options.setdefault("budget_bytes", max(int(nbytes * share), 1))
    return ParameterStream(module, {name: tier for name, _ in module.named_parameters()}, **options)


def held_bytes(module: nn.Module) -> int:
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in module.parameters()}.values())


@contextlib.contextmanager
def counted(module: nn.Module, budget_bytes: int) -> Iterator[None]:
    """The storages' bytes never exceed the budget, whichever operation runs."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in module.parameters()}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert sum(storage.nbytes() for storage in storages.values()) <= budget_bytes
            return func(*args, **(kwargs or {}))

    with Count():
        yield


def same_as_plain(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    share: float = 0.5,
    steps: int = 3,
    loss: Callable[[Any], Tensor] = lambda output: output.float().pow(2).mean(),
    call: Callable[..., Any] = lambda module, *inputs: module(*inputs),
    count: bool = True,
    early: bool = False,
    **options: Any,
) -> ParameterStream:
    """Train both for some steps with Adam; all outputs, gradients, parameters and buffers are equal."""
    plain = copy.deepcopy(module)
    tier = MemoryTier(early=early)
    stream = stream_of(module, tier, share, **options)
    assert held_bytes(module) == 0
    budget = options.get("budget_bytes") or max(int(sum(one.nbytes for one in module.parameters()) * share), 1)
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.01, foreach=False) for one in (plain, module)]
    for step in range(steps):
        results = []
        for one, optimizer in zip((plain, module), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            given = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
            with counted(module, budget) if one is module and count else contextlib.nullcontext():
                output = call(one, *given)
                loss(output).backward()
            results.append((loss(output).detach(), [x.grad for x in given]))
        assert torch.equal(results[0][0], results[1][0])
        for expected, found in zip(results[0][1], results[1][1], strict=True):
            assert (expected is None) == (found is None)
            assert expected is None or torch.equal(expected, found)
        for (name, expected), found in zip(plain.named_parameters(), module.parameters(), strict=True):
            assert (expected.grad is None) == (found.grad is None), name
            assert expected.grad is None or torch.equal(expected.grad, found.grad), name
        optimizers[0].step()
        step_each(optimizers[1], stream)
        stream.end_step()
        assert held_bytes(module) == 0
    assert stream.statistics.peak_bytes <= budget
    assert stream.statistics.resident_bytes == 0
    for (name, expected), found in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    stream.detach()
    assert_ordinary(module)
    for expected, found in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(expected, found)
    return stream


def step_each(optimizer: torch.optim.Optimizer, stream: ParameterStream) -> None:
    """One parameter after the other, so that they need not fit at once."""
    groups = optimizer.param_groups
    for group in groups:
        for parameter in group["params"]:
            optimizer.param_groups = [{**group, "params": [parameter]}]
            with stream.ensure([parameter]):
                optimizer.step()
                stream.changed(parameter)
    optimizer.param_groups = groups


def assert_ordinary(module: nn.Module) -> None:
    for one in module.modules():
        assert not any(isinstance(value, InstanceMethod) for value in vars(one).values())
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    assert all(parameter.untyped_storage().nbytes() for parameter in module.parameters() if parameter.numel())
    assert innermost_saved_tensors_hooks() is None


def mlp(layers: int = 6, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)]
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu(norm(layer(x)))
        return x


class Shared(nn.Module):
    """A layer that is used twice, and one whose weight another module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(8))
        self.other_name = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.other_name(torch.tanh(self.first(x)))) * self.scale
        weight = self.second.weight.t()  # used after the layer's own forward
        return F.linear(self.second(x), self.first.weight) @ weight
