"""Where in a network values became such that are not finite, for the message of an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_efficient.core.torch_internals import without_torch_function

__all__ = ["Blame"]


class Blame(TorchFunctionMode):
    """Within it a forward and a backward pass are watched; it takes long.

    An operation is to blame whose result is not finite though all its operands are, and whose result led to the loss:
    what a mask puts at minus infinity on purpose, and a softmax makes zeros of, is not.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._names = {id(part): name for name, part in module.named_modules()}
        self._within: list[str] = []
        self._made: dict[int, tuple[Tensor, str, list[Tensor]]] = {}  # not finite: by what, of which such operands
        self._last: Tensor | None = None
        self._over = False  # the forward pass
        self._nodes: dict[Any, str] = {}
        self._at: dict[Any, Tensor] = {}
        self._backward = ""
        self._handles: list[Any] = []

    def __enter__(self) -> Blame:
        def enter(part: nn.Module, args: Any) -> None:
            self._within.append(self._names.get(id(part), type(part).__name__))

        def leave(part: nn.Module, args: Any, result: Any) -> None:
            name = self._within.pop()
            if name and not self._over:  # an operation that no mode is shown
                self._note(result, f"{type(part).__name__} '{name}'", (args, list(part.parameters(recurse=False))))

        self._handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self._over:
            return result
        label = f"{name.strip('_')} in '{self._within[-1]}'" if self._within and self._within[-1] else name.strip("_")
        self._note(result, label, (args, kwargs))
        return result

    def _note(self, result: Any, label: str, operands: Any) -> None:
        for made in _floating(result):
            if made.grad_fn is not None:
                self._nodes.setdefault(made.grad_fn, label)
            if not _finite(made) and id(made) not in self._made:
                bad = [tensor for tensor in _floating(operands) if not _finite(tensor)]
                self._made[id(made)] = made, label, bad
                self._last = made
                if made.grad_fn is not None:
                    self._at[made.grad_fn] = made

    def watch_backward(self, loss: Tensor) -> None:
        """The forward pass is over, and this is what it gave."""
        self._over = True
        if not _finite(loss):
            self._last = loss if id(loss) in self._made else self._last
            return
        self._last = None
        todo, seen = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self._handles.append(node.register_hook(self._hook(node)))
            todo += [following for following, _ in node.next_functions]

    def _hook(self, node: Any) -> Callable[[Any, Any], None]:
        def look(inputs: Any, outputs: Any) -> None:
            bad = any(not _finite(gradient) for gradient in _floating(inputs))
            if bad and not self._backward and all(_finite(gradient) for gradient in _floating(outputs)):
                self._backward = self._nodes.get(node, node.name())

        return look

    def found(self) -> str:
        """In words, after both passes."""
        if self._last is None:
            if self._backward:
                return f"the gradient of {self._backward}"
            return "no operation that could be watched"
        tensor, path = self._last, set()
        while True:
            _, label, operands = self._made[id(tensor)]
            path.add(id(tensor))
            made = [one for one in map(self._noted, operands) if one is not None and id(one) not in path]
            if made:
                tensor = made[0]
            elif operands:
                return f"{self._name_of(operands[0])}, which {label} was given"
            else:
                return label

    def _noted(self, tensor: Tensor) -> Tensor | None:
        """It, or what it was made of by operations that were not seen."""
        if id(tensor) in self._made:
            return tensor
        todo, seen = [tensor.grad_fn], set()
        while todo:
            node = todo.pop(0)
            if node in self._at:
                return self._at[node]
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return None

    def _name_of(self, tensor: Tensor) -> str:
        if tensor.grad_fn is not None:
            return f"the result of {tensor.grad_fn.name()}"
        for name, one in (*self._module.named_parameters(), *self._module.named_buffers()):
            if one is tensor:
                return f"the values of '{name}'"
        return "a value that no operation of the step has made, as of the batch"


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    with torch.no_grad(), without_torch_function():
        return bool(tensor.detach().isfinite().all())
