"""Finds the operations of a forward pass that can be in few bits, whoever calls them, and hands them to the engine."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.core.torch_internals import (
    backward_within_modes,
    grad_within_modes,
    written_out_attention,
)
from lightning_efficient.precision.engine import Engine, product
from lightning_efficient.precision.kinds import Convolution, Kind, Linear, MatMul, sized
from lightning_efficient.precision.nodes import Node

__all__ = ["NOT_COVERED", "Operations"]

NOT_COVERED = frozenset((
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "bilinear", "tensordot", "chain_matmul", "multi_dot", "cdist", "mv", "dot", "baddbmm", "addbmm",
    "inner", "kron", "vdot",
))  # fmt: skip
"""Operations that multiply matrices and stay in high bits, by name of the function."""
_CONVOLUTIONS = {
    f"conv{transposed}{dimensions}d": (dimensions, bool(transposed))
    for dimensions in (1, 2, 3)
    for transposed in ("", "_transpose")
}
_PRODUCTS = frozenset(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"))


def _backward(tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False,
              inputs: Any = None) -> None:  # fmt: skip
    backward_within_modes(tensor, gradient, retain_graph, create_graph, inputs=inputs)


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
        skipped: How often what is not covered was called, by name.

    Args:
        engine: Computes them.
        make: A node of this name and kind.
        takes_part: Whether the node of this name does.
        plain_is_high: Whether what torch does by itself is in the high bits of ``engine``.
    """

    def __init__(
        self,
        engine: Engine,
        make: Callable[[str, str], Node],
        takes_part: Callable[[str], bool],
        *,
        plain_is_high: bool = False,
    ) -> None:
        super().__init__()
        self.skipped: Counter[str] = Counter()
        self._engine, self._make, self._takes_part = engine, make, takes_part
        self._plain_is_high = plain_is_high
        self._nodes: dict[str, Node] = {}
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._module: nn.Module | None = None
        self._walked = False
        self._places: Counter[str] = Counter()

    def begin(self, module: nn.Module) -> None:
        """A step begins."""
        self._module, self._walked = module, False
        self._places.clear()

    def forget(self) -> None:
        """Parameters came or went."""
        self._names.clear()
        self._nodes.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        instead = self._instead(name, args, kwargs)
        if instead is not None:
            return instead
        if func in _WITHIN:
            with self:
                return _WITHIN[func](*args, **kwargs)
        if name in NOT_COVERED:
            self.skipped[name] += 1
        return func(*args, **kwargs)

    def _instead(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        if name == "linear":
            x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
            return self._product(Linear(), x, weight, bias)
        if name in _CONVOLUTIONS:
            return self._convolution(name, args, kwargs)
        if name in _PRODUCTS and len(args) == 2 and not kwargs:
            x, weight = reversed(args) if name == "__rmatmul__" else args
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and min(x.dim(), weight.dim()) >= 2:
                return self._product(MatMul(), x, weight, None)
        if name == "addmm" and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if isinstance(bias, Tensor) and bias.dim() == 1 and isinstance(weight, Tensor):
                return self._product(MatMul(), x, weight, bias) if bias.shape[0] == weight.shape[-1] else None
        if name == "einsum":
            return self._einsum(args)
        return None

    def _convolution(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        dimensions, transposed = _CONVOLUTIONS[name]
        names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding")
        names += ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        given = dict(zip(names, _arguments(names, args, kwargs), strict=True))
        x, weight = given["input"], given["weight"]
        if not isinstance(x, Tensor) or x.dim() != dimensions + 2:  # without a batch
            return None
        stride, dilation = (sized(given[key] or 1, dimensions) for key in ("stride", "dilation"))
        padding = given["padding"] or 0
        if padding == "valid":
            padding = 0
        elif isinstance(padding, str):
            widths = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
            if any(width % 2 for width in widths):
                return None
            padding = [width // 2 for width in widths]
        arguments = (
            stride, sized(padding, dimensions), dilation, transposed,
            sized(given.get("output_padding") or 0, dimensions), given["groups"] or 1,
        )  # fmt: skip
        return self._product(Convolution(arguments), x, weight, given["bias"])

    def _einsum(self, args: tuple[Any, ...]) -> Tensor | None:
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        if not isinstance(equation, str) or len(operands) != 2:
            return None
        plan = _as_matrices(equation, *operands)
        if plan is None:
            return None
        x, weight, finish = plan
        result = self._product(MatMul(), x, weight, None, kind_name="einsum")
        return finish(result) if result is not None else None

    def _product(self, kind: Kind, x: Any, weight: Any, bias: Any, *, kind_name: str | None = None) -> Tensor | None:
        tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
        if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() for tensor in tensors):
            return None
        if not any(tensor.requires_grad for tensor in tensors) or x.dtype == torch.float64:
            return None
        if len({tensor.device for tensor in tensors}) > 1 or not x.numel() or not weight.numel():
            return None  # torch says what is wrong
        name = self._name(weight) or self._name(x)
        if not name:
            base = kind_name or kind.name
            self._places[base] += 1
            name = f"{base}#{self._places[base]}"
        if not self._takes_part(name):
            return None
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = self._make(name, kind_name or kind.name)
        if node.learning.low_pays is False and self._plain_is_high:
            self._engine.work += 3 * node.work
            return None
        return product(self._engine, node, kind, x, weight, bias)

    def _name(self, tensor: Tensor) -> str:
        """Of the module that has it as a parameter; or empty."""
        known = self._names.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        if isinstance(tensor, nn.Parameter) and not self._walked and self._module is not None:
            self._walked = True  # once a step: parameters that are there only in forward, as with FSDP2, come again
            for name, parameter in _parameters(self._module):
                self._names[id(parameter)] = weakref.ref(parameter), name
            return self._name(tensor)
        return ""


def _parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """By the name of the first module that has it; of weights that are not called so, with their own."""
    for name, parameter in module.named_parameters():
        yield name.removesuffix(".weight"), parameter


def _arguments(names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in enumerate(names)]


def _as_matrices(equation: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None:
    """An einsum of two tensors as one product of matrices, or of batches of them; None if it is none."""
    sides, arrow, result = equation.replace(" ", "").partition("->")
    left, comma, right = sides.partition(",")
    letters = left + right + result
    if not arrow or not comma or not letters.isalpha():
        return None
    if any(len(set(part)) != len(part) for part in (left, right, result)) or (len(left), len(right)) != (
        x.dim(), weight.dim(),
    ):  # fmt: skip
        return None
    batch = [letter for letter in left if letter in right and letter in result]
    summed = [letter for letter in left if letter in right and letter not in result]
    rows = [letter for letter in left if letter not in right]
    columns = [letter for letter in right if letter not in left]
    if not summed or any(letter not in result for letter in rows + columns):
        return None
    sizes = dict(zip(left + right, [*x.shape, *weight.shape], strict=True))
    if any(x.shape[left.index(letter)] != weight.shape[right.index(letter)] for letter in batch + summed):
        return None

    def count(group: list[str]) -> int:
        return int(torch.Size([sizes[letter] for letter in group]).numel())

    one = x.permute([left.index(letter) for letter in batch + rows + summed])
    two = weight.permute([right.index(letter) for letter in batch + summed + columns])
    before = [count(batch)] if batch else []
    order = batch + rows + columns

    def finish(found: Tensor) -> Tensor:
        return found.reshape([sizes[letter] for letter in order]).permute([order.index(letter) for letter in result])

    return (
        one.reshape([*before, count(rows), count(summed)]), two.reshape([*before, count(summed), count(columns)]),
        finish,
    )  # fmt: skip
