"""A spike guard's state in checkpoints, beside a loss scaler, and on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_efficient.precision.precision import RollbackPrecision
from lightning_efficient.precision.scaling import lower_scale
from tests.helpers.fitting import assert_same_tree
from tests.helpers.ranks import run_on_two_ranks
from tests.precision.spiking import AtBatch, Batches, Net, guarded, train
from tests.technique_settings import SHARDS


def test_resumed_bit_for_bit_with_all_that_was_seen(tmp_path: Path) -> None:
    def go(**more: Any) -> Any:
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
        data = Batches(bad={8: 100.0, 14: 100.0})
        return train(guarded(), every, data=data, module=Net(plain=True), root=tmp_path, max_epochs=2, **more)

    whole = go()
    middle = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = go(ckpt_path=middle)
    assert whole.counts["skipped"] == resumed.counts["skipped"] >= 3
    assert_same_tree(resumed.state, whole.state, "state")
    assert_same_tree(resumed.plugin.state_dict()["guard"], whole.plugin.state_dict()["guard"], "guard")
    assert [event.step for event in resumed.plugin.events()] == [event.step for event in whole.plugin.events()]


def test_a_checkpoint_without_the_state_of_a_guard_loads() -> None:
    state = RollbackPrecision(high="fp32").state_dict()
    del state["guard"]
    plugin = guarded()
    plugin.load_state_dict(state)
    assert plugin.skipped_batches() == []


# -- a loss scaler ----------------------------------------------------------------------------------------------------


def scaled(scale: float, **more: Any) -> RollbackPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return guarded(inner=MixedPrecision("16-mixed", "cpu", scaler), **({"spike_guard": None} | more))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("guard", [None, {"window": 6}])
def test_a_step_that_a_scaler_would_leave_out_is_done_again(accumulate: int, guard: Any) -> None:
    more = {"accumulate_grad_batches": accumulate, "module": None}
    one = train(scaled(2.0**24, spike_guard=guard), **more)
    scale = one.plugin.inner.scaler.get_scale()
    assert 1 < scale < 2.0**24
    assert one.counts["scale_retries"] >= 1
    assert "spikes" not in one.counts
    other = train(scaled(scale, spike_guard=guard), **more)
    assert_same_tree(one.state, other.state, "state")
    assert_same_tree(one.logged_of_model, other.logged_of_model, "logged")
    steps = {int(state["step"]) for state in one.state["optimizer"]["state"].values()}
    assert steps == {16 // accumulate}


def test_gradients_of_earlier_batches_get_the_smaller_scale_too() -> None:
    more = {"accumulate_grad_batches": 2, "data": Batches(bad={3: 4096.0})}
    one = train(scaled(2.0**12), module=Net(plain=True), **more)
    scale = one.plugin.inner.scaler.get_scale()
    assert scale < 2.0**12
    other = train(scaled(scale), module=Net(plain=True), **more)
    assert other.counts == {}
    for name, weight in one.state["weights"].items():
        torch.testing.assert_close(weight, other.state["weights"][name], rtol=1e-3, atol=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 5})
    assert lower_scale(scaler) == (0.5, 4.0)
    assert scaler.state_dict()["_growth_tracker"] == 0


@pytest.mark.parametrize("case", ["loss", "gradient"])
def test_what_no_scale_mends_is_left_to_the_scaler(case: str) -> None:
    class Root(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + (loss * 0).sqrt() if case == "gradient" and batch_idx == 3 else loss

    bad = {3: float("inf")} if case == "loss" else {}
    result = train(scaled(2.0**10), data=Batches(bad=bad), module=Root(plain=True))
    assert result.counts == ({} if case == "loss" else {"scale_retries": 16})
    assert result.plugin.inner.scaler.get_scale() == 2.0**9
    steps = {int(state["step"]) for state in result.state["optimizer"]["state"].values()}
    assert steps == {15}


# -- two ranks --------------------------------------------------------------------------------------------------------


def on_rank(rank: int, accumulate: int) -> dict[str, Any]:
    more = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": accumulate, "use_distributed_sampler": False}

    def go(bad: dict[int, float], without: tuple[int, ...] = ()) -> Any:
        data = Batches(bad=bad if rank == 1 else {}, without=without, rank=rank)
        return train(guarded(), data=data, module=Net(plain=True), **more)

    def damage(module: Any) -> None:
        if rank == 1:
            module.net[0].weight.data.mul_(1e4)

    healed = train(guarded(), AtBatch(11, damage), data=Batches(rank=rank), module=Net(plain=True), **more)
    bad = go({9: 1000.0})
    without = go({}, (8, 9)[-1 if accumulate == 1 else 0 :])
    return {
        "bad": bad.state, "without": without.state, "counts": bad.counts, "reason": bad.plugin.skipped_batches(),
        "healed": healed.state, "whole": go({}).state, "healed counts": healed.counts,
    }  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_agree_on_a_spike_of_one(accumulate: int, tmp_path: Path) -> None:
    one, other = run_on_two_ranks(on_rank, tmp_path, accumulate)
    assert one["counts"] == other["counts"]
    assert one["counts"]["skipped"] == 1
    assert_same_tree(one["bad"], other["bad"], "ranks")
    assert_same_tree(one["bad"], one["without"], "as if it had not been there")
    assert "loss" in other["reason"][0]["reason"]
    assert one["healed counts"] == other["healed counts"] == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert_same_tree(one["healed"], other["healed"], "ranks")
    assert_same_tree(one["healed"], one["whole"], "healed")


class Sharded(Net):
    """Its parameters are spread over the ranks."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[-1], self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def damage_on_one(module: Any) -> None:
    if module.global_rank == 1:
        module.net[0].weight._local_tensor.data.mul_(1e4)


def on_sharded_rank(rank: int) -> dict[str, Any]:
    def go(*callbacks: Any, bad: dict[int, float] | None = None, **more: Any) -> Any:
        return train(
            guarded(**more), *callbacks, data=Batches(bad=bad if rank else {}, rank=rank), module=Sharded(plain=True),
            devices=2, strategy=ModelParallelStrategy(**SHARDS), use_distributed_sampler=False,
        )  # fmt: skip

    def weights(result: Any) -> dict[str, Any]:
        return {name: p.detach().to_local().clone() for name, p in result.module.named_parameters()}

    one, other = go(AtBatch(10, damage_on_one)), go(spike_guard=None)
    skipped = go(bad={9: 1000.0})
    return {"one": weights(one), "other": weights(other), "counts": one.counts, "skipped": skipped.counts}


def test_shards_go_back_too(tmp_path: Path) -> None:
    for result in run_on_two_ranks(on_sharded_rank, tmp_path):
        assert result["counts"] == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
        assert result["skipped"]["skipped"] == 1
        assert_same_tree(result["one"], result["other"], "weights")
