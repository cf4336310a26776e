"""What a user may ask of the offload, checked before anything runs."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_efficient.core.units import parse_bytes
from lightning_efficient.offload.placement import KINDS, NOT_PLACED, PlaceFunction, Rules, Where, is_tier

__all__ = ["LossReduction", "ScheduleChoice", "Settings", "SiteChoice", "parse_settings"]

LossReduction = Literal["mean", "sum"]
ScheduleChoice = Literal["auto", "after_backward", "in_backward", "under_forward", "delayed"]
SiteChoice = Literal["auto", "device", "host"]


@dataclass(frozen=True)
class Settings:
    """See the arguments of :class:`~lightning_efficient.OffloadStrategy`.

    Attributes:
        budgets: Bytes by tier; a tier that is not named, or is ``auto``, takes what is free. Of a NUMA node, which is
            used only if it is named, None is ``auto``.
        directory: For what goes to a disk; None: below the Trainer's ``default_root_dir``.
        place: From a kind, a pattern of names, or both, to a tier, or to a function that names one.
        schedule: When updates take place.
        staging_bytes: For records on their way.
        master_weights: Whether parameters of 16 bits have values in full precision beside them.
        batch_feedback: Whether batches are split when memory is short.
        loss_reduction: What the loss is over the samples of a batch.
        delay_after: Steps before the first one whose update may be late.
        step_on: Where updates are computed whose optimizer state is elsewhere.
        stays: Kinds that the run needs where they are used.
    """

    budgets: Mapping[str, int | None]
    directory: Path | None
    place: Mapping[str, Where]
    schedule: ScheduleChoice
    staging_bytes: int | None
    master_weights: bool
    batch_feedback: bool = False
    loss_reduction: LossReduction = "mean"
    delay_after: int = 40
    step_on: SiteChoice = "auto"
    stays: Collection[str] = ()

    @property
    def rules(self) -> Rules:
        return Rules(self.place)


def parse_settings(
    *,
    memory_budget: int | str | Mapping[str, int | str] | None,
    offload_dir: str | Path | None,
    place: Mapping[str, str | PlaceFunction] | str | PlaceFunction | None,
    schedule: str,
    staging: int | str | None,
    master_weights: bool,
    batch_feedback: bool = False,
    loss_reduction: str = "mean",
    delay_after: int = 40,
    step_on: str = "auto",
) -> Settings:
    """Check and convert what the user gave.

    Raises:
        ValueError: Naming the argument, what was given, and what is allowed.
    """
    if schedule not in get_args(ScheduleChoice):
        raise ValueError(f"schedule={schedule!r} is not allowed. Use one of {', '.join(get_args(ScheduleChoice))}.")
    if step_on not in get_args(SiteChoice):
        raise ValueError(f"step_on={step_on!r} is not allowed. Use one of {', '.join(get_args(SiteChoice))}.")
    if loss_reduction not in get_args(LossReduction):
        raise ValueError(f"loss_reduction={loss_reduction!r} is not allowed. Use 'mean' or 'sum'.")
    if not isinstance(delay_after, int) or isinstance(delay_after, bool) or delay_after < 0:
        raise ValueError(f"delay_after={delay_after!r} is not allowed. Give a number of steps, 0 or more.")
    if offload_dir is not None and not isinstance(offload_dir, str | Path):
        raise ValueError(f"offload_dir={offload_dir!r} is no folder. Give a path.")
    return Settings(
        budgets=_budgets(memory_budget),
        directory=Path(offload_dir) if offload_dir is not None else None,
        place=_places(place),
        schedule=schedule,  # type: ignore[arg-type]
        staging_bytes=None if staging is None else parse_bytes(staging, "staging"),
        master_weights=bool(master_weights),
        batch_feedback=bool(batch_feedback),
        loss_reduction=loss_reduction,  # type: ignore[arg-type]
        delay_after=delay_after,
        step_on=step_on,  # type: ignore[arg-type]
    )


def _places(given: Mapping[str, str | PlaceFunction] | str | PlaceFunction | None) -> dict[str, Where]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        where = _where(given, "place")
        if isinstance(where, str):
            raise ValueError(
                f"place={given!r} is not allowed. Give a mapping, such as {{'optimizer_state': {given!r}}}, or a "
                "function from an attribute (its kind, name and nbytes) to a tier."
            )
        return {"*": where}
    for rule in given:
        kind = rule.split(":", 1)[0] if ":" in rule else None
        if kind is not None and kind not in KINDS:
            raise ValueError(f"place[{rule!r}]: {kind!r} is no kind of tensor. Use one of {', '.join(KINDS)}.")
        if why := NOT_PLACED.get(kind or rule):
            raise ValueError(f"place[{rule!r}] would do nothing: {why}. Leave this rule out.")
        if kind == "activation" and rule != "activation:*":
            raise ValueError(
                f"place[{rule!r}] would do nothing: what backward needs has no names. Use place['activation'] for all."
            )
    return {rule: _where(where, f"place[{rule!r}]") for rule, where in given.items()}


def _where(given: Any, argument: str) -> Where:
    """A tier, or a function; one that is given by its import path is imported."""
    if callable(given) or is_tier(given):
        return given
    module, _, name = given.rpartition(".") if isinstance(given, str) else ("", "", "")
    if not module:
        raise ValueError(
            f"{argument}: {given!r} is no tier. Use device, host, disk, or numa:N with the number of a node; or a "
            "function that returns one, also by its import path."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument}: {given!r} is no tier, and no function that can be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"{argument}: {given!r} is no function but {found!r}. Give one that returns a tier.")
    return found


def _budgets(given: int | str | Mapping[str, int | str] | None) -> dict[str, int | None]:
    if given is None or given == "auto":
        return {}
    if isinstance(given, int | str):  # of the fastest memory that can be full: known when the device is
        return {"fastest": parse_bytes(given, "memory_budget")}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"memory_budget={given!r} is not allowed. Give whole bytes, a text such as '6GiB', or a mapping from tiers."
        )
    budgets: dict[str, int | None] = {}
    for tier, amount in given.items():
        if not is_tier(tier):
            raise ValueError(
                f"memory_budget: {tier!r} is no tier. Use device, host, disk, or numa:N with the number of a node."
            )
        if amount == "auto":
            budgets |= {tier: None} if tier.startswith("numa") else {}
        else:
            budgets[tier] = parse_bytes(amount, f"memory_budget[{tier!r}]")
    return budgets
