"""Runs with late updates in a Trainer: against a loop by hand, resumed, interrupted, and what is refused (O10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback, OffloadDDPStrategy, OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.demos.metrics import IGNORED
from lightning_efficient.offload import session as offload_session
from lightning_efficient.offload import tier_set
from tests.helpers.fitting import Run, StopAt, assert_continues, assert_same_tree, fit, optimizer_by_name
from tests.helpers.models import ManualModel
from tests.technique_settings import EPOCH, STEPS, demo_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:The dirpath has changed",
    "ignore:.*was called without a model",  # so Lightning speaks of an OnExceptionCheckpoint
    "ignore:.*there is no last checkpoint available",
)

AFTER = 2
PLACES: dict[str, dict[str, str]] = {
    "state": {"optimizer_state": "disk"},
    "host": {"optimizer_state": "host", "optimizer_state:blocks.2.*": "disk"},
    "gradients": dict.fromkeys(("optimizer_state", "gradient"), "disk"),
    "parameters": dict.fromkeys(("optimizer_state", "parameter"), "disk"),
    "everything": dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk"),
}
CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def delayed(after: int = AFTER, place: str = "state", **arguments: Any) -> dict[str, Any]:
    strategy = OffloadStrategy(
        offload_dir="swap", place=PLACES[place], schedule="delayed", delay_after=after, **arguments
    )
    return {"strategy": strategy}


def by_hand(
    plain: Run, *, after: int = AFTER, accumulate: int = 1, clip: str = "none", asked: tuple[int, ...] = ()
) -> Run:
    """What a run does whose updates are late, in plain torch.

    Args:
        plain: The same run without a strategy: for its batches and learning rates.
        after: Steps that are exact.
        accumulate: Batches of a step.
        clip: See ``CLIPS``.
        asked: Steps behind which somebody asks for the weights.
    """
    run = Run(plain.trainer, demo_model(), None, [])
    module = run.module
    parameters = list(module.parameters())
    shared = {"lr": module.learning_rate, "betas": module.betas}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": module.weight_decay, **shared},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **shared},
        ]
    )
    held: tuple[list[Tensor | None], list[float]] | None = None

    def apply() -> None:
        nonlocal held
        if held is not None:
            for parameter, gradient in zip(parameters, held[0], strict=True):
                parameter.grad = gradient
            for group, rate in zip(optimizer.param_groups, held[1], strict=True):
                group["lr"] = rate
            optimizer.step()
            held = None

    step = 0
    for (_, index, batch), rates in zip(plain.batches, plain.rates, strict=True):
        if index % accumulate == 0:
            optimizer.zero_grad()
        tokens = torch.tensor(batch)
        logits = module.model(tokens[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=IGNORED)
        loss = loss / accumulate
        run.losses.append(float(loss.detach()))
        loss.backward()
        if (index + 1) % accumulate and index + 1 < EPOCH:
            continue
        if clip == "norm":
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.3)
        elif clip == "value":
            nn.utils.clip_grad_value_(parameters, 0.01)
        gradients = [parameter.grad for parameter in parameters]
        apply()
        held, step = (gradients, rates), step + 1
        if step <= after or step in asked or index + 1 == EPOCH:
            apply()
        run.weights_at.append({name: value.clone() for name, value in module.state_dict().items()})
    apply()
    run.weights = dict(module.state_dict())
    run.optimizers = [optimizer_by_name(optimizer, module)]
    return run


def same(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    weights = {name: value for name, value in one.weights.items() if name in other.weights}
    assert_same_tree(weights, other.weights, "weights")
    assert_same_tree(one.optimizers[0]["state"], other.optimizers[0]["state"], "optimizers")


# -- what is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_that_of_a_loop_by_hand_o10(
    place: str, clip: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_session, "_SAVED", 1024)
    arguments = {**CLIPS[clip], "accumulate_grad_batches": accumulate, "max_steps": 8}
    plain = fit(None, **arguments)
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


def test_free_memory_that_changes_does_not_change_the_run_o10(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 20] * 3 + [0] * 4 + [1 << 24] * 40)
    monkeypatch.setattr(tier_set, "free_bytes", lambda device: next(free))
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


# -- beside others -----------------------------------------------------------------------------------------------------


def test_growth_begins_with_weights_that_are_not_behind_o10(tmp_path: Path) -> None:
    def grow(**arguments: Any) -> GrowAndUnshareCallback:
        return GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 5}, {"depth": 4}], **arguments)

    def run(build: dict[str, Any], callback: GrowAndUnshareCallback, **arguments: Any) -> Run:
        return fit(None, build={**build, "callbacks": [callback]}, **arguments)

    plain = run({}, grow())
    same(run(delayed(after=5), grow(), after=[StopAt(6)]), run({}, grow(), after=[StopAt(6)]))
    late = run(delayed(after=4), grow(), after=[StopAt(6)])
    assert late.losses[:6] == plain.losses[:6]  # the update of step 5 was not late, for the switch is behind it
    whole = run(delayed(), grow(), root=tmp_path, checkpoints={"every_n_train_steps": 7})
    resumed = run(
        delayed(), grow(), root=tmp_path / "r", checkpoints={"every_n_train_steps": 7}, ckpt_path=whole.checkpoints[7]
    )
    assert resumed.losses == whole.losses[7:]
    assert_same_tree(resumed.weights, whole.weights, "weights")
    switched = run(
        {"strategy": OffloadStrategy(offload_dir="swap", schedule="delayed", delay_after=0, enabled=False)},
        grow(offload_on_switch=True),
    )
    assert switched.losses[:6] == plain.losses[:6]
    assert switched.losses[7] != plain.losses[7]


def test_averages_and_a_search_for_the_rate_go_with_it_o10() -> None:
    averages = EMAWeightAveraging(decay=0.5)
    averaged, expected = fit(None, build=delayed(), after=[averages], max_steps=8), by_hand(fit(None, max_steps=8))
    assert averaged.losses == expected.losses
    own = dict(expected.weights_at[0])  # behind each step, as the average finds them: the update of step 1 is there
    for weights in expected.weights_at[1:]:
        own = {name: 0.5 * own[name] + 0.5 * value for name, value in weights.items()}
    for name, value in averaged.module.state_dict().items():
        if name in own:
            torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-6)
    search = LearningRateFinder(num_training_steps=6, early_stop_threshold=None, attr_name="learning_rate")
    run = fit(None, build=delayed(), after=[search], max_steps=8, enable_checkpointing=True)
    assert sum(run.losses[-2:]) < sum(run.losses[:2])


class Swaps(pl.Callback):
    """Puts other weights in the place of the model's for validation, and at the end."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept = [parameter.clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.zero_()

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter, value in zip(pl_module.parameters(), self.kept, strict=True):
            parameter.copy_(value)

    on_train_end = on_validation_start


