"""Each private symbol that ``compat`` uses still exists and still means what we take it for."""

from __future__ import annotations

from copy import deepcopy
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_efficient import compat, compat_resume

from .monitoring.tiny import TinyModel, ValidatedModel, loader, trainer


class Recorder(pl.Callback):
    """Asks ``compat`` in each hook where the suite asks it."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logs: list[bool] = []
        self.accumulates: list[bool] = []
        self.validations: list[dict[str, float]] = []
        self.averaged: list[torch.nn.Module] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logs.append(compat.should_log(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(compat.log_step(trainer))
        self.accumulates.append(compat.accumulating(trainer))
        assert compat.should_log(trainer) == self.logs[-1]

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.validations.append(compat.validation_metrics(trainer))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.averaged = compat.averaged_models(trainer)


def test_the_logged_step_and_interval_and_accumulation(tmp_path) -> None:
    recorder = Recorder()
    trainer(tmp_path, recorder, accumulate_grad_batches=2).fit(TinyModel(), loader())
    assert recorder.steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert recorder.logs == [False, False, True, True] * 2
    assert recorder.accumulates == [True, False] * 4


class TwoMetrics(ValidatedModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_metric", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 0:
            self.log("only_at_first", 1.0)


class Leaves(pl.Callback):
    """Which batches are followed by something else than the next batch."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(compat.leaves_training(trainer))


def test_what_follows_a_batch_is_known(tmp_path) -> None:
    leaves = Leaves()
    runner = trainer(tmp_path, leaves, max_epochs=-1, max_steps=11, val_check_interval=3, num_sanity_val_steps=0)
    runner.fit(ValidatedModel(), loader(), loader(8))
    batches = len(loader())
    for number, left in enumerate(leaves.seen, 1):
        in_epoch = (number - 1) % batches + 1
        assert left == (in_epoch % 3 == 0 or in_epoch == batches or number == 11), number


