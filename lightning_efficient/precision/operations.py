"""Finds the operations of a forward pass that can be in few bits, whoever calls them, and hands them to the engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from lightning_efficient.core.torch_internals import (
    backward_within_modes,
    computes_nothing,
    grad_within_modes,
    in_backward,
    written_out_attention,
)
from lightning_efficient.precision import compiled
from lightning_efficient.precision.calls import NOT_COVERED, Product, kind_of, name_of, product_of, unfit
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.guarded_call import product
from lightning_efficient.precision.names import Names
from lightning_efficient.precision.nodes import Node

__all__ = ["NOT_COVERED", "Operations"]


def _backward(tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False,
              inputs: Any = None) -> None:  # fmt: skip
    backward_within_modes(tensor, gradient, retain_graph, create_graph, inputs=inputs)


_ATTENTION = "multi_head_attention_forward"
_WITHIN: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: written_out_attention,
    Tensor.backward: _backward,
    torch.autograd.backward: backward_within_modes,
    torch.autograd.grad: grad_within_modes,
}
"""Functions that are no operations but call some: what to call instead, so that the mode sees those."""


class Operations(TorchFunctionMode):
    """Within it, operations are nodes.

    Attributes:
        skipped: How often what is not covered was called, by the name of its module or else of its function; in what is
            compiled, in how many graphs it is.
        reasons: Why it is not.
        engine: That computes the products.

    Args:
        engine: Computes them.
        make: A node of this name and kind.
        takes_part: Whether the node of this name does.
        plain_is_high: Whether what torch does by itself is in the high bits of ``engine``.
        mixed: Whether autocast is on around all of the step.
    """

    def __init__(
        self,
        engine: Engine,
        make: Callable[[str, str], Node],
        takes_part: Callable[[str], bool],
        *,
        plain_is_high: bool = False,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.skipped: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.engine, self._make, self._takes_part = engine, make, takes_part
        self._plain_is_high, self.mixed = plain_is_high, mixed
        self._nodes: dict[str, Node] = {}
        self._names = Names()

    def begin(self, module: nn.Module | None) -> None:
        """A step begins; ``module``: whose parameters have names."""
        self._names.begin(module)
        compiled.begin(self)

    def forget(self) -> None:
        """Parameters came or went."""
        self._names.forget()
        self._nodes.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if torch.compiler.is_dynamo_compiling() and name != _ATTENTION:
            return compiled.traced(self, name, func, args, kwargs)
        if func in _WITHIN:
            with self:
                return _WITHIN[func](*args, **kwargs)
        began, found = time.perf_counter(), product_of(name, args, kwargs)
        graph = isinstance(func, OpOverload) or isinstance(found, str)
        if found is None or (graph and not torch.is_grad_enabled()):
            self.engine.times.found(began)
            return func(*args, **kwargs)  # so do graphs call what is not covered, for which it was counted already
        if isinstance(found, Product):
            result = self._product(found, began)
            if result is not None:
                return found.finish(result) if found.finish is not None else result
        else:
            self.skip(name, found)
        self.engine.times.found(began)
        return func(*args, **kwargs)

    def _product(self, found: Product, began: float) -> Tensor | None:
        """Its result; None: torch may do it. ``began``: when somebody began to look what it is."""
        x, weight = found.x, found.weight
        if computes_nothing(x):
            return None
        name = self._names.of(weight) or self._names.of(x)
        reason = unfit(found, mixed=self.mixed) or ("" if x.numel() and weight.numel() else "there is nothing in it")
        if reason:
            self.skip(name or found.base, reason)
            return None
        site, again = (x.shape, weight.shape), not name and in_backward()
        if not name:
            name = self._names.numbered(found.base, site, again=again)
        node = self._node(name, found.base)
        if node is None:
            return None
        if again:  # which one of those that look alike it is, is not known: one in high bits is for all
            others = (self._nodes.get(other) for other in self._names.alike(found.base, site))
            node.last_low = node.last_low and all(other.last_low for other in others if other is not None)
        if not in_backward():  # before it is looked at: what is computed again in backward finds what forward found
            node.begin(self.engine.batch)
        if node.learning.low_pays is False and self._plain_is_high:
            self.engine.work += 3 * node.work
            return None
        self.engine.times.found(began)
        return product(self.engine, node, kind_of(found.kind, found.arguments), x, weight, found.bias)

    def _node(self, name: str, kind: str) -> Node | None:
        if not self._takes_part(name):
            self.skip(name, "it is excluded")
            return None
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = self._make(name, kind)
        return node

    def skip(self, name: str, reason: str) -> None:
        """Count what is not covered."""
        self.skipped[name] += 1
        self.reasons[name] = reason

    def skip_scripted(self, module: nn.Module) -> None:
        """Count the parts that TorchScript runs, of which Python hears nothing."""
        parts = [name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
        for name in parts:
            if not any(name.startswith(f"{other}.") for other in parts):
                self.skip(name, "it is a module of TorchScript")

    # For graphs

    def parameter(self, tensor: Tensor) -> tuple[Tensor, str]:
        """The parameter whose memory a tensor is, and its name; the tensor and an empty name if there is none."""
        return self._names.parameter(tensor)

    def in_graph(self, name: str, base: str, site: int, *, again: bool) -> Node | None:
        """The node of a product in a graph, or None if it takes no part."""
        return self._node(name or self._names.numbered(base, site, again=again), base)
