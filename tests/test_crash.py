"""Killed at any point, a run ends where it would have ended (G8, X1)."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_efficient import telemetry
from tests.helpers.crash import newest_loadable, run_and_kill
from tests.helpers.fitting import assert_same_tree, fit, optimizer_by_name
from tests.technique_settings import TechniqueSetting, every, named

STEPS = 48
"""More than elsewhere, so that there is time to be killed."""

SEEDS = {
    "stack": 1,
    "share-by-correlation": 7,
    "stack-and-width": 3,
    "monitor": 4,
    "checkpoint": 5,
    "offload": 6,
    "offload-everything": 8,
    "precision": 9,
}
"""Of the moments at which each is killed."""


def train(folder: Path, checkpoint: Path | None, name: str) -> None:
    """Train to the end from ``checkpoint``, and write down how it ended."""
    run = fit(named(name), root=folder, checkpoints={"every_n_train_steps": 2}, ckpt_path=checkpoint, max_steps=STEPS)
    # Not what the run recorded as training ended: one that was killed after its last step has no training left.
    result = {
        "weights": dict(run.module.state_dict()),
        "optimizers": [optimizer_by_name(optimizer, run.module) for optimizer in run.trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in run.trainer.lr_scheduler_configs],
        "steps": run.trainer.global_step,
        "events": [event.text for event in telemetry.events(run.trainer)],
    }
    torch.save(result, folder / "result.pt")


@every(lambda setting: setting.name in SEEDS)
def test_killed_at_random_it_ends_as_if_nothing_had_been_g8_x1(setting: TechniqueSetting, tmp_path: Path) -> None:
    run_and_kill(train, tmp_path / "whole", setting.name, seed=0, kills=0)
    killed = run_and_kill(train, tmp_path / "killed", setting.name, seed=SEEDS[setting.name], kills=4)
    one, other = (torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("killed", "whole"))
    assert_same_tree(one, other, "result")
    assert other["steps"] == STEPS
    assert killed.kills == 4


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    setting = named("stack")
    whole = fit(setting, root=tmp_path, checkpoints={})
    last = max(whole.checkpoints)
    content = whole.checkpoints[last].read_bytes()
    whole.checkpoints[last].write_bytes(content[: len(content) // 2])
    newest = newest_loadable(tmp_path / "checkpoints")
    assert newest == whole.checkpoints[last - 1]
