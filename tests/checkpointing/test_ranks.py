"""AsyncCheckpointIO on two ranks, of which one writes; and its copies, which other processes get."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_efficient import AsyncCheckpointIO
from lightning_efficient.checkpointing import verify
from lightning_efficient.checkpointing.outcomes import Outcomes
from lightning_efficient.checkpointing.writer import Failure
from tests.checkpointing.clouds import Bucket
from tests.helpers.fitting import assert_same_tree, fit
from tests.helpers.processes import context
from tests.helpers.ranks import run_on_two_ranks
from tests.technique_settings import demo_data, demo_model

DDP = {"devices": 2, "use_distributed_sampler": False}


def train(*callbacks: Callback, root: Path, **arguments: Any) -> pl.Trainer:
    """On both ranks, on a model with dropout."""
    arguments = {"module": demo_model(dropout=0.2), "strategy": DDPStrategy(), "logger": False} | arguments
    return fit(None, before=callbacks, root=root, **DDP, **arguments).trainer


def every(root: Path | str, steps: int = 2, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root, "{step}", every_n_train_steps=steps, **({"save_top_k": -1} | arguments))


def slow_disk(rank: int, seconds: float = 0.05) -> None:
    """Of rank zero, so that the other one is always ahead."""
    real = os.pwrite

    def pwrite(*arguments: Any) -> int:
        time.sleep(seconds)
        return real(*arguments)

    if rank == 0:
        os.pwrite = pwrite


def full_disk(rank: int) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    if rank == 0:
        os.pwrite = pwrite


def outcome(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


# -- resuming ----------------------------------------------------------------------------------------------------------


def resume_with_dropout(rank: int, root: Path) -> dict[str, Any]:
    def run(seed: int, **arguments: Any) -> Any:
        pl.seed_everything(seed + rank, verbose=False)
        module = demo_model(dropout=0.2)
        pl.seed_everything(seed + rank, verbose=False)  # what the model has drawn was the same on both
        io = AsyncCheckpointIO()
        return fit(None, module=module, strategy=DDPStrategy(), before=[io], root=root, **DDP, **arguments)

    whole = run(7, checkpoints={"every_n_train_steps": 1})
    after = {"whole": torch.rand(4)}
    for step in (1, 5, 8, 10, 14):  # of epochs of five batches
        resumed = run(99, ckpt_path=root / "checkpoints" / whole.checkpoints[step].name)
        after[f"resumed at {step}"] = torch.rand(4)
        assert resumed.losses == whole.losses[step:], f"resumed at {step}"
        assert resumed.batches == whole.batches[step:]
        assert_same_tree(resumed.weights, whole.weights, f"resumed at {step}")
        assert_same_tree(resumed.optimizers, whole.optimizers, f"resumed at {step}")
    return after


def test_each_rank_draws_what_it_would_have_drawn_c6(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(resume_with_dropout, tmp_path, tmp_path / "run")
    for rank in one, other:
        for name, drawn in rank.items():
            assert torch.equal(drawn, rank["whole"]), name
    assert not torch.equal(one["whole"], other["whole"])


# -- a rank that cannot write ------------------------------------------------------------------------------------------


def fail_on_rank_zero(rank: int, root: Path, every_n_steps: int, save: dict[str, Any], steps: int) -> tuple[str, int]:
    full_disk(rank)
    trainers: list[pl.Trainer] = []

    class Notes(Callback):
        def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainers.append(trainer)

    said = outcome(
        lambda: train(AsyncCheckpointIO(), Notes(), every(root, every_n_steps, **save), root=root, max_steps=steps)
    )
    return said, trainers[0].global_step


@pytest.mark.parametrize(
    ("every_n_steps", "save", "steps"),
    [(2, {}, 400), (8, {}, 8), (2, {"save_weights_only": True}, 400)],
    ids=["in the run", "at its end", "weights only"],
)
def test_all_end_together_when_one_cannot_write_c10(
    every_n_steps: int, save: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    began = time.monotonic()
    arguments = (tmp_path / "run", every_n_steps, save, steps)
    (one, step), (other, other_step) = run_on_two_ranks(fail_on_rank_zero, tmp_path, *arguments, timeout=60)
    assert "CheckpointSaveError: '" in one
    assert "No space left on device" in one
    assert other.startswith("CheckpointSaveError: On rank zero: ")
    assert step == other_step <= (8 if steps == 8 else 100)
    assert time.monotonic() - began < 45
    assert not list(tmp_path.rglob("*.ckpt"))


def go_on_without(rank: int, root: Path) -> list[Any]:
    """Two files can be written."""
    real, files = os.pwrite, set()

    def pwrite(descriptor: int, *arguments: Any) -> int:
        files.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(files) > 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, *arguments)

    os.pwrite = pwrite
    warnings.simplefilter("ignore")
    save = every(root, save_top_k=1, monitor="step", mode="max")
    trainer = train(AsyncCheckpointIO(on_error="warn"), save, root=root, max_steps=12)
    return [trainer.global_step, save.best_model_path, list(save.best_k_models)]


def test_a_save_that_fails_while_it_is_asked_about_is_heard_of_c10() -> None:
    """It is not pending any more then, and nothing may have been seen of its failure yet."""
    failures: list[Failure] = []

    def pending() -> bool:
        failures.append(Failure("save", Path("a.ckpt"), 1, OSError("No space left on device")))
        return False

    def take() -> list[Failure]:
        taken, failures[:] = failures[:], []
        return taken

    engine = SimpleNamespace(take_failures=take)
    places = SimpleNamespace(pending=pending, take_written=list, take_failures=list)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=1))
    strategy = SimpleNamespace(broadcast=lambda told: told)
    trainer = SimpleNamespace(world_size=2, is_global_zero=True, strategy=strategy, fit_loop=loop)
    outcomes = Outcomes(engine, places, "raise", lambda _: None)  # type: ignore[arg-type]
    outcomes.unresolved = True
    heard = [outcome(lambda: outcomes.poll_together(trainer)) for _ in range(2)]  # type: ignore[arg-type]
    assert any("No space left" in one for one in heard)


def test_all_name_the_same_files_when_one_could_not_be_written_c10(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(go_on_without, tmp_path, tmp_path / "run", timeout=60)
    assert one == other == [12, str(tmp_path / "run" / "step=4.ckpt"), []]


def name_the_best(rank: int, root: Path) -> list[Any]:
    slow_disk(rank)
    save = every(root, save_top_k=2, monitor="step", mode="max", save_last=True)
    train(AsyncCheckpointIO(), save, root=root, max_steps=6)
    return [save.best_model_path, save.last_model_path, sorted(save.best_k_models)]


def test_who_does_not_write_knows_no_less_c10(tmp_path: Path) -> None:
    """It is at the end before the last file is there."""
    one, other = run_on_two_ranks(name_the_best, tmp_path, tmp_path / "run")
    assert one == other
    assert Path(one[0]).name == "step=6.ckpt"


def name_a_url(rank: int, root: Path) -> list[str]:
    Bucket.root = root
    return [
        outcome(lambda: train(AsyncCheckpointIO(), every("bucket://run"), root=root)),
        outcome(lambda: train(AsyncCheckpointIO(frequency="drive", dirpath="bucket://run"), root=root)),
    ]


def test_all_refuse_what_cannot_be(tmp_path: Path) -> None:
    for said in run_on_two_ranks(name_a_url, tmp_path, tmp_path / "run", timeout=60):
        for message in said:
            assert message.startswith("ValueError: 'bucket://run")
            assert "local_dir='" in message


# -- loading what is still to be written -------------------------------------------------------------------------------


def find_a_rate(rank: int, root: Path) -> float:
    slow_disk(rank)
    warnings.simplefilter("ignore")
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    module = demo_model(learning_rate=1e-3)
    trainer = train(AsyncCheckpointIO(), finder, module=module, root=root, max_steps=2)
    assert not list(root.glob(".lr_find*"))
    return float(trainer.callback_metrics["train_loss"])


def test_a_pending_save_is_waited_for_on_all_ranks_c10(tmp_path: Path) -> None:
    """As the learning-rate finder does: it saves, trains, and loads what it saved."""
    run_on_two_ranks(find_a_rate, tmp_path, tmp_path)


def load_on_two_machines(rank: int, root: Path) -> dict[str, torch.Tensor]:
    Bucket.root = root / "store"
    real = Bucket._open

    def slow(self: Bucket, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "checkpoint-upload":
            time.sleep(2)
        return real(self, *arguments, **options)

    Bucket._open = slow

    class Reads(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                self.loaded = trainer.strategy.load_checkpoint("bucket://run/step=4.ckpt")

    reads = Reads()
    train(
        AsyncCheckpointIO(local_dir=str(root / f"disk-{rank}")), reads, every("bucket://run", 4), root=root, max_steps=6
    )
    return dict(reads.loaded["state_dict"])


def test_an_upload_is_waited_for_on_all_ranks_c10(tmp_path: Path) -> None:
    """On two machines, with a disk each, and a slow network."""
    one, other = run_on_two_ranks(load_on_two_machines, tmp_path, tmp_path)
    assert_same_tree(one, other, "weights")


# -- copies ------------------------------------------------------------------------------------------------------------


class Named(AsyncCheckpointIO):
    """With an argument and an attribute of its own."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.name = name
        self.seen: list[int] = []


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda io: pickle.loads(pickle.dumps(io))])
def test_a_copy_is_a_new_object_with_the_same_arguments(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    io = AsyncCheckpointIO(memory_cap="1GiB", keep=3, on_error="warn", local_dir=str(tmp_path))
    one = copied(io)
    assert type(one) is AsyncCheckpointIO
    assert one._arguments == io._arguments
    assert one.engine is not io.engine
    assert one.engine.pool is not io.engine.pool


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda io: pickle.loads(pickle.dumps(io))])
def test_a_copy_of_a_subclass_keeps_what_is_its_own(copied: Callable[[Any], Any]) -> None:
    io = Named("mine", keep=3)
    io.seen.append(5)
    one = copied(io)
    assert type(one) is Named
    assert (one.name, one.seen, one._arguments["keep"]) == ("mine", [5], 3)
    assert one.engine is not io.engine


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_spawned_ranks_save_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    context()  # of which it makes the processes
    save = every(tmp_path / "ck", 2, save_top_k=1)
    trainer = pl.Trainer(
        strategy=DDPStrategy(start_method="forkserver"),  # as "spawn" pickles all, and imports less
        accelerator="cpu",
        devices=2,
        callbacks=[AsyncCheckpointIO(), save],
        use_distributed_sampler=False,
        max_steps=4,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = demo_model()
    trainer.fit(module, demo_data())
    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["step=4.ckpt"]
    assert save.best_model_path == str(tmp_path / "ck" / "step=4.ckpt")
    verify(Path(save.best_model_path))
    saved = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    assert_same_tree(dict(saved), dict(module.state_dict()), "weights")
