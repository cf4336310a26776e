"""The command: what it says, writes and returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_efficient.__main__ import main as lightning_efficient
from lightning_efficient.planning import plan as planning
from lightning_efficient.planning.command import main
from lightning_efficient.planning.facts import Sample, ShortRun
from lightning_efficient.planning.options import options_for
from lightning_efficient.planning.plan import Plan, RunFailed, Shop, make_plan
from tests.planning.small import MIB, configuration, profile

TRIALS = {
    "ActivationCompressionPlugin": (1.2, 600),
    "OffloadStrategy": (1.5, 680),
    "RollbackPrecision": (0.7, 980),
    "GrowAndUnshareCallback": (0.4, 500),
    "AsyncCheckpointIO": (1.0, 970),
}


BIG = {"peak_bytes": 801 * MIB}


class Runs:
    """Stands for the processes: each technique does what the table says."""

    def __init__(self, **changed: Any) -> None:
        self.profile = profile(**changed)
        self.asked: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.refused: dict[str, str] = {}
        self.together: tuple[float, int] | str | None = None
        self.said: list[str] = []

    def __call__(self, shop: Shop, trainer: dict[str, Any], **job: Any) -> dict[str, Any]:
        self.asked.append((trainer, job))
        for name, why in self.refused.items():
            if name in str(trainer):
                raise RunFailed("memory" if why == "memory" else "MisconfigurationException", why)
        if job.get("profile"):
            return self.profile.to_json()
        names = [name for name in TRIALS if name in str(trainer)]
        if len(names) > 1 and isinstance(self.together, str):
            raise RunFailed(self.together, "not both")
        wall = 1.0 + sum(TRIALS[name][0] - 1.0 for name in names)
        peak = min([950, *(TRIALS[name][1] for name in names)]) if names else 950
        if len(names) > 1 and self.together is not None:
            wall, peak = self.together
        values = {"activations/saved_bytes": 400.0 * MIB, "activations/kept_bytes": 40.0 * MIB}
        samples = tuple(Sample(64, wall, wall) for _ in range(3))
        return ShortRun(
            100 * MIB, peak * MIB, samples, yardstick=(0.002, 0.002), values=values, save_seconds=0.1
        ).to_json()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(Shop, "run", lambda shop, trainer, **job: found(shop, trainer, **job))
    return found


def plan(tmp_path: Path, *arguments: str) -> int:
    """The command's exit status."""
    return main(["--config", str(configuration(tmp_path)), *arguments])


def test_it_writes_an_overlay_and_a_report_and_checks_x4(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, "--memory", "800MiB") == 0
    trainer = yaml.safe_load(Path("plan.yaml").read_text())["trainer"]
    assert "ActivationCompressionPlugin" in str(trainer["callbacks+"])  # lossless, the fastest that fits
    assert "lossless" in str(trainer)
    printed = capsys.readouterr()
    assert "## Where memory goes" in Path("plan.md").read_text()
    assert "## Checked by a run" in Path("plan.md").read_text()
    assert "trying offload-state" in printed.err
    assert runs.asked[-1] == (trainer, {"warm_up": 3, "chosen": False, "saves": False})
    assert not list(Path.cwd().glob(".plan-*"))
    assert "No run has checked it" not in Path("plan.yaml").read_text()
    assert plan(tmp_path, "--memory", "800MiB") == 0, "a plan may be made again"


@pytest.mark.parametrize("fails", [False, True])
def test_what_does_not_hold_when_it_is_run_is_not_used_x4(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    def run(shop: Shop, trainer: dict[str, Any], **job: Any) -> dict[str, Any]:
        found = runs(shop, trainer, **job)
        if job.get("chosen", True) or "lossless" not in str(trainer):
            return found
        if fails:
            raise RunFailed("memory", "can't allocate")
        return found | {"peak_bytes": 801 * MIB}

    monkeypatch.setattr(Shop, "run", run)
    assert plan(tmp_path, "--memory", "800MiB") == 0
    trainer = yaml.safe_load(Path("plan.yaml").read_text())["trainer"]
    assert "OffloadStrategy" in str(trainer)
    assert "lossless" not in str(trainer)
    assert ("can't allocate" if fails else "It took more than 800 MiB") in Path("plan.md").read_text()
    assert "What looked better did not do when it was run: 1 of them" in capsys.readouterr().out


def test_where_nothing_holds_there_is_no_overlay(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Shop, "run", lambda shop, trainer, **job: runs(shop, trainer, **job) | ({} if job.get("chosen", True) else BIG)
    )
    assert plan(tmp_path, "--memory", "800MiB") == 3
    assert not Path("plan.yaml").exists()
    text = Path("plan.md").read_text()
    assert "3 of 3 times" in text
    assert text.count("It took more than 800 MiB") == 3


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("my.yaml", "is one of the configurations"),
        ("third.yaml", "third.yaml', which is no plan"),
        ("other.yaml", "other.md', which is no plan"),
        ("plan.md", "does not end in .yaml"),
        ("", "does not end in .yaml"),
        ("folder.yaml", "is a folder"),
        ("/proc/nowhere/plan.yaml", "Cannot write"),
    ],
)
def test_what_would_be_replaced_is_asked_before_anything_is_run(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str], out: str, words: str
) -> None:
    Path("folder.yaml").mkdir()
    Path("other.md").write_text("my notes")
    Path("third.yaml").write_text("model: mine")
    name = str(tmp_path / out) if out == "my.yaml" else out
    assert plan(tmp_path, "--out", name) == 1
    assert words in capsys.readouterr().err
    assert not runs.asked
    assert Path("other.md").read_text() == "my notes"


