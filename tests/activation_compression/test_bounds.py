"""Predicted errors of gradients, against measured ones and against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_efficient.activation_compression.bounds import (
    LayerError,
    allocate_bits,
    error_bound,
    gradient_deviation,
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


def layers(seed: int, count: int = 4) -> dict[str, LayerError]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand(1, generator=generator).exp() ** 3)

    sizes = torch.randint(1, 5, (count,), generator=generator).tolist()
    return {f"layer{n}": LayerError(sizes[n], draw(), draw(), 1.0, 10, draw()) for n in range(count)}


def objective(problem: dict[str, LayerError], bits: dict[str, int]) -> float:
    return sum(layer.relative(bits[name]) ** 2 for name, layer in problem.items())


@pytest.mark.parametrize("seed", range(10))
def test_bits_go_where_they_do_most_a8(seed: int) -> None:
    """Within one layer's last bit of the best of all allocations."""
    problem = layers(seed)
    floors, budget = dict.fromkeys(problem, 3), 4.5 * sum(layer.numel for layer in problem.values())
    found = allocate_bits(problem, floors, budget, most=6)
    assert sum(problem[name].numel * bits for name, bits in found.items()) <= budget
    feasible = [
        dict(zip(problem, choice, strict=True))
        for choice in itertools.product(range(3, 7), repeat=len(problem))
        if sum(problem[name].numel * bits for name, bits in zip(problem, choice, strict=True)) <= budget
    ]
    best = min(objective(problem, bits) for bits in feasible)
    even = objective(problem, dict.fromkeys(problem, 4))
    assert best <= objective(problem, found) <= best + 0.35 * (even - best)


def test_floors_are_given_in_any_case_a8() -> None:
    problem = layers(0)
    floors = dict.fromkeys(problem, 4)
    assert allocate_bits(problem, floors, budget_bits=0) == floors
    assert set(allocate_bits(problem, floors, budget_bits=math.inf).values()) == {8}
