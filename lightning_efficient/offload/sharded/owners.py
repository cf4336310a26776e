"""Which rank updates which parameters, and keeps their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch.optim import Optimizer

from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.subset_step import state_bytes_per_element
from lightning_efficient.offload.updates.units import Unit, cut_units, make_units

__all__ = ["Piece", "own_pieces", "share_out", "units_of"]

_PIECES = 16  # for each rank, at least: the shares then differ by about a sixteenth, if no parameter is larger


@dataclass(frozen=True, order=True)
class Piece:
    """Neighbours in one group of one optimizer, by position: what ranks say to one another of a unit."""

    optimizer: int
    group: int
    begin: int
    end: int


def share_out(optimizers: Sequence[Optimizer], ranks: int, together_bytes: int) -> dict[int, int]:
    """Divide all parameters among ``ranks``, so that each has about as many bytes of optimizer state to move.

    Neighbours stay together, so that records are worth a disk's while; a single parameter is not divided. The result
    depends on shapes only, and is the same on each rank. (Rajbhandari et al. 2020, "ZeRO", 5.1: optimizer state
    partitioning.)

    Args:
        optimizers: Of all parameters.
        ranks: How many there are.
        together_bytes: Neighbours of up to so many bytes stay together.

    Returns:
        The rank of each parameter, by ``id``.
    """
    total = sum(p.numel() * p.element_size() for o in optimizers for group in o.param_groups for p in group["params"])
    together = max(1, min(together_bytes, total // (_PIECES * ranks)))
    pieces = [unit for optimizer in optimizers for unit in make_units(optimizer, {}, lambda _: None, together)]
    sizes = [_moved_bytes(piece) for piece in pieces]
    loads = [0.0] * ranks
    owners: dict[int, int] = {}
    for index in sorted(range(len(pieces)), key=lambda i: -sizes[i]):
        rank = min(range(ranks), key=loads.__getitem__)
        loads[rank] += sizes[index]
        owners |= {id(parameter): rank for parameter in pieces[index].parameters}
    return owners


def _moved_bytes(unit: Unit) -> float:
    """About how many bytes an update of the unit reads and writes."""
    ratios: dict[int, float] = {}
    nbytes = 0.0
    for parameter in unit.parameters:
        if not parameter.requires_grad:
            continue
        if parameter.dim() not in ratios:
            ratios[parameter.dim()] = state_bytes_per_element(unit.optimizer, unit.group, parameter)
        nbytes += parameter.numel() * (ratios[parameter.dim()] + parameter.element_size())
    return nbytes


def own_pieces(
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
    tier_of: Callable[[str], Tier | None],
    together_bytes: int,
    mine: Callable[[int], bool],
) -> Iterator[Piece]:
    """Cut the parameters of this rank into units; where their state goes is its own affair.

    Args:
        optimizers: Of all parameters.
        names: The name of each parameter by ``id``.
        tier_of: Where the state of a parameter goes, by its name.
        together_bytes: See :func:`~..updates.units.make_units`.
        mine: Whether a parameter is this rank's, by ``id``.
    """
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            begin = 0
            for own, run in groupby(group["params"], key=lambda p: mine(id(p))):
                parameters = list(run)
                units = cut_units(optimizer, index, parameters, names, tier_of, together_bytes) if own else ()
                at = begin
                for unit in units:
                    yield Piece(number, index, at, at + len(unit.parameters))
                    at += len(unit.parameters)
                begin += len(parameters)


def units_of(
    optimizers: Sequence[Optimizer],
    pieces: Sequence[Piece],
    names: Mapping[int, str],
    tier_of: Callable[[str], Tier | None],
) -> list[Unit]:
    """The units that ``pieces`` describe, with the tier of their first parameter."""
    units = []
    for piece in pieces:
        optimizer = optimizers[piece.optimizer]
        parameters = optimizer.param_groups[piece.group]["params"][piece.begin : piece.end]
        own = [names.get(id(p), f"<unnamed {piece.group}.{i}>") for i, p in enumerate(parameters, start=piece.begin)]
        units.append(Unit(optimizer, piece.group, own, list(parameters), tier_of(own[0])))
    return units
