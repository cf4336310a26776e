"""Runs that look in the middle of things, or do what few do: as plain Lightning bit for bit, or refused by name."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import OffloadStrategy
from lightning_efficient.offload import session as offload_session
from lightning_efficient.offload import tier_set
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.updates import engine
from lightning_efficient.offload.updates.under_forward import StaleWeightsError
from tests.helpers.fitting import assert_same_tree, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The 'val_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:You're resuming from a checkpoint",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create",
)

STATE = {"optimizer_state": "disk"}
WAYS: dict[str, dict[str, Any]] = {
    "auto": {"place": STATE},
    "after_backward": {"place": STATE, "schedule": "after_backward"},
    "under_forward": {"place": STATE, "schedule": "under_forward"},
    "everything": {"place": dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk")},
    "parameters, under_forward": {"place": {**STATE, "parameter": "disk"}, "schedule": "under_forward"},
    "gradients, under_forward": {"place": {**STATE, "gradient": "disk"}, "schedule": "under_forward"},
}


class Small(pl.LightningModule):
    """Predicts the next of 50 tokens."""

    sparse = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_size, self.rate = 4, 1e-2
        self.embedding = nn.Embedding(50, 16, sparse=self.sparse)
        self.up, self.norm, self.down = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 50)

    def hidden(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return hidden + self.down(torch.relu(self.norm(self.up(hidden))))

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(tokens)).flatten(0, 1), tokens.roll(1, 1).flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)

    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(0, 50, (40, 8), generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(tokens), batch_size=self.batch_size)

    val_dataloader = train_dataloader


def trained(
    way: dict[str, Any] | None,
    model: type[Small] = Small,
    callbacks: Callable[[], list[pl.Callback]] = list,
    *,
    fit: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[pl.Trainer, dict[str, Any]]:
    """The Trainer; and the weights, the optimizers' state and what callbacks have noted in ``seen``."""
    torch.manual_seed(5)
    used = callbacks()
    if way is not None:
        arguments["strategy"] = OffloadStrategy(offload_dir="swap", **way)
    trainer = make_trainer(*used, **({"max_steps": 8} | arguments))
    module = model()
    trainer.fit(module, **(fit or {}))
    found = {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "seen": [getattr(callback, "seen", None) for callback in used],
    }
    return trainer, found


def same(way: str, *given: Any, **arguments: Any) -> None:
    assert_same_tree(trained(WAYS[way], *given, **arguments)[1], trained(None, *given, **arguments)[1], "run")


@pytest.fixture(autouse=True)
def _small_tensors_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_session, "_SAVED", 256)


every_way = pytest.mark.parametrize("way", WAYS)

# -- gradients that come in some micro-batches only ------------------------------------------------------------------


class Sometimes(Small):
    """The head has a gradient in each second micro-batch, and each fourth batch is skipped."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx % 4 == 3:
            return None
        return self.loss(batch[0]) if batch_idx % 2 == 0 else self.hidden(batch[0]).square().mean()


class Growing(Small):
    """Layers come into use in the middle of accumulation, some before others of the same unit."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.embedding(batch[0])
        if batch_idx < 2:
            hidden = self.one(hidden)
        elif batch_idx == 2:
            hidden = self.one(hidden) + self.two(hidden)
        elif batch_idx != 4:
            hidden = self.one(self.two(hidden))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch[0].roll(1, 1).flatten())


@every_way
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("model", [Sometimes, Growing])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_gradients_of_some_micro_batches_only_o3_o4(model: type[Small], clip: float | None, way: str) -> None:
    same(way, model, accumulate_grad_batches=2, gradient_clip_val=clip)


