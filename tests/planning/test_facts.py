"""Batches that are chosen, and what is concluded from those that were timed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_efficient.planning.batches import ChosenBatches, batch_size, load_batches, save_batches, scan
from lightning_efficient.planning.curves import Curve
from lightning_efficient.planning.facts import Sample, Seconds, ShortRun
from lightning_efficient.planning.saved_bytes import LayerAccount


def test_a_curve_goes_through_what_grows_with_the_square() -> None:
    curve = Curve.through({size: 5.0 + 2 * size + 0.1 * size**2 for size in (10, 20, 30, 40)})
    assert curve.at(100) == pytest.approx(5 + 200 + 1000)
    assert curve.mean_over([10, 40]) == pytest.approx((5 + 20 + 10 + 5 + 80 + 160) / 2)
    assert Curve.through({7: 3.0}).at(1000) == pytest.approx(3.0)
    assert Curve.through({10: 1.0, 20: 2.0}).at(30) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="No batch was measured"):
        Curve.through({})


def test_the_time_of_a_run_is_that_of_the_sizes_to_come() -> None:
    usual = [Sample(size, size / 10, size / 5) for size in (10, 20, 10, 20)]
    run = ShortRun(base_bytes=0, peak_bytes=1, samples=(*usual, Sample(10, 99.0, 99.0)), yardstick=(2.0, 4.0))
    assert run.seconds([10, 30]).wall == pytest.approx(2.0)  # a median each: the slow one is an accident
    # When the machine was twice as fast, and its processors four times:
    assert run.seconds([10, 30], (1.0, 1.0)) == Seconds(pytest.approx(1.0), pytest.approx(1.0))
    again = ShortRun.from_json(json.loads(json.dumps(run.to_json())))
    assert again.samples == run.samples


def test_with_accumulation_the_update_counts_in_part() -> None:
    samples = tuple(Sample(8, wall, wall) for wall in (1.0, 1.0, 1.0, 5.0))
    run = ShortRun(base_bytes=0, peak_bytes=1, samples=samples, accumulate=4)
    assert run.seconds([8]).wall == pytest.approx(2.0)


def test_the_smallest_and_the_largest_batch_are_kept_and_some_between(tmp_path: Path) -> None:
    lengths = [500, 501, 502, 3, 900, *range(10, 480, 10)]
    found = scan([torch.zeros(2, length) for length in lengths])
    assert found.sizes == [2 * length for length in lengths]
    assert found.complete
    assert len(found.kept) == 48
    assert {6, 1800} <= set(found.kept)
    assert 2 * 501 not in found.kept  # has the nearest neighbours
    batches = found.by_turns(12)
    sizes = [batch_size(batch) for batch in batches]
    assert sorted(sizes) == sorted(found.kept)
    assert {min(sizes), max(sizes)} <= set(sizes[:12]), "what is timed reaches over all sizes"
    assert max(b - a for a, b in itertools.pairwise(sorted(sizes[:12]))) < 900
    assert save_batches(tmp_path / "batches.pt", batches)
    assert [batch_size(batch) for batch in load_batches(tmp_path / "batches.pt")] == sizes
    assert not save_batches(tmp_path / "none.pt", [lambda: None])


def test_few_sizes_are_trained_on_as_they_came() -> None:
    found = scan([torch.zeros(2, length) for length in (5, 3, 4)])
    for first in (1, 2, 12):
        assert sorted(map(batch_size, found.by_turns(first))) == [6, 8, 10]
    assert [batch_size(batch) for batch in found.by_turns(12)] == [10, 6, 8]
    assert len(scan([torch.zeros(3)]).by_turns(12)) == 1


def test_a_scan_stops_when_it_has_seen_enough() -> None:
    found = scan([torch.zeros(4)] * 100, batches=10)
    assert len(found.sizes) == 10
    assert not found.complete
    assert len(found.kept) == 1


def test_chosen_batches_come_by_turns_as_often_as_the_loaders() -> None:
    assert list(ChosenBatches(["a", "b"], 5)) == ["a", "b", "a", "b", "a"]
    with pytest.raises(TypeError, match="no end"):
        len(ChosenBatches(["a"], None))


def test_saved_bytes_are_counted_once_and_by_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2))
    batch = torch.randn(3, 4)
    account = LayerAccount(model)
    with account.counting([batch]):
        loss = model(batch).square().mean()
    saved = {layer.name: layer.saved_bytes for layer in account.layers()}
    # The inputs of the linear layers, 3 x 8 floats each; the first one's is the batch, and the last one's is what Tanh
    # has saved already. The square saves its input, 3 x 2.
    assert saved["*"] == 0
    assert saved["*.*"] == 3 * 8 * 4 * 2
    assert saved["(the step itself)"] == 3 * 2 * 4
    assert account.saved_bytes == 3 * 8 * 4 * 2 + 3 * 2 * 4
    assert all(layer.forward_seconds > 0 for layer in account.layers())
    loss.backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