class Validates(ValidatedModel):
    """Its mode is the first thing that a validation changes."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.seen.append("eval")


def test_what_is_called_before_each_validation_of_a_fit(tmp_path) -> None:
    seen: list[str] = []
    runner = trainer(tmp_path, val_check_interval=4, num_sanity_val_steps=0)
    undo = compat.before_validations(runner, lambda: seen.append("before"))
    runner.fit(Validates(seen), loader(), loader(8))
    assert seen == ["before", "eval"] * 2
    undo()
    assert "run" not in vars(runner.fit_loop.epoch_loop.val_loop)


def test_a_file_that_comes_while_it_is_looked_for_is_one_that_will_exist(tmp_path) -> None:
    coming = [tmp_path / "a.ckpt"]

    class Looks(ModelCheckpoint):
        def file_exists(self, filepath: Any, trainer: pl.Trainer) -> bool:
            coming.clear()  # it has come, right after the look
            return False

    callback = Looks()
    undo = compat.defer_links(callback, lambda target, link: None, lambda path: bool(coming))
    assert callback.file_exists(tmp_path / "a.ckpt", trainer(tmp_path))
    undo()
    assert not callback.file_exists(tmp_path / "a.ckpt", trainer(tmp_path))


def test_how_often_a_model_checkpoint_saves() -> None:
    assert compat.save_triggers(ModelCheckpoint()) == (0, 0.0, 1, None)
    assert compat.save_triggers(ModelCheckpoint(every_n_train_steps=7)) == (7, 0.0, 0, None)
    assert compat.save_triggers(ModelCheckpoint(every_n_epochs=2, save_on_train_epoch_end=True)) == (0, 0.0, 2, True)
    assert compat.save_triggers(ModelCheckpoint(train_time_interval=timedelta(minutes=2))) == (0, 120.0, 0, None)


def test_validations_may_follow_the_clock(tmp_path) -> None:
    assert compat.validation_seconds(trainer(tmp_path)) == 0
    assert compat.validation_seconds(trainer(tmp_path, val_check_interval="00:00:02:00")) == 120


def test_validation_metrics_are_those_of_this_validation(tmp_path) -> None:
    recorder = Recorder()
    model = TwoMetrics()
    runner = trainer(tmp_path, recorder, max_epochs=2, num_sanity_val_steps=0)
    runner.fit(model, loader(), loader(8))
    assert [set(metrics) for metrics in recorder.validations] == [{"val_loss", "only_at_first"}, {"val_loss"}]
    assert recorder.validations[-1]["val_loss"] == pytest.approx(float(runner.callback_metrics["val_loss"]))


@pytest.mark.parametrize(
    ("averaging", "copies"),
    [
        (lambda: EMAWeightAveraging(decay=0.5), 1),
        (lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), 1),
        (pl.Callback, 0),
    ],
    ids=["ema", "swa", "none"],
)
def test_the_copies_of_averaging_callbacks_are_found(tmp_path, averaging, copies: int) -> None:
    recorder, model = Recorder(), TinyModel()
    trainer(tmp_path, recorder, averaging(), max_epochs=2).fit(model, loader())
    assert len(recorder.averaged) == copies
    for copy in recorder.averaged:
        assert isinstance(copy, TinyModel)
        assert copy is not model


class CountingDDP(DDPStrategy):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped: list[object] = []

    def configure_ddp(self) -> None:
        self.wrapped.append(self.model)


def test_ddp_wraps_the_bare_module_anew() -> None:
    strategy = CountingDDP()
    with pytest.raises(RuntimeError, match="no LightningModule"):
        compat.rewrap_ddp(strategy)
    model = TinyModel()
    strategy.connect(model)
    strategy.model = torch.nn.Identity()  # stands for the wrapper of before
    compat.rewrap_ddp(strategy)
    assert strategy.wrapped == [model]


class Places(pl.Callback):
    """Says where a checkpoint would be that were taken in each hook; ``compat`` changes no more than the copy."""

    def __init__(self) -> None:
        self.places: list[tuple[str, Any]] = []

    def note(self, hook: str, trainer: pl.Trainer) -> None:
        checkpoint = deepcopy(trainer._checkpoint_connector.dump_checkpoint())
        point = compat_resume.resume_point(checkpoint, trainer.accumulate_grad_batches)
        self.places.append((hook, point and (point.place, point.last, point.batches)))

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("train start", trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("epoch start", trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("batch start", trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("batch end", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("validation end", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("epoch end", trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.note("train end", trainer)


def test_where_a_checkpoint_was_taken(tmp_path) -> None:
    places = Places()
    arguments = {"max_epochs": -1, "max_steps": 3, "num_sanity_val_steps": 0}
    trainer(tmp_path, places, **arguments).fit(ValidatedModel(), loader(8), loader(8))
    assert places.places == [
        ("train start", None),
        ("epoch start", None),
        ("batch start", None),
        ("batch end", ("batch", False, 1)),
        ("batch start", None),
        ("batch end", ("batch", True, 2)),
        ("validation end", ("validation", True, 2)),
        ("epoch end", ("end", True, 2)),
        ("epoch start", None),
        ("batch start", None),
        ("batch end", ("batch", False, 1)),
        ("epoch end", ("validation", False, 1)),  # there is more to this epoch
        ("train end", ("validation", False, 1)),
    ]


class Loaders(pl.Callback):
    """Asks for the train loaders, and has the states kept that they had before the last fetch."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.kept: list[list[dict[str, Any]]] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found = compat_resume.train_loaders(trainer)
        self.cycles = compat_resume.cycles_loaders(trainer)
        self.states, self.end = compat_resume.keep_loader_states(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        if self.states is not None:
            compat_resume.replace_loader_states(checkpoint, self.states)
        self.kept.append([states, checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])])

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.end()
        assert "_on_before_fetch" not in vars(trainer.fit_loop.epoch_loop)


class Counting:
    """Three batches; a state, and no length."""

    given = 0

    def __iter__(self) -> Any:
        for batch in torch.ones(3, 1, 4, 8):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.given = state_dict["given"]


def test_states_of_loaders_count_what_was_trained_on(tmp_path) -> None:
    """Lightning's count is one ahead, for it fetches ahead; once it does not any more, this is not needed."""
    loaders = Loaders()
    counting = Counting()
    trainer(tmp_path, loaders).fit(TinyModel(), counting)
    assert loaders.found == [counting]
    assert [[state["given"] for state in states] for states, _ in loaders.kept] == [[2], [3], [3]]
    assert [[state["given"] for state in kept] for _, kept in loaders.kept] == [[1], [2], [3]]


def test_train_loaders_and_what_joins_them(tmp_path) -> None:
    loaders = Loaders()
    trainer(tmp_path, loaders).fit(PairModel(), {"one": loader(8), "two": loader(16)})
    assert [len(one) for one in loaders.found] == [2, 4]
    assert loaders.cycles
    assert loaders.states is None  # nothing is fetched ahead
    trainer(tmp_path, loaders).fit(PairModel(), CombinedLoader({"one": loader(8), "two": loader(16)}, "min_size"))
    assert not loaders.cycles


class PairModel(TinyModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch["one"], batch_idx) + super().training_step(batch["two"], batch_idx)