def test_what_changes_results_has_to_be_allowed(tmp_path: Path, runs: Runs) -> None:
    assert plan(tmp_path, "--no-check", "--out", "exact.yaml") == 0
    assert yaml.safe_load(Path("exact.yaml").read_text()) == {}
    assert plan(tmp_path, "--no-check", "--allow-lossy", "--out", "deep/lossy.yaml") == 0
    text = Path("deep/lossy.yaml").read_text()
    assert "RollbackPrecision" in text
    assert "GrowAndUnshareCallback" in text


KEYS = {"activations-lossless", "activations-4bit", "offload-all", "int8", "async-checkpoints"}


def made(tmp_path: Path, runs: Runs) -> Plan:
    return make_plan(Shop([], tmp_path, say=lambda text: runs.said.append(text)), only=KEYS)


@pytest.mark.parametrize("saves", [0, 60])
def test_a_pair_that_was_tried_is_predicted_as_it_was_x4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    runs = Runs(save_interval=saves)
    runs.together = (1.4, 630)
    monkeypatch.setattr(Shop, "run", lambda shop, trainer, **job: runs(shop, trainer, **job))
    plan = made(tmp_path, runs)
    for keys in (("activations-4bit", "int8"), ("activations-4bit", "offload-all")):
        found = plan.candidate((*keys, "async-checkpoints") if saves else keys).prediction
        assert found.step.wall == pytest.approx(1.4)
        if not saves:
            assert found.peak == pytest.approx(630 * MIB, abs=10)
        else:  # as if it were alone, but for what the other one adds to any combination
            assert found.peak >= 630 * MIB
    assert "trying activations-4bit and int8 ..." in runs.said


@pytest.mark.parametrize(("kind", "left"), [("memory", True), ("MisconfigurationException", False)])
def test_a_pair_that_was_tried_in_vain_is_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, left: bool
) -> None:
    runs = Runs()
    runs.together = kind
    monkeypatch.setattr(Shop, "run", lambda shop, trainer, **job: runs(shop, trainer, **job))
    plan = made(tmp_path, runs)
    names = {candidate.name for candidate in plan.found}
    assert not names & {"activations-4bit + int8", "activations-4bit + offload-all"}
    assert ("activations-4bit + offload-all + int8" in names) == left
    assert "activations-lossless + int8" in names
    assert "activations-4bit + int8" in plan.not_tried


def test_nothing_fits_is_status_three_x4(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path, "--memory", "50MiB") == 3
    assert "Nothing fits into 50 MiB" in capsys.readouterr().out
    assert not Path("plan.yaml").exists()


def test_what_is_refused_is_named_and_the_next_way_is_tried(
    tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.refused = {"'gradient': 'disk'": "gradients are read", "RollbackPrecision": "it cannot be\nbecause"}
    assert plan(tmp_path, "--no-check", "--memory", "1") == 3
    printed = capsys.readouterr().out
    assert "- int8: it cannot be\n" in printed
    assert "offload-all" in printed
    assert "- offload-all" not in printed


def test_plain_training_that_does_not_fit_is_profiled_from_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Runs(taken={"offload": "OffloadStrategy"})

    def run(shop: Shop, trainer: dict[str, Any], **job: Any) -> dict[str, Any]:
        if not trainer:
            raise RunFailed("memory", "no memory")
        return found(shop, trainer, **job)

    monkeypatch.setattr(Shop, "run", run)
    assert plan(tmp_path, "--no-check", "--memory", "1GiB") == 0
    assert "Plain training does not fit here" in capsys.readouterr().out
    assert yaml.safe_load(Path("plan.yaml").read_text())


def test_parts_of_an_offloaded_profile_add_up() -> None:
    parts = planning._parts(profile(offloaded=True))
    assert parts.peak == (100 + 100 + 100 + 200 + 400 + (950 - 100 - 400)) * MIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "much"], "--memory='much' is no amount of memory"),
        (["--steps", "1"], "--steps 1 is too few"),
        (["--config", "nowhere.yaml"], "nowhere.yaml is no file"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert plan(tmp_path, *arguments) == 1
    assert words in capsys.readouterr().err


def test_a_module_that_fails_is_told_in_a_sentence(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(shop: Shop, trainer: dict[str, Any], **job: Any) -> dict[str, Any]:
        raise RunFailed("KeyError", "'no such column' (mine.py, line 3, in training_step)")

    monkeypatch.setattr(Shop, "run", run)
    with pytest.raises(SystemExit) as ended:
        lightning_efficient(["plan", "--config", str(configuration(tmp_path))])
    assert ended.value.code == 1
    assert "fails: 'no such column' (mine.py, line 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_plan_of_a_small_training_x4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        planning,
        "options_for",
        lambda found: ([option for option in options_for(found)[0] if option.key == "offload-state"], {}),
    )
    assert plan(tmp_path, "--steps", "6") == 0
    text = Path("plan.md").read_text()
    assert "| offload-state" in text
    assert "| peak " in text.split("## Checked by a run")[1]
