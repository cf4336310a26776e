"""Which product of matrices a call of a function of torch is, or why it is not one that can be in few bits.

All of it is Python that a compiler can trace: what a call is, is settled once for a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import within_transform
from lightning_efficient.precision.kinds import Convolution, Kind, Linear, MatMul, sized

__all__ = ["NOT_COVERED", "Product", "kind_of", "name_of", "product_of", "unfit"]

NOT_COVERED = frozenset((
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "bilinear", "tensordot", "chain_matmul", "multi_dot", "linalg_multi_dot", "linalg_matmul",
    "linalg_vecdot", "cdist", "mv", "addmv", "addmv_", "dot", "vdot", "inner", "kron", "baddbmm", "baddbmm_", "addbmm",
    "addbmm_", "addmm_", "sparse_mm", "smm", "hspmm", "sspaddmm", "conv_tbc", "convolution", "grouped_mm",
    "_grouped_mm", "scaled_mm", "_scaled_mm", "scaled_grouped_mm", "_scaled_grouped_mm", "flex_attention",
    "autograd_function_apply", "cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph",
))  # fmt: skip
"""Operations that multiply matrices and stay in high bits, by name of the function."""
_CONVOLUTIONS = {
    f"conv{transposed}{dimensions}d": (dimensions, bool(transposed))
    for dimensions in (1, 2, 3)
    for transposed in ("", "_transpose")
}
_PRODUCTS = frozenset(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"))


class Product(NamedTuple):
    """A call that can be in few bits.

    Attributes:
        kind: Of the operation, see :func:`kind_of`.
        arguments: Likewise.
        x: Input.
        weight: What it is multiplied by.
        bias: What is added.
        base: Of the names of operations whose tensors are no parameters.
        finish: What is to be done with the result; None: nothing.
    """

    kind: str
    arguments: tuple[int, ...]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    base: str
    finish: Callable[[Tensor], Tensor] | None = None


@cache
def kind_of(kind: str, arguments: tuple[int, ...]) -> Kind:
    """The operation of this kind, with these arguments.

    Args:
        kind: ``"linear"``, ``"matmul"`` or ``"convolution"``.
        arguments: Of a convolution: stride, padding, dilation and output padding of each dimension, one after another,
            whether it is transposed, and groups.
    """
    if kind != "convolution":
        return Linear() if kind == "linear" else MatMul()
    *sizes, transposed, groups = arguments
    each = len(sizes) // 4
    stride, padding, dilation, output_padding = (list(sizes[i * each : (i + 1) * each]) for i in range(4))
    return Convolution((stride, padding, dilation, bool(transposed), output_padding, groups))


def name_of(function: Callable[..., Any]) -> str:
    """Of a function, a method, or an operation of ``torch.ops``, whatever its overload."""
    name: str = getattr(function, "__name__", "")
    # Dynamo sees no overloads, and since torch 2.14 cannot take names apart.
    return name if torch.compiler.is_dynamo_compiling() else name.partition(".")[0]


def product_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | str | None:
    """What a call is.

    Args:
        name: Of the function.
        args: Of the call.
        kwargs: Likewise.

    Returns:
        The product; or why a product of matrices stays in high bits; or None, as it is none.
    """
    if "out" in kwargs:
        return None  # torch has no gradients for these
    if name == "linear":
        x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
        if weight.dim() != 2:
            return "it is a product with a vector"
        if bias is not None and bias.shape != weight.shape[:1]:
            return "what is added is not a bias"
        return Product("linear", (), x, weight, bias, "linear")
    if name in _CONVOLUTIONS:
        return _convolution(name, args, kwargs)
    if name in _PRODUCTS:
        x, weight = _arguments(("input", "other" if name == "matmul" else "mat2"), args, kwargs)
        if name == "__rmatmul__":
            x, weight = weight, x
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return None
        if x.dim() < 2 or weight.dim() < 2:
            return "it is a product with a vector"
        return Product("matmul", (), x, weight, None, "matmul")
    if name == "addmm":
        bias, x, weight = _arguments(("input", "mat1", "mat2"), args, kwargs)
        if len(args) > 3 or "alpha" in kwargs or "beta" in kwargs:
            return "it has factors"
        if not isinstance(bias, Tensor) or bias.dim() != 1 or bias.shape[0] != weight.shape[-1]:
            return "what is added is not a bias"
        return Product("matmul", (), x, weight, bias, "matmul")
    if name == "einsum":
        return _einsum(args)
    return "it is one function, whose products are not seen" if name in NOT_COVERED else None


def unfit(product: Product, *, mixed: bool) -> str:
    """Why a product stays in high bits, by its tensors; empty: it need not.

    Args:
        product: It.
        mixed: Whether autocast is on around all of the step.
    """
    x, weight, bias = product.x, product.weight, product.bias
    tensors = (x, weight) if bias is None else (x, weight, bias)
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"{type(tensor).__name__} is not a plain tensor"
        if tensor.layout is not torch.strided:
            return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return f"its numbers are {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device != x.device:
            return "its tensors are on several devices"
    autocast = torch.is_autocast_enabled(x.device.type)
    if mixed and not autocast:
        return "autocast is off around it"  # who writes that wants the bits that its tensors have
    if not autocast and any(tensor.dtype != x.dtype for tensor in tensors):
        return "its tensors are of several types"  # torch says so
    if not any(tensor.requires_grad for tensor in tensors):
        return "nothing in it needs a gradient"
    return "it is within a transform of torch.func" if within_transform() else ""


def _convolution(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | str:
    dimensions, transposed = _CONVOLUTIONS[name]
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding")
    names += ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = dict(zip(names, _arguments(names, args, kwargs), strict=True))
    x, weight = given["input"], given["weight"]
    if not isinstance(x, Tensor) or x.dim() != dimensions + 2:
        return "its input has no dimension for the batch"
    stride, dilation = (sized(given[key] or 1, dimensions) for key in ("stride", "dilation"))
    padding = given["padding"] or 0
    if padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        widths = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(width % 2 for width in widths):
            return "its padding differs between both sides"
        padding = [width // 2 for width in widths]
    output_padding = sized(given.get("output_padding") or 0, dimensions)
    arguments = (
        *stride, *sized(padding, dimensions), *dilation, *output_padding, int(transposed), given["groups"] or 1,
    )  # fmt: skip
    return Product("convolution", arguments, x, weight, given["bias"], "convolution")


def _einsum(args: tuple[Any, ...]) -> Product | str:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    plan = _as_matrices(equation, *operands) if isinstance(equation, str) and len(operands) == 2 else None
    if plan is None:
        return "it is not a product of two matrices, or of batches of them"
    x, weight, finish = plan
    return Product("matmul", (), x, weight, None, "einsum", finish)


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
        return math.prod([sizes[letter] for letter in group])

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
