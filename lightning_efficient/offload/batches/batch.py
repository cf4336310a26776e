"""A batch of samples cut into micro-batches without copies, and what its parts return put together again."""

from __future__ import annotations

import copy
import enum
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["count_samples", "merge_outputs", "split_batch"]

_ATOMS = (bool, int, float, complex, str, bytes, enum.Enum, os.PathLike, torch.device, torch.dtype, torch.Size, slice)
_ADVICE = (
    "Batches that are split consist of dense tensors whose dim 0 counts the samples, in tuples, lists, mappings and "
    "dataclasses. Collate them so, or do not let them be split."
)


def count_samples(batch: Any) -> int:
    """How many samples a batch has: the size along dim 0 that its tensors have in common.

    Raises:
        ValueError: If they disagree or there are none, or for what cannot be split (see :func:`split_batch`).
    """
    found = list(_sizes(batch, "batch", False))
    outside = [(path, size) for path, size, in_list in found if not in_list and size != 1]
    sizes: dict[int, str] = {}
    for path, size in outside or [(path, size) for path, size, _ in found]:  # lists may hold one tensor for each sample
        if size != 1 or not sizes:
            sizes.setdefault(size, path)
    several = {size: path for size, path in sizes.items() if size != 1}
    if len(several) > 1:
        (size, path), (other, other_path) = list(several.items())[:2]
        raise ValueError(
            f"{path} has size {size} along dim 0 and {other_path} has {other}: it is not clear how many samples the "
            f"batch has. {_ADVICE}"
        )
    if not sizes:
        raise ValueError(f"The batch has no tensor with a dim 0 that counts its samples. {_ADVICE}")
    samples = next(iter(several or sizes))
    _part(batch, "batch", slice(0, 1), samples)  # refuses what cannot be split
    return samples


def split_batch(batch: Any, parts: int) -> list[tuple[Any, float]]:
    """Cut a batch along dim 0 into micro-batches of as equal sizes as can be, the larger ones first.

    A batch is a tree of tuples, named tuples, lists, mappings and dataclasses. Its tensors, and other arrays with a
    ``shape``, are cut into views. A list that is as long as the batch and holds no such tensors (texts, or a
    dictionary for each sample) is cut too. What has no dimension of samples goes into each part as it is: None,
    numbers, texts, tensors without dimensions or with size 1 along dim 0, which are broadcast.

    Args:
        batch: With at least ``parts`` samples.
        parts: At least 1.

    Returns:
        Pairs of a micro-batch, of the same types as the batch, and its share of the samples; the shares add up to 1.

    Raises:
        ValueError: If there are fewer samples than parts; or naming the path in the batch, if sizes disagree, or for
            sparse and nested tensors, packed sequences, and objects of unknown types.
    """
    samples = count_samples(batch)
    if not 1 <= parts <= samples:
        raise ValueError(f"parts={parts}; a batch of {samples} samples can be split into 1 to {samples} parts.")
    if parts == 1:
        return [(batch, 1.0)]
    small, larger = divmod(samples, parts)
    cut, start = [], 0
    for part in range(parts):
        end = start + small + (part < larger)
        cut.append((_part(batch, "batch", slice(start, end), samples), (end - start) / samples))
        start = end
    return cut


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int], path: str = "the output") -> Any:
    """What a step on the whole batch would have returned, from what it returned for each of its parts.

    Values per sample (tensors, or lists of numbers or texts, as long as their part) are put one behind the other;
    numbers, and tensors without dimensions, are averaged with the sizes as weights; what is the same in all parts is
    kept.

    Args:
        outputs: Trees of mappings, tuples, lists, tensors and other values, one for each part, without a graph.
        sizes: Samples of each part.
        path: Where in the output this is.

    Raises:
        ValueError: For what cannot be merged, by path.
    """
    first = outputs[0]
    if any(type(other) is not type(first) for other in outputs):
        raise _unmergeable(path, f"is of types {', '.join(sorted({type(o).__name__ for o in outputs}))}")
    if isinstance(first, Tensor):
        return _merge_tensors(outputs, sizes, path)
    if isinstance(first, float):
        same = all(other == first for other in outputs)
        return first if same else sum(o * n for o, n in zip(outputs, sizes, strict=True)) / sum(sizes)
    if isinstance(first, Mapping):
        if any(set(other) != set(first) for other in outputs):
            raise _unmergeable(path, f"has the keys {' and '.join(str(sorted(map(str, o))) for o in outputs)}")
        merged = {k: merge_outputs([o[k] for o in outputs], sizes, f"{path}[{k!r}]") for k in first}
        return _mapping_like(first, merged)
    if isinstance(first, list | tuple):
        if (
            not hasattr(first, "_fields")
            and not any(map(_is_tree, (item for o in outputs for item in o)))
            and [len(o) for o in outputs] == list(sizes)
        ):
            return type(first)(item for o in outputs for item in o)
        if any(len(other) != len(first) for other in outputs):
            raise _unmergeable(path, f"has the lengths {[len(o) for o in outputs]}")
        items = (merge_outputs(both, sizes, f"{path}[{i}]") for i, both in enumerate(zip(*outputs, strict=True)))
        return _sequence_like(first, list(items))
    if first is None or (isinstance(first, _ATOMS) and all(other == first for other in outputs)):
        return first
    raise _unmergeable(path, f"is {' and '.join(repr(o)[:40] for o in outputs)}")


