"""Layers that share weights, and the moment to stop.

[Yang 2021] trains with units of layers that share one set of weights, averages the sharers' gradients (Alg. 1), and
unshares when the gradients of the sharers no longer agree; [Takase & Kiyono 2021] name the patterns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_efficient.growth.arrangement import LayerArrangement

__all__ = ["GradientAgreement", "MeanGradient", "SharingPattern", "sharing_leaders", "split_groups"]

SharingPattern = Literal["cycle", "sequence", "all"]


def sharing_leaders(depth: int, pattern: SharingPattern, unit: int) -> tuple[int, ...]:
    """Who leads whom among ``depth`` layers.

    Args:
        depth: Number of layers.
        pattern: ``"cycle"``: a unit of ``unit`` layers is repeated, layer ``i`` follows ``i mod unit`` (Yang's units);
            ``"sequence"``: each ``unit`` consecutive layers share; ``"all"``: one set of weights.
        unit: See ``pattern``; ``"all"`` does not use it.

    Raises:
        ValueError: If ``unit`` does not divide the layers.
    """
    if pattern == "all":
        return (0,) * depth
    if not 1 <= unit <= depth or depth % unit:
        divisors = [n for n in range(1, depth + 1) if depth % n == 0]
        raise ValueError(f"unit={unit} does not divide the {depth} layers; use one of {divisors}.")
    if pattern == "cycle":
        return tuple(i % unit for i in range(depth))
    return tuple(i - i % unit for i in range(depth))


def split_groups(leaders: Sequence[int], agreement: Mapping[tuple[int, int], float], below: float) -> tuple[int, ...]:
    """Split each sharing group between neighbours whose gradients agree less than ``below`` (SWE-M, [Yang 2021] §3.3).

    Args:
        leaders: The present arrangement.
        agreement: The correlation of each pair of successive members of a group.
        below: The threshold.
    """
    result = list(leaders)
    for leader in dict.fromkeys(leaders):
        members = [i for i, who in enumerate(leaders) if who == leader]
        head = leader
        for before, after in pairwise(members):
            if agreement.get((before, after), 1.0) < below:
                head = after
            result[after] = head
    return tuple(result)


class MeanGradient:
    """While it is on, a parameter that ``n`` layers share receives the mean of their gradients, not the sum.

    Clipping norms then stay comparable with the unshared model, and Adam's moments need no rescaling afterwards.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def attach(self, arrangement: LayerArrangement) -> None:
        """Hook the parameters that ``arrangement`` shares now, and no others."""
        self.remove()
        for parameter, sharers in arrangement.shared_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(_divide_by(sharers)))

    def remove(self) -> None:
        """Back to sums."""
        while self._handles:
            self._handles.pop().remove()


def _divide_by(sharers: int):  # type: ignore[no-untyped-def]
    def hook(gradient: Tensor) -> Tensor:
        return gradient / sharers

    return hook


class GradientAgreement:
    """Correlation (cosine) of the gradients of neighbouring layers.

    Neighbours are successive layers that share weights or, where none share, successive layers. For layers that share,
    the gradient of each use is read in the training step itself: for its duration every use gets an alias of the
    shared parameter, through which the gradient flows unchanged; no second pass, and one layer's gradients of memory.
    """

    def __init__(self, arrangement: LayerArrangement) -> None:
        self.arrangement = arrangement
        self._products: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around forward and backward of one batch."""
        restore: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._products = {}
        waiting: dict[tuple[int, int, int], Tensor] = {}
        leaders = self.arrangement.leaders
        successor = dict(neighbours(leaders))
        try:
            for s, (slots, layers) in enumerate(zip(self.arrangement.slots, self.arrangement.layers, strict=True)):
                for i in range(len(leaders)):
                    for k, slot in enumerate(slots):
                        parameter = slot.get(layers[i])
                        if not parameter.requires_grad:
                            continue
                        owner = layers[i].get_submodule(slot.module)
                        restore.append((owner, slot.name, parameter))
                        alias = parameter.view_as(parameter)
                        alias.register_hook(self._reader(s, i, k, successor, waiting))
                        owner._parameters[slot.name] = alias  # type: ignore[assignment]
            with warnings.catch_warnings():
                # The compiler looks at `.grad` of all it finds in a module; that of an alias means nothing.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                yield
        finally:
            for owner, name, parameter in restore:
                owner._parameters[name] = parameter

    def _reader(  # type: ignore[no-untyped-def]
        self,
        s: int,
        i: int,
        k: int,
        successor: Mapping[int, int],
        waiting: dict[tuple[int, int, int], Tensor],
    ):
        predecessor = {after: before for before, after in successor.items()}.get(i)

        def read(gradient: Tensor) -> None:
            after = successor.get(i)
            if after is not None:
                later = waiting.pop((s, after, k), None)
                if later is not None:
                    self._add((i, after), gradient, later)
            if predecessor is not None:
                waiting[s, i, k] = gradient.detach()

        return read

    def _add(self, pair: tuple[int, int], one: Tensor, other: Tensor) -> None:
        a, b = one.detach().flatten().float(), other.flatten().float()
        terms = torch.stack([a @ b, a @ a, b @ b])
        self._products[pair] = self._products[pair] + terms if pair in self._products else terms

    def products(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Dot product and squared norms of each pair, ``[pairs, 3]``; a sum over ranks is theirs together."""
        device = next(iter(self._products.values())).device if self._products else None
        rows = torch.zeros(len(pairs), 3, device=device)
        for row, pair in zip(rows, pairs, strict=True):
            if pair in self._products:
                row.copy_(self._products[pair])
        return rows


def neighbours(leaders: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of layers whose gradients are compared."""
    if len(set(leaders)) == len(leaders):
        return [(i, i + 1) for i in range(len(leaders) - 1)]
    pairs: list[tuple[int, int]] = []
    for leader in dict.fromkeys(leaders):
        members = [i for i, who in enumerate(leaders) if who == leader]
        pairs += pairwise(members)
    return sorted(pairs)


def correlations(products: Tensor) -> list[float]:
    """Cosines from :meth:`GradientAgreement.products`; one for a pair without gradients."""
    dot, one, other = products.double().reshape(-1, 3).unbind(-1)
    norm = (one * other).sqrt()
    return torch.where(norm > 0, dot / norm.clamp_min(1e-300), torch.ones_like(dot)).tolist()
