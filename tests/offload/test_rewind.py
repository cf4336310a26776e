"""What a step changes is put back bit for bit, and what cannot be is named."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn

from lightning_efficient.core import watched_tensors
from lightning_efficient.core.random_state import random_state, restore_random_state
from lightning_efficient.core.watched_tensors import Slot, WatchedTensors, buffer_slots
from lightning_efficient.offload.batches import rewind
from lightning_efficient.offload.batches.rewind import KeptGradients


def test_o7_all_generators_go_back() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), random.random(), float(numpy.random.rand()), random.gauss(0, 1)]

    random.gauss(0, 1)  # one more is kept for the next call
    before = random_state()
    first = draw()
    restore_random_state(before)
    assert draw() == first
    restore_random_state(before)
    assert draw() == first


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("constant", torch.arange(3.0), persistent=False)
        self.inner = nn.BatchNorm1d(2)
        self.values: list[torch.Tensor] = [torch.ones(1)]

    def step(self) -> None:
        self.in_place += torch.rand(2)
        self.replaced = self.replaced + torch.rand(2)
        self.inner(torch.rand(4, 2))
        self.values.append(torch.rand(1))


def watched(module: Buffers) -> WatchedTensors:
    return WatchedTensors([*buffer_slots(module), Slot("values", module, "values")])


def snapshot(module: Buffers) -> list[torch.Tensor]:
    return [*(b.clone() for b in module.buffers()), *(v.clone() for v in module.values)]


def test_o7_tensors_go_back_and_stay_the_same_objects() -> None:
    module = Buffers()
    tensors = watched(module)
    for _ in range(3):
        before, objects = snapshot(module), [*module.buffers(), module.values]
        tensors.keep()
        for _ in range(2):  # attempts
            module.step()
            assert not tensors.lost()
            tensors.back()
            assert all(a is b for a, b in zip([*module.buffers(), module.values], objects, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(snapshot(module), before, strict=True))
        module.step()
        tensors.succeeded()


def test_o7_only_what_changes_is_copied_and_what_changes_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_tensors, "_SMALL", 0)
    module = Buffers()
    tensors = watched(module)
    tensors.keep()
    module.step()
    tensors.succeeded()
    tensors.keep()
    module.step()
    module.constant.mul_(2)
    assert tensors.lost() == ["constant"]
    tensors.succeeded()
    tensors.keep()
    module.constant.mul_(2)
    assert not tensors.lost()  # from now on there are copies of it
    tensors.back()
    assert torch.equal(module.constant, 2 * torch.arange(3.0))


def test_o7_gradients_of_before_go_back_and_others_go() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    module[2].requires_grad_(False)
    module[1](torch.rand(4, 2)).sum().backward()
    before = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    gradients = KeptGradients(module)
    for _ in range(2):
        assert gradients.keep()
        kept = module[1].weight.grad
        module(torch.rand(4, 3)).sum().backward()
        module[1].bias.grad = None  # taken away in between
        gradients.back()
        assert module[1].weight.grad is kept
        after = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert set(after) == set(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        gradients.forget()
        gradients.back()


def test_o7_sparse_gradients_go_back() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    before = embedding.weight.grad.to_dense()
    gradients = KeptGradients(embedding)
    for _ in range(2):
        assert gradients.keep()
        embedding(torch.tensor([2])).sum().backward()
        gradients.back()
        assert torch.equal(embedding.weight.grad.to_dense(), before)


def test_o7_gradients_are_not_copied_where_the_host_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(10, 10)
    monkeypatch.setattr(rewind, "free_bytes", lambda device: 200)
    gradients = KeptGradients(module)
    assert gradients.keep()  # there are none yet
    module(torch.rand(1, 10)).sum().backward()
    assert not gradients.keep()


@pytest.mark.gpu
def test_o7_gradients_and_generators_of_a_gpu_go_back() -> None:
    device = torch.device("cuda", 0)
    module = nn.Linear(64, 64, device=device)
    module(torch.rand(4, 64, device=device)).sum().backward()
    before = module.weight.grad.clone()
    gradients, generators = KeptGradients(module), random_state()
    assert gradients.keep()
    drawn = torch.rand(8, device=device)
    module(torch.rand(4, 64, device=device)).sum().backward()
    gradients.back()
    restore_random_state(generators)
    assert torch.equal(module.weight.grad, before)
    assert torch.equal(torch.rand(8, device=device), drawn)
