"""All techniques in one run (``configs/all.yaml``), killed with -9 where it hurts, and resumed (X1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.together_kills import differences, killed_and_resumed


@pytest.mark.slow
def test_killed_amid_all_that_it_does_it_ends_as_if_nothing_had_been_x1(tmp_path: Path) -> None:
    """``python -m benchmarks together`` does it 50 times."""
    killed = killed_and_resumed(tmp_path, kills=2, steps=16, every=2)
    assert killed.problems == []
    assert killed.exact == killed.kills == 2


def test_the_comparison_sees_a_single_bit_and_not_a_clock() -> None:
    one = {"state_dict": {"w": torch.tensor([1.0, 0.0])}, "callbacks": {"EfficiencyMonitor": {"seconds": 1.0}}}
    other = {"state_dict": {"w": torch.tensor([1.0, 0.0])}, "callbacks": {"EfficiencyMonitor": {"seconds": 2.0}}}
    assert differences(one, one) == differences(one, other) == []
    other["state_dict"]["w"][1] = -0.0
    assert differences(one, other) == ["[state_dict][w] differs"]
    assert differences({"a": 1}, {"b": 1}) != []
    assert differences({"a": [1]}, {"a": [1.0]}) != []
