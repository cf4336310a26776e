"""The form that a module had when a checkpoint was written: which layers were live, which shared, how wide it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_efficient.core.named_state import reorder_state
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.progress import Progress

__all__ = ["FORMAT", "FORM_KEY", "check_format", "check_same_run", "describe", "reorder_optimizer_states", "write_form"]

FORM_KEY = "growth_form"
"""Where a checkpoint says which form the module had, with or without the state of callbacks."""

FORMAT = 1


def describe(growing: GrowingModule) -> dict[str, Any]:
    """The form that a module has now, as plain data for a checkpoint."""
    return {
        "stacks": [[stack.parent, list(stack.keys)] for stack in growing.stacks],
        "leaders": list(growing.leaders),
        "width": growing.width,
    }


def write_form(progress: Progress) -> dict[str, Any]:
    """The form, the phase, and the stages of the run, for a checkpoint."""
    settings = progress.settings
    return {
        "format": FORMAT,
        **describe(progress.growing),
        "mode": settings.mode,
        "width_settings": settings.width.to_dict() if settings.width else None,
        "phase": progress.phase,
        "phases": progress.phase_leaders(),
    }


def check_same_run(form: Mapping[str, Any], progress: Progress, *, fitting: bool) -> None:
    """Whether a checkpoint of this form belongs to a run like ``progress``.

    Args:
        form: From the checkpoint.
        progress: Of the present run.
        fitting: Whether training goes on, so that the stages must agree too.

    Raises:
        ValueError: Naming what differs.
    """
    if (found := describe(progress.growing)["stacks"]) != form["stacks"]:
        raise ValueError(
            f"The checkpoint grew the layers {form['stacks']}, this module has {found}. "
            "Use the `layers` that the run was started with."
        )
    saved, own = (form["mode"], form["phases"]), (progress.settings.mode, progress.phase_leaders())
    if fitting and saved != own:
        raise ValueError(
            f"The checkpoint's run has the stages {saved[1]} of mode={saved[0]!r}, this one {own[1]} of "
            f"mode={own[0]!r} (for each layer, the layer whose weights it uses). Resume with the stages that the "
            "run was started with; only their `until` may differ."
        )


def check_format(state: Mapping[str, Any]) -> None:
    """Whether this version can read the growth state of a checkpoint.

    Raises:
        ValueError: If a newer version wrote it.
    """
    if state["format"] > FORMAT:
        raise ValueError(
            f"The checkpoint's growth state has format {state['format']}; this version reads up to {FORMAT}. "
            "Use the version of lightning_efficient that wrote it, or a newer one."
        )


def reorder_optimizer_states(checkpoint: dict[str, Any], saved: list[list[list[str]]], growing: GrowingModule) -> None:
    """Put a checkpoint's optimizer state, which torch stores by position, into the present order, by name.

    Args:
        checkpoint: Changed in place.
        saved: The names of the parameters of each optimizer's groups when it was written; empty where the optimizers
            were not known yet, as the learning-rate finder writes it.
        growing: The module, its optimizers planned.
    """
    if saved:
        present = growing.optimizer_names()
        states = checkpoint.get("optimizer_states", [])
        checkpoint["optimizer_states"] = [
            reorder_state(state, before, now) for state, before, now in zip(states, saved, present, strict=True)
        ]