class NamesEpochs(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        compat_resume.name_epoch(trainer, compat_resume.train_loaders(trainer)[0])


class Sampler(torch.utils.data.SequentialSampler):
    named: list[int]

    def set_epoch(self, epoch: int) -> None:
        self.named.append(epoch)


def test_epochs_are_named_to_samplers(tmp_path) -> None:
    dataset = loader(8).dataset
    sampler = Sampler(dataset)  # type: ignore[arg-type]
    sampler.named = []
    trainer(tmp_path, NamesEpochs(), max_epochs=2).fit(TinyModel(), DataLoader(dataset, 4, sampler=sampler))
    assert sampler.named == [0, 1, 1, 2]  # by Lightning as it begins, and by us as it ends


class Resumes(pl.Callback):
    """What ``compat`` is asked to do in the hooks of a resumed fit, and what it finds there."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.point: compat_resume.ResumePoint | None = None

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.point = compat_resume.resume_point(checkpoint, 1)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop
        if self.point is None:
            return
        self.waiting = list(loop._combined_loader_states_to_load)
        assert loop.epoch_loop.restarting
        if self.point.place == "batch":
            compat_resume.finish_batch(trainer)
            assert loop.epoch_loop.val_loop._has_run
            compat_resume.load_waiting_loader_states(trainer)
        if self.point.place == "end":
            compat_resume.begin_next_epoch(trainer)
            compat_resume.forget_loader_states(trainer)
            flags = [loop.restarting, loop.epoch_loop.restarting, loop.epoch_loop.val_loop.restarting, loop.is_resuming]
            assert not any(flags)
        assert loop._combined_loader_states_to_load == []


class Estimates(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, float(batch[0].sum())))
        return super().training_step(batch, batch_idx)


class Resumable(DataLoader):
    """The simplest loader with a state."""

    given = 0

    def __iter__(self) -> Any:
        first, self.given = self.given % len(self), self.given // len(self) * len(self)
        for i, batch in enumerate(super().__iter__()):
            self.given += 1
            if i >= first:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.given = state_dict["given"]


@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"save_on_train_epoch_end": True}], ids=["middle", "end"])
def test_states_that_wait_and_epochs_that_begin(tmp_path, when: dict[str, Any]) -> None:
    """If this fails where nothing waits any more, Lightning loads the states by itself, in time."""

    def fit(steps: int, resume: Any = None) -> tuple[Estimates, Resumes, ModelCheckpoint]:
        model, resumes = Estimates(), Resumes()
        save = ModelCheckpoint(tmp_path / "ck", "{step}", save_top_k=-1, **when)
        arguments = {"max_epochs": 3, "max_steps": steps, "enable_checkpointing": True}
        data = Resumable(loader(12).dataset, 4)
        trainer(tmp_path, resumes, save, **arguments).fit(model, data, ckpt_path=resume)
        return model, resumes, save

    whole, _, _ = fit(9)
    step = 2 if "every_n_train_steps" in when else 3
    resumed, resumes, _ = fit(9, tmp_path / "ck" / f"step={step}.ckpt")
    assert resumes.point is not None
    assert resumes.waiting == ([{"given": 2}] if step == 2 else [{"given": 3}])
    assert resumed.seen == whole.seen[step:]


@pytest.mark.parametrize("what", ["nothing", "part", "part in place", "module", "module in place"])
def test_compiled_parts_are_found(what: str) -> None:
    class Model(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            part = torch.nn.Linear(2, 2)
            self.part = torch.compile(part, backend="eager") if what == "part" else part

    model = Model()
    expected = {"nothing": [], "part": ["part"], "module": [""], "part in place": ["part"], "module in place": [""]}[
        what
    ]
    if what == "part in place":
        model.part.compile(backend="eager")
    if what == "module in place":
        model.compile(backend="eager")
    if what == "module":
        compiled = torch.compile(model, backend="eager")
        pl.trainer.trainer._maybe_unwrap_optimized(compiled)  # as `Trainer.fit` does
    assert compat.compiled_parts(model) == expected
    assert compat.step_is_compiled(model) == (what == "module")


def test_whose_checkpoints_are_files() -> None:
    assert compat.writes_files(DDPStrategy())
    assert not compat.writes_files(ModelParallelStrategy())
    assert compat.writes_files(ModelParallelStrategy(save_distributed_checkpoint=False))
    assert not compat.writes_files(FSDPStrategy())


@pytest.mark.parametrize(("tensor_parallel", "expected"), [(1, 4), (2, 2)])
def test_parameters_are_sharded_over_all_ranks(tensor_parallel: int, expected: int) -> None:
    strategy = ModelParallelStrategy(tensor_parallel_size=tensor_parallel)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    compat.shard_over_all(strategy)
    assert strategy._data_parallel_size == expected
    given = ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=1)
    compat.shard_over_all(given)
    assert given._data_parallel_size == 3
