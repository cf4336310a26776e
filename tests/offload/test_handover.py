"""Groups and parameters that change while state is elsewhere: what stays keeps its record (O3, O4, G6)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient import GrowAndUnshareCallback, OffloadStrategy
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.mapped_memory import is_of_a_record
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.handover import Handover
from lightning_efficient.offload.updates.staging import Staging
from tests.helpers.fitting import assert_same_tree, make_trainer
from tests.helpers.processes import context
from tests.offload.test_checkpoint import WIDTH, Peak, Wide

MIB = 1 << 20
LAYER = 4 * WIDTH * WIDTH
STAGING = 16 * MIB

# -- an engine after another ---------------------------------------------------------------------------------------


class Job:
    """An optimizer that has stepped once, and an engine that has its state on a disk."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(8, 8)) for _ in range(5)]
        self.optimizer = torch.optim.AdamW(self.parameters[:4], lr=1e-2)
        for parameter in self.parameters[:4]:
            parameter.grad = torch.randn(8, 8)
        self.optimizer.step()
        self.before = self.optimizer.state_dict()["state"]
        self.before = {i: {k: v.clone() for k, v in state.items()} for i, state in self.before.items()}
        self.tier, self.staging = DiskTier(folder), Staging(MIB)
        self.engine = self.make()

    def make(self, stays: str = "", before: Handover | None = None) -> UpdateEngine:
        names = {id(parameter): str(index) for index, parameter in enumerate(self.parameters)}
        tier_of: Callable[[str], DiskTier | None] = lambda name: None if name == stays else self.tier  # noqa: E731
        return UpdateEngine([self.optimizer], names, tier_of, self.staging, together_bytes=1, before=before)

    def states(self) -> dict[int, Any]:
        self.engine.settle()
        return {i: self.engine.states(unit)[0] for i, unit in enumerate(self.engine.units) if i < 4}

    def close(self) -> None:
        self.staging.close()
        self.tier.close()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


def test_what_stays_keeps_its_record_and_what_moves_does_not_o4(job: Job) -> None:
    placed = [unit.placed for unit in job.engine.units]
    job.staging.flush()
    written = job.tier.statistics().written_bytes
    job.optimizer.add_param_group({"params": job.parameters[4:]})
    job.engine = job.make("1", Handover(job.engine))
    now = [unit.placed for unit in job.engine.units]
    assert now == [placed[0], None, placed[2], placed[3], None]
    job.staging.flush()
    assert job.tier.statistics().written_bytes == written
    assert "exp_avg" in job.optimizer.state[job.parameters[1]]
    assert "exp_avg" not in job.optimizer.state[job.parameters[0]]
    assert_same_tree(job.states(), job.before, "state")


def test_what_is_lent_is_read_replaced_and_written_to_o4(job: Job) -> None:
    placed = [unit.placed for unit in job.engine.units]
    handover = Handover(job.engine)
    handover.lend()
    state = job.optimizer.state
    assert_same_tree({i: dict(state[p]) for i, p in enumerate(job.parameters[:4])}, job.before, "state")
    assert all(is_of_a_record(state[p]["exp_avg"]) for p in job.parameters[:4])
    state[job.parameters[1]]["exp_avg"].mul_(2)
    job.before[1]["exp_avg"].mul_(2)
    state[job.parameters[2]] = {key: value.clone() for key, value in state[job.parameters[0]].items()}
    job.before[2] = job.before[0]
    job.engine = job.make("3", handover)
    now = [unit.placed for unit in job.engine.units]
    assert now[0] is placed[0]
    assert now[3] is None
    assert None not in now[1:3]
    assert not set(now[1:3]) & set(placed)
    assert not any(is_of_a_record(value) for p in job.parameters[:4] for value in state[p].values())
    job.tier.commit()
    job.tier.commit()  # behind which nothing may be a view of what was there
    assert_same_tree(job.states(), job.before, "state")


# -- memory ----------------------------------------------------------------------------------------------------------


class Wider(Wide):
    """Has a layer more, which nobody trains at first."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH, WIDTH, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.more(self.layers(batch[0])).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.layers.parameters(), lr=1e-3)


class Measures(pl.Callback):
    """The most memory of two steps before a switch, and of the switch and two steps behind it."""

    def __init__(self, switch: int, add: bool) -> None:
        self.switch, self.add, self.most = switch, add, []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.switch - 2, self.switch):
            self.peak = Peak().__enter__()
        if batch_idx == self.switch and self.add:
            trainer.optimizers[0].add_param_group({"params": list(module.more.parameters())})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.switch - 1, self.switch + 1):
            self.peak.__exit__()
            self.most.append(self.peak.most)


def measured(folder: Path, grows: bool) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    measures = Measures(4, add=not grows)
    stages = [{"depth": 4, "until": 4}, {"depth": 8}]
    grow = [GrowAndUnshareCallback(layers="layers.*", mode="stack", stages=stages)] if grows else []
    strategy = OffloadStrategy(place={"optimizer_state": "disk"}, offload_dir="swap", staging=STAGING)
    trainer = make_trainer(measures, *grow, strategy=strategy, default_root_dir=folder, max_steps=7)
    trainer.fit(Wide() if grows else Wider(), torch.utils.data.DataLoader(torch.ones(32, 1, WIDTH)))
    Path("found.json").write_text(json.dumps(measures.most))


@pytest.mark.parametrize(("grows", "layers"), [(False, 1), (True, 4)])
def test_a_change_needs_memory_for_what_came_only_g6(grows: bool, layers: int, tmp_path: Path) -> None:
    """Not for the state of the layers that stay, which is 32 or 64 MiB."""
    process = context().Process(target=measured, args=(tmp_path, grows))
    process.start()
    process.join()
    before, behind = json.loads((tmp_path / "found.json").read_text())
    came = 2 * layers * LAYER  # the state of what came, or its parameters and gradients
    assert behind - before < came + 16 * MIB
