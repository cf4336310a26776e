"""Two ranks that divide optimizer state: they end together, and say what cannot be (O2, O3)."""

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
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_efficient import AsyncCheckpointIO, GrowAndUnshareCallback, OffloadDDPStrategy, OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.offload import tier_set
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from tests.helpers.fitting import fit
from tests.helpers.ranks import RankError, run_on_two_ranks
from tests.offload.dividing import DDP, DISK, ours, run
from tests.technique_settings import demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def dying_disk(rank: int, root: Path, where: int, after: int) -> str:
    """The disk of the rank ``where`` fails at a write; what the rank ends with."""
    writes = itertools.count()

    def pwritev(*arguments: Any) -> int:
        if next(writes) >= after:
            raise OSError(5, "Input/output error")
        return os.pwritev(*arguments)

    if rank == where:
        dying = SystemCalls(pwritev=pwritev)
        tier_set.DiskTier = lambda directory, **others: DiskTier(directory, system=dying, **others)
    try:
        fit(None, strategy=ours(), root=root, max_steps=400, **DDP)
    except Exception as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    return "ended"


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("after", [0, 2, 40], ids=["at-the-start", "placing", "training"])
def test_a_disk_that_dies_on_one_rank_ends_both_o2(where: int, after: int, tmp_path: Path) -> None:
    began = time.monotonic()
    said = run_on_two_ranks(dying_disk, tmp_path, tmp_path, where, after, timeout=60)
    assert "Input/output error" in said[where]
    assert f"on rank {where} of 2" in said[where]
    assert said[1 - where].startswith("OtherRankError: Another rank cannot go on")
    assert f"rank {where}: TierError" in said[1 - where]
    assert time.monotonic() - began < 40
    assert not list(tmp_path.rglob("*.spill"))


def dying_while_saving(rank: int, root: Path, where: int) -> str:
    from lightning_efficient.offload.sharded import session as sharded

    class Dying(DiskTier):
        def reserve(self, *arguments: Any, **options: Any) -> Any:
            raise OSError(28, "No space left on device")

        def mapped(self, *arguments: Any) -> Any:
            raise OSError(5, "Input/output error")

    if rank == where == 0:
        sharded.DiskTier = Dying
    if rank == where == 1:
        DiskTier.mapped = Dying.mapped
    try:
        run(root, ours())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


@pytest.mark.parametrize("where", [0, 1])
def test_a_disk_that_dies_while_saving_ends_both_o2(where: int, tmp_path: Path) -> None:
    said = run_on_two_ranks(dying_while_saving, tmp_path, tmp_path, where, timeout=60)
    assert "No space left" in said[0] if where == 0 else "Input/output" in said[1]
    assert f"rank {where}: OSError" in said[1 - where]


def dying_while_growing(rank: int, root: Path) -> str:
    def mapped(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    if rank == 1:
        DiskTier.mapped = mapped  # type: ignore[method-assign]
    grow = GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 2}, {"depth": 4}])
    try:
        fit(None, strategy=ours(), before=[grow], root=root, **DDP)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ended"


def test_a_disk_that_dies_while_parameters_come_ends_both_g6(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(dying_while_growing, tmp_path, tmp_path, timeout=60)
    assert "Input/output error" in other
    assert "rank 1: OSError" in one


REFUSED: dict[str, Any] = {
    "schedule='in_backward' cannot be with several ranks": lambda: {"strategy": ours(schedule="in_backward")},
    "schedule='under_forward' cannot be with several ranks": lambda: {"strategy": ours(schedule="under_forward")},
    "schedule='delayed' cannot be with several ranks": lambda: {"strategy": ours(schedule="delayed")},
    "place['parameter']='disk' cannot be: DistributedDataParallel needs all": lambda: {
        "strategy": ours(place={"parameter": "disk"})
    },
    "place['gradient:blocks.*']='disk' cannot be: DistributedDataParallel reduces": lambda: {
        "strategy": ours(place={"gradient:blocks.*": "disk"})
    },
    "OffloadDDPStrategy cannot work with model_averaging_period": lambda: {"strategy": ours(model_averaging_period=2)},
    "OffloadDDPStrategy: ZeroRedundancyOptimizer": lambda: {"module": demo_model(Redundant), "strategy": ours()},
    "Batch feedback cannot work with static_graph=True": lambda: {
        "strategy": ours(static_graph=True, batch_feedback=True)
    },
    "AsyncCheckpointIO(optimizer_in_backward=True) and OffloadDDPStrategy": lambda: {
        "strategy": ours(),
        "before": [AsyncCheckpointIO(optimizer_in_backward=True)],
    },
}


class Redundant(ByteLanguageModel):
    def configure_optimizers(self) -> Any:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)


def refusing(rank: int) -> dict[str, str]:
    said = {}
    for message, arguments in REFUSED.items():
        try:
            fit(None, max_steps=1, **DDP, **arguments())
            said[message] = "nothing was refused"
        except MisconfigurationException as error:
            said[message] = str(error)
    return said


def test_what_cannot_be_is_refused_by_name_o3(tmp_path: Path) -> None:
    for said in run_on_two_ranks(refusing, tmp_path):
        for message, text in said.items():
            assert message in text


class Frozen(pl.Callback):
    """Freezes a parameter, and leaves it its gradient."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        next(pl_module.parameters()).requires_grad_(False)


def freezing(rank: int) -> None:
    fit(None, strategy=ours(), after=[Frozen()], max_steps=2, **DDP)


def test_a_frozen_parameter_with_a_gradient_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="has a gradient and does not require one"):
        run_on_two_ranks(freezing, tmp_path)


def test_several_devices_are_not_for_the_single_one() -> None:
    with pytest.raises(MisconfigurationException, match=r"the Trainer has 2\. Use strategy='offload_ddp'"):
        fit(None, strategy=OffloadStrategy(), **DDP)


def by_name(rank: int) -> None:
    finished = fit(None, strategy="offload_ddp", max_steps=2, **DDP)
    assert isinstance(finished.trainer.strategy, OffloadDDPStrategy)
    assert "| parameter | forward to update | host |" in finished.trainer.strategy.placement()


def test_the_string_stands_for_it(tmp_path: Path) -> None:
    run_on_two_ranks(by_name, tmp_path)


def test_comes_from_yaml_with_the_arguments_of_ddp_x1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning 2.6 calls
    arguments = {"place": DISK, "find_unused_parameters": True, "timeout": "0:05:00", "staging": "1MiB"}
    strategy = {"class_path": "lightning_efficient.OffloadDDPStrategy", "init_args": arguments}
    strategy["dict_kwargs"] = {"bucket_cap_mb": 7}
    trainer = {"accelerator": "cpu", "devices": 2, "logger": False, "strategy": strategy, "barebones": True}
    config = {"seed_everything": False, "trainer": trainer}
    cli = LightningCLI(ByteLanguageModel, StdlibDataModule, run=False, args=config, save_config_callback=None)
    made = cli.trainer.strategy
    assert made.settings.place == DISK
    assert made.settings.staging_bytes == 1 << 20
    assert DDPStrategy(find_unused_parameters=True)._ddp_kwargs.items() <= made._ddp_kwargs.items()
    assert made._ddp_kwargs["bucket_cap_mb"] == 7
    assert made._timeout == timedelta(minutes=5)