def _merge_tensors(tensors: Sequence[Tensor], sizes: Sequence[int], path: str) -> Tensor:
    first = tensors[0]
    if all(t.ndim and t.shape[0] == n and t.shape[1:] == first.shape[1:] for t, n in zip(tensors, sizes, strict=True)):
        return torch.cat(list(tensors))
    if all(t.ndim == 0 for t in tensors) and (first.is_floating_point() or first.is_complex()):
        weights = [n / sum(sizes) for n in sizes]
        return torch.stack([t * w for t, w in zip(tensors, weights, strict=True)]).sum(0)
    if all(t.shape == first.shape and torch.equal(t, first) for t in tensors):
        return first
    raise _unmergeable(path, f"has the shapes {[tuple(t.shape) for t in tensors]} for parts of {list(sizes)} samples")


def _unmergeable(path: str, what: str) -> ValueError:
    return ValueError(
        f"{path} {what} in the micro-batches of one batch, and cannot be made into what the whole batch would give. "
        "Return tensors with one entry per sample in dim 0, or means over samples; or do not let batches be split."
    )


def _sizes(tree: Any, path: str, in_list: bool) -> Iterator[tuple[str, int, bool]]:
    """Of each array: where it is, its size along dim 0, and whether it is within a list."""
    if not in_list:
        _refuse(tree, path)
    if _is_array(tree):
        if len(tree.shape):
            yield path, int(tree.shape[0]), in_list
        return
    inside = in_list or isinstance(tree, list)
    for name, item in _children(tree, path):
        yield from _sizes(item, name, inside)


def _part(tree: Any, path: str, rows: slice, samples: int) -> Any:
    if _is_per_sample(tree, samples):
        return tree[rows]
    _refuse(tree, path)
    if isinstance(tree, Tensor):
        has_samples = tree.ndim and tree.shape[0] == samples
        return tree.narrow(0, rows.start, rows.stop - rows.start) if has_samples else _whole(tree, path, samples)
    if _is_array(tree):
        return tree[rows] if len(tree.shape) and tree.shape[0] == samples else _whole(tree, path, samples)
    children = [_part(item, name, rows, samples) for name, item in _children(tree, path)]
    if isinstance(tree, Mapping):
        return _mapping_like(tree, dict(zip(tree, children, strict=True)))
    if isinstance(tree, list | tuple):
        return _sequence_like(tree, children)
    if is_dataclass(tree) and not isinstance(tree, type):
        part = copy.copy(tree)
        for field, value in zip(fields(tree), children, strict=True):
            object.__setattr__(part, field.name, value)  # it may be frozen
        return part
    return tree


def _whole(array: Any, path: str, samples: int) -> Any:
    if len(array.shape) and array.shape[0] != 1:
        raise ValueError(f"{path} has size {array.shape[0]} along dim 0 in a batch of {samples} samples. {_ADVICE}")
    return array


def _is_per_sample(tree: Any, samples: int) -> bool:
    """Whether it is a list or tuple with an item for each sample, rather than one of columns."""
    if not isinstance(tree, list | tuple) or hasattr(tree, "_fields") or len(tree) != samples:
        return False
    columns = all(_is_array(item) and len(item.shape) and item.shape[0] == samples for item in tree)
    return not columns and (isinstance(tree, list) or not any(_is_tree(item) for item in tree))


def _children(tree: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(f"{path}[{key!r}]", tree[key]) for key in tree]
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        names = getattr(tree, "_fields", None)
        return [(f"{path}.{names[i]}" if names else f"{path}[{i}]", item) for i, item in enumerate(tree)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(f"{path}.{field.name}", getattr(tree, field.name)) for field in fields(tree)]
    return []


def _is_array(tree: Any) -> bool:
    return isinstance(tree, Tensor) or (
        isinstance(getattr(tree, "shape", None), tuple) and hasattr(tree, "__getitem__")
    )


def _is_tree(tree: Any) -> bool:
    return _is_array(tree) or isinstance(tree, Mapping | list | tuple) or is_dataclass(tree)


def _refuse(tree: Any, path: str) -> None:
    if isinstance(tree, Tensor) and (tree.layout is not torch.strided or tree.is_nested):
        kind = "a nested tensor" if tree.is_nested else f"a tensor of layout {tree.layout}"
    elif isinstance(tree, PackedSequence):
        kind = "a PackedSequence, which mixes its samples along dim 0"
    elif tree is None or isinstance(tree, _ATOMS) or _is_tree(tree):
        return
    else:
        kind = f"a {type(tree).__name__}, of which it is not known how samples are cut out of it"
    raise ValueError(f"{path} is {kind}. {_ADVICE}")


def _mapping_like(mapping: Any, items: dict[Any, Any]) -> Any:
    """Of the same type, with these values; what else the object holds is kept."""
    if type(mapping) is dict:
        return items
    if isinstance(mapping, MutableMapping):
        part: Any = copy.copy(mapping)
        for key, value in items.items():
            part[key] = value
        return part
    return type(mapping)(items)  # type: ignore[call-arg]


def _sequence_like(sequence: Any, items: list[Any]) -> Any:
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)
