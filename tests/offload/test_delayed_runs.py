"""Runs with late updates in a Trainer: against a loop by hand, validated, saved and resumed (O10)."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_efficient import AsyncCheckpointIO, OffloadStrategy
from lightning_efficient.offload import session as offload_session
from lightning_efficient.offload import tier_set
from tests.helpers.fitting import Run, assert_continues, assert_same_tree, fit
from tests.offload.late import AFTER, CLIPS, PLACES, by_hand, delayed, same
from tests.technique_settings import STEPS, demo_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:The dirpath has changed",
    "ignore:.*was called without a model",  # so Lightning speaks of an OnExceptionCheckpoint
    "ignore:.*there is no last checkpoint available",
)

# -- what is computed --------------------------------------------------------------------------------------------------


@functools.cache
def plain_run(clip: str, accumulate: int) -> tuple[dict[str, Any], Run]:
    """Its arguments, and what came of it."""
    arguments = {**CLIPS[clip], "accumulate_grad_batches": accumulate, "max_steps": 8}
    return arguments, fit(None, **arguments)


@pytest.mark.parametrize(
    ("place", "clip", "accumulate"),
    [  # of each place and each clipping there is one that accumulates and one that does not
        (place, clip, (1, 3)[number % 2]) for number, (place, clip) in enumerate(itertools.product(PLACES, CLIPS))
    ],
)
def test_a_run_is_that_of_a_loop_by_hand_o10(
    place: str, clip: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_session, "_SAVED", 1024)
    arguments, plain = plain_run(clip, accumulate)
    ours = fit(None, build=delayed(place=place), **arguments)
    same(ours, by_hand(plain, accumulate=accumulate, clip=clip))
    assert ours.losses != plain.losses


def test_the_first_steps_are_exact_o10() -> None:
    plain = fit(None)
    same(fit(None, build=delayed(after=STEPS)), plain)
    ours = fit(None, build=delayed(after=7))
    assert ours.losses[:8] == plain.losses[:8]  # the loss of a step is of the weights behind the one before
    assert ours.losses[8] != plain.losses[8]
    same(ours, by_hand(plain, after=7))


def test_validation_finds_weights_that_are_not_behind_o10() -> None:
    arguments = {"limit_val_batches": 1, "val_check_interval": 5}
    plain = fit(None, **arguments)
    ours = fit(None, build=delayed(place="everything"), **arguments)
    found = by_hand(plain, asked=(5, 10, 15))
    same(ours, found)
    [loss] = {step: m["val_loss"] for step, m in ours.logged if "val_loss" in m and step == 4}.values()
    module = demo_model()
    module.load_state_dict(found.weights_at[4], strict=False)
    trainer = pl.Trainer(logger=False, limit_val_batches=1, enable_progress_bar=False, enable_model_summary=False)
    [validated] = trainer.validate(module, ours.trainer.datamodule, verbose=False)
    assert float(loss) == validated["val_loss"]


def test_who_asks_for_state_gets_that_of_the_last_step_o10() -> None:
    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                self.state = trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
            if trainer.global_step == 7:
                trainer.strategy.finish_updates()

    asks, plain = Asks(), fit(None)
    same(fit(None, build=delayed(), before=[asks]), by_hand(plain, asked=(5, 7)))
    plain.batches, plain.rates = plain.batches[:5], plain.rates[:5]
    [optimizer] = by_hand(plain).optimizers
    assert torch.equal(asks.state, optimizer["state"][optimizer["names"][0][0]]["exp_avg"])


def test_free_memory_that_changes_does_not_change_the_run_o10(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 20] * 3 + [0] * 4 + [1 << 24] * 40)
    monkeypatch.setattr(tier_set, "free_bytes", lambda device: next(free))
    monkeypatch.setattr(offload_session, "ADAPT_EVERY", 1)
    strategy = OffloadStrategy(offload_dir="swap", schedule="delayed", delay_after=AFTER)
    run = fit(None, build={"strategy": strategy})
    assert len(run.events) >= 2
    same(run, by_hand(fit(None)))


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [AFTER, 9])
@pytest.mark.parametrize("callback", ["plain", "asynchronous"])
def test_resumed_it_goes_on_as_the_run_that_saved_o10(after: int, callback: str, tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        asynchronous = {"callbacks": [AsyncCheckpointIO(in_memory=1)]} if callback == "asynchronous" else {}
        return {**delayed(after), **asynchronous}

    when = {"every_n_train_steps": 6}
    whole = fit(None, build=build(), root=tmp_path, checkpoints=when)
    assert sorted(whole.checkpoints) == [6, 12]
    expected = by_hand(fit(None), after=after, asked=(6, 12))
    same(whole, expected)
    for step, path in dict(whole.checkpoints).items():
        saved = torch.load(path, weights_only=True)
        weights = {name: saved["state_dict"][name] for name in expected.weights}
        assert_same_tree(weights, expected.weights_at[step - 1], "saved")
        resumed = fit(None, build=build(), root=tmp_path / f"from {step}", checkpoints=when, ckpt_path=path)
        same_from = Run(resumed.trainer, resumed.module, None, [], losses=whole.losses[step:])
        same_from.weights, same_from.optimizers = whole.weights, whole.optimizers
        same(resumed, same_from)


def test_a_checkpoint_is_plain_o10(tmp_path: Path) -> None:
    plain = fit(None, root=tmp_path / "plain", checkpoints={"every_n_train_steps": 6})
    ours = fit(None, build=delayed(after=6), root=tmp_path / "ours", checkpoints={"every_n_train_steps": 6})
    one, other = (torch.load(run.checkpoints[6], weights_only=True) for run in (ours, plain))
    assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
    assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
    assert_continues(fit(None, ckpt_path=ours.checkpoints[6]), fit(None, ckpt_path=plain.checkpoints[6]))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_checkpoint_of_a_run_that_failed_is_of_one_step_o10(where: str, tmp_path: Path) -> None:
    module, plain = demo_model(), fit(None)
    plain.batches, plain.rates = plain.batches[:5], plain.rates[:5]
    expected = by_hand(plain)

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                fail = lambda *_: _raise()  # noqa: E731
                if where == "forward":
                    module.model.blocks[2].register_forward_hook(fail)
                else:
                    module.model.blocks[1].register_full_backward_hook(fail)

    def _raise() -> None:
        raise RuntimeError("made for this test")

    save = OnExceptionCheckpoint(tmp_path, "last")
    with pytest.raises(RuntimeError, match="made for this test"):
        fit(None, build=delayed(), module=module, after=[Fails(), save], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    weights = {name: saved["state_dict"][name] for name in expected.weights}
    assert_same_tree(weights, expected.weights, "weights")
    [optimizer] = expected.optimizers
    names = [name for group in optimizer["names"] for name in group]
    state = {names[place]: one for place, one in saved["optimizer_states"][0]["state"].items()}
    assert_same_tree(state, optimizer["state"], "optimizer")
