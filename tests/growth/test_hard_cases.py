"""What users do around growth: freeze, stop early, swap optimizers, keep averaged copies, save weights alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import AveragedModel

from lightning_efficient import GrowAndUnshareCallback, load_grown
from lightning_efficient.demos import ByteLanguageModel
from tests.helpers import quick
from tests.helpers.fitting import StopAt
from tests.technique_settings import demo_data, demo_model

STAGES = [{"depth": 1, "until": 3}, {"depth": 2, "until": 6}, {"depth": 4}]


def train(module: pl.LightningModule, root: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """Ten steps, quietly; returns the Trainer."""
    return quick.train(root, *callbacks, module=module, **({"max_steps": 10} | arguments))[0]


class Break(pl.Callback):
    """Raises in the middle of a step."""

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("on purpose")


def test_learning_rates_are_the_users_after_an_exception_g8(tmp_path: Path) -> None:
    module = demo_model()
    grow = GrowAndUnshareCallback(stages=STAGES, lr_scale=0.1)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(module, tmp_path, grow, Break())
    plain = demo_model()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(plain, tmp_path, Break())
    ours, theirs = (m.optimizers(use_pl_optimizer=False) for m in (module, plain))
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_other_stages_is_refused_g8(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    train(demo_model(), tmp_path, GrowAndUnshareCallback(stages=STAGES), save)
    others = [{"depth": 2, "until": 6}, {"depth": 4}]
    with pytest.raises(ValueError, match="stages that the run was started with"):
        train(demo_model(), tmp_path, GrowAndUnshareCallback(stages=others), resume=tmp_path / "step=4.ckpt")
    later = [{"depth": 1, "until": 3}, {"depth": 2, "until": 8}, {"depth": 4}]
    grow = GrowAndUnshareCallback(stages=later)
    train(demo_model(), tmp_path, grow, resume=tmp_path / "step=4.ckpt")
    assert [event.step for event in grow.events()] == [3, 8]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"mode": "share", "unit": 2}, {"width": {"factor": 2}}, {"mode": "interleave", "width": {"factor": 2}}],
    ids=["default", "share", "width", "interleave-and-width"],
)
def test_fractions_of_the_run_resume_in_every_phase_g8(arguments: dict[str, Any], tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = demo_model()
    train(whole, tmp_path, GrowAndUnshareCallback(**arguments), save)
    for step in range(1, 10):
        resumed = demo_model()
        grow = GrowAndUnshareCallback(**arguments)
        train(resumed, tmp_path / "resumed", grow, resume=tmp_path / f"step={step}.ckpt")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), f"{name}, resumed at {step}"


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_a_run_without_a_length_is_warned_of_g5(tmp_path: Path) -> None:
    stop = {"max_steps": -1, "limit_train_batches": 1}
    with pytest.warns(UserWarning, match="the Trainer was given no length: Lightning plans 1000 epochs"):
        train(demo_model(), tmp_path, GrowAndUnshareCallback(), StopAt(1), **stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": [2, 4]}, r"stages\[0\]=2: expected a mapping such as \{'depth'"),
        ({"stages": {2: 0.25}}, r"stages=\{2: 0.25\}: expected a list such as"),
        ({"stages": [(2, 0.25), (8,)]}, r"stages\[0\]=\(2, 0.25\): expected a mapping"),
        ({"width": 2}, r"width=2: expected a mapping such as \{'factor': 2"),
        ({"layers": 4}, r"layers=4: expected a pattern"),
        ({"lr_scale": "0.5"}, r"lr_scale='0.5': expected a factor above 0"),
    ],
)
def test_what_is_no_setting_is_named_g8(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowAndUnshareCallback(**arguments)


def test_the_list_itself_as_a_pattern_gets_a_hint_g1(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean the 4 modules in it, 'model.blocks.\*'"):
        train(demo_model(), tmp_path, GrowAndUnshareCallback(layers="blocks"))


class CountsLayers(pl.LightningModule):
    """A forward that knows how many layers there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = torch.ones(2, 4)
        for i in range(4):
            x = self.layers[i](x)
        return x.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_forward_that_counts_layers_learns_why_it_failed_g1(tmp_path: Path) -> None:
    with pytest.raises(IndexError) as raised:
        train(CountsLayers(), tmp_path, GrowAndUnshareCallback(mode="stack", stages=STAGES))
    assert any("must iterate over the layers that are there" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("frozen", [slice(0, 2), slice(2, 4)], ids=["lower", "upper"])
def test_frozen_layers_stay_those_that_the_user_froze_g8(frozen: slice, tmp_path: Path) -> None:
    module = demo_model()
    module.model.blocks[frozen].requires_grad_(False)
    expected = {name: p.requires_grad for name, p in module.named_parameters()}
    train(module, tmp_path, GrowAndUnshareCallback(stages=STAGES))
    assert {name: p.requires_grad for name, p in module.named_parameters()} == expected


def test_layers_thawed_while_the_model_is_small_thaw_their_copies_g8(tmp_path: Path) -> None:
    class Thaw(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                pl_module.model.blocks.requires_grad_(True)

    module = demo_model(ConfiguresAll)
    module.model.blocks.requires_grad_(False)
    train(module, tmp_path, Thaw(), GrowAndUnshareCallback(stages=STAGES))
    assert all(p.requires_grad for p in module.parameters())


class ConfiguresAll(ByteLanguageModel):
    """All parameters are in the optimizer, whether they are trained now or later."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class ConfiguresTrained(ByteLanguageModel):
    """Only what is trained from the beginning is in the optimizer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_sharing_of_a_frozen_with_a_trained_layer_is_refused_g1(tmp_path: Path) -> None:
    module = demo_model()
    module.model.blocks[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"cannot share weights with 'model.blocks.0'.*frozen in only one"):
        train(module, tmp_path, GrowAndUnshareCallback(mode="share", unit=1, until=5))


def test_an_averaged_copy_inside_the_module_is_refused_by_name_g8(tmp_path: Path) -> None:
    module = demo_model()
    module.ema = AveragedModel(module.model)
    with pytest.raises(ValueError, match=r"'ema' is an averaged copy.*WeightAveraging"):
        train(module, tmp_path, GrowAndUnshareCallback(layers="model.blocks.*", stages=STAGES))


def test_a_frozen_teacher_is_not_taken_for_the_network_g7(tmp_path: Path) -> None:
    module = demo_model(layers=4)
    module.teacher = demo_model(layers=6).model.requires_grad_(False)
    train(module, tmp_path, GrowAndUnshareCallback(stages=STAGES))
    assert len(module.teacher.blocks) == 6
    assert len(module.model.blocks) == 4


def test_a_run_that_stops_early_says_that_the_model_is_small_g5(tmp_path: Path) -> None:
    stop = EarlyStopping("train_loss", patience=0, min_delta=100.0, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="Training ended with 2 layers, before the full model began"):
        train(
            demo_model(),
            tmp_path,
            GrowAndUnshareCallback(stages=[{"depth": 2, "until": 30}, {"depth": 4}]),
            stop,
            max_steps=-1,
            max_epochs=9,
        )


def test_optimizers_that_were_replaced_are_refused_g8(tmp_path: Path) -> None:
    class Replace(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.strategy.setup_optimizers(trainer)

    with pytest.raises(MisconfigurationException, match="optimizers were replaced"):
        train(demo_model(), tmp_path, GrowAndUnshareCallback(stages=STAGES), Replace())


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # zero biases are equal to it
def test_groups_added_while_it_trains_are_refused_in_words_g8(tmp_path: Path) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.model.blocks)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 0:
                self.unfreeze_and_add_param_group(pl_module.model.blocks, optimizer)

    with pytest.raises(ValueError, match="parameter groups when it was built"):
        train(demo_model(ConfiguresTrained), tmp_path, Unfreeze(), GrowAndUnshareCallback(stages=STAGES))


def test_weights_of_a_full_model_are_not_loaded_into_layers_that_share_g1(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in demo_model().state_dict().items()}

    class Loads(ByteLanguageModel):
        def setup(self, stage: str) -> None:
            self.load_state_dict(weights)

    with pytest.raises(RuntimeError, match=r"'model.blocks.1' shares weights with other layers"):
        train(demo_model(Loads), tmp_path, GrowAndUnshareCallback(mode="share", unit=1, until=5))


@pytest.mark.parametrize("at", [2, 5])
def test_a_checkpoint_of_weights_alone_loads_in_every_phase_g8(at: int, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    train(demo_model(), tmp_path, GrowAndUnshareCallback(stages=STAGES), save)
    loaded = load_grown(ByteLanguageModel, tmp_path / f"step={at}.ckpt")
    assert len(loaded.model.blocks) == {2: 1, 5: 2}[at]
    trainer = pl.Trainer(callbacks=[GrowAndUnshareCallback(stages=STAGES)], logger=False, enable_progress_bar=False)
    trainer.validate(demo_model(), demo_data(), ckpt_path=tmp_path / f"step={at}.ckpt", verbose=False)


def test_the_learning_rate_finder_runs_before_it_g8(tmp_path: Path) -> None:
    class Plain(ByteLanguageModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    module = demo_model(Plain)
    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    train(module, tmp_path, finder, GrowAndUnshareCallback(stages=STAGES))
    assert len(module.model.blocks) == 4


def test_the_callback_can_be_copied_and_pickled() -> None:
    original = GrowAndUnshareCallback(stages=STAGES, rewarm_steps=2)
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert twin.settings == original.settings


def test_statistics_that_cannot_be_scaled_are_refused_before_the_first_step_g4(tmp_path: Path) -> None:
    class Factored(ByteLanguageModel):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor(self.parameters())

    width = {"factor": 2, "until": 5}
    with pytest.raises(MisconfigurationException, match=r"cannot follow Adafactor.*optimizer_state='reset'"):
        train(demo_model(Factored), tmp_path, GrowAndUnshareCallback(width=width))
    train(demo_model(Factored), tmp_path, GrowAndUnshareCallback(width=width, optimizer_state="reset"))


def test_plateau_of_a_validation_metric_waits_for_its_second_value_g5(tmp_path: Path) -> None:
    stages = [{"depth": 2, "until": {"plateau": 2, "step": 9}}, {"depth": 4}]
    grow = GrowAndUnshareCallback(stages=stages, monitor="val_loss", check_every_n_steps=1)
    train(demo_model(), tmp_path, grow, limit_val_batches=1, val_check_interval=5)
    assert grow.events()[0].step == 9, grow.events()[0].text
