"""What two ranks, or two runs in other processes, are compared by."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from tests.helpers.fitting import Run, assert_same_tree

__all__ = ["DDP", "assert_ranks_agree", "assert_resumed", "summary", "whole_summary"]

DDP = {"devices": 2, "use_distributed_sampler": False}
"""Arguments of a Trainer on two ranks."""


def summary(run: Run) -> dict[str, Any]:
    """What two ranks, or two runs, are compared by."""
    return {
        "began_at": run.began_at,
        "weights": run.weights,
        "optimizers": run.optimizers,
        "schedulers": run.schedulers,
        "losses": run.losses,
        "batches": run.batches,
        "rates": run.rates,
        "names": run.names,
        "events": [(event.step, event.text) for event in run.events],
        "logged": run.logged_values(run.first_log_step),
        "checkpoints": run.checkpoints,
        "switched_at": run.switched_at(),
    }


def assert_ranks_agree(one: dict[str, Any], other: dict[str, Any], *, divided: bool = False) -> None:
    """Two ranks did the same with different batches.

    Args:
        one: The :func:`summary` of a rank.
        other: That of the other.
        divided: Whether each has a part of the optimizer state, and reports events of its own memory.
    """
    for key in ("weights", "schedulers", "rates", "names", *(() if divided else ("optimizers", "events"))):
        assert_same_tree(one[key], other[key], key)
    for mine, theirs in zip(one["optimizers"], other["optimizers"], strict=True) if divided else ():
        assert not set(mine["state"]) & set(theirs["state"])
        assert set(mine["state"]) | set(theirs["state"]) == {name for group in mine["names"] for name in group}
    assert one["batches"] != other["batches"]
    assert one["losses"] != other["losses"]


def assert_resumed(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("weights", "optimizers", "schedulers", "events"):
        assert_same_tree(resumed[key], whole[key], key)
    done = len(whole["losses"]) - len(resumed["losses"])
    for key in ("losses", "batches", "rates", "names"):
        assert resumed[key] == whole[key][done:], key
    assert resumed["logged"] == {key: v for key, v in whole["logged"].items() if key in resumed["logged"]}


def whole_summary(run: Run) -> dict[str, Any]:
    """See :func:`summary`; sharded tensors are put together."""

    def whole(value: Any) -> Any:
        return value.full_tensor() if isinstance(value, DTensor) else value

    return pytree.tree_map(whole, summary(run))
