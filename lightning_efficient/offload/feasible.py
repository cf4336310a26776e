"""What a plan must leave room for, and whether it does: said before the first step, by the names of the arguments.

Parameters that live elsewhere need a window of the fastest memory, through which they pass while they are used.
(Rajbhandari et al. 2021, "ZeRO-Infinity", 3: beside what stays, a model needs the working memory of its largest
operator.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.buffers import round_up
from lightning_efficient.core.units import human_bytes
from lightning_efficient.offload.on_the_way import OnTheWay
from lightning_efficient.offload.placement import Attribute, Placement, Room, Rules, plan
from lightning_efficient.offload.settings import Settings
from lightning_efficient.offload.updates.subset_step import state_bytes

__all__ = ["check_rooms", "check_staging", "check_way", "plan_with_window", "share_room", "window_bytes"]

_WINDOW = 2  # of the largest module: one is fetched while another computes


def plan_with_window(
    attributes: Sequence[Attribute],
    rooms: Sequence[Room],
    rules: Rules,
    at_once: Mapping[str, Collection[str]],
    way: OnTheWay | None = None,
) -> Placement:
    """See :func:`~.placement.plan`; where parameters go elsewhere, what stays leaves room for those that are in use.

    Args:
        attributes: See there, as the next two.
        rooms: The first one is where parameters are used.
        rules: Of the user.
        at_once: The names of the parameters that are used at once, by the module that does.
        way: What is on its way has its memory in the first room too; None: beside it.

    Raises:
        ValueError: If the room is too small for what must be there and the largest module.
    """
    if way is None:
        return _planned(attributes, rooms, rules, at_once)
    tight = _planned(attributes, rooms, rules, at_once, way)
    ample = _planned(attributes, rooms, rules, at_once, way, ample=True)
    return ample if _kept(ample) >= _kept(tight) else tight


def _kept(placement: Placement) -> tuple[int, bool]:
    """What stays where it is used of that which a step moves most often: parameters, and what backward needs."""
    here = [row.attribute for row in placement.rows if row.tier == placement.rooms[0].tier]
    parameters = sum(attribute.nbytes for attribute in here if attribute.kind == "parameter")
    return parameters, any(attribute.kind == "activation" for attribute in here)


def _planned(
    attributes: Sequence[Attribute],
    rooms: Sequence[Room],
    rules: Rules,
    at_once: Mapping[str, Collection[str]],
    way: OnTheWay | None = None,
    *,
    ample: bool = False,
) -> Placement:
    """With room for the least that is on its way, or, if there is as much, for what is of use (``ample``)."""
    placement, first, reserved = plan(attributes, rooms, rules), rooms[0], 0

    def with_room(nbytes: int) -> Placement:
        return replace(plan(attributes, [Room(first.tier, nbytes), *rooms[1:]], rules), rooms=tuple(rooms))

    def moving() -> int:
        if way is None:
            return 0
        return way.preferred(placement) if ample else way.least(placement)

    while first.nbytes is not None:
        module, largest, away = _largest(placement, at_once)
        wanted, used = min(_WINDOW * largest, away) + moving(), placement.used(first.tier)
        if first.nbytes - used >= wanted:
            break
        if reserved >= wanted:  # nothing else is there that a plan could send away
            if way is not None:
                placement = with_room(used)  # what must be here, which is not room for nothing
            least = moving()
            if away and first.nbytes < used + largest + least and not ample:
                enough = used + largest + least
                raise ValueError(
                    f"memory_budget allows {human_bytes(first.nbytes)} of {first.tier} memory, which cannot be: module "
                    f"'{module}' uses parameters of {human_bytes(largest)} at a time, and {human_bytes(used)} of other "
                    f"tensors stay there (small parameters, and what `place` puts there){_and_moving(least)}. Give "
                    f"memory_budget at least {way.enough(placement, enough) if way else enough:,} bytes, or make the "
                    "module smaller."
                )
            break
        reserved = wanted
        placement = with_room(max(0, first.nbytes - reserved))
    return placement


def _and_moving(least: int) -> str:
    return f", and what is on its way needs {human_bytes(least)}" if least else ""


def share_room(placement: Placement, at_once: Mapping[str, Collection[str]], way: OnTheWay | None) -> tuple[int, int]:
    """How the room that a plan leaves where parameters are used is shared.

    Args:
        placement: The plan.
        at_once: See :func:`plan_with_window`.
        way: Likewise.

    Returns:
        The bytes for parameters that live elsewhere, their window, and the ``staging`` of what is on its way, which may
        be more than fits, as :func:`check_way` says; 0 without ``way``.
    """
    first, (_, largest, away) = placement.rooms[0], _largest(placement, at_once)
    if way is None or first.nbytes is None:
        return window_bytes(placement), 0
    free, least = first.nbytes - placement.used(first.tier), way.least(placement)
    over = free - least - min(_WINDOW * largest, away)  # beside what both need
    staging = way.fitted(placement, least + max(0, over // 2 if away > _WINDOW * largest else over))
    return max(0, min(away, free - way.total(placement, staging))), staging


def window_bytes(placement: Placement) -> int:
    """The room that parameters which live elsewhere have where they are used; 0 if none does."""
    first = placement.rooms[0]
    away = sum(_away(placement).values())
    return away if first.nbytes is None else min(away, first.nbytes - placement.used(first.tier))


def check_way(placement: Placement, way: OnTheWay | None) -> None:
    """Whether the budget has room for what is on its way, beside what is there.

    Args:
        placement: The plan.
        way: See :func:`plan_with_window`.

    Raises:
        ValueError: If it has not, naming what is enough.
    """
    first = placement.rooms[0]
    if way is None or first.nbytes is None:
        return
    used, least = placement.used(first.tier), way.least(placement)
    if not least or used + least <= first.nbytes:
        return
    staging = f"staging={way.given:,} bytes" if way.given is not None else "one record, the largest"
    raise ValueError(
        f"memory_budget allows {human_bytes(first.nbytes)} of {first.tier} memory, which cannot be: "
        f"{human_bytes(used)} of tensors stay there, and what is on its way to and from other tiers needs "
        f"{human_bytes(least)} at least ({staging}, and room for what else moves). Give memory_budget at least "
        f"{way.enough(placement, used + least):,} bytes, or place less there."
    )


def _away(placement: Placement) -> dict[str, int]:
    return {
        row.attribute.name: row.attribute.nbytes
        for row in placement.rows
        if row.attribute.kind == "parameter" and row.tier != placement.rooms[0].tier
    }


def _largest(placement: Placement, at_once: Mapping[str, Collection[str]]) -> tuple[str, int, int]:
    """The module that uses the most parameters at once which live elsewhere, their bytes, and those of all such."""
    away = _away(placement)
    sizes = {module: sum(away.get(name, 0) for name in names) for module, names in at_once.items()}
    module = max(sizes, key=sizes.__getitem__, default="")
    return module, sizes.get(module, 0), sum(away.values())


def check_rooms(placement: Placement, rules: Rules, others: Mapping[str, int], stays: Collection[str] = ()) -> None:
    """Whether what goes to a tier, by a rule or because there is no other, fits what may be there.

    Args:
        placement: With its rooms.
        rules: Of the user.
        others: The bytes of tiers that a rule names and no budget does.
        stays: Kinds that are where they are used because the run needs them there, whatever room there is.

    Raises:
        ValueError: If it does not, naming the rules that send the most there.
    """
    for tier, limit in ({room.tier: room.nbytes for room in placement.rooms} | dict(others)).items():
        rows = [row for row in placement.rows if row.tier == tier]
        if tier == placement.rooms[0].tier:  # what no rule keeps there is there because it fits, or is small
            rows = [row for row in rows if row.attribute.kind not in stays and rules.find(row.attribute)]
            needed = sum(row.attribute.nbytes for row in rows)
        else:
            needed = placement.used(tier)
        if limit is None or needed <= limit:
            continue
        asking: dict[str, int] = {}
        for row in rows:
            if found := rules.find(row.attribute):
                asking[found[0]] = asking.get(found[0], 0) + row.attribute.nbytes
        by = f" by {max(asking, key=asking.__getitem__)}" if asking else ""
        budget = f"memory_budget[{tier!r}]"
        has, enough = f"{budget} allows {human_bytes(limit)}", f"Give {budget} at least {needed:,} bytes, or place"
        if tier in others:
            has, enough = f"{tier} has {human_bytes(limit)} free", "Place"
        raise ValueError(f"{has}, and {human_bytes(needed)} would go there{by}. {enough} less there.")


def check_staging(
    placement: Placement,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    settings: Settings,
    *,
    values_stay: bool = False,
) -> None:
    """Whether the optimizer state of each parameter that is elsewhere fits the memory for records on their way.

    Args:
        placement: Says which is elsewhere.
        module: Whose parameters they are.
        optimizers: Of its parameters.
        settings: Of the user.
        values_stay: Whether the values of parameters are beside their state, where that is not on a disk.

    Raises:
        ValueError: Naming the parameter with the largest state, and what is enough.
    """
    most = settings.staging_bytes
    if most is None:  # then there is as much as is needed
        return
    large = {
        row.attribute.name: values_stay and row.tier != "disk"
        for row in placement.rows
        if row.attribute.kind == "optimizer_state"
        and row.tier != placement.rooms[0].tier
        and round_up(row.attribute.nbytes) > most  # as estimated, which may be too much
    }
    names = {id(parameter): name for name, parameter in module.named_parameters() if name in large}
    sizes = {
        names[id(parameter)]: _record_bytes(optimizer, group, parameter, settings, large[names[id(parameter)]])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    }
    name = max(sizes, key=sizes.__getitem__, default="")
    if name and sizes[name] > most:
        raise ValueError(
            f"staging={most:,} bytes is too small: the optimizer state of '{name}' is moved in one piece of "
            f"{sizes[name]:,} bytes. Give staging at least that, better {2 * sizes[name]:,}, or leave it out, or let "
            "this state stay where its parameter is used."
        )


def _record_bytes(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, settings: Settings, with_value: bool
) -> int:
    in_full = settings.master_weights and parameter.element_size() < 4
    like = torch.empty(parameter.shape, device="meta") if in_full else parameter
    value = 4 if in_full else parameter.element_size() * with_value
    return round_up(state_bytes(optimizer, group, like) + value * parameter.numel())
