"""The tensors of a batch, whatever it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["tensors_in"]


def tensors_in(batch: Any) -> list[Tensor]:
    """Those in its mappings, sequences and dataclasses, and in objects that can be moved to a device (``to``)."""
    return list(_tensors(batch, set()))


def _tensors(part: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
        return
    if isinstance(part, str | bytes) or id(part) in seen:
        return
    seen.add(id(part))
    for child in _children(part):
        yield from _tensors(child, seen)


def _children(part: Any) -> list[Any]:
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, Sequence):
        return list(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, field.name) for field in dataclasses.fields(part)]
    leaves = pytree.tree_leaves(part)  # of classes that were registered there
    if len(leaves) == 1 and leaves[0] is part:
        return list(vars(part).values()) if hasattr(part, "to") and hasattr(part, "__dict__") else []
    return leaves
