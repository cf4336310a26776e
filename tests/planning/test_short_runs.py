"""Short runs of a user's configuration: in this process where that is enough, else in one of their own."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_efficient.planning import child
from lightning_efficient.planning.facts import Profile, ShortRun
from lightning_efficient.planning.job import Job
from lightning_efficient.planning.plan import RunFailed, Shop
from lightning_efficient.planning.trainer import save_interval
from tests.planning.small import configuration


@pytest.fixture(autouse=True)
def _no_limit_for_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_limit_memory", lambda nbytes: None)


def run_here(tmp_path: Path, name: str, config: Path, **job: Any) -> dict[str, Any]:
    """What a child would leave."""
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    asked = Job(**({"configs": [str(config)], "folder": str(folder), "batches": 6, "seconds": 0.01} | job))
    (folder / "job.json").write_text(asked.to_json())
    child.main(str(folder / "job.json"))
    return json.loads(asked.result.read_text())


def test_a_profile_has_all_parts_of_the_memory_x4(tmp_path: Path) -> None:
    config = configuration(tmp_path, enable_checkpointing=True)
    found = Profile.from_json(run_here(tmp_path, "profile", config, profile=True, saves=True))
    parameters = 4 * (16 * 16 + 16) * 4
    assert (found.module, found.device) == ("SmallModel", "cpu")
    assert (found.parameters, found.gradients) == (parameters, parameters)
    assert found.optimizer_state == 2 * parameters + 8 * 4  # two moments, and a count for each parameter
    assert sorted(set(found.sizes)) == [16 * rows for rows in range(1, 7)]
    assert found.all_batches
    # What each of the four layers gives is saved by the next one, or by the square.
    assert found.saved == {size: 4 * 4 * size for size in set(found.sizes)}
    assert found.largest_saved == 4 * 4 * 96
    assert found.largest_parameter == 16 * 16 * 4
    assert found.save_interval == 60
    assert found.checkpoint > 3 * parameters
    # Less the batches that only the plan keeps. In a process of many tests all memory may come from what they freed.
    assert found.run.peak_bytes > found.run.base_bytes - (1 << 20) > 0
    assert found.update_peak > 0
    assert {sample.size for sample in found.run.samples} == set(found.sizes)
    assert all(
        0 < sample.forward + sample.backward + sample.update <= sample.wall * 1.001 for sample in found.run.samples
    )
    assert found.taken == {}


def test_a_trial_trains_on_the_batches_of_the_profile_with_a_technique(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    run_here(tmp_path, "profile", config, profile=True)
    overlay = tmp_path / "overlay.yaml"
    names = ["ActivationCompressionPlugin", "AsyncCheckpointIO"]
    callbacks = [{"class_path": f"lightning_efficient.{name}"} for name in names]
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    found = ShortRun.from_json(run_here(tmp_path, "trial", config, configs=[str(config), str(overlay)], saves=True))
    assert {sample.size for sample in found.samples} == {16 * rows for rows in range(1, 7)}
    assert found.values["activations/saved_bytes"] > 0
    assert found.values["checkpoint/saves"] == 2


def test_a_check_trains_as_the_user_would(tmp_path: Path) -> None:
    found = ShortRun.from_json(run_here(tmp_path, "check", configuration(tmp_path), chosen=False, batches=8))
    assert [sample.size for sample in found.samples][:3] == [16 * 4, 16 * 5, 16 * 6]  # three are warm-up


def test_callbacks_that_write_or_stop_are_left_out(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "never"}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 7}},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": "lightning_efficient.EfficiencyMonitor"},
        {"class_path": "lightning_efficient.AsyncCheckpointIO"},
    ]
    config = configuration(tmp_path, callbacks=callbacks, max_steps=5, accumulate_grad_batches=2)
    config.write_text(config.read_text().replace("enable_checkpointing: false", "enable_checkpointing: true"))
    found = Profile.from_json(run_here(tmp_path, "profile", config, profile=True, saves=True))
    assert found.save_interval == 14
    assert found.taken == {"checkpoint": "AsyncCheckpointIO"}
    assert found.checkpoint > 0, "written behind the training"
    assert found.run.accumulate == 2
    assert len(found.run.samples) >= 6
    assert not list(tmp_path.rglob("efficiency_report.md"))


def test_checkpoints_of_the_training_are_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "step=900.ckpt").write_bytes(b"a checkpoint")
    (own / "last.ckpt").symlink_to("step=900.ckpt")
    arguments = {"frequency": "drive", "dirpath": str(own), "local_dir": str(own), "resume": "auto"}
    callbacks = [{"class_path": "lightning_efficient.AsyncCheckpointIO", "init_args": arguments}]
    found = run_here(tmp_path, "profile", configuration(tmp_path, callbacks=callbacks), profile=True, batches=40)
    assert found["run"]["values"]["checkpoint/saves"] > 0
    assert {path.name for path in own.iterdir()} == {"step=900.ckpt", "last.ckpt"}
    assert (own / "last.ckpt").read_bytes() == b"a checkpoint"


def test_several_loaders_give_one_batch_together(tmp_path: Path) -> None:
    config = configuration(tmp_path, "TwoInputs")
    config.write_text(config.read_text().replace("SmallData", "TwoLoaders"))
    found = Profile.from_json(run_here(tmp_path, "profile", config, profile=True))
    assert set(found.sizes) == {2 * 16 * 2}
    assert found.save_interval == 0
    assert found.batches == 4 * 20
    ShortRun.from_json(run_here(tmp_path, "check", config, chosen=False))


def test_a_training_that_is_over_too_soon_is_told(tmp_path: Path) -> None:
    found = run_here(tmp_path, "profile", configuration(tmp_path, max_epochs=1, limit_train_batches=4), profile=True)
    assert "trainer.max_epochs" in found["error"]["message"]


SAVES = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.mark.parametrize(
    ("trainer", "arguments", "expected"),
    [
        ({}, {}, 60),
        ({}, None, 60),
        ({}, {"every_n_epochs": 10}, 600),
        ({}, {"save_top_k": 0}, 0),
        ({"val_check_interval": 20}, {}, 20),
        ({"val_check_interval": 0.5}, {"every_n_epochs": 2}, 60),
        ({"val_check_interval": 20}, {"save_on_train_epoch_end": True}, 60),
        ({"val_check_interval": 20, "limit_val_batches": 0}, {}, 60),
        ({"check_val_every_n_epoch": 3}, {"every_n_epochs": 2}, 360),
        ({"check_val_every_n_epoch": None, "val_check_interval": 100}, {}, 100),
        ({"accumulate_grad_batches": 2}, {"every_n_train_steps": 7}, 14),
    ],
)
def test_how_often_a_configuration_saves(
    tmp_path: Path, trainer: dict[str, Any], arguments: dict[str, Any] | None, expected: int
) -> None:
    callbacks = [] if arguments is None else [{"class_path": SAVES, "init_args": arguments}]
    config = configuration(tmp_path, "Validates", enable_checkpointing=True, callbacks=callbacks, **trainer)
    assert run_here(tmp_path, "profile", config, profile=True)["save_interval"] == expected


def test_saving_by_the_clock_is_counted_in_batches() -> None:
    class Cli:
        saves_by_default = True
        saves = (ModelCheckpoint(train_time_interval=timedelta(minutes=1)),)

    assert save_interval(Cli(), 60, 0.5) == 120  # type: ignore[arg-type]


def test_what_the_users_code_raises_is_told_with_its_place(tmp_path: Path) -> None:
    found = run_here(tmp_path, "profile", configuration(tmp_path, "Breaks"), profile=True)
    assert found["error"]["kind"] == "KeyError"
    assert "no such column" in found["error"]["message"]
    assert "small.py, line" in found["error"]["message"]


def test_several_devices_are_refused(tmp_path: Path) -> None:
    class Two:
        world_size = 2

    class Cli:
        trainer = Two()

    job = Job(configs=[], folder=str(tmp_path))
    with pytest.raises(ValueError, match="trains on 2 devices"):
        child._Run(job)._before_fit(Cli())  # type: ignore[arg-type]


def test_a_file_for_a_command_line_that_knows_its_classes_is_told_what_it_lacks(tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"max_steps": 4}}))
    message = run_here(tmp_path, "profile", config, profile=True)["error"]["message"]
    assert "fit.model" in message
    assert "model: {class_path:" in message


def test_a_configuration_that_does_not_load_is_told(tmp_path: Path) -> None:
    found = run_here(tmp_path, "profile", configuration(tmp_path, "NoSuchModel"), profile=True)
    assert "NoSuchModel" in found["error"]["message"]


@pytest.mark.slow
def test_a_process_of_its_own_is_limited_and_its_end_is_told(tmp_path: Path) -> None:
    shop = Shop([str(configuration(tmp_path, "TakesTooMuch"))], tmp_path / "runs")
    with pytest.raises(RunFailed) as caught:
        shop.run({}, profile=True)
    assert caught.value.kind == "memory"