class Attacked(Small):
    """A backward within the step, whose gradients Lightning clears before its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.embedding(batch[0]).detach().requires_grad_()
        self.head(self.down(torch.relu(self.up(hidden)))).square().mean().backward()
        assert hidden.grad is not None
        moved = self.embedding(batch[0]) + 0.01 * hidden.grad.sign()
        logits = self.head(moved + self.down(torch.relu(self.norm(self.up(moved)))))
        return F.cross_entropy(logits.flatten(0, 1), batch[0].roll(1, 1).flatten())


@every_way
def test_a_backward_of_the_users_own_within_the_step(way: str) -> None:
    same(way, Attacked)


class Empty(Small):
    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.scale = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0]) * self.scale + self.nothing.sum()


@every_way
@pytest.mark.parametrize("clip", [None, 0.3])
def test_parameters_without_numbers(clip: float | None, way: str) -> None:
    same(way, Empty, gradient_clip_val=clip)


# -- who reads and writes weights, and when ---------------------------------------------------------------------------


class Clamping(Small):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()

        @torch.no_grad()
        def clamp(optimizer: Any, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.2, 0.2)

        optimizer.register_step_post_hook(clamp)
        return optimizer


@every_way
def test_a_hook_behind_the_step_finds_the_groups_and_the_new_weights(way: str) -> None:
    same(way, Clamping)


class Reads(pl.Callback):
    """Weights behind each step, by references that no module gives out then."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held = list(pl_module.parameters())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append([parameter.detach().clone() for parameter in self.held])


class ReadsAsNumpy(Reads):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(torch.tensor(self.held[1].detach().numpy().copy()))


class ReadsState(Reads):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(copy.deepcopy(trainer.optimizers[0].state_dict()))


class Clamps(Reads):
    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for parameter in trainer.optimizers[0].param_groups[0]["params"]:
            parameter.clamp_(-0.2, 0.2)


class ClampsData(Reads):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for parameter in self.held:
            parameter.data.clamp_(-0.2, 0.2)


class StartsAnew(Reads):
    """Takes the optimizer's state away."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            trainer.optimizers[0].state.clear()


class GoesBack(Reads):
    """Loads an earlier state of the optimizer alone."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.kept = copy.deepcopy(trainer.optimizers[0].state_dict())
        if batch_idx == 5:
            trainer.optimizers[0].load_state_dict(copy.deepcopy(self.kept))


class Regroups(Reads):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            optimizer = trainer.optimizers[0]
            first, (*rest,) = dict(optimizer.param_groups[0]), optimizer.param_groups[0]["params"]
            optimizer.param_groups = [
                {**first, "params": rest[4:], "lr": 1e-3}, {**first, "params": rest[:4]}
            ]  # fmt: skip


@every_way
@pytest.mark.parametrize(
    "callback", [Reads, ReadsAsNumpy, ReadsState, Clamps, ClampsData, StartsAnew, GoesBack, Regroups]
)
def test_callbacks_that_look_or_change_in_the_middle(callback: Callable[[], pl.Callback], way: str) -> None:
    same(way, Small, lambda: [callback()])


def test_what_is_written_to_weights_of_16_bits_counts_in_each_way_o3() -> None:
    found = {
        way: trained({**given, "master_weights": True}, Small, lambda: [ClampsData()], precision="bf16-true")[1]
        for way, given in WAYS.items()
    }
    for way, run in found.items():
        assert_same_tree(run, found["after_backward"], way)
        assert all(value.abs().max() <= 0.2001 for value in run["weights"].values())


@pytest.mark.parametrize("way", ["auto", "under_forward", "gradients, under_forward"])
def test_copies_of_modules_have_the_new_weights(way: str) -> None:
    class Copies(Reads):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.seen.append(copy.deepcopy(pl_module.up).weight.detach().clone())

    same(way, Small, lambda: [Copies()])


def test_a_weight_that_is_changed_through_an_old_view_is_noticed() -> None:
    class Views(Reads):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.held = [parameter.detach() for parameter in pl_module.parameters()]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            for view in self.held:
                view.clamp_(-0.2, 0.2)

    same("auto", Small, lambda: [Views()])
    with pytest.raises(RuntimeError, match=r"embedding\.weight was changed through a view .*schedule='after_backward'"):
        trained(WAYS["under_forward"], Small, lambda: [Views()])


