"""Compression inside modules that ``torch.compile`` has taken.

Such a module is one forward graph and one backward graph. Ordinary saved-tensor hooks see what passes from one to the
other: all of it after the whole forward, all of it before the whole backward, so that the peak hardly falls. Hooks that
are ``GraphModule`` objects become part of both graphs instead: what passes is the codes, and encoding and decoding are
next to the operations. While torch puts them there, it shows the hooks the graphs, and these say what each tensor is
used for.

Whatever is not compiled in the end (between graph breaks, or by a backend that takes no gradients) gives the same hooks
real tensors; those go the ordinary way (:class:`SavedTensors`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.graph_codec import (
    CODES,
    LOGARITHMS,
    RAW,
    RECTIFIED,
    SIGNS,
    VERSION,
    decode,
    encode,
    group_of,
)
from lightning_efficient.activation_compression.graph_uses import (
    beyond_views,
    in_log_space,
    is_mask,
    is_statistic,
    kind_of_users,
    of_input,
    operation,
)
from lightning_efficient.activation_compression.layers import is_in
from lightning_efficient.activation_compression.operations import Kind
from lightning_efficient.activation_compression.store import SavedTensors
from lightning_efficient.core.torch_internals import (
    GraphsOfSaved,
    compiled_entry,
    graphs_of_saved,
    innermost_pack_hook,
    likely_size,
    without_mode,
)

__all__ = ["CompiledModules", "Traced", "graph_hooks", "stored_bits"]

_LOSSY = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1024  # numbers that are not worth the work

Overrides = tuple[tuple[str, int], ...]


# -- which tensor gets what --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A tensor that passes from a forward graph to a backward graph.

    Attributes:
        layer: The module that made it, below the compiled one.
        kind: What it is used for.
        way: How it is kept, for a person.
        nbytes: It takes.
        kept_nbytes: Is kept instead.
    """

    layer: str
    kind: Kind
    way: str
    nbytes: int
    kept_nbytes: int


def stored_bits(bits: float) -> int:
    """What a code of so many bits takes inside compiled modules: 4 or 8; :data:`EXACT` stays that."""
    return 4 if bits <= 4 else 8 if bits <= 8 else EXACT


@dataclass(frozen=True)
class _Plan:
    way: int
    bits: int
    kind: Kind
    layer: str


def _plan(tensor: Tensor, graphs: GraphsOfSaved, bits: int, overrides: Overrides) -> _Plan:
    """How to keep ``tensor``, made by a node of the forward graph, for those that use it in the backward graph."""
    nodes = beyond_views(graphs.users())
    users = [operation(node) for node in nodes]
    kind, logarithms = kind_of_users(users), in_log_space(nodes)
    if kind == "other" and logarithms:
        kind = "loss"
    layer = graphs.layer()
    if kind == "loss":
        bits = max(bits, 8)
    for name, value in overrides:
        if is_in(layer, name):
            bits = value
            break
    way = RAW
    rectified = "threshold_backward" in users
    if tensor.dtype == torch.bool or (rectified and set(users) == {"threshold_backward"}):
        way = SIGNS
    elif tensor.dtype in _LOSSY and bits < EXACT and not is_statistic(graphs.node):
        way = RECTIFIED if rectified else LOGARITHMS if kind == "loss" or logarithms else CODES
    if tensor.numel() < _SMALL or of_input(graphs.node) or 0 in tensor.stride() or is_mask(graphs.node, nodes):
        way = RAW
    return _Plan(way, bits, kind, layer)


# -- hooks -------------------------------------------------------------------------------------------------------------


@dataclass
class _Outside:
    """Where the hooks are called from.

    Attributes:
        saved: Keeps tensors that are not in a graph.
        traced: What the graphs that are being compiled pass, by graph and node.
    """

    saved: SavedTensors
    traced: dict[tuple[int, str], Traced] = field(default_factory=dict)


_outside: ContextVar[_Outside | None] = ContextVar("activations outside of graphs", default=None)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _pack(x: Tensor, bits: int, group_size: int, overrides: Overrides) -> Any:
    graphs, outside = graphs_of_saved(), _outside.get()
    if graphs is None:
        return (outside.saved, outside.saved.pack(x)) if outside is not None else x.detach()
    _settle_last(graphs)
    plan = _plan(x, graphs, bits, overrides)
    group = group_of(x.numel(), group_size)
    if plan.way == RAW or not group:
        packed: Any = x
    else:
        packed = encode(x, plan.way, plan.bits, group)
        _unsettled.append((graphs, *graphs.names()))
    if outside is not None:
        outside.traced[id(graphs.node.graph), graphs.node.name] = _trace(x, packed, plan)
    return packed


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _unpack(packed: Any) -> Tensor:
    graphs = graphs_of_saved()
    if isinstance(packed, Tensor):
        return packed
    if graphs is None:
        saved, handle = packed
        return saved.unpack(handle)
    return decode(packed, graphs.node.meta["val"])


_unsettled: list[tuple[GraphsOfSaved, frozenset[str], frozenset[str]]] = []


def _settle_last(graphs: GraphsOfSaved) -> None:
    """Move what was put in for the tensor before this one to where it belongs.

    Torch puts all encoding at the end of the forward graph and all decoding at the beginning of the backward graph, and
    compilers more or less keep the order: all tensors would be in memory as they were.
    """
    while _unsettled:
        before, forward_names, backward_names = _unsettled.pop()
        if before.backward is graphs.backward and before.node is not graphs.node:
            before.encode_early(forward_names)
            before.decode_late(backward_names)


