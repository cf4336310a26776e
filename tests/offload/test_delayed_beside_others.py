"""Late updates beside callbacks, growth, and short memory; what they say, and what is refused (O7, O10)."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import GrowAndUnshareCallback, OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.offload import tier_set
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from tests.helpers.fitting import Run, StopAt, assert_same_tree, fit
from tests.helpers.models import CheckpointedModel, CompiledModel, ManualModel
from tests.offload.late import PLACES, by_hand, delayed, same
from tests.technique_settings import STEPS, demo_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
    "ignore:The dirpath has changed",
    "ignore:.*was called without a model",  # so Lightning speaks of an OnExceptionCheckpoint
    "ignore:.*there is no last checkpoint available",
)

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


@pytest.mark.parametrize("model", [CompiledModel, CheckpointedModel])
def test_compiled_and_checkpointed_networks_o10(model: type[ByteLanguageModel]) -> None:
    torch.compiler.reset()
    arguments = {"backend": "eager"} if model is CompiledModel else {}
    ours = fit(None, build=delayed(place="everything"), module=demo_model(model, **arguments), max_steps=8)
    expected = by_hand(fit(None, max_steps=8))
    assert ours.losses == expected.losses
    assert all(map(torch.equal, ours.module.parameters(), expected.module.parameters()))  # by other names


@pytest.mark.parametrize("writes", [30, 75, 120])
@pytest.mark.filterwarnings("ignore:.*is lost")
def test_a_disk_that_dies_leaves_an_ordinary_module(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count, before, module = itertools.count(), set(threading.enumerate()), demo_model()

    def pwritev(*arguments: Any) -> int:
        if next(count) > writes:
            raise OSError(5, "Input/output error")
        return os.pwritev(*arguments)

    calls = SystemCalls(pwritev=pwritev)
    monkeypatch.setattr(tier_set, "DiskTier", lambda folder, **others: DiskTier(folder, system=calls, **others))
    with pytest.raises(OSError, match="Input/output error"):
        fit(None, build=delayed(), module=module, max_steps=60)
    assert set(threading.enumerate()) == before
    for part in module.modules():
        assert not part._state_dict_pre_hooks
        assert not part._load_state_dict_pre_hooks
    for parameter in module.parameters():
        assert type(parameter) is nn.Parameter
        assert torch.isfinite(parameter).all()
        assert not parameter._post_accumulate_grad_hooks


# -- what it says, and what is refused ---------------------------------------------------------------------------------


def test_it_is_labelled_and_never_chosen_by_itself_o10(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = fit(None, build=delayed(), max_steps=6)
    assert "schedule delayed: as asked for" in caplog.text
    assert "each update from step 3 on comes one step late, so that results differ" in caplog.text
    behind = [m["offload/updates_behind"] for _, m in run.logged if "offload/updates_behind" in m]
    assert behind == [0, 0, 0, 1, 1, 1]
    assert "results differ" in str(OffloadStrategy.__doc__)
    sizes = {"parameter": 0, "gradient": 0}
    for row in run.trainer.strategy._session.placement.rows:
        if row.attribute.kind in sizes:
            sizes[row.attribute.kind] += row.attribute.nbytes
    assert sizes["gradient"] == 2 * sizes["parameter"]
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


def test_compiled_steps_and_scalers_are_refused_by_name_o10() -> None:
    with pytest.raises(MisconfigurationException, match=r"schedule='delayed' .* training step is compiled as a whole"):
        fit(None, build=delayed(), compiled=torch.compile(demo_model(), backend="eager"))
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"schedule='delayed' .* the gradient scaler decides"):
        fit(None, build=delayed(), plugins=[scaler])


@pytest.mark.parametrize("steps", [-1, 1.5, "many", True])
def test_a_number_of_steps_that_is_none_is_said_at_once(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"delay_after=.* is not allowed\. Give a number of steps, 0 or more"):
        OffloadStrategy(schedule="delayed", delay_after=steps)
