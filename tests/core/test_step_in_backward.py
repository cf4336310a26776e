"""Updates within backward are those of one step for all, bit for bit (C8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from lightning_efficient.core.step_in_backward import StepInBackward
from tests.helpers.fitting import assert_same_tree

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "Adam amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    network[4].bias = nn.Parameter(network[4].bias.detach())
    return network


def groups(network: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in network.parameters() if p.dim() > 1]
    return [{"params": weights}, {"params": [p for p in network.parameters() if p.dim() < 2], "lr": 0.003}]


def train(network: nn.Module, optimizer: optim.Optimizer, *, closure: bool, micro: int, last: list[bool]) -> None:
    schedule = optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    torch.manual_seed(1)
    for _ in range(8):

        def compute() -> torch.Tensor:
            optimizer.zero_grad()
            for i in range(micro):
                last[0] = i == micro - 1
                loss = network(torch.randn(5, 6)).square().mean() / micro
                loss.backward()
            return loss

        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "plain"])
@pytest.mark.parametrize("micro", [1, 3], ids=["whole", "accumulated"])
def test_it_is_the_step_for_all_c8(name: str, closure: bool, micro: int) -> None:
    results = []
    for in_backward in (False, True):
        network, last = model(), [True]
        optimizer = OPTIMIZERS[name](groups(network))
        stepping = StepInBackward([optimizer], lambda last=last: last[0])
        if in_backward:
            stepping.attach()
        train(network, optimizer, closure=closure, micro=micro, last=last)
        stepping.detach()
        results.append((dict(network.state_dict()), optimizer.state_dict()))
        assert all(not (p._post_accumulate_grad_hooks or ()) for p in network.parameters())
    assert_same_tree(results[1][0], results[0][0], "weights")
    assert_same_tree(results[1][1], results[0][1], "optimizer")


def test_no_two_layers_gradients_are_alive_together_c8() -> None:
    network = model()
    optimizer = optim.AdamW(network.parameters(), lr=0.01)
    stepping = StepInBackward([optimizer], lambda: True)
    alive: list[int] = []
    original = optimizer.step

    def counted(*arguments: Any) -> Any:
        alive.append(sum(p.grad is not None for p in network.parameters()))
        return original(*arguments)

    optimizer.step = counted  # type: ignore[method-assign]
    stepping.attach()
    network(torch.randn(5, 6)).sum().backward()
    stepping.detach()
    assert len(alive) == 6
    assert max(alive) <= 2, "the weight and the bias of a layer"
    assert all(p.grad is None for p in network.parameters())


def test_a_tied_weight_is_updated_once_c8() -> None:
    network = model()
    network[4].weight = nn.Parameter(torch.randn(6, 8))
    network[0].weight = nn.Parameter(network[4].weight.detach().t().contiguous())
    tied = nn.Parameter(torch.randn(4, 4))
    optimizer = optim.SGD([tied], lr=0.1)
    plain = tied.detach().clone().requires_grad_()
    (plain @ plain).sum().backward()
    stepping = StepInBackward([optimizer], lambda: True)
    stepping.attach()
    (tied @ tied).sum().backward()
    stepping.detach()
    torch.testing.assert_close(tied, plain - 0.1 * plain.grad)


def test_frozen_parameters_have_no_hooks() -> None:
    network = model()
    network[0].requires_grad_(False)
    stepping = StepInBackward([optim.SGD(network.parameters(), lr=0.1)], lambda: True)
    stepping.attach()
    assert not network[0].weight._post_accumulate_grad_hooks
    stepping.detach()


def test_what_needs_all_gradients_is_refused_c8() -> None:
    with pytest.raises(ValueError, match="LBFGS needs the gradients of all parameters together"):
        StepInBackward([optim.LBFGS(model().parameters())], lambda: True)


def test_rates_that_change_after_a_state_was_loaded_are_followed_c8() -> None:
    network = model()
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    stepping = StepInBackward([optimizer], lambda: True)
    stepping.attach()
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[0]["lr"] = 0.0
    before = network[0].weight.detach().clone()
    network(torch.randn(5, 6)).sum().backward()
    stepping.detach()
    assert torch.equal(network[0].weight, before)
