"""Private symbols of torch that the cores use, in one place; ``tests/core/test_torch_internals.py`` holds them.

(Those of Lightning are in ``compat.py``, which the cores do not import.)
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.storage import TypedStorage, UntypedStorage
from torch.utils.hooks import RemovableHandle

__all__ = [
    "BatchNorm",
    "GraphsOfSaved",
    "WeakStorage",
    "backward_within_modes",
    "bytes_of",
    "compiled_entry",
    "computes_nothing",
    "counting",
    "first_step_post_hook",
    "forward_is_compiled",
    "gathered",
    "global_step_hooks",
    "grad_within_modes",
    "graph_hooks_are_shown_graphs",
    "graphs_of_saved",
    "has_compatible_type",
    "in_backward",
    "innermost_pack_hook",
    "innermost_saved_tensors_hooks",
    "is_of_checkpointing",
    "is_spread",
    "likely_size",
    "local_part",
    "not_compiling",
    "rebuild_tensor",
    "saves_for_checkpointing",
    "shares_version",
    "spread_of",
    "spread_over_ranks",
    "storage_key",
    "storage_use_count",
    "tensor_version",
    "typed_storage_parts",
    "unhooked_step",
    "within_transform",
    "without_mode",
    "without_torch_function",
    "written_out_attention",
]

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base of all modules that normalize by the statistics of their batch, those of other libraries included."""

rebuild_tensor = torch._utils._rebuild_tensor_v2
"""What ``torch.load`` calls to make a tensor of a storage."""


def storage_key(storage: UntypedStorage) -> tuple[int, int]:
    """The same for two storages exactly if they are the same memory."""
    # Storages without memory have no address; those may begin at another's, so the size counts too.
    return storage.data_ptr() or storage._cdata, storage.nbytes()


def storage_use_count(storage: UntypedStorage) -> int:
    """How many tensors, and other things outside of Python, hold a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))


has_compatible_type = torch._has_compatible_shallow_copy_type
"""What modules ask to know whether a converted parameter can take the place of another; it looks at no numbers."""

without_torch_function = torch._C.DisableTorchFunction
"""Within it no mode hears of the operations that are called."""


def innermost_pack_hook() -> Any:
    """The hook that an operation called now would give its saved tensors to, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks[0] if hooks is not None else None


def innermost_saved_tensors_hooks() -> tuple[Any, Any] | None:
    """Those that an operation called now would give its saved tensors to, and backward would get them from."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def is_of_checkpointing(pack: Any) -> bool:
    """Whether a hook that packs saved tensors is that of ``torch.utils.checkpoint``, in forward or in backward."""
    return getattr(pack, "__module__", None) == "torch.utils.checkpoint"


_TORCH = Path(torch.__file__).parent
_TRANSPARENT = tuple(map(str, (Path(__file__).parents[1], _TORCH / "autograd" / "function.py", _TORCH / "_dynamo")))
"""Where the frames between a hook and who calls the operation are from."""


def saves_for_checkpointing() -> bool:
    """Whether ``torch.utils.checkpoint`` saves the input of a function, to call it again in backward.

    To be asked by a hook that packs saved tensors: no operation is called then, so nothing else tells.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_TRANSPARENT):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == torch.utils.checkpoint.__file__


def saved_tensors_hooks_are_allowed() -> bool:
    """False within ``torch.func`` transforms and the like, which refuse them."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Within it ``mode`` is not active, and all others are."""
    above: list[Any] = []
    stack = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    if mode not in stack:
        yield
        return
    while (top := torch._C._pop_torch_function_stack()) is not mode:
        above.append(top)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)
    try:
        yield
    finally:
        for _ in above:
            torch._C._pop_torch_function_stack()
        for other in (mode, *reversed(above)):
            torch._C._push_on_torch_function_stack(other)


def compiled_entry(module: nn.Module) -> str | None:
    """The attribute that holds the compiled call of ``module``; None if it is not compiled."""
    from torch._dynamo import OptimizedModule

    if isinstance(module, OptimizedModule):
        return "forward"
    return "_compiled_call_impl" if module._compiled_call_impl is not None else None


