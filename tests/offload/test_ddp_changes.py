"""Two ranks that divide optimizer state while parameters, memory and batches change (G6, O5, O7)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_efficient import GrowAndUnshareCallback
from lightning_efficient.offload import session, tier_set
from tests.helpers.fitting import assert_same_tree
from tests.helpers.models import ScheduledModel
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.dividing import assert_same_checkpoints, ours, run
from tests.technique_settings import demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def growing(rank: int, root: Path, late: bool) -> None:
    def grow(**arguments: Any) -> GrowAndUnshareCallback:
        return GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 3}, {"depth": 4}], **arguments)

    plain = run(root / "plain", DDPStrategy(), before=[grow()], max_steps=6)
    mine = run(root / "ours", ours(enabled=not late), before=[grow(offload_on_switch=late)], max_steps=6)
    assert mine.losses == plain.losses
    assert_same_checkpoints(mine, plain, "checkpoints")
    again = run(root / "again", ours(), before=[grow()], max_steps=6, ckpt_path=mine.checkpoints[2])
    assert again.losses == plain.losses[2:]
    assert_same_checkpoints(again, plain, "resumed", 6)


@pytest.mark.parametrize("late", [False, True], ids=["from-the-start", "at-the-switch"])
def test_parameters_that_come_while_it_runs_g6(late: bool, tmp_path: Path) -> None:
    run_on_two_ranks(growing, tmp_path, tmp_path, late)


class Enable(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.strategy.enable_offload(trainer)


def enabled_late(rank: int, root: Path) -> None:
    plain = run(root / "plain", DDPStrategy())
    mine = run(root / "ours", ours(enabled=False), before=[Enable()])
    assert mine.losses == plain.losses
    assert_same_checkpoints(mine, plain, "checkpoints")


def test_enabled_while_it_runs_g6(tmp_path: Path) -> None:
    run_on_two_ranks(enabled_late, tmp_path, tmp_path)


class OneMoreGroup(pl.Callback):
    """The optimizer gets a parameter that it had not."""

    def __init__(self, module: nn.Module) -> None:
        self.parameter = module.model.head.weight

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        if trainer.global_step == 0:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not self.parameter]
        if trainer.global_step == 2:
            optimizer.add_param_group({"params": [self.parameter]})


def one_more_group(rank: int, root: Path) -> None:
    runs = []
    for name, strategy in (("plain", DDPStrategy()), ("ours", ours())):
        module = demo_model(ScheduledModel, optimizer="SGD")
        runs.append(run(root / name, strategy, module=module, before=[OneMoreGroup(module)]))
    plain, mine = runs
    assert mine.losses == plain.losses
    assert_same_checkpoints(mine, plain, "checkpoints")


def test_a_group_that_comes_while_it_runs_g6(tmp_path: Path) -> None:
    run_on_two_ranks(one_more_group, tmp_path, tmp_path)


def placed_anew(rank: int, root: Path) -> None:
    plain = run(root / "plain", DDPStrategy(), max_steps=8)
    free = itertools.chain([1 << 20] * 2, [0] * (1 + rank), itertools.repeat(1 << 24))
    tier_set.free_bytes = lambda device: next(free)
    session.ADAPT_EVERY = 2
    mine = run(root / "ours", ours(place=None), max_steps=8)
    assert any(event.technique == "offload" for event in mine.events)
    assert mine.losses == plain.losses
    assert_same_checkpoints(mine, plain, "checkpoints")


def test_each_rank_places_anew_by_its_own_memory_o5(tmp_path: Path) -> None:
    run_on_two_ranks(placed_anew, tmp_path, tmp_path)


class ShortOnce(pl.Callback):
    """Rank 1 has no room for its whole batch, once."""

    def __init__(self, module: nn.Module) -> None:
        self.failed, self.step = 0, -1
        module.model.head.register_forward_hook(self.fail)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step if trainer.global_rank else -1

    def fail(self, module: Any, args: Any, output: Tensor) -> None:
        if self.step == 2 and not self.failed:
            self.failed += 1
            raise torch.OutOfMemoryError("made for this test")


def in_parts(rank: int, root: Path) -> dict[str, Any]:
    module = demo_model()
    short = ShortOnce(module)
    mine = run(root / "ours", ours(batch_feedback=True), module=module, before=[short])
    plain = run(root / "plain", DDPStrategy())
    assert short.failed == rank
    assert mine.losses[:2] == plain.losses[:2]
    assert mine.losses == pytest.approx(plain.losses, rel=1e-3)
    return {"weights": mine.weights, "parts": mine.trainer.strategy.measurements()}


def test_a_step_without_room_is_done_again_in_parts_o7(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(in_parts, tmp_path, tmp_path)
    assert_same_tree(one["weights"], other["weights"], "weights")
    assert other["parts"]["offload/samples_per_part"] == 2
