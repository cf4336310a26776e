"""What is tried, what is chosen, and the configuration that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_efficient.planning import plan as planning
from lightning_efficient.planning.choose import Candidate, best, candidates, frontier, least, with_room
from lightning_efficient.planning.facts import Profile, Seconds
from lightning_efficient.planning.model import Alone, Parts
from lightning_efficient.planning.options import merged, options_for
from lightning_efficient.planning.plan import Plan
from lightning_efficient.planning.words import checked, overlay, report
from tests.planning.small import MIB, profile

PARTS = Parts(100 * MIB, 100 * MIB, 100 * MIB, 200 * MIB, 400 * MIB, 950 * MIB, 520 * MIB)
TRIED = {
    "activations-lossless": (1.1, 700, {"saved": 0.5}),
    "activations-4bit": (1.3, 600, {"saved": 0.1}),
    "offload-state": (1.5, 680, {"optimizer_state": 0.0}),
    "offload-all": (2.0, 580, dict.fromkeys(("parameters", "gradients", "optimizer_state"), 0.0)),
    "int8": (0.7, 980, {}),
}


def a_plan() -> Plan:
    found = profile()
    options, not_tried = options_for(found)
    alone = {
        key: Alone(key, next(o.slot for o in options if o.key == key), Seconds(wall, wall), peak * MIB, keeps)
        for key, (wall, peak, keeps) in TRIED.items()
    }
    options = [option for option in options if option.key in alone]
    plain = Seconds(1.0, 1.0)
    return Plan(found, PARTS, plain, options, alone, not_tried, candidates(found, PARTS, plain, options, alone))


PLAN = a_plan()


def test_there_is_every_combination_once_and_none_that_keeps_activations_twice() -> None:
    names = [candidate.name for candidate in PLAN.found]
    assert names[0] == "as it is"
    assert len(names) == len(set(names)) == 3 * 3 * 2
    assert "activations-4bit + offload-all + int8" in names


def test_without_a_budget_it_is_the_fastest_and_exact_ones_come_first() -> None:
    assert best(PLAN.found, None, lossy=False).name == "as it is"  # type: ignore[union-attr]
    assert best(PLAN.found, None, lossy=True).name == "int8"  # type: ignore[union-attr]


def test_a_budget_is_kept_with_its_margin_x4() -> None:
    def chosen(mebibytes: int, lossy: bool = False) -> str | None:
        found = best(PLAN.found, mebibytes * MIB, lossy=lossy)
        return found and found.name

    assert chosen(1060) == "as it is"  # 950 by 0.9
    assert chosen(1050) == "activations-lossless"
    assert chosen(760) == "offload-state"  # 680 of 684
    assert chosen(700) == "activations-lossless + offload-state"  # 550, and 50 and 70 below their sums
    assert chosen(760, lossy=True) == "activations-4bit + int8"  # 600 and 30
    assert chosen(100) is None
    assert least(PLAN.found, lossy=True).prediction.peak < least(PLAN.found, lossy=False).prediction.peak


def test_the_frontier_has_what_nothing_else_beats() -> None:
    kept = frontier(PLAN.found, lossy=False)
    assert kept[0].name == "as it is"
    peaks = [candidate.prediction.peak for candidate in kept]
    times = [candidate.prediction.seconds.wall for candidate in kept]
    assert peaks == sorted(peaks, reverse=True)
    assert times == sorted(times)


def test_what_a_configuration_has_already_is_not_planned_again() -> None:
    options, why = options_for(profile(taken={"offload": "DDPStrategy"}, precision="16-mixed", save_interval=50))
    assert {option.slot for option in options} == {"activation", "growth", "checkpoint"}
    assert "DDPStrategy" in why["offload"]
    assert "16-mixed" in why["precision"]


def test_room_that_is_left_goes_to_what_would_have_to_move() -> None:
    small = PLAN.candidate(["offload-all"])
    wide = with_room(small, 800 * MIB, movable=400 * MIB)
    budget = wide.options[0].trainer["strategy"]["init_args"]["memory_budget"]["host"]
    before = small.options[0].trainer["strategy"]["init_args"]["memory_budget"]["host"]
    assert int(budget[:-3]) == int(before[:-3]) + 720 - 580
    assert wide.prediction.peak == 720 * MIB
    assert with_room(small, None, movable=400 * MIB) is small
    assert with_room(PLAN.candidate(["int8"]), 10**12, 1).prediction == PLAN.candidate(["int8"]).prediction


def test_the_overlay_says_what_it_does_and_loads_x4() -> None:
    chosen = PLAN.candidate(["activations-4bit", "offload-state", "int8"])
    text = overlay(PLAN, chosen, 760 * MIB, held=True)
    trainer = yaml.safe_load(text)["trainer"]
    assert trainer == merged(chosen.options)
    assert trainer["strategy"]["class_path"] == "lightning_efficient.OffloadStrategy"
    assert trainer["plugins"][0]["init_args"] == {"low": "int8", "high": "fp32"}
    assert [each["class_path"] for each in trainer["callbacks+"]] == ["lightning_efficient.ActivationCompressionPlugin"]
    assert "Results: gradients get an error that is zero on average." in text.replace("\n# ", " ")
    assert "of the time now" in text
    assert yaml.safe_load(overlay(PLAN, PLAN.found[0], None, held=True)) == {}


def test_mixed_precision_makes_room_for_the_plugin() -> None:
    options, _ = options_for(profile(precision="bf16-mixed"))
    trainer = merged([option for option in options if option.key == "int8"])
    assert trainer["precision"] is None
    assert trainer["plugins"][0]["init_args"] == {"low": "int8", "high": "bf16"}
    tried = merged(options, trial=True)["plugins"][0]["init_args"]
    assert tried["pre_learning_steps"] < 50  # the default, which a short run would not see the end of


def test_for_a_gpu_the_hosts_memory_comes_before_the_disk() -> None:
    for option in options_for(profile(device="cuda"))[0]:
        if option.slot == "offload":
            tiers = [set(way["strategy"]["init_args"]["place"].values()) for way in (option.trainer, *option.instead)]
            assert tiers == [{"host"}, {"disk"}] * (len(tiers) // 2), option.key
            assert "memory_budget" not in option.trainer["strategy"]["init_args"]
            assert "host's memory" in option.says


def test_what_workers_fetch_behind_a_step_is_not_waited_for() -> None:
    assert profile(data_seconds=0.5).waits(2.0) == 0.5
    assert profile(data_seconds=0.5, prefetches=True).waits(2.0) == 0
    assert profile(data_seconds=0.5, prefetches=True).waits(0.2) == pytest.approx(0.3)


def test_the_report_shows_where_memory_goes_and_what_was_chosen() -> None:
    text = report(PLAN, PLAN.candidate(["offload-state"]), 760 * MIB, lossy=False)
    assert "| optimizer state" in text
    assert "200 MiB" in text
    assert "`blocks.*.mlp` (4 of them)" in text
    assert "| **offload-state**" in text
    assert "--allow-lossy" in text
    assert "- checkpoint: the configuration saves no checkpoints" in text


def test_where_nothing_fits_it_says_what_would_do_and_what_takes_most() -> None:
    text = report(PLAN, None, 200 * MIB, lossy=False)
    assert "Nothing fits into 200 MiB" in text
    assert "--memory" in text
    assert "With --allow-lossy" in text
    assert "Most of that is" in text


def test_a_check_compares_the_step_of_the_whole_model() -> None:
    text = checked(
        PLAN.candidate(["offload-state"]), 700 * MIB, Seconds(2.0, 2.0), profile(data_seconds=0.1), 700 * MIB
    )
    assert "-2.9%" in text
    assert "-20.0%" in text
    assert "It took more than" not in text
    assert "**It took more than 699 MiB**" in checked(
        PLAN.candidate(["offload-state"]), 700 * MIB, Seconds(2.0, 2.0), profile(), 699 * MIB
    )


def test_a_profile_passes_between_processes(tmp_path: Path) -> None:
    found = profile()
    (tmp_path / "profile.json").write_text(json.dumps(found.to_json()))
    assert Profile.from_json(json.loads((tmp_path / "profile.json").read_text())) == found
    assert found.largest_saved == pytest.approx(400 * MIB)


def test_what_only_chance_can_have_done_is_not_believed() -> None:
    busy = profile(threads=1)
    plain = Seconds(2.0, 1.0)  # half of the processor was somebody else's
    options = {option.key: option for option in options_for(busy)[0]}

    def trusted(key: str, wall: float, cpu: float) -> float:
        return planning._trusted(Seconds(wall, cpu), options[key], busy, plain).wall

    assert trusted("activations-4bit", 1.5, 1.2) == pytest.approx(2.4)
    assert trusted("int8", 3.0, 0.5) == pytest.approx(1.0)
    assert trusted("offload-state", 1.5, 1.2) == pytest.approx(2.0)  # it adds work, and cannot be faster
    assert trusted("offload-state", 2.5, 1.2) == pytest.approx(2.5)


def test_candidates_are_named_by_their_options() -> None:
    assert Candidate((), PLAN.found[0].prediction).name == "as it is"
