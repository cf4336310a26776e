"""The benchmark of the whole suite, and the soak: their arithmetic, their runs and faults, and the last line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import together
from benchmarks.harness import Options, Result, Table
from benchmarks.soak import growth_of, surplus
from benchmarks.together_kills import Killed, _last
from benchmarks.together_losses import CLOCKS, Losses, difference, ratio
from benchmarks.together_runs import settings
from benchmarks.together_scale import RATIO, Scale, grid, largest
from lightning_efficient.monitoring.series import Point

TABLE = Table("a table", (), ())


def test_the_last_checkpoint_is_that_of_the_last_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, epoch, name in ((4, 0, "last.ckpt"), (96, 0, "last-v2.ckpt"), (96, 1, "last-v1.ckpt")):
        torch.save({"global_step": step, "epoch": epoch}, folder / f"{epoch}-{step}.ckpt")
        (folder / name).symlink_to(f"{epoch}-{step}.ckpt")
    assert _last(tmp_path).name == "1-96.ckpt"


def test_sizes_grow_by_the_same_ratio() -> None:
    sizes = [size.parameters for size in grid()]
    assert sizes[0] < 2e6
    assert sizes[-1] > 1e9
    assert all(1 < larger / smaller < RATIO**2 for smaller, larger in itertools.pairwise(sizes[8:]))


@pytest.mark.parametrize("start", [0, 7, 1000])
@pytest.mark.parametrize("fitting", [1, 2, 13, 40])
def test_the_largest_that_fits_is_found_in_few_trials(start: int, fitting: int) -> None:
    sizes, tried = grid()[:40], []

    def fits(size: object) -> bool:
        tried.append(size)
        return size in sizes[:fitting]

    assert largest(sizes, fits, start=start) == sizes[fitting - 1]
    assert len(tried) == len(set(tried)) <= 12


def test_nothing_fits() -> None:
    assert largest(grid(), lambda size: False, start=20) is None


def test_memory_that_grows_is_seen_and_one_that_varies_is_not() -> None:
    flat = [{"step": step, "rss": 1000 + (step % 3 == 0) * 100} for step in range(40)]
    assert growth_of(flat)[0] == 0
    leaking = [{"step": step, "rss": 1000 + 7 * step} for step in range(40)]
    assert growth_of(leaking) == (7 * 30, pytest.approx(7000))


def test_what_is_left_behind_is_named() -> None:
    assert surplus(Counter(a=2, b=1), Counter(a=1, b=1, c=5)) == ["1 more of a"]


def points(*losses: float) -> list[Point]:
    return [Point(step, 10.0 * step, 5.0 * step, loss) for step, loss in enumerate(losses, 1)]


def test_time_to_a_loss_is_over_plains_whole_time() -> None:
    plain, suite = points(4.0, 3.0, 2.0, 1.0), points(3.0, 1.0, 0.5, 0.4)
    for clock in CLOCKS.values():
        assert ratio(plain, suite, clock) == 0.5
        assert ratio(plain, points(3.0, 2.0, 1.5, 1.1), clock) is None


def test_a_configuration_is_changed_by_the_names_of_classes(tmp_path: Path) -> None:
    whole = settings(tmp_path, changes={"RollbackPrecision": {"only_if_faster": False}})
    assert whole["trainer"]["plugins"][0]["init_args"]["only_if_faster"] is False
    assert len(whole["trainer"]["callbacks"]) > 4
    with pytest.raises(KeyError, match="NoSuchThing"):
        settings(tmp_path, changes={"NoSuchThing": {}})


def test_the_last_line_begins_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Losses({"cpu": [0.7, 0.6, None], "wall": [0.5] * 3}, {"plain": [1.0], "the suite": [0.75]}, TABLE)
    assert difference(losses) == -0.25
    imports = {"wall": [90.0, 100.0, 150.0], "cpu": [1.0], "initialised": [0.0]}
    monkeypatch.setattr(together, "import_times", lambda rounds: imports)
    monkeypatch.setattr(together, "measured_scale", lambda options: Scale(4.5, 1.25, [TABLE], {}))
    monkeypatch.setattr(together, "measured_losses", lambda folder, options: losses)
    monkeypatch.setattr(
        together, "killed_and_resumed", lambda folder, kills: Killed(kills, kills, Counter(growth=7), [], TABLE)
    )
    planned = Result("plan", {"plan_peak_error": 0.05, "plan_time_error": 0.1, "plan_checked": "4/4"}, [])
    monkeypatch.setattr(together.plan, "run", lambda options: planned)
    options = Options(quick=False, device="cpu", seeds=(0,), threads=1, out=None)  # type: ignore[arg-type]
    result = together.run(options)
    assert json.loads(json.dumps(result.raw))["kills"] == {"amid": {"growth": 7}, "problems": []}
    assert result.last_line().startswith(
        "together model_scale=4.5 time_per_token_ratio=1.25 time_to_loss_ratio=0.7 resume_exact=50/50 "
        "plan_peak_error=0.05 plan_time_error=0.1 import_ms=100 "
    )
