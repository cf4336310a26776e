"""Products within what ``torch.compile`` has taken: operations that a graph holds, and that decide when they run.

A compiler sees two operations, ``lightning_efficient::low_product`` and its backward, and knows of each only the type
and the shape of what it gives. In them runs what runs without a compiler. So a graph is made once, whatever is decided;
it has no names either, so that one graph serves all layers of a kind. Which parameter a weight is, is told by its
memory.

What forward leaves for backward (see :class:`~lightning_efficient.precision.guarded_call.Call`) is kept beside the
graph, as long as the graph keeps a small tensor with its number.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.core.torch_internals import in_backward, without_torch_function
from lightning_efficient.precision.calls import Product, kind_of, product_of, unfit
from lightning_efficient.precision.device.call import DeviceCall
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import format_named
from lightning_efficient.precision.guarded_call import Call, call_of
from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.status import ReturnPolicy

__all__ = ["Nodes", "begin", "pending", "traced"]

# By functions that check less than torch.library.custom_op: those checks take as long as all of the rest.
_LIBRARY = torch.library.Library("lightning_efficient", "FRAGMENT")
_ARGUMENTS = "str kind, int[] arguments"
_FORWARD = (
    f"(Tensor x, Tensor weight, Tensor? bias, {_ARGUMENTS}, ScalarType result_type, str base, int parameters, int site)"
    " -> (Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor gradient, Tensor x, Tensor weight, Tensor token, {_ARGUMENTS}, bool bias, bool[] needed, int parameters)"
    " -> (Tensor, Tensor, Tensor)"
)
_WEIGHT, _INPUT = 1, 2  # which of the tensors are parameters
_METHODS = ("unflatten", "dim_order")  # a compiler traces them as functions, which it cannot, but not as methods
_CHECKPOINTED = "tag_activation_checkpoint"  # what a compiler makes of torch.utils.checkpoint


class Nodes(Protocol):
    """Who knows the nodes of the step that is going on."""

    engine: Engine

    def parameter(self, tensor: Tensor) -> tuple[Tensor, str]:
        """The parameter whose memory a tensor is, and its name; the tensor and an empty name if there is none."""
        ...

    def in_graph(self, name: str, base: str, site: int, *, again: bool) -> Node | None:
        """The node of a product, or None if it takes no part.

        Args:
            name: Of its parameter, or empty.
            base: Of the name that it has otherwise.
            site: Its place in the graph.
            again: Whether it is computed again in backward.
        """
        ...

    def skip(self, name: str, reason: str) -> None:
        """Count what is not covered."""
        ...


_active: weakref.ref[Nodes] | None = None
_calls: dict[int, tuple[weakref.ref[Tensor], Call | DeviceCall]] = {}
"""Those that wait for backward, by number, with what they live as long as."""
_call_numbers, _node_numbers, _sites = itertools.count(1), itertools.count(1), itertools.count(1)
_numbers: weakref.WeakKeyDictionary[Node, int] = weakref.WeakKeyDictionary()
_nodes: weakref.WeakValueDictionary[int, Node] = weakref.WeakValueDictionary()


def begin(nodes: Nodes) -> None:
    """A step begins."""
    global _active
    _active = weakref.ref(nodes)


def pending() -> int:
    """How many calls wait for their backward."""
    return len(_calls)


# While a graph is made


def traced(mode: Any, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A call of a function of torch in a graph that is being made; products become :func:`low_product`."""
    if name == _CHECKPOINTED:
        with mode:
            pass  # to enter it is noted as a change: outside of the part, for within it none may be
        return function(_within(mode, args[0]), *args[1:], **kwargs)
    found = product_of(name, args, kwargs)
    if isinstance(found, Product):
        reason = unfit(found, mixed=mode.mixed)
        if not reason:
            return _in_graph(found)
        _skipped(name, reason)
    elif found is not None:
        _skipped(name, found)
    if name in _METHODS:
        return getattr(args[0], name)(*args[1:], **kwargs)
    return function(*args, **kwargs)


