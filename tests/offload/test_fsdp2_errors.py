"""Two ranks with sharded parameters: they end together, and say what cannot be (O2, O3)."""

from __future__ import annotations

import itertools
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_efficient import AsyncCheckpointIO, OffloadFSDP2Strategy
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.offload import tier_set
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from tests.helpers.fitting import fit
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.sharding import DISK, RANKS, ours, plain, run, sharded
from tests.offload.test_fsdp2 import muon

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

ENDINGS: dict[str, Any] = {
    "in-backward": lambda: {},
    "behind-backward": lambda: {"strategy": {"schedule": "after_backward"}},
    "communicating": lambda: {"module": sharded(make_optimizers=muon)},
}


def dying_disk(rank: int, root: Path, where: int, after: int, name: str) -> str:
    """The disk of the rank ``where`` fails at a write; what the rank ends with."""
    writes = itertools.count()

    def pwritev(*arguments: Any) -> int:
        if next(writes) >= after:
            raise OSError(5, "Input/output error")
        return os.pwritev(*arguments)

    if rank == where:
        dying = SystemCalls(pwritev=pwritev)
        tier_set.DiskTier = lambda directory, **others: DiskTier(directory, system=dying, **others)
    case = ENDINGS[name]()
    strategy = ours(**case.pop("strategy", {}))
    try:
        run(root, strategy, max_steps=400, checkpoints=None, **case)
    except Exception as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    return "ended"


