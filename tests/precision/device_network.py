"""A small network in few bits, by the immediate engine and by that of a device, step for step, with faults."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.precision.device.engine import DeviceEngine
from lightning_efficient.precision.engine import Engine, Retry
from lightning_efficient.precision.formats import format_named
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.operations import Operations
from lightning_efficient.precision.status import ReturnPolicy

FAULTS = ("nan", "outlier", "underflow", "jump", "zeros", "gradient jump")
LEARNING = 4


class Net(nn.Module):
    """Two linear layers and a product by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 20, bias=False)
        self.plain = nn.Parameter(torch.randn(20, 12) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x))) @ self.plain


class Run:
    """One network with its engine.

    Args:
        operations: Of the device; None: the immediate engine.
        low: Format.
        device: Of all tensors.
        protect: Whether signs are looked for.
        stochastic: Whether numbers are rounded at random.
        learning: Steps of pre-learning.
    """

    def __init__(
        self, operations: Any, low: str = "int8", device: str = "cpu", *, protect: bool = True,
        stochastic: bool = False, learning: int = LEARNING,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.net = Net().to(device)
        self.nodes: dict[str, Node] = {}
        self.engine = Engine(format_named(low), torch.float32, stochastic=stochastic, protect=protect, seed=0)
        self.device: DeviceEngine | None = None
        self.calls: dict[str, int] = {}
        if operations is not None:
            where = torch.empty(0, device=device).device
            self.device = DeviceEngine(
                self.engine, where, self._counted(operations), stochastic=stochastic, protect=protect, seed=0
            )
            self.engine.on_devices[where] = self.device
        policy = ReturnPolicy(return_after=3, retry_rate=0.05)
        self.policy = policy
        self.operations = Operations(
            self.engine, lambda name, kind: self.nodes.setdefault(name, Node(name, kind, policy)), lambda name: True
        )
        self.number, self.learning = 0, learning

    def _counted(self, operations: Any) -> Any:
        def counted(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> None:
                self.calls[name] = self.calls.get(name, 0) + 1
                getattr(operations, name)(*args, **kwargs)

            return call

        return SimpleNamespace(**{name: counted(name) for name in operations.__all__})

    def step(self, fault: str = "", *, wait: bool = True) -> tuple[Tensor, Mapping[str, Tensor], list[Retry]]:
        """The result, gradients, and what was computed again."""
        generator = torch.Generator().manual_seed(self.number)
        x = with_fault(torch.randn(48, 24, generator=generator), fault).to(self.net.plain.device)
        self.engine.learning = self.number < self.learning
        self.engine.begin(self.number)
        self.operations.begin(self.net)
        self.number += 1
        self.net.zero_grad()
        with self.operations:
            result = self.net(x.requires_grad_())
            loss = result.square().mean() * (2.0**14 if fault == "gradient jump" else 1.0)
            loss.backward()
        if wait:
            self.engine.refresh(wait=True)
        retries, self.engine.retries = self.engine.retries, []
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        return result.detach(), gradients, retries


def with_fault(x: Tensor, fault: str) -> Tensor:
    if fault == "nan":
        x[3, 4] = torch.nan
    elif fault == "outlier":
        x[:, 3] *= 1e5
    elif fault == "underflow":
        x[0, 0] = 1500.0
    elif fault == "jump":
        x *= 2.0**14
    elif fault == "zeros":
        x.zero_()
    return x


def compare(
    operations: Any, low: str = "int8", device: str = "cpu", faults: tuple[str, ...] = FAULTS, *,
    between: int = 7, healthy: int = 3, learning: int = LEARNING,
) -> int:  # fmt: skip
    """The same retries, counters and exponents, and results as near as high bits by other kernels are.

    Returns:
        How many products were in low bits.
    """
    immediate, other = Run(None, low, learning=learning), Run(operations, low, device, learning=learning)
    plan = [""] * (learning + healthy) + [step for fault in faults for step in (fault, *[""] * between)]
    for number, fault in enumerate(plan):
        result, gradients, retries = immediate.step(fault)
        found, near, again = other.step(fault)
        where = f"step {number} {fault!r}: {retries} {again}"
        assert sorted(map(str, retries)) == sorted(map(str, again)), where
        assert bool(retries) == bool(fault), where
        torch.testing.assert_close(
            found.cpu(), result, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, w=where: w + m
        )
        for name, gradient in gradients.items():
            size = float(gradient.norm())
            torch.testing.assert_close(
                near[name].cpu(), gradient, rtol=1e-3, atol=1e-3 * size if size == size else 1, equal_nan=True
            )
        for name, node in immediate.nodes.items():
            alike(node, other.nodes[name], where)
    return sum(node.products[role].status.low for node in other.nodes.values() for role in ROLES)


def alike(one: Node, other: Node, where: str) -> None:
    for role in ROLES:
        a, b = one.products[role], other.products[role]
        assert a.status.state_dict() == b.status.state_dict(), (where, one.name, role)
        assert a.distances == b.distances, (where, one.name, role)
        assert a.result.state_dict()["exponents"] == b.result.state_dict()["exponents"], (where, one.name, role)
    for which, tracker in one.tensors.items():
        a_state, b_state = tracker.state_dict(), other.tensors[which].state_dict()
        assert a_state["exponents"] == b_state["exponents"], (where, one.name, which)
        for name, limit in a_state["limits"].items():
            assert abs(limit - b_state["limits"][name]) < 1e-3, (where, one.name, which, name)
