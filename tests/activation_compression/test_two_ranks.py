"""On two ranks of FSDP2: what follows gradients, and what follows the size of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_efficient import ActivationCompressionPlugin
from lightning_efficient.demos import ByteLanguageModel
from tests.helpers.fitting import make_trainer
from tests.helpers.ranks import run_on_two_ranks
from tests.technique_settings import demo_data, demo_model


class ShardedWithMomentum(ByteLanguageModel):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def trained(plugin: ActivationCompressionPlugin, steps: int) -> pl.Trainer:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = make_trainer(
        plugin, strategy=strategy, max_steps=steps, devices=2, use_distributed_sampler=False,
        enable_checkpointing=False, logger=False,
    )  # fmt: skip
    trainer.fit(demo_model(ShardedWithMomentum, layers=2), demo_data(batches=steps))
    return trainer


def sharded_runs(rank: int) -> dict[str, Any]:
    adaptive = ActivationCompressionPlugin(adaptive={"every": 3, "target": 0.1})
    trainer = trained(adaptive, 7)
    measured = adaptive._adaptive.adaptive.measured  # type: ignore[union-attr]
    now = {}
    for layer in ("model.blocks.0.mlp.up", "model.head"):
        weight = trainer.lightning_module.get_parameter(f"{layer}.weight")
        now[layer] = float(trainer.optimizers[0].state[weight]["momentum_buffer"].full_tensor().abs().mean())
    budget = ActivationCompressionPlugin(memory_budget="96KiB")
    trained(budget, 4)
    return {
        "rates": {tag: value for tag, value in adaptive.measurements().items() if "/bits/" in tag},
        "momentum": {layer: measured[layer].momentum for layer in now},
        "now": now,
        "budget": dict(budget.measurements()),
    }


def test_rates_that_follow_gradients_and_budgets_work_with_shards_a6_a9(tmp_path: Path) -> None:
    """Optimizers have the momentum of shards, and layers are called with whole weights."""
    one, other = run_on_two_ranks(sharded_runs, tmp_path)
    assert one["rates"] == other["rates"] != {}
    assert one["momentum"] == other["momentum"]
    for layer, now in one["now"].items():
        assert one["momentum"][layer] == pytest.approx(now, rel=0.5), "of the step before"
    for values in (one["budget"], other["budget"]):
        assert values["activations/kept_bytes"] == pytest.approx(values["activations/planned_bytes"], rel=0.03)
        assert values["activations/kept_bytes"] <= 1.01 * 96 * 1024