def forward_is_compiled(module: nn.Module) -> bool:
    """Whether ``module.forward`` was replaced by what ``torch.compile`` made of it, whatever is around that."""
    entry = vars(module).get("forward")
    while entry is not None:
        if hasattr(entry, "_torchdynamo_orig_callable"):
            return True
        entry = getattr(entry, "__wrapped__", None)
    return False


@contextlib.contextmanager
def not_compiling() -> Iterator[None]:
    """Within it operations are done as ever, also where a compiler looks at a tensor, and optimizers round as ever."""
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@dataclass(frozen=True)
class GraphsOfSaved:
    """A tensor that a compiler is about to pass from a forward graph to a backward graph.

    Attributes:
        node: Of the forward graph, that makes it.
        backward: The backward graph.
    """

    node: fx.Node
    backward: fx.Graph

    def users(self) -> list[fx.Node]:
        """What it is used for in the backward graph."""
        inputs = self.backward.find_nodes(op="placeholder")
        return [user for one in inputs if one.name == self.node.name for user in one.users]

    def names(self) -> tuple[frozenset[str], frozenset[str]]:
        """Of the nodes that there are in the forward and in the backward graph."""
        return _names(self.node.graph), _names(self.backward)

    def encode_early(self, known: frozenset[str]) -> None:
        """Put what was added to the end of the forward graph, in which there were the ``known``, behind the node."""
        place = self.node
        for one in _added(self.node.graph, known):
            place.append(one)
            place = one

    def decode_late(self, known: frozenset[str]) -> None:
        """Put what was added to the beginning of the backward graph before the first that uses it."""
        added = _added(self.backward, known)
        users = [user for one in added for user in one.users if user not in added]
        for one in added if users else []:
            min(users).prepend(one)

    def layer(self) -> str:
        """Name of the module, below the compiled one, in which it was made."""
        meta = self.node.meta
        stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
        names = [str(name) for name, _ in stack.values()]  # "L['self'].blocks.0"
        return names[-1].partition("].")[2] if names else ""


def _names(graph: fx.Graph) -> frozenset[str]:
    return frozenset(one.name for one in graph.nodes)


def _added(graph: fx.Graph, known: frozenset[str]) -> list[fx.Node]:
    return [one for one in graph.nodes if one.op == "call_function" and one.name not in known]


def graph_hooks_are_shown_graphs() -> bool:
    """Whether :func:`graphs_of_saved` works."""
    from torch._functorch._aot_autograd import graph_compile, utils

    return all((
        hasattr(graph_compile, "_get_saved_tensor_hook_context"),
        hasattr(graph_compile, "maybe_inline_graph_saved_tensors_hooks"),
        hasattr(utils, "saved_tensors_hooks_are_inlineable"),
    ))  # fmt: skip


def graphs_of_saved() -> GraphsOfSaved | None:
    """What the tensor that a hook is called with is, if the hook is being put into compiled graphs; else None."""
    from torch._functorch._aot_autograd.graph_compile import _get_saved_tensor_hook_context

    shown = _get_saved_tensor_hook_context()
    return GraphsOfSaved(shown["_node"], shown["_bw_graph"]) if shown is not None else None


def likely_size(size: int | torch.SymInt) -> int:
    """A size; the one met first, where a graph is for many."""
    return size if isinstance(size, int) else int(size.node.hint)


class WeakStorage:
    """Does not keep a storage alive; as long as it lives, no other storage has its ``_cdata``."""

    __slots__ = ("_reference",)

    def __init__(self, storage: UntypedStorage) -> None:
        self._reference = storage._weak_ref()

    def get(self) -> UntypedStorage | None:
        """The storage, or None if it is gone."""
        return UntypedStorage._new_with_weak_ptr(self._reference)

    def __del__(self, free: Any = UntypedStorage._free_weak_ref) -> None:
        free(self._reference)


