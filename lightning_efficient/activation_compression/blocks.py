"""Modules whose forward can be done again in backward, so that only their inputs are kept.

(Chen et al. 2016, "Training deep nets with sublinear memory cost".)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient.activation_compression.operations import CurrentOperation

__all__ = ["Blocks", "find_blocks"]


def find_blocks(module: nn.Module) -> list[str]:
    """Names of repeated modules: neighbours of the same class in a list or sequence, the outermost ones."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and not any(name.startswith(f"{one}.") for one in found):
            classes = [type(child) for child in part]
            found += [
                f"{name}.{index}" if name else str(index)
                for index, child in enumerate(part)
                if classes.count(type(child)) > 1 and _worth_it(child)
            ]
    return found


def _worth_it(child: nn.Module) -> bool:
    return sum(1 for _ in child.modules()) > 2 and any(True for _ in child.parameters())


class Blocks:
    """Calls modules so that they can be made again.

    Args:
        operation: Hears that an input of a block is being saved.

    Attributes:
        recomputed: Names of those that are, from the next call on.
        impure: Names of those that change their buffers when they are called (statistics of BatchNorm), and are not.
    """

    def __init__(self, operation: CurrentOperation) -> None:
        self.names: list[str] = []
        self.recomputed: frozenset[str] = frozenset()
        self.impure: set[str] = set()
        self._operation = operation

    @property
    def candidates(self) -> list[str]:
        """In the order of the forward pass."""
        return [name for name in self.names if name not in self.impure]

    @contextlib.contextmanager
    def wrapping(self, module: nn.Module) -> Iterator[None]:
        """Within it, blocks of ``module`` are called so."""
        self.names = find_blocks(module)
        parts = dict(module.named_modules())
        with contextlib.ExitStack() as undo:
            for name in self.names:
                part = parts[name]
                if "forward" not in part.__dict__:  # somebody else's, who may not want to be called twice
                    part.__dict__["forward"] = _Forward(self, name, part)
                    undo.callback(part.__dict__.pop, "forward", None)
                else:
                    self.impure.add(name)
            yield

    def call(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> Any:
        """Its forward."""
        forward = type(part).forward
        if name in self.recomputed and name not in self.impure and torch.is_grad_enabled():
            with self._operation.called("checkpoint"):
                return checkpoint(forward, part, *args, use_reentrant=False, **kwargs)
        before = [(id(buffer), buffer._version) for buffer in part.buffers()]
        result = forward(part, *args, **kwargs)
        if before != [(id(buffer), buffer._version) for buffer in part.buffers()]:
            self.impure.add(name)
        return result


class _Forward:
    """In place of a module's forward."""

    def __init__(self, blocks: Blocks, name: str, part: nn.Module) -> None:
        self._blocks, self._name, self._part = blocks, name, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._blocks.call(self._name, self._part, args, kwargs)
