"""Which operation saves a tensor: what it may lose depends on what its gradient is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.core.torch_internals import saves_for_checkpointing

__all__ = ["FLOORS", "CurrentOperation", "Kind", "kind_of"]

Kind = Literal[
    "linear", "normalization", "activation", "attention", "loss", "dropout", "pooling", "other", "block", "checkpoint"
]

FLOORS: Mapping[Kind, int] = {
    "linear": 1,
    "normalization": 2,
    "activation": 4,
    "attention": 4,
    "dropout": 4,
    "pooling": 4,
    "other": 4,
    "loss": 8,
    "block": 8,
    "checkpoint": 8,
}
"""Fewest bits for what an operation saves.

An error in the input of a linear operation enters only the gradient of its weight, and on average not even that. In
the other operations it enters the gradient of their input, and so all layers before, with a bias where they are not
linear; in normalizations least, whose statistics are exact. The input of a block that is made again, by us or by the
user's activation checkpointing, enters all that it saves.
"""

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "linear": (
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    ),
    "normalization": ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "native_layer_norm"),
    "activation": (
        "relu", "relu_", "relu6", "gelu", "silu", "elu", "selu", "leaky_relu", "mish", "softplus", "sigmoid", "tanh",
        "hardswish", "hardtanh", "hardsigmoid", "logsigmoid", "prelu", "celu", "glu", "threshold",
    ),
    "attention": ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax"),
    "loss": (
        "cross_entropy", "nll_loss", "log_softmax", "binary_cross_entropy", "binary_cross_entropy_with_logits",
        "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "ctc_loss", "gaussian_nll_loss", "logsumexp",
    ),
    "dropout": ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    "pooling": (
        "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    ),
}  # fmt: skip
_KINDS: Mapping[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names} | {"checkpoint": "block"}


_NEEDS_FINITE = frozenset((
    *_NAMES["linear"], *_NAMES["normalization"], "gelu", "silu", "mish", "sigmoid", "tanh", "softmax", "dropout",
    "scaled_dot_product_attention",
))  # fmt: skip


_PRODUCTS = frozenset(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "baddbmm", "addmm"))
"""Linear if one factor is a parameter."""
_SUMMED = frozenset(("baddbmm", "addmm"))
"""Their first argument is added to the product of the others."""

_FACTORIZATIONS = (
    "cholesky", "det", "eig", "householder_product", "inv", "ldl", "logdet", "lstsq", "lu", "matrix_exp",
    "matrix_power", "orgqr", "ormqr", "pinv", "qr", "slogdet", "solve", "svd", "tensorinv", "tensorsolve",
    "triangular_solve",
)  # fmt: skip
"""How the names of those begin whose gradients invert what was saved, or divide by differences: no error is small."""
_ROOTS = frozenset(("sqrt", "rsqrt", "reciprocal"))
"""What makes normalizers, and saves nothing but its result."""
_COPIES = (
    "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0", "UnsafeViewBackward0", "ToCopyBackward0",
)  # fmt: skip
_OF_WEIGHTS = frozenset((
    *_COPIES, "MmBackward0", "BmmBackward0", "AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0",
    "CloneBackward0", "SqueezeBackward1", "torch::autograd::AccumulateGrad",
))  # fmt: skip
_ELEMENTWISE = frozenset(("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0"))
"""Their other operand may be a number."""
_SHORT = 16  # operations that make a weight of parameters


def _is_made_of_parameters(tensor: Tensor) -> bool:
    waiting = [tensor.grad_fn]
    for _ in range(_SHORT):
        if not waiting:
            return True
        node = waiting.pop()
        if node is None or node.name() not in _OF_WEIGHTS:
            return False
        if not isinstance(getattr(node, "variable", None), nn.Parameter | None):
            return False
        others = [other for other, _ in node.next_functions]
        waiting += [other for other in others if other is not None] if node.name() in _ELEMENTWISE else others
    return False


def kind_of(name: str) -> Kind:
    """Of the operation with this name."""
    return _KINDS.get(name, "other")


class CurrentOperation(TorchFunctionMode):
    """Knows which operation is being called from Python, within its context.

    Args:
        instead: Called with the name and the arguments of each operation; what it returns, if not None, is the result.
        after: Called with the name, the arguments and the result of each operation.

    Attributes:
        name: Of the operation, or empty.
        largest: Numbers in the largest tensor that it has saved so far.
    """

    def __init__(
        self,
        instead: Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any],
        after: Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None],
    ) -> None:
        super().__init__()
        self._instead = instead
        self.name = ""
        self.largest = 0
        self._arguments: tuple[Any, ...] = ()
        self._keywords: Mapping[str, Any] = {}
        self._after = after

    @property
    def kind(self) -> Kind:
        """Of the operation."""
        if self.name in _PRODUCTS:
            factors = self._arguments[1:] if self.name in _SUMMED else self._arguments
            return "linear" if any(isinstance(factor, nn.Parameter) for factor in factors) else "other"
        if not self.name and saves_for_checkpointing():
            return "checkpoint"
        return kind_of(self.name)

    @contextlib.contextmanager
    def called(self, name: str) -> Iterator[None]:
        """Within it, what is no operation by itself counts as the operation ``name``."""
        before = self.name, self.largest, self._arguments, self._keywords
        self.name, self.largest, self._arguments, self._keywords = name, 0, (), {}
        try:
            yield
        finally:
            self.name, self.largest, self._arguments, self._keywords = before

    @property
    def is_factorization(self) -> bool:
        """Whether it takes a matrix apart, inverts it, or the like."""
        return self.name.removeprefix("linalg_").startswith(_FACTORIZATIONS)

    def is_statistic(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is one number for many, as in norms that are written out: mean, scale, normalizer."""
        shape = tensor.shape
        return bool(shape) and (shape[-1] == 1 or (self.name in _ROOTS and 1 in shape[1:]))

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a linear operation saves ``tensor`` as its weight; an error in that enters all layers before.

        In products it may be either factor: the one that is made of parameters and nothing else.
        """
        if self.name in _PRODUCTS:
            return tensor.dim() == 2 and _is_made_of_parameters(tensor)
        if self.kind != "linear":
            return False
        x, weight = (
            self._arguments[place] if len(self._arguments) > place else self._keywords.get(name)
            for place, name in enumerate(("input", "weight"))
        )
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return False
        storage = tensor.untyped_storage()._cdata
        if storage == x.untyped_storage()._cdata:
            return False
        if storage == weight.untyped_storage()._cdata:
            return True
        if x.requires_grad != weight.requires_grad:  # a copy, made by autocast
            return tensor.requires_grad == weight.requires_grad
        node = tensor.grad_fn
        while node is not None and node is not weight.grad_fn and node.name() in _COPIES:
            node = node.next_functions[0][0]
        return node is not None and (node is weight.grad_fn or getattr(node, "variable", None) is weight)

    @property
    def needs_finite(self) -> bool:
        """Whether something infinite or NaN among what it saves makes the step's result so in any case.

        Not so in losses and in log space, where minus infinity stands for what cannot be; nor in elementwise products,
        of which ``where`` may take away what is not finite.
        """
        if self.name == "scaled_dot_product_attention" and any(
            isinstance(mask, Tensor) and mask.requires_grad
            for mask in (*self._arguments[3:4], self._keywords.get("attn_mask"))
        ):
            return False
        return self.name in _NEEDS_FINITE or self.name in _PRODUCTS

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.name, self.largest, self._arguments, self._keywords
        kwargs = kwargs or {}
        self.name, self.largest, self._arguments, self._keywords = getattr(func, "__name__", ""), 0, args, kwargs
        try:
            result = self._instead(self.name, args, kwargs)
            if result is None:
                result = func(*args, **kwargs)
            self._after(self.name, args, kwargs, result)
            return result
        finally:
            self.name, self.largest, self._arguments, self._keywords = before