def bytes_of(storage: UntypedStorage) -> Tensor:
    """The bytes of a storage as a tensor ``[nbytes]`` that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def typed_storage_parts(storage: TypedStorage) -> tuple[UntypedStorage, torch.dtype, Any, int]:
    """Of the kind of storage that tensors are pickled with: memory, type, legacy class, number of elements."""
    kind = getattr(torch, storage._pickle_storage_type())
    return storage._untyped_storage, storage.dtype, kind, storage._size()


def global_step_hooks() -> tuple[list[Any], list[Any]]:
    """The hooks before and behind the steps of all optimizers, in the order in which they are called."""
    from torch.optim import optimizer

    return list(optimizer._global_optimizer_pre_hooks.values()), list(optimizer._global_optimizer_post_hooks.values())


def first_step_post_hook(optimizer: Optimizer, hook: Any) -> RemovableHandle:
    """Let ``hook`` be called behind the steps of ``optimizer``, before those hooks that were there already."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict
    hooks.move_to_end(handle.id, last=False)
    return handle


def unhooked_step(optimizer: Optimizer) -> None:
    """Step without calling a hook of this optimizer, also where its step calls that of its base class.

    (There torch calls the hooks of all optimizers again.)
    """
    step: Any = type(optimizer).step
    hooks = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
    own = {name: vars(optimizer)[name] for name in hooks if name in vars(optimizer)}
    vars(optimizer).update({name: OrderedDict() for name in own})
    try:
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
    finally:
        vars(optimizer).update(own)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks, a DTensor: there is none before somebody imports what takes long to."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over ranks, who all must call this; of any other, itself."""
    whole: Any = tensor
    return whole.full_tensor() if is_spread(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that is spread over ranks, which may be nothing; of any other, itself."""
    part: Any = tensor
    return part._local_tensor if is_spread(tensor) else tensor


def spread_of(tensor: Tensor) -> Any:
    """How a tensor is spread over ranks: to be compared, and for :func:`spread_over_ranks`; None if it is not."""
    spread: Any = tensor
    return spread._spec if is_spread(tensor) else None


def spread_over_ranks(local: Tensor, how: Any) -> Tensor:
    """The tensor of which this rank has ``local``, wherever that is; nothing is communicated.

    Args:
        local: That part.
        how: See :func:`spread_of`.
    """
    if how is None:
        return local
    from torch.distributed.tensor import DTensor

    return DTensor(local, how, requires_grad=False)


def in_backward() -> bool:
    """Whether this thread is going through a graph backwards."""
    return bool(torch._C._current_graph_task_id() != -1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def within_transform() -> bool:
    """Whether a transform of ``torch.func`` is going on; a graph is made for one or the other."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def computes_nothing(tensor: Tensor) -> bool:
    """Whether it only stands for one, of which a compiler wants to know what becomes of it."""
    return isinstance(tensor, FakeTensor) or bool(getattr(tensor, "is_meta", False))


def tensor_version(tensor: Tensor) -> int:
    """Grows with each change in place; that of an inference tensor, which none can change, is -1."""
    return -1 if tensor.is_inference() else tensor._version


counting = threading.Lock()
"""Held while :func:`shares_version` has changed a count; who finds one changed looks again with it."""


def shares_version(tensor: Tensor, other: Tensor) -> bool:
    """Whether a change of one in place counts as a change of the other, so that they are the same memory's."""
    with counting:
        before, others = tensor._version, other._version
        torch.autograd.graph.increment_version(tensor)
        try:
            return bool(other._version != others)
        finally:
            torch._C._autograd._unsafe_set_version_counter((tensor,), (before,))


def _without_dispatch(function: Any) -> FunctionType:
    """A Python function of torch that does not hand its call to a mode, but calls the functions that it is made of."""
    names = function.__globals__ | {"has_torch_function": lambda arguments: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


written_out_attention: Callable[..., Any] = _without_dispatch(torch.nn.functional.multi_head_attention_forward)
"""``F.multi_head_attention_forward``, whose projections a mode sees."""
backward_within_modes: Callable[..., Any] = _without_dispatch(torch.autograd.backward)
grad_within_modes: Callable[..., Any] = _without_dispatch(torch.autograd.grad)
"""``torch.autograd``'s ``backward`` and ``grad``, within which a mode sees what checkpointing computes again."""