@pytest.mark.parametrize("stop", [STEPS, 13])
def test_weights_that_others_put_in_their_place_are_left_alone_o10(stop: int) -> None:
    arguments = {"limit_val_batches": 1, "val_check_interval": 5}
    plain = fit(None, **arguments)
    ours = fit(None, build=delayed(), before=[Swaps()], after=[StopAt(stop)], **arguments)
    assert ours.losses == by_hand(plain, asked=(5, 10, 15)).losses[:stop]
    assert not any(parameter.any() for parameter in ours.module.parameters())
    assert not any(type(callback).__name__ == "FinishUpdates" for callback in ours.trainer.callbacks)


class OutOfMemoryOnce(pl.Callback):
    """There is no room for the whole batch, once: in the forward, or in the backward of the first layers."""

    def __init__(self, module: nn.Module, where: str) -> None:
        self.failed, self.now = 0, 0
        if where == "forward":
            module.model.head.register_forward_hook(self.fail)
        else:
            module.model.token_embedding.weight.register_hook(self.fail)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.now = trainer.global_step

    def fail(self, *_: Any) -> None:
        if self.now == 6 and not self.failed and torch.is_grad_enabled() == (len(_) > 1):
            self.failed += 1
            raise torch.OutOfMemoryError("made for this test")


def test_a_step_without_room_is_done_again_before_weights_change_o7_o10() -> None:
    module = demo_model()
    short = OutOfMemoryOnce(module, "forward")
    ours = fit(None, build=delayed(batch_feedback=True), module=module, before=[short])
    expected = by_hand(fit(None))
    assert short.failed == 1
    assert ours.losses[:6] == expected.losses[:6]
    assert ours.losses == pytest.approx(expected.losses, rel=1e-3)


def test_a_step_without_room_is_not_done_again_with_other_weights_o7_o10() -> None:
    module = demo_model()
    short = OutOfMemoryOnce(module, "backward")
    with pytest.raises(torch.OutOfMemoryError) as error:
        fit(None, build=delayed(batch_feedback=True), module=module, before=[short])
    assert "weights of some layers were updated already within this step" in str(error.value.__notes__)


# -- what it says, and what is refused ---------------------------------------------------------------------------------


def test_it_is_labelled_and_never_chosen_by_itself_o10(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = fit(None, build=delayed(), max_steps=6)
    assert "(delayed: as asked for)" in caplog.text
    assert "each update from step 3 on comes one step late, so that results differ" in caplog.text
    behind = [m["offload/updates_behind"] for _, m in run.logged if "offload/updates_behind" in m]
    assert behind == [0, 0, 0, 1, 1, 1]
    assert "results differ" in str(OffloadStrategy.__doc__)
    table = fit(None, build=delayed(), after=[StopAt(1)]).trainer.strategy
    assert table.settings.delay_after == AFTER
    caplog.clear()
    with caplog.at_level("INFO"):
        for arguments in ({}, {"gradient_clip_val": 0.5}):
            run = fit(None, build={"strategy": OffloadStrategy(place=PLACES["state"])}, max_steps=2, **arguments)
            assert not any("offload/updates_behind" in metrics for _, metrics in run.logged)
    assert "delayed" not in caplog.text


class ZeroesItself(ByteLanguageModel):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ManualModel, "the LightningModule optimizes manually"),
        (ZeroesItself, "optimizer_zero_grad is overridden"),
    ],
)
def test_runs_that_it_cannot_be_used_in_are_refused_by_name_o10(model: type[ByteLanguageModel], reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"schedule='delayed' updates .* which cannot be: {reason}"):
        fit(None, build=delayed(), module=demo_model(model))


def test_compiled_steps_scalers_and_several_ranks_are_refused_by_name_o10() -> None:
    with pytest.raises(MisconfigurationException, match=r"schedule='delayed' .* training step is compiled as a whole"):
        fit(None, build=delayed(), compiled=torch.compile(demo_model(), backend="eager"))
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"schedule='delayed' .* the gradient scaler decides"):
        fit(None, build=delayed(), plugins=[scaler])
    with pytest.raises(MisconfigurationException, match="schedule='delayed' cannot be with several ranks"):
        fit(None, build={"strategy": OffloadDDPStrategy(place=PLACES["state"], schedule="delayed")})


@pytest.mark.parametrize("steps", [-1, 1.5, "many", True])
def test_a_number_of_steps_that_is_none_is_said_at_once(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"delay_after=.* is not allowed\. Give a number of steps, 0 or more"):
        OffloadStrategy(schedule="delayed", delay_after=steps)
