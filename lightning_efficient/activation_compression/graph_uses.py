"""What a tensor that passes from a forward graph to a backward graph is made of and used for, as the graphs show it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, fx

from lightning_efficient.activation_compression.operations import Kind, kind_of

__all__ = ["beyond_views", "in_log_space", "is_mask", "is_statistic", "kind_of_users", "of_input", "operation"]

_STATISTICS = 8  # times smaller than what they are the mean, scale or normalizer of
_REDUCTIONS = frozenset(("mean", "sum", "var", "amax", "amin", "logsumexp", "var_mean", "std"))
_CASTS = frozenset((
    "_to_copy", "convert_element_type", "t", "transpose", "permute", "view", "reshape", "_unsafe_view", "detach",
    "alias", "clone", "expand", "squeeze", "unsqueeze",
))  # fmt: skip
_SUMS = frozenset(("add", "sub", "where", "masked_fill"))
"""What minus infinity goes through on its way to an ``exp``, which makes it zero."""

_SENSITIVITY: tuple[Kind, ...] = ("loss", "attention", "activation", "normalization", "dropout", "pooling", "linear")


def beyond_views(users: Iterable[fx.Node]) -> list[fx.Node]:
    """They, and in place of views and casts what uses those."""
    return _beyond(users, _CASTS)


def _beyond(users: Iterable[fx.Node], through: Collection[str]) -> list[fx.Node]:
    found: dict[fx.Node, bool] = {}
    waiting = list(users)
    while waiting:
        user = waiting.pop()
        if user not in found:
            found[user] = _target(user) not in through
            waiting += [] if found[user] else user.users
    return [user for user, is_last in found.items() if is_last]


def kind_of_users(users: Iterable[str]) -> Kind:
    """The most sensitive of these operations."""
    kinds = {_kind_of_aten(name) for name in users}
    return next((kind for kind in _SENSITIVITY if kind in kinds), "other")


def _kind_of_aten(name: str) -> Kind:
    name = name.removesuffix("_data").removesuffix("_backward").removeprefix("_").removeprefix("native_")
    if name in ("mm", "addmm", "convolution"):
        return "linear"
    if "scaled_dot_product" in name or name == "safe_softmax":
        return "attention"
    if "loss" in name:
        return "loss"
    return "normalization" if "norm" in name else kind_of(name)


def in_log_space(users: Iterable[fx.Node]) -> bool:
    """Whether ``users`` let minus infinity stand for what cannot be: it does no harm, but to its neighbours' scale."""
    return any(_target(user) == "exp" for user in _beyond(users, _CASTS | _SUMS))


def is_mask(node: fx.Node, users: Iterable[fx.Node]) -> bool:
    """Whether one of ``users`` takes ``node`` for the mask, or the bias, of attention."""
    for user in users:
        schema = getattr(user.target, "_schema", None)
        if "scaled_dot_product" not in _target(user) or schema is None:
            continue
        places = [place for place, one in enumerate(schema.arguments) if one.name in ("attn_mask", "attn_bias")]
        masks = [user.args[place] for place in places if place < len(user.args)]
        masks += [user.kwargs.get("attn_mask"), user.kwargs.get("attn_bias")]
        if any(isinstance(mask, fx.Node) and _before_casts(mask).name == node.name for mask in masks):
            return True
    return False


def operation(node: fx.Node) -> str:
    """The name of the operation that the user called, of which ``node`` is a part."""
    target = node.meta.get("original_aten") or node.target
    return str(getattr(target, "__name__", target)).partition(".")[0]


def of_input(node: fx.Node) -> bool:
    """Whether it is a copy of an input of the graph, as autocast makes them of weights."""
    return _before_casts(node).op == "placeholder"


def is_statistic(node: fx.Node) -> bool:
    """Whether it is made, by elementwise operations, of what an operation found out about many more numbers."""
    numel = node.meta["val"].numel()
    for _ in range(8):
        source = node.args[0] if node.args else None
        if _target(node) == "getitem" and isinstance(source, fx.Node):
            if node.args[1] == 0 and _target(source) not in _REDUCTIONS:
                return False
            return _largest(source) >= _STATISTICS * numel
        if _target(node) in _REDUCTIONS:
            return _largest(node) >= _STATISTICS * numel
        same = [one for one in node.all_input_nodes if _numel(one) == numel]
        if len(same) != 1:
            return False
        node = same[0]
    return False


def _target(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _before_casts(node: fx.Node) -> fx.Node:
    """What ``node`` is a view or a cast of."""
    while node.op != "placeholder" and _target(node) in _CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _largest(node: fx.Node) -> int:
    return max((_numel(one) for one in node.all_input_nodes), default=0)


def _numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0
