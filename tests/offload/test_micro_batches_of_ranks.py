"""Two ranks that split their batches: gradients are reduced once, and a failure of one takes both back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankError, run_on_two_ranks
from tests.offload.stepping import Model, SplitDDP, SplitsAt, data, fit, out_of_memory_at

OFF = {"check_loss": False}


def trained(
    rank: int,
    folder: str,
    parts: int | None,
    feedback: dict[str, Any] | None,
    failures: Any = (),
    at: Any = (),
    **arguments: Any,
) -> dict[str, Any]:
    """Weights, logged values and buffers of a run; ``failures``: rank, hook and calls that find no memory."""
    hooks = {failures[1]: out_of_memory_at(*failures[2])} if failures and failures[0] == rank else {}
    model = Model(dropout=0.5 if feedback == OFF else 0.0, **hooks)
    callbacks = [SplitsAt(*at)] if at else []
    strategy = SplitDDP(parts, feedback, process_group_backend="gloo", **arguments)
    _, record = fit(Path(folder), model, strategy, data(38), devices=2, callbacks=callbacks)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "logged": record.logged,
        "gradients": record.gradients,
        "hooks": record.hooks,
    }


def run(tmp_path: Path, function: Any, *arguments: Any) -> Any:
    return run_on_two_ranks(function, tmp_path, str(tmp_path), *arguments, timeout=45)


def whole_and_split(rank: int, folder: str, find_unused: bool) -> list[dict[str, Any]]:
    unused = {"find_unused_parameters": True} if find_unused else {}
    return [trained(rank, folder, parts, feedback, **unused) for parts, feedback in ((None, None), (3, {}))]


@pytest.mark.parametrize("find_unused", [False, True])
def test_o7_ranks_reduce_the_gradients_of_whole_batches(tmp_path: Path, find_unused: bool) -> None:
    (plain, one), (_, other) = run(tmp_path, whole_and_split, find_unused)
    assert one["hooks"] == plain["hooks"]
    torch.testing.assert_close(one["gradients"], plain["gradients"], rtol=1e-12, atol=1e-12)
    for name in one["weights"]:
        if name.startswith("net"):
            assert torch.equal(one["weights"][name], other["weights"][name])
    for mine, theirs in zip(one["logged"], plain["logged"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def failed_and_split(rank: int, folder: str, parts: int, hook: str, call: int) -> list[dict[str, Any]]:
    failed = trained(rank, folder, parts, OFF, (1, hook, (call,)))
    return [failed, trained(rank, folder, parts, OFF, (), (1, 2 * parts))]


@pytest.mark.parametrize(
    ("parts", "hook", "call"),
    [
        (1, "hook", 2),  # the only forward
        (3, "hook", 4),  # the first
        (3, "hook", 6),  # the last, after the backwards of the others
        (3, "backward_hook", 5),  # in the midst
    ],
)
def test_o7_a_failure_of_one_rank_takes_both_back(tmp_path: Path, parts: int, hook: str, call: int) -> None:
    for mine, theirs in run(tmp_path, failed_and_split, parts, hook, call):
        assert mine["hooks"] == theirs["hooks"]
        assert mine["logged"] == theirs["logged"]
        for name, value in theirs["weights"].items():
            assert torch.equal(mine["weights"][name], value), name


def ends(rank: int, folder: str) -> str:
    """What a rank raises when rank 1 has no memory for one sample."""
    try:
        trained(rank, folder, 1, OFF, (1, "hook", range(1, 99)))
    except RuntimeError as error:
        return f"{error} {getattr(error, '__notes__', '')}"
    return ""


def test_o7_a_rank_that_cannot_go_on_ends_both(tmp_path: Path) -> None:
    one, other = run(tmp_path, ends)
    assert "Another rank ran out of memory" in one
    assert "the parts were of one sample" in other


def reducing(rank: int, folder: str) -> None:
    """Rank 1 fails in the backward in which the gradients are reduced."""
    trained(rank, folder, 1, OFF, (1, "backward_hook", (2,)))


def test_o7_a_failure_while_ranks_reduce_is_final(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="reduces gradients in this backward"):
        run(tmp_path, reducing)
