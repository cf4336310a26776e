"""Predicted errors of gradients, against measured ones and against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.activation_compression.bounds import (
    allocate_bits,
    error_bound,
    gradient_deviation,
    step_variance,
)

Layer = Callable[[Tensor, Tensor], Tensor]

LAYERS: dict[str, tuple[Layer, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (256, 48), (32, 48)),
    "linear over tokens": (F.linear, (4, 64, 48), (32, 48)),
    "conv": (lambda x, w: F.conv2d(x, w), (8, 6, 14, 14), (10, 6, 3, 3)),
    "conv, padded": (lambda x, w: F.conv2d(x, w, padding=1), (8, 6, 24, 24), (10, 6, 3, 3)),
    "conv, strided": (lambda x, w: F.conv2d(x, w, stride=2), (8, 6, 17, 17), (10, 6, 3, 3)),
    "conv, one by one": (lambda x, w: F.conv2d(x, w), (8, 6, 9, 9), (10, 6, 1, 1)),
    "conv1d": (lambda x, w: F.conv1d(x, w), (8, 6, 40), (10, 6, 3)),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_deviation_of_the_gradient_is_predicted_a7(name: str, sparse: bool) -> None:
    layer, shape, weight_shape = LAYERS[name]
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double(), torch.randn(weight_shape).double().requires_grad_()
    if sparse:
        x = F.relu(x)
    out = layer(x, weight)
    loss = torch.randn_like(out)
    exact = torch.autograd.grad(out, weight, loss)[0]
    channel = -1 if "linear" in name else 1
    loss_squares = float(loss.square().sum() / out.shape[channel])
    nonzero = float((x != 0).double().mean())
    bound, errors = 0.1, []
    for _ in range(20):
        noise = (torch.rand_like(x) * 2 - 1) * bound * (x != 0)
        found = torch.autograd.grad(layer(x + noise, weight), weight, loss)[0]
        errors.append(found - exact)
    measured = float(torch.stack(errors).square().mean().sqrt())
    predicted = gradient_deviation(bound, loss_squares, nonzero)
    assert measured == pytest.approx(predicted, rel=0.10)
    assert error_bound(predicted, loss_squares, nonzero) == pytest.approx(bound)


def test_without_a_gradient_any_error_will_do_a7() -> None:
    assert error_bound(0.1, 0.0, 1.0) == math.inf


@dataclass(frozen=True)
class Problem:
    sizes: dict[str, int]
    harm: dict[str, float]

    def floors(self, bits: int) -> dict[str, int]:
        return dict.fromkeys(self.sizes, bits)

    def loss(self, bits: Mapping[str, int]) -> float:
        return sum(self.harm[name] * step_variance(bits[name]) for name in bits)

    def total(self, bits: Mapping[str, int]) -> int:
        return sum(self.sizes[name] * bits[name] for name in bits)


def draw(seed: int, count: int = 4) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (count,), generator=generator).tolist()
    harm = (torch.rand(count, generator=generator) * 6).exp().tolist()
    names = [f"layer{n}" for n in range(count)]
    return Problem(dict(zip(names, sizes, strict=True)), dict(zip(names, harm, strict=True)))


@pytest.mark.parametrize("seed", range(10))
def test_bits_go_where_they_do_most_a8(seed: int) -> None:
    """Within one layer's last bit of the best of all allocations."""
    problem = draw(seed)
    budget = 4.5 * sum(problem.sizes.values())
    found = allocate_bits(problem.sizes, problem.harm, problem.floors(3), problem.floors(6), budget)
    assert problem.total(found) <= budget
    choices = itertools.product(range(3, 7), repeat=len(problem.sizes))
    feasible = [dict(zip(problem.sizes, choice, strict=True)) for choice in choices]
    best = min(problem.loss(bits) for bits in feasible if problem.total(bits) <= budget)
    even = problem.loss(problem.floors(4))
    assert best <= problem.loss(found) <= best + 0.35 * (even - best)


def test_floors_are_given_in_any_case_and_ceilings_never_passed_a8() -> None:
    problem = draw(0)
    floors, ceilings = problem.floors(4), problem.floors(7)
    assert allocate_bits(problem.sizes, problem.harm, floors, ceilings, 0) == floors
    assert allocate_bits(problem.sizes, problem.harm, floors, ceilings, math.inf) == ceilings