def test_gradients_are_there_for_who_looks_before_they_are_cleared() -> None:
    class Looks(Reads):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.seen.append([None if p.grad is None else p.grad.clone() for p in pl_module.parameters()])

        on_fit_start, on_train_batch_end = pl.Callback.on_fit_start, pl.Callback.on_train_batch_end

    same("auto", Small, lambda: [Looks()])
    with pytest.raises(MisconfigurationException, match="Looks has on_before_zero_grad"):
        trained(WAYS["everything"], Small, lambda: [Looks()])


@pytest.mark.parametrize("parameters", ["host", "disk"])
def test_updates_that_a_validation_asks_for_o3(parameters: str) -> None:
    """Validation is in inference mode, where state that is made could not be changed later."""
    way = {"place": {"optimizer_state:up.*": "disk", "parameter": parameters}, "schedule": "under_forward"}
    arguments: dict[str, Any] = {"val_check_interval": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    assert_same_tree(trained(way, **arguments)[1], trained(None, **arguments)[1], "run")


def test_a_stale_weight_of_a_class_of_its_own_is_noticed() -> None:
    class Own(nn.Parameter):
        pass

    class Hidden(Small):
        def __init__(self) -> None:
            super().__init__()
            self.gain = Own(torch.ones(16))
            self.held = [self.gain]

        def hidden(self, tokens: Tensor) -> Tensor:
            return super().hidden(tokens) * self.held[0]

    way = {"place": {"optimizer_state": "host", "optimizer_state:gain": "disk"}}
    assert_same_tree(trained(way, Hidden)[1], trained(None, Hidden)[1], "run")
    with pytest.raises(StaleWeightsError, match="used gain through a reference that is not its module's"):
        trained({**way, "schedule": "under_forward"}, Hidden)


class Outside(Small):
    """A parameter that no module has."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [nn.Parameter(torch.ones(16))]

    def hidden(self, tokens: Tensor) -> Tensor:
        return super().hidden(tokens) * self.own[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters(), *self.own], lr=1e-2)


class CompiledMethod(Small):
    def __init__(self) -> None:
        super().__init__()
        self.up.forward = torch.compile(self.up.forward, backend="eager")  # type: ignore[method-assign]


class CompiledPart(Small):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.compile(self.hidden, backend="eager")  # type: ignore[method-assign]


@every_way
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of torch, behind a graph break
@pytest.mark.parametrize("model", [Outside, CompiledMethod, CompiledPart])
def test_weights_that_modules_do_not_hand_out(model: type[Small], way: str) -> None:
    torch.compiler.reset()
    same(way, model)


# -- optimizers --------------------------------------------------------------------------------------------------------


class PlainSgd(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class SparseSgd(PlainSgd):
    sparse = True


class SparseAdam(Small):
    sparse, automatic_optimization = True, False

    def configure_optimizers(self) -> Any:
        others = [p for name, p in self.named_parameters() if "embedding" not in name]
        return [torch.optim.SparseAdam(self.embedding.parameters(), lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.step()


@every_way
@pytest.mark.parametrize("model", [PlainSgd, SparseSgd])
def test_optimizers_without_state_o3(model: type[Small], way: str) -> None:
    same(way, model)


@pytest.mark.parametrize("way", ["auto", "after_backward"])
def test_gradients_that_are_sparse_o3(way: str) -> None:
    same(way, SparseAdam, max_steps=22)  # eleven batches: every tenth free memory is looked at, and what is held of it


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, which has groups of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 1e-2})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        self.inner.step()
        return loss


def test_a_wrapper_around_an_optimizer_is_refused_by_name() -> None:
    class Wrapped(Small):
        def configure_optimizers(self) -> Any:
            return Wrapping(super().configure_optimizers())

    with pytest.raises(MisconfigurationException, match=r"Wrapping did not change the parameters .* may be a wrapper"):
        trained(WAYS["auto"], Wrapped)


@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_rates_that_change_nothing_yet_are_no_wrappers(rate: float) -> None:
    class Slow(Small):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=rate)

    same("auto", Slow, precision="bf16-true")


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.up, pl_module.embedding])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.up, pl_module.embedding], optimizer, lr=1e-3)


class Frozen(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@every_way
def test_groups_that_come_in_the_middle_and_resume_o3(way: str, tmp_path: Path) -> None:
    def callbacks(folder: str) -> Callable[[], list[pl.Callback]]:
        saves = {"dirpath": tmp_path / folder, "filename": "{step}", "save_top_k": -1, "every_n_train_steps": 6}
        return lambda: [Unfreezes(), ModelCheckpoint(**saves)]

    runs = [
        trained(how, Frozen, callbacks(name), max_steps=18)[1] for name, how in (("ours", WAYS[way]), ("plain", None))
    ]
    runs = [{key: run[key] for key in ("weights", "optimizers")} for run in runs]
    assert_same_tree(*runs, "run")
    for step in (6, 12):
        one, other = (
            torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=False) for name in ("ours", "plain")
        )
        for key in ("state_dict", "optimizer_states"):
            assert_same_tree(one[key], other[key], key)
        resumed = [
            trained(
                how,
                Frozen,
                lambda: [Unfreezes()],
                max_steps=18,
                fit={"ckpt_path": tmp_path / name / f"step={step}.ckpt", "weights_only": False},
            )[1]
            for name, how in (("plain", WAYS[way]), ("ours", None))
        ]
        assert_same_tree(*resumed, f"resumed at {step}")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_that_leave_memory_later_are_clipped_o3(algorithm: str) -> None:
    """The budget has room for those of the first group, and not for those that come."""

    class Notes(Reads):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            session = getattr(trainer.strategy, "_session", None)
            self.elsewhere = [*getattr(self, "elsewhere", []), session is not None and session.gradients is not None]

    notes = Notes()
    way = {"memory_budget": {"host": "42KiB"}, "schedule": "after_backward"}
    clip = {"gradient_clip_val": 0.05 if algorithm == "norm" else 1e-3, "gradient_clip_algorithm": algorithm}
    ours, plain = (trained(how, Frozen, lambda: [Unfreezes(), notes], max_steps=14, **clip)[1] for how in (way, None))
    assert notes.elsewhere[:14] == [False] * 10 + [True] * 4
    assert_same_tree(ours, plain, "run")


class ClipsItself(Small):
    """Each part in a way of its own, and then all by Lightning's."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        nn.utils.clip_grad_norm_([*self.up.parameters(), *self.down.parameters()], 0.01)
        nn.utils.clip_grad_value_(self.head.parameters(), 1e-3)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


@every_way
def test_a_configure_gradient_clipping_of_the_users_own_o3(way: str, caplog: pytest.LogCaptureFixture) -> None:
    if "gradient" in WAYS[way]["place"]:
        told = r"place\['gradient'\]='disk' cannot be: .* the LightningModule has its own configure_gradient_clipping"
        with pytest.raises(MisconfigurationException, match=told):
            trained(WAYS[way], ClipsItself)
        return
    with caplog.at_level("INFO"):
        same(way, ClipsItself)
    asked_for = "schedule" in WAYS[way]
    assert asked_for or "under_forward: the LightningModule has its own configure_gradient_clipping" in caplog.text


# -- training within training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["auto", "everything", "parameters, under_forward"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: LearningRateFinder(num_training_steps=6, early_stop_threshold=None, attr_name="rate"),
        lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_callbacks_that_train_before_training(callback: Callable[[], pl.Callback], way: str) -> None:
    same(way, Small, lambda: [callback()], max_steps=6)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.filterwarnings("ignore:.*no checkpoint is written")
def test_no_checkpoint_is_of_two_steps_o3(
    where: str, error: type[BaseException], way: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 3:
            raise error("made for this test")

    class Failing(Small):
        def __init__(self) -> None:
            super().__init__()
            if where == "forward":
                self.down.register_forward_hook(fail)
            else:
                self.embedding.weight.register_hook(fail)

    with pytest.raises((error, SystemExit)):
        trained(WAYS[way], Failing, lambda: [OnExceptionCheckpoint(tmp_path, "last")], enable_checkpointing=True)
    if not (tmp_path / "last.ckpt").exists():
        assert way == "everything"
        assert where == "backward"
        assert "The step in progress has updated some weights" in str([str(one.message) for one in recwarn])
        return
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = trained(None, max_steps=3)[1]
    assert_same_tree(dict(saved["state_dict"]), plain["weights"], "weights")
    assert_same_tree(saved["optimizer_states"], plain["optimizers"], "optimizers")


@every_way
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(16, 19))
def test_no_checkpoint_is_of_a_step_in_whose_midst_an_update_failed_o3(
    call: int,
    error: type[BaseException],
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Those of other parameters, made on the way out, make no whole step of it."""
    real, calls = engine.step_subset, itertools.count()

    def fail(*arguments: Any) -> None:
        if next(calls) == call:
            raise error("made for this test")
        real(*arguments)

    monkeypatch.setattr(engine, "step_subset", fail)
    monkeypatch.setattr(offload_session, "TOGETHER_BYTES", 1)  # each parameter by itself
    with pytest.raises((error, SystemExit)):
        trained(WAYS[way], Small, lambda: [OnExceptionCheckpoint(tmp_path, "last")], enable_checkpointing=True)
    assert not (tmp_path / "last.ckpt").exists()
    assert "The step in progress has updated some weights" in str([str(one.message) for one in recwarn])


@every_way
@pytest.mark.parametrize("writes", range(2, 50, 7))
@pytest.mark.filterwarnings("ignore:.*is lost")
def test_a_disk_that_dies_leaves_an_ordinary_module(writes: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, before = itertools.count(), set(threading.enumerate())

    def pwritev(*arguments: Any) -> int:
        if next(count) > writes:
            raise OSError(5, "Input/output error")
        return os.pwritev(*arguments)

    calls = SystemCalls(pwritev=pwritev)
    monkeypatch.setattr(tier_set, "DiskTier", lambda folder, **others: DiskTier(folder, system=calls, **others))
    module = Small()
    trainer = make_trainer(max_steps=20, strategy=OffloadStrategy(offload_dir="swap", **WAYS[way]))
    with pytest.raises(OSError, match="Input/output error"):
        trainer.fit(module)
    assert set(threading.enumerate()) == before
    for part in module.modules():
        assert "forward" not in vars(part)
        assert type(part._parameters) is dict
    for parameter in module.parameters():
        assert type(parameter) is nn.Parameter
        assert torch.isfinite(parameter).all()


@every_way
def test_nothing_is_left_on_optimizers_and_parameters(way: str) -> None:
    trainer, _ = trained(WAYS[way])
    optimizer = trainer.optimizers[0]
    hooks = (
        "step_pre",
        "step_post",
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
    assert not any(getattr(optimizer, f"_optimizer_{name}_hooks") for name in hooks)
    assert "zero_grad" not in vars(optimizer)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.lightning_module.parameters())


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["master_weight", "input_batch", "checkpoint"])
def test_a_rule_that_would_do_nothing_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"place\['{kind}'\] would do nothing"):
        OffloadStrategy(place={kind: "disk"})


def test_values_in_full_precision_count_with_the_state_that_they_lie_with_o2() -> None:
    way = {"place": STATE, "master_weights": True}
    trainer, _ = trained(way, precision="bf16-true", max_steps=2)
    numbers = sum(parameter.numel() for parameter in trainer.lightning_module.parameters())
    rows = trainer.strategy._session.placement.rows  # type: ignore[attr-defined]
    assert sum(row.attribute.nbytes for row in rows if row.attribute.kind == "optimizer_state") >= 12 * numbers


def test_records_share_little_memory_on_their_way_o8() -> None:
    way = {"place": STATE, "staging": 32 << 10}
    assert_same_tree(trained(way)[1], trained(None)[1], "run")