def _within(mode: TorchFunctionMode, part: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return part(*args, **kwargs)

    return within


def _in_graph(found: Product) -> Tensor:
    x, weight = found.x, found.weight
    device = x.device.type
    result_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parameters = _WEIGHT * isinstance(weight, nn.Parameter) + _INPUT * isinstance(x, nn.Parameter)
    result, _ = low_product(
        x, weight, found.bias, found.kind, found.arguments, result_type, found.base, parameters, _site()
    )
    return found.finish(result) if found.finish is not None else result  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _site() -> int:
    """Another number for each place in a graph, so that no two calls are taken for one."""
    return next(_sites)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _skipped(name: str, reason: str) -> bool:
    """Counted once for a graph, not for each call of it."""
    nodes = _active() if _active is not None else None
    if nodes is not None:
        nodes.skip(name, reason)
    return True


# When it runs


def _low_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, arguments: Sequence[int], result_type: torch.dtype,
    base: str, parameters: int, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the token by which backward finds the call."""
    nodes = _active() if _active is not None else None
    with without_torch_function(), torch.autocast(x.device.type, enabled=False):
        node = None
        if nodes is not None and x.numel() and weight.numel():
            x, weight, name = _known(nodes, x, weight, parameters)
            node = nodes.in_graph(name, base, site, again=in_backward())
        if nodes is None or node is None:
            call: Call | DeviceCall = _plain(kind, tuple(arguments), result_type)
        else:
            call = call_of(nodes.engine, node, kind_of(kind, tuple(arguments)), x, weight)
        result = call.forward(x, weight, bias, result_type).contiguous()
        return result, _token(call, node)


def _low_product_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, arguments: Sequence[int], result_type: torch.dtype,
    base: str, parameters: int, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        result = kind_of(kind, tuple(arguments)).forward(x.to(result_type), weight.to(result_type), None)
    return x.new_empty(result.shape, dtype=result_type), torch.empty(2, dtype=torch.int64, device="cpu")


def _low_product_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, token: Tensor, kind: str, arguments: Sequence[int], bias: bool,
    needed: Sequence[bool], parameters: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of input, weight and bias; what is not needed is empty."""
    nodes = _active() if _active is not None else None
    with without_torch_function(), torch.autocast(x.device.type, enabled=False):
        if nodes is not None:
            x, weight, _ = _known(nodes, x, weight, parameters)
        call = _call(token, nodes, kind, tuple(arguments), x, weight, gradient.dtype)
        found = call.backward(x, weight, bias, gradient, (needed[0], needed[1], needed[2]))
        one, two, three = (part.contiguous() if part is not None else gradient.new_empty(0) for part in found)
        return one, two, three


def _low_product_backward_shape(
    gradient: Tensor, x: Tensor, weight: Tensor, token: Tensor, kind: str, arguments: Sequence[int], bias: bool,
    needed: Sequence[bool], parameters: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    nothing = gradient.new_empty(0)
    return (
        x.new_empty(x.shape) if needed[0] else nothing,
        weight.new_empty(weight.shape) if needed[1] else nothing.clone(),
        kind_of(kind, tuple(arguments)).grad_bias(gradient) if bias and needed[2] else nothing.clone(),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.kind, ctx.arguments, _, _, ctx.parameters, _ = inputs
    ctx.bias = bias.dtype if bias is not None else None
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, token = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    found = low_product_backward(
        gradient, x, weight, token, ctx.kind, ctx.arguments, ctx.bias is not None, list(needed), ctx.parameters
    )
    one, two, three = (part if some else None for part, some in zip(found, needed, strict=True))
    return one, two, three.to(ctx.bias) if three is not None else None, None, None, None, None, None, None


def _backward_of_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "Products in few bits are differentiable once, as is what torch.compile takes. Leave operations whose "
        "gradients have gradients out of both: RollbackPrecision(exclude=[...]), torch.compiler.disable."
    )


for _name, _schema, _function, _shape in (
    ("low_product", _FORWARD, _low_product, _low_product_shape),
    ("low_product_backward", _BACKWARD, _low_product_backward, _low_product_backward_shape),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{_name}", _shape, lib=_LIBRARY)
torch.library.register_autograd(f"{_LIBRARY.ns}::low_product", _backward, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(f"{_LIBRARY.ns}::low_product_backward", _backward_of_backward, lib=_LIBRARY)
low_product = torch.ops.lightning_efficient.low_product.default
low_product_backward = torch.ops.lightning_efficient.low_product_backward.default


def _known(nodes: Nodes, x: Tensor, weight: Tensor, parameters: int) -> tuple[Tensor, Tensor, str]:
    name = other = ""
    if parameters & _WEIGHT:
        weight, name = nodes.parameter(weight)
    if parameters & _INPUT:
        x, other = nodes.parameter(x)
    return x, weight, name or other


def _token(call: Call | DeviceCall, node: Node | None) -> Tensor:
    number = next(_call_numbers) if call.left is not None else 0
    token = torch.tensor((number, _number(node) if node is not None else 0))
    if number:
        _calls[number] = weakref.ref(token, lambda gone: _calls.pop(number, None)), call
    return token


def _number(node: Node) -> int:
    number = _numbers.get(node)
    if number is None:
        number = _numbers[node] = next(_node_numbers)
        _nodes[number] = node
    return number


def _call(
    token: Tensor, nodes: Nodes | None, kind: str, arguments: tuple[int, ...], x: Tensor, weight: Tensor,
    result_type: torch.dtype,
) -> Call | DeviceCall:  # fmt: skip
    """That of forward; or one of its node, if what forward left is gone, as where saved tensors are kept elsewhere."""
    number, of_node = token.tolist()
    if number in _calls:
        return _calls[number][1]
    node = _nodes.get(of_node)
    if node is None or nodes is None:
        return _plain(kind, arguments, result_type)
    return call_of(nodes.engine, node, kind_of(kind, arguments), x, weight)


@cache
def _plain(kind: str, arguments: tuple[int, ...], result_type: torch.dtype) -> Call:
    """One that is as without low bits."""
    engine = Engine(format_named("bf16"), result_type, stochastic=False, protect=False, seed=0)
    engine.force_high = True
    return Call(engine, Node("", kind, ReturnPolicy()), kind_of(kind, arguments))