def _trace(x: Tensor, packed: Any, plan: _Plan) -> Traced:
    nbytes = likely_size(x.numel()) * x.element_size()
    if isinstance(packed, Tensor):
        return Traced(plan.layer, plan.kind, "raw", nbytes, nbytes)
    kept = sum(likely_size(part.numel()) * part.element_size() for part in packed if isinstance(part, Tensor))
    way = "1 bit, exact" if plan.way == SIGNS else f"{plan.bits} bits"
    return Traced(plan.layer, plan.kind, way, nbytes, kept)


@cache
def graph_hooks(bits: int, group_size: int = 128, overrides: Overrides = ()) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Hooks for ``torch.autograd.graph.saved_tensors_hooks``, to be pushed around the call of a compiled module.

    The same objects for the same arguments: others would have everything compiled anew.

    Args:
        bits: 4, 8 or :data:`EXACT`; losses get 8 at least.
        group_size: Neighbours that share a scale.
        overrides: Bits by the name of a module in the compiled one, for all in it; the first that fits counts.
    """
    digest = hashlib.sha256(repr((VERSION, bits, group_size, overrides)).encode()).hexdigest()
    return _hook(_pack, digest, bits, group_size, overrides), _hook(_unpack, digest)


def _hook(function: Callable[..., Any], digest: str, *constants: Any) -> fx.GraphModule:
    graph = fx.Graph()
    call = graph.call_function(function, (graph.placeholder("x"), *constants))
    call.meta.update(is_wrapped=True, user_cache_hash=f"{function.__name__} {digest}")
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph)


class CompiledModules:
    """Has what compiled modules save compressed inside them.

    Args:
        classifier: Knows the rates, and takes what is not in a graph.
        group_size: Neighbours that share a scale.
    """

    def __init__(self, classifier: Classifier, group_size: int = 128) -> None:
        self._classifier = classifier
        self._group_size = group_size
        self._tables: dict[tuple[str, int], Overrides] = {}
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._traced: dict[tuple[Any, ...], list[Traced]] = {}

    @contextlib.contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within it, the calls of these compiled modules compress where the classifier's hooks are the innermost."""
        self._tables.clear()
        self._shapes.clear()
        with contextlib.ExitStack() as undo:
            for name, module in modules.items():
                entry = compiled_entry(module)
                if entry is not None:
                    own = getattr(module, entry)
                    module.__dict__[entry] = partial(self._call, name, module, own)
                    undo.callback(module.__dict__.__setitem__, entry, own)
            yield

    def _call(self, name: str, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        classifier = self._classifier
        ours = innermost_pack_hook() == classifier.saved.pack  # else validation, or activation checkpointing
        with without_mode(classifier.operation), self.inside(name, module) if ours else contextlib.nullcontext():
            return own(*args, **kwargs)

    @contextlib.contextmanager
    def inside(self, name: str, module: nn.Module) -> Iterator[None]:
        """Around a call of a compiled module of this name."""
        classifier = self._classifier
        saved = classifier.saved
        if classifier.rates.bound(("linear", name)) is not None:  # no graph knows how many bits that takes
            hooks = torch.compiler.disable(saved.pack), torch.compiler.disable(saved.unpack)
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                yield
            return
        bits = stored_bits(classifier.rates.of("linear", name)[0])
        overrides = self._overrides(name, module, bits)
        outside = _Outside(saved)
        token = _outside.set(outside)
        classifier.layers.append(name)
        try:
            with torch.autograd.graph.saved_tensors_hooks(*graph_hooks(bits, self._group_size, overrides)):
                yield
        finally:
            classifier.layers.pop()
            _outside.reset(token)
            _unsettled.clear()
        if name not in self._shapes:
            own = getattr(module, "_orig_mod", module)
            self._shapes[name] = type(own), *(tuple(parameter.shape) for parameter in own.parameters())
        own_key = name, *self._shapes[name], bits, overrides
        key = own_key[1:]  # its graphs may serve others like it
        if outside.traced:
            self._traced[key] = self._traced[own_key] = list(outside.traced.values())
        traced = self._traced.get(own_key) or self._traced.get(key, [])
        for one in traced if torch.is_grad_enabled() else []:
            layer = ".".join(part for part in (name, one.layer) if part)
            classifier.ledger.passed(layer, one.kind, f"{one.way}, compiled", one.nbytes, one.kept_nbytes)

    def _overrides(self, name: str, module: nn.Module, bits: int) -> Overrides:
        """Bits of the modules inside that have others than the one that they are in; innermost first."""
        if (name, bits) not in self._tables:
            inner, prefix = module, name
            if "_orig_mod" in module._modules:
                inner, prefix = module.get_submodule("_orig_mod"), f"{name}._orig_mod"
            found = {"": bits}
            different: list[tuple[str, int]] = []
            for path, _ in inner.named_modules():
                if path:
                    level, _ = self._classifier.rates.of("linear", f"{prefix}.{path}".lstrip("."))
                    found[path] = stored_bits(level)
                    if found[path] != found[path.rpartition(".")[0]]:
                        different.append((path, found[path]))
            self._tables[name, bits] = tuple(reversed(different))
        return self._tables[name, bits]