@pytest.mark.parametrize(
    ("where", "after", "name"),
    [
        (0, 0, "in-backward"),
        (0, 0, "communicating"),
        (1, 20, "behind-backward"),
        (1, 20, "communicating"),
        (0, 41, "in-backward"),
    ],
)
def test_a_disk_that_dies_on_one_rank_ends_both_o2(where: int, after: int, name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    said = run_on_two_ranks(dying_disk, tmp_path, tmp_path, where, after, name, timeout=100)
    assert "Input/output error" in said[where]
    assert f"on rank {where} of 2" in said[where]
    assert said[1 - where].startswith("OtherRankError: Another rank cannot go on")
    assert f"rank {where}: TierError" in said[1 - where]
    assert time.monotonic() - began < 90
    assert not list(tmp_path.rglob("*.spill"))


def dying_while_saving(rank: int, root: Path, where: int) -> str:
    def mapped(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    if rank == where:
        DiskTier.mapped = mapped  # type: ignore[method-assign]
    try:
        run(root, ours())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


def test_a_disk_that_dies_while_saving_ends_both_o2(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(dying_while_saving, tmp_path, tmp_path, 1, timeout=100)
    assert "Input/output" in other
    assert "rank 1: OSError" in one


class SavesInTheEnd(pl.Callback):
    """Saves when the run fails."""

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "torn")


def torn(rank: int, root: Path, schedule: str) -> str:
    """Rank 1 fails in the midst of a step; both are asked for a checkpoint."""
    from lightning_efficient.offload.local_shards.engine import ShardEngine

    update, calls = ShardEngine.update, itertools.count()

    def failing(self: Any, unit: Any, *arguments: Any) -> None:
        if rank == 1 and next(calls) == len(self.units) + 1:
            self.updating = True
            raise OSError(5, "Input/output error")
        update(self, unit, *arguments)

    ShardEngine.update = failing  # type: ignore[method-assign]
    try:
        run(root, ours(schedule=schedule, staging="64KiB"), after=[SavesInTheEnd()], checkpoints=None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


@pytest.mark.parametrize("schedule", ["in_backward", "after_backward"])
def test_no_checkpoint_of_weights_of_two_steps_is_written(schedule: str, tmp_path: Path) -> None:
    one, other = run_on_two_ranks(torn, tmp_path, tmp_path, schedule, timeout=100)
    assert other.startswith("OSError")
    assert one.startswith("OtherRankError")
    assert not (tmp_path / "torn").exists()


# -- what is refused -------------------------------------------------------------------------------------------------


REFUSED: dict[str, Any] = {
    "schedule='under_forward' cannot be with FSDP2": lambda: {"strategy": ours(schedule="under_forward")},
    "schedule='delayed' cannot be with several ranks": lambda: {"strategy": ours(schedule="delayed")},
    "schedule='in_backward' updates shards while backward goes on, which cannot be: Muon needs more": lambda: {
        "strategy": ours(schedule="in_backward"),
        "module": sharded(make_optimizers=muon),
    },
    "schedule='in_backward' updates each parameter as soon as its gradient is there, which cannot be": lambda: {
        "strategy": ours(schedule="in_backward"),
        "gradient_clip_val": 1.0,
    },
    "place['parameter']='disk' cannot be: FSDP2 has a shard": lambda: {"strategy": ours(place={"parameter": "disk"})},
    "place['gradient:blocks.*']='disk' cannot be: FSDP2 reduces": lambda: {
        "strategy": ours(place={"gradient:blocks.*": "disk"})
    },
    "OffloadFSDP2Strategy: LBFGS": lambda: {
        "strategy": ours(),
        "module": sharded(make_optimizers=lambda module: torch.optim.LBFGS(module.parameters())),
    },
    "OffloadFSDP2Strategy writes checkpoints by itself": lambda: {
        "strategy": ours(),
        "before": [AsyncCheckpointIO()],
    },
}


def refusing(rank: int, root: Path) -> dict[str, str]:
    said = {}
    for message, arguments in REFUSED.items():
        try:
            run(root, **arguments(), max_steps=1, checkpoints=None)
            said[message] = "nothing was refused"
        except MisconfigurationException as error:
            said[message] = str(error)
    return said


def test_what_cannot_be_is_refused_by_name_o3(tmp_path: Path) -> None:
    for said in run_on_two_ranks(refusing, tmp_path, tmp_path, timeout=200):
        for message, text in said.items():
            assert message in text


@pytest.mark.parametrize("argument", ["master_weights", "batch_feedback"])
def test_what_is_never_possible_is_refused_at_once(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=True is not possible with OffloadFSDP2Strategy"):
        OffloadFSDP2Strategy(**{argument: True})


def as_torch_refuses(rank: int, root: Path) -> list[str]:
    said = []
    for strategy in (plain(), ours()):
        try:
            run(root, strategy, module=sharded(optimizer="Adafactor"), checkpoints=None)
            said.append("nothing was refused")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_what_torch_cannot_do_with_shards_is_said_by_torch(tmp_path: Path) -> None:
    for one, other in run_on_two_ranks(as_torch_refuses, tmp_path, tmp_path, timeout=100):
        assert "placement" in one
        assert one == other


# -- how it is asked for ---------------------------------------------------------------------------------------------


def by_name(rank: int) -> None:
    finished = fit(None, module=sharded(), strategy="offload_fsdp2", max_steps=2, **RANKS)
    strategy = finished.trainer.strategy
    assert isinstance(strategy, OffloadFSDP2Strategy)
    assert strategy.device_mesh["data_parallel"].size() == 2
    assert "| parameter | forward to update | host |" in strategy.placement()


def test_the_string_stands_for_it(tmp_path: Path) -> None:
    run_on_two_ranks(by_name, tmp_path)


def test_comes_from_yaml_x1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning 2.6 calls
    arguments = {"place": DISK, "tensor_parallel_size": 2, "timeout": "0:05:00", "staging": "1MiB"}
    strategy = {"class_path": "lightning_efficient.OffloadFSDP2Strategy", "init_args": arguments}
    trainer = {"accelerator": "cpu", "devices": 4, "logger": False, "strategy": strategy, "barebones": True}
    config = {"seed_everything": False, "trainer": trainer}
    cli = LightningCLI(ByteLanguageModel, StdlibDataModule, run=False, args=config, save_config_callback=None)
    made = cli.trainer.strategy
    assert made.settings.place == DISK
    assert made.settings.staging_bytes == 1 << 20
    assert made._timeout == timedelta(minutes=5)
    assert (made._data_parallel_size, made._tensor_parallel_size) == ("auto", 2)
