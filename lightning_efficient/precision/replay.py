"""What training changes, kept so that a step, or some, can be done again as if for the first time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_efficient.core.random_state import random_state, restore_random_state
from lightning_efficient.core.torch_internals import local_part, tensor_version
from lightning_efficient.core.watched_tensors import Slot, WatchedTensors, buffer_slots

__all__ = ["KeptStep", "Snapshot", "group_options", "set_group_options", "versions"]


class _Metrics:
    """The ``torchmetrics`` objects of a module, as they were.

    Args:
        module: All that it holds are kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._metrics = {path: part for path, part in module.named_modules() if isinstance(part, Metric)}
        self._states = WatchedTensors(
            Slot(f"{path}.{name}", metric, name) for path, metric in self._metrics.items() for name in metric._defaults
        )
        self._attributes: list[tuple[Metric, dict[str, Any]]] = []

    def keep(self) -> None:
        """A step begins."""
        self._states.keep()
        self._attributes = [
            (metric, {name: value for name, value in metric.__dict__.items() if name not in metric._defaults})
            for metric in self._metrics.values()
        ]

    def back(self) -> None:
        """As the step began."""
        for metric, attributes in self._attributes:
            metric.__dict__.update(attributes)
        self._states.back()

    def succeeded(self) -> None:
        """The step is done."""
        self._states.succeeded()


class KeptStep:
    """What one forward and backward pass change: random generators, buffers, metrics and gradients.

    Attributes of Python objects, and data loaders, are not among it.

    Args:
        module: Whose pass it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._buffers, self._metrics = WatchedTensors(buffer_slots(module)), _Metrics(module)
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self.random: dict[str, Any] = {}

    def keep(self, *, adds: bool) -> None:
        """A pass begins.

        Args:
            adds: Whether it adds to the gradients that are there; else it clears them.
        """
        self.random = random_state()
        self._buffers.keep()
        self._metrics.keep()
        if adds:
            self._gradients = [(parameter, self._copied(parameter)) for parameter in self._parameters]
        else:
            self._gradients = [(parameter, None) for parameter in self._parameters]

    def _copied(self, parameter: nn.Parameter) -> Tensor | None:
        gradient = parameter.grad
        if gradient is None:
            return None
        copy = self._copies.get(parameter)
        fits = copy is not None and (copy.shape, copy.dtype, copy.layout) == (
            gradient.shape, gradient.dtype, gradient.layout,
        )  # fmt: skip
        if copy is not None and fits and gradient.layout is torch.strided:
            copy.copy_(gradient.detach())
        else:
            copy = self._copies[parameter] = gradient.detach().clone()
        return copy

    def back(self) -> None:
        """As the pass began; gradients that it clears are not there."""
        restore_random_state(self.random)
        self._buffers.back()
        self._metrics.back()
        for parameter, copy in self._gradients:
            if copy is None:
                parameter.grad = None
            elif parameter.grad is None or copy.layout is not torch.strided:
                parameter.grad = copy.clone()
            else:
                with torch.no_grad():
                    parameter.grad.copy_(copy)

    def scale_gradients(self, factor: float) -> None:
        """Those that were there before, for a loss scaler with another factor; to be called before :meth:`back`."""
        for _, copy in self._gradients:
            if copy is not None:
                copy.mul_(factor)

    def keep_replayed(self, random: Mapping[str, Any], *, adds: bool) -> None:
        """Batches before it were done again: buffers and gradients are others now, and metrics are as they were."""
        self._metrics.back()
        restore_random_state(random)
        self.keep(adds=adds)

    def lost(self) -> list[str]:
        """Names of buffers that the pass has changed for the first time, so that they cannot be put back."""
        return self._buffers.lost()

    def succeeded(self) -> None:
        """The pass counts."""
        self._buffers.succeeded()
        self._metrics.succeeded()


class Snapshot:
    """A copy of modules and optimizers in the host's memory; of what is spread over ranks, this rank's part.

    Args:
        step: Optimizer steps by now.
        modules: Parameters and buffers are copied, each once.
        optimizers: Their state is.
        within: Memory that may be used again: a snapshot that nobody needs any more.
    """

    def __init__(
        self, step: int, modules: Iterable[nn.Module], optimizers: Sequence[Optimizer], within: Snapshot | None = None
    ) -> None:
        self.step = step
        spare = within._copies if within is not None else {}
        self._copies: dict[Any, tuple[Tensor, Tensor]] = {}
        self._states: list[tuple[Optimizer, dict[Any, Any]]] = []
        self._parameters = [list(map(id, _parameters(optimizer))) for optimizer in optimizers]
        for tensor in _tensors(modules):
            self._copies[id(tensor)] = tensor, _copy(tensor, spare.get(id(tensor)))
        for number, optimizer in enumerate(optimizers):
            states = {}
            for place, (key, state) in enumerate(optimizer.state.items()):
                leaves, tree = pytree.tree_flatten(state)
                for i, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor):
                        name = number, place, i
                        self._copies[name] = leaf, _copy(leaf, spare.get(name))
                        leaves[i] = self._copies[name]
                states[key] = leaves, tree
            self._states.append((optimizer, states))

    @staticmethod
    def nbytes(modules: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> int:
        """Memory that one takes."""
        states = (pytree.tree_leaves(list(optimizer.state.values())) for optimizer in optimizers)
        leaves = (leaf for state in states for leaf in state if isinstance(leaf, Tensor))
        return sum(local_part(tensor).nbytes for tensor in (*_tensors(modules), *leaves))

    def fits(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether the optimizers still have the same parameters."""
        return self._parameters == [list(map(id, _parameters(optimizer))) for optimizer in optimizers]

    @torch.no_grad()
    def back(self) -> None:
        """Put everything back in place; gradients are gone."""
        for key, (tensor, copy) in self._copies.items():
            if isinstance(key, int):
                _put_back(tensor, copy)
        for optimizer, states in self._states:
            for parameter in _parameters(optimizer):
                parameter.grad = None
            optimizer.state.clear()
            for key, (leaves, tree) in states.items():
                put = [_put_back(*leaf) if isinstance(leaf, tuple) else leaf for leaf in leaves]
                optimizer.state[key] = pytree.tree_unflatten(put, tree)


def _put_back(tensor: Tensor, copy: Tensor) -> Tensor:
    local_part(tensor).copy_(copy)
    return tensor


def _copy(tensor: Tensor, spare: tuple[Tensor, Tensor] | None) -> Tensor:
    """On the host, in the memory of ``spare`` if it is alike."""
    source = local_part(tensor.detach())
    if spare is not None and (spare[1].shape, spare[1].dtype, spare[1].stride()) == (
        source.shape, source.dtype, source.stride(),
    ):  # fmt: skip
        return spare[1].copy_(source)
    return source.to("cpu", copy=True)


def _tensors(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    seen: set[int] = set()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def group_options(optimizers: Iterable[Optimizer]) -> list[list[dict[str, Any]]]:
    """What stands beside the parameters in the groups: learning rates and the like."""
    return [
        [{name: _own(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def set_group_options(optimizers: Iterable[Optimizer], options: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Go back to what :func:`group_options` returned."""
    for optimizer, groups in zip(optimizers, options, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = _own(value)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def versions(batch: Any) -> list[tuple[Tensor, int]]:
    """The tensors of a batch, and how often each has been changed in place."""
    return [(leaf, tensor_version(leaf)) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
