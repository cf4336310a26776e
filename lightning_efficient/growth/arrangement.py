"""The layers of a network that are live, and those that share one set of weights.

An arrangement is written as *leaders*: ``leaders[i]`` is the layer whose parameters layer ``i`` uses, and the number
of entries is the depth. With eight layers, ``(0, 1)`` is the shallow model of two, ``(0, 1, 0, 1, 0, 1, 0, 1)`` shares
a unit of two layers four times, and ``(0, 1, ..., 7)`` is the full model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_efficient.growth.layers import LayerStack
from lightning_efficient.growth.operators import Scaled, Transfer, hollow, like
from lightning_efficient.growth.slots import Slot, find_slots

__all__ = ["LayerArrangement", "group_sizes"]

Leaders = tuple[int, ...]

SHORTENED = "_layers_of_the_full_model"
"""Attribute that a list of layers has while it is shorter than the full model's."""


def group_sizes(leaders: Sequence[int]) -> dict[int, int]:
    """How many layers use each leader's parameters."""
    return {leader: list(leaders).count(leader) for leader in dict.fromkeys(leaders)}


class LayerArrangement:
    """Cuts, shares, grows and unshares the layers of ``module`` in place.

    Every layer object of the full model is kept, with its own buffers and attributes; the parameters of layers that
    are not live, or follow a leader, take no memory.

    Args:
        module: The network, complete.
        stacks: Its repeated layers; all stacks are arranged alike and have the same number of layers.

    Raises:
        ValueError: If the stacks differ in length, or layers are sharded or uninitialised.
    """

    def __init__(self, module: nn.Module, stacks: Sequence[LayerStack]) -> None:
        lengths = {len(stack) for stack in stacks}
        if len(lengths) != 1:
            listing = "; ".join(map(str, stacks))
            raise ValueError(f"All stacks must have the same number of layers, got {listing}. Name one with `layers=`.")
        for stack in stacks:
            if full := module.get_submodule(stack.parent).__dict__.get(SHORTENED):
                raise ValueError(
                    f"'{stack.parent}' was left with {len(stack)} of its {full} layers by an earlier run. Build the "
                    "module anew, or go on with the callback of that run."
                )
        self.module = module
        self.stacks = list(stacks)
        self.full_depth = lengths.pop()
        self.layers = [[module.get_submodule(s.path(i)) for i in range(len(s))] for s in stacks]
        self.leaders: Leaders = tuple(range(self.full_depth))
        self.slots, self._tied = find_slots(module, self.stacks, self.layers)
        self._trainable = [
            [[slot.get(layer).requires_grad for slot in slots] for layer in layers]
            for slots, layers in zip(self.slots, self.layers, strict=True)
        ]

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of live layers in each stack."""
        return len(self.leaders)

    def shared_parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Each parameter that several layers use, with their number."""
        for leader, size in group_sizes(self.leaders).items():
            if size > 1:
                for slots, layers in zip(self.slots, self.layers, strict=True):
                    for parameter in {id(p): p for p in (slot.get(layers[leader]) for slot in slots)}.values():
                        yield parameter, size

    # -- changes -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def arrange(
        self, leaders: Sequence[int], source: Sequence[int] | None = None, *, summed_gradient: bool = False
    ) -> list[Transfer]:
        """Go to another arrangement; layer ``i`` gets the weights and buffers of the present layer ``source[i]``.

        A parameter that stays the leader of its layer keeps its object; others are new objects. Where layers stop to
        share, every copy is bit for bit what the shared one was, so that the output does not change.

        Args:
            leaders: The arrangement to reach.
            source: For each of its layers, a layer of the present arrangement. None: layer ``i mod depth``.
            summed_gradient: Whether sharers' gradients were added up rather than averaged; then the statistics of a
                group of ``n`` that becomes groups of ``m`` scale by ``m / n`` for each power of the gradient.

        Returns:
            One transfer for each distinct parameter of the new arrangement.
        """
        leaders = tuple(leaders)
        if source is None:
            source = [i % self.depth for i in range(len(leaders))]
        old_sizes = group_sizes(self.leaders)
        new_sizes = group_sizes(leaders)
        transfers: list[Transfer] = []
        for s, (stack, slots, layers) in enumerate(zip(self.stacks, self.slots, self.layers, strict=True)):
            before = [[slot.get(layer) for slot in slots] for layer in layers[: self.depth]]
            thawed = [[parameter.requires_grad for parameter in layer] for layer in before]
            overwrite: list[tuple[Tensor, Tensor]] = []
            made: dict[tuple[int, int], nn.Parameter] = {}
            for i, layer in enumerate(layers):
                for k, slot in enumerate(slots):
                    if (s, i, slot) in self._tied:
                        continue
                    if i >= len(leaders):
                        present = slot.get(layer)
                        slot.set(layer, made.setdefault((i, id(present)), hollow(present)))
                    elif leaders[i] != i:
                        if self._trainable[s][i][k] != self._trainable[s][leaders[i]][k]:
                            raise ValueError(
                                f"'{stack.path(i)}' cannot share weights with '{stack.path(leaders[i])}': "
                                f"'{slot}' is frozen in only one of them."
                            )
                        slot.set(layer, slot.get(layers[leaders[i]]))
                    else:
                        origin = before[source[i]][k]
                        scale = new_sizes[i] / old_sizes[self.leaders[source[i]]] if summed_gradient else 1.0
                        stays = i < self.depth and self.leaders[i] == i
                        key = (i, id(before[i][k] if stays else origin))  # ties inside a layer stay ties
                        if key in made:
                            target = made[key]
                        elif stays:
                            target = before[i][k]
                            if origin is not target:
                                overwrite.append((target, origin.clone()))
                        else:
                            target = like(slot.get(layer), origin.clone())
                        slot.set(layer, target)
                        if key not in made:
                            made[key] = target
                            # A layer keeps its own flag, unless its source was thawed or frozen since.
                            if thawed[source[i]][k] != self._trainable[s][source[i]][k]:
                                target.requires_grad_(thawed[source[i]][k])
                            transfers.append(Transfer(origin, target, Scaled(scale)))
            overwrite += self._buffer_copies(layers, leaders, source)
            for tensor, value in overwrite:
                tensor.copy_(value)
            self._show(stack, layers, len(leaders))
        self.leaders = leaders
        return transfers

    @contextmanager
    def expanded(self) -> Iterator[dict[int, str]]:
        """For its duration the module has all its layers, each with parameters of its own.

        Parameters that the present arrangement lacks are stand-ins of the right shape that occupy no memory. User code
        that sorts parameters into groups then sees the full model.

        Yields:
            The name of every parameter of the full model, by ``id``.
        """
        shared: list[tuple[Slot, nn.Module, nn.Parameter]] = []
        for stack, slots, layers in zip(self.stacks, self.slots, self.layers, strict=True):
            for i, leader in enumerate(self.leaders):
                if leader != i:
                    stand_ins: dict[int, nn.Parameter] = {}
                    for slot in slots:
                        parameter = slot.get(layers[i])
                        shared.append((slot, layers[i], parameter))
                        slot.set(layers[i], stand_ins.setdefault(id(parameter), hollow(parameter)))
            self._show(stack, layers, self.full_depth)
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        try:
            yield names
        finally:
            for slot, layer, parameter in shared:
                slot.set(layer, parameter)
            for stack, layers in zip(self.stacks, self.layers, strict=True):
                self._show(stack, layers, self.depth)

    def mirror(self, twin: nn.Module) -> LayerArrangement:
        """The same arrangement over a copy of the module, such as an averaged model.

        Args:
            twin: A deep copy of the module, taken when it was complete or in its present arrangement.
        """
        mirrored = copy.copy(self)
        mirrored.module = twin
        mirrored.layers = []
        complete = True
        in_module = dict(self.module.named_parameters())
        for stack, layers in zip(self.stacks, self.layers, strict=True):
            container = twin.get_submodule(stack.parent)
            present = [child for key in stack.keys if (child := container._modules.get(key)) is not None]
            complete &= len(present) == self.full_depth
            missing = []
            for layer in layers[len(present) :]:
                memo: dict[int, object] = {id(p): hollow(p) for p in layer.parameters()}
                memo |= {id(p): twin.get_parameter(name) for name, p in in_module.items() if id(p) in memo}
                missing.append(copy.deepcopy(layer, memo))
            mirrored.layers.append([*present, *missing])
        if (complete and self.depth < self.full_depth) or not self._tied_like(mirrored):
            mirrored.leaders = tuple(range(self.full_depth))
            mirrored.arrange(self.leaders, range(self.depth))
        return mirrored

    # -- inside --------------------------------------------------------------------------------------------------

    def _tied_like(self, twin: LayerArrangement) -> bool:
        return all(
            slots[0].get(layers[i]) is slots[0].get(layers[leader])
            for slots, layers in zip(self.slots, twin.layers, strict=True)
            for i, leader in enumerate(self.leaders)
            if slots
        )

    def _buffer_copies(
        self, layers: list[nn.Module], leaders: Leaders, source: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Persistent buffers (running statistics) follow the weights; each layer has its own."""
        copies: list[tuple[Tensor, Tensor]] = []
        for i in range(len(leaders)):
            if source[i] == i < self.depth:
                continue
            here, there = layers[i], layers[source[i]]
            for path, sub in here.named_modules():
                original = there.get_submodule(path)
                sub.training = original.training
                for name, buffer in sub._buffers.items():
                    value = original._buffers[name]
                    if buffer is None or value is None:
                        continue
                    if buffer.device != value.device or buffer.dtype != value.dtype:
                        buffer = sub._buffers[name] = buffer.to(value.device, value.dtype)
                    if name not in sub._non_persistent_buffers_set:
                        copies.append((buffer, value.clone()))
        return copies

    def _show(self, stack: LayerStack, layers: list[nn.Module], depth: int) -> None:
        """Make the container hold the first ``depth`` layers of the stack, in place."""
        container = self.module.get_submodule(stack.parent)
        children = list(container._modules.items())
        inside = set(stack.keys)
        first = next(n for n, (key, _) in enumerate(children) if key in inside)
        before = children[:first]
        after = [(key, child) for key, child in children[first:] if key not in inside]
        if depth < self.full_depth:
            container.__dict__[SHORTENED] = self.full_depth
        else:
            container.__dict__.pop(SHORTENED, None)
        container._modules.clear()
        container._modules.update([*before, *zip(stack.keys[:depth], layers[:depth], strict=True), *after])
