"""Spikes of a loss or a gradient: done again in high bits, from a snapshot, and left out only then (X3)."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_efficient.checkpointing import AsyncCheckpointIO
from lightning_efficient.checkpointing.snapshot import Snapshot as Kept
from lightning_efficient.precision.precision import RollbackPrecision
from lightning_efficient.precision.replay import Snapshot, group_options, versions
from lightning_efficient.precision.ring import KeptBatch, Ring
from lightning_efficient.precision.spikes import HEALTHY, NOT_FINITE, OVERFLOW, SPIKE, STEEP, Level, SpikeGuard, judge
from tests.helpers.fitting import assert_same_tree, fit, make_trainer
from tests.precision.spiking import GUARD, AtBatch, Batches, Net, Result, guarded, train
from tests.technique_settings import named


def assert_same(one: Result, other: Result) -> None:
    """Weights, buffers, optimizer, schedule, steps and logged values."""
    assert_same_tree(one.state, other.state, "state")
    assert_same_tree(one.logged_of_model, other.logged_of_model, "logged")
    assert one.counted == other.counted


@torch.no_grad()
def damage(module: Any) -> None:
    module.net[0].weight[:] *= 1e3
    module.net[-1].weight[:] *= 1e3


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_what_a_spike_is() -> None:
    level = Level(3.0, 8)
    for n in range(3):
        level.add(2.0 + 0.01 * n)
    assert level.limit == math.inf  # not before half of the window
    level.add(2.0)
    assert level.limit == pytest.approx(3 * level.usual)
    level.add(math.nan)
    level.add(math.inf)
    assert len(level.state_dict()) == 4
    for value in (0.1, 5.0, 0.5, 9.0, 0.2, 7.0, 1.0, 4.0):  # scatters by itself
        level.add(value)
    assert level.limit > 9.0 * 2
    below = Level(3.0, 4)
    for value in (-2.0, -2.1, -1.9, -2.0):
        below.add(value)
    assert below.limit == pytest.approx(2.0)
    zeros = Level(3.0, 4)
    for _ in range(4):
        zeros.add(0.0)
    assert zeros.limit == math.inf
    other = Level(3.0, 4)
    other.load_state_dict(level.state_dict())
    assert other.state_dict() == level.state_dict()[-4:]


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "verdict"),
    [
        (3.0, 2.0, False, HEALTHY), (math.nextafter(3.0, 4), 2.0, False, SPIKE),
        (1.0, math.nextafter(2.0, 3), True, STEEP),
        (math.nan, 0.0, True, NOT_FINITE), (-math.inf, 0.0, False, NOT_FINITE), (1.0, math.inf, False, NOT_FINITE),
        (1.0, math.nan, True, OVERFLOW),
    ],
)  # fmt: skip
def test_just_over_and_just_under(loss: float, norm: float, scaled: bool, verdict: int) -> None:
    one, other = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)
    assert judge(one, other, (3.0, 2.0), scaled=scaled)[0] == verdict


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"factor": 1.0}, "factor"), ({"factor": True}, "factor"), ({"window": 3}, "window"),
        ({"windows": 50}, "window"), ({"gradients": 1}, "gradients"), (3.0, "dict"),
        ({"snapshots": -1}, "snapshots"), ({"memory_cap": "many"}, "memory_cap"),
    ],
)  # fmt: skip
def test_arguments_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"spike_guard.*{words}"):
        RollbackPrecision(spike_guard=given)
    assert SpikeGuard.of(None) is None


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("manual", "manual optimization"),
        ("lbfgs", "LBFGS"),
        ("backward", "optimizer_in_backward"),
    ],
)
def test_what_cannot_be_taken_back_is_refused_by_name(what: str, words: str, tmp_path: Path) -> None:
    module: Any = Net()
    module.automatic_optimization = what != "manual"
    if what == "lbfgs":
        module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    callbacks = [AsyncCheckpointIO(optimizer_in_backward=True)] if what == "backward" else []
    with pytest.raises(MisconfigurationException, match=words):
        train(guarded(), *callbacks, module=module, root=tmp_path)


# -- healthy runs ------------------------------------------------------------------------------------------------------


def test_a_guard_changes_nothing_in_a_healthy_run() -> None:
    one, other = train(guarded()), train(guarded(spike_guard=None))
    assert_same(one, other)
    assert one.counts == {}
    loop = one.trainer.fit_loop.epoch_loop  # and nothing stays behind
    assert "run" not in loop.automatic_optimization.__dict__
    assert "update_lr_schedulers" not in loop.__dict__


def test_a_search_for_a_rate_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = guarded(spike_guard=GUARD)
    trainer = make_trainer(plugins=[plugin], max_epochs=1, max_steps=-1, default_root_dir=tmp_path)
    module = Net(plain=True)
    module.lr = 0.0
    found = Tuner(trainer).lr_find(module, Batches(60).loader(), min_lr=1e-3, max_lr=1e6, num_training=60)
    assert max(found.results["loss"]) > 4 * min(found.results["loss"])
    assert "Epoch 0, batch" not in caplog.text  # the counts are those of before the search again


# -- (a) the same batch in high bits ----------------------------------------------------------------------------------


class Broken:
    """A format whose numbers are far too large in some batches, which no sign notices."""

    def __init__(self, own: Any, module: Any, at: tuple[int, ...]) -> None:
        self.own, self.module, self.at = own, module, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def encode(self, values: Any, **more: Any) -> Any:
        broken = self.module.trainer.fit_loop.batch_idx in self.at
        return self.own.encode(values * 100 if broken else values, **more)


class HighAt(Callback):
    """Some batches are in high bits."""

    def __init__(self, plugin: RollbackPrecision, at: tuple[int, ...]) -> None:
        self.plugin, self.at = plugin, at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.plugin.compute_high(batch_idx in self.at)


def low(module: Any, at: tuple[int, ...], **more: Any) -> RollbackPrecision:
    plugin = guarded(low="int8", pre_learning_steps=2, **more)
    plugin._engine._protect = False
    plugin._engine.low = Broken(plugin._engine.low, module, at)
    return plugin


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_spike_of_few_bits_heals_in_high_ones_as_if_nothing_had_been(accumulate: int) -> None:
    module = Net()
    one = train(low(module, (9,)), module=module, accumulate_grad_batches=accumulate)
    reference = Net()
    plugin = low(reference, (), spike_guard=None)
    other = train(plugin, HighAt(plugin, (9,)), module=reference, accumulate_grad_batches=accumulate)
    assert one.counts == {"spikes": 1, "healed": 1}
    assert_same(one, other)
    assert one.module.hooks == other.module.hooks
    assert one.module.net[1].num_batches_tracked == 16
    assert_same_tree(one.plugin.state_dict()["nodes"], plugin.state_dict()["nodes"], "nodes")


def test_a_gradient_that_is_as_large_in_high_bits_is_right() -> None:
    class Steep(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss, weight = super().training_step(batch, batch_idx), self.net[0].weight
            return loss + 1e3 * (weight - weight.detach()).sum() if batch_idx == 9 else loss

    one, other = train(guarded(), module=Steep()), train(guarded(spike_guard=None), module=Steep())
    assert one.counts == {"spikes": 1, "confirmed": 1}
    assert_same(one, other)


def test_few_bits_that_cause_spikes_again_and_again_wait() -> None:
    module = Net(plain=True)
    result = train(low(module, tuple(range(6, 16))), module=module)
    assert 1 < result.counts["healed"] < 6
    assert "skipped" not in result.counts


# -- (b) from a snapshot ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_damaged_weights_heal_from_a_snapshot(accumulate: int) -> None:
    averages = [EMAWeightAveraging(decay=0.5), EMAWeightAveraging(decay=0.5)]
    more = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    one = train(guarded(), averages[0], AtBatch(13, damage), **more)
    other = train(guarded(), averages[1], **more)
    assert one.counts == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert_same(one, other)  # the weights at the end are the averages
    assert one.module.hooks == other.module.hooks
    assert one.plugin.measurements()["precision/rollbacks"] == 1.0
    assert one.plugin.events()[0].text.startswith("Epoch 0, batch 13, step")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_network_is_guarded_too() -> None:
    def compiled() -> Net:
        module = Net(plain=True)
        module.net.compile(backend="aot_eager")
        return module

    one, other = train(guarded(), AtBatch(10, damage), module=compiled()), train(guarded(), module=compiled())
    assert one.counts == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert_same(one, other)
    skipped = train(guarded(), data=Batches(bad={9: 100.0}), module=compiled())
    assert skipped.counts == {"spikes": 1, "rollbacks": 1, "skipped": 1}
    without = train(guarded(), data=Batches(without=(9,)), module=compiled())
    assert_same_tree(skipped.state, without.state, "state")


def test_over_the_end_of_an_epoch() -> None:
    class InSecondEpoch(AtBatch):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    class Warm(Net):
        """Its learning rate is set by the number of the step, in the step."""

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            self.seen.append((epoch, batch_idx, self.trainer.global_step))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + self.trainer.global_step)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def go(*callbacks: Callback) -> Result:
        module = Warm()
        module.seen = []
        return train(guarded(), *callbacks, data=Batches(9), module=module, max_epochs=2)

    one, other = go(InSecondEpoch(1, damage)), go()
    assert set(one.module.seen) == set(other.module.seen)  # the same, some of them again
    assert len(one.module.seen) > len(other.module.seen)
    assert one.counts["healed_from_snapshot"] == 1
    assert_same(one, other)


def test_snapshots_of_asynchronous_checkpoints_are_used(tmp_path: Path) -> None:
    def go(name: str, *more: Callback) -> Result:
        every = ModelCheckpoint(tmp_path / name, every_n_train_steps=4, save_top_k=-1)
        plugin = guarded(spike_guard=GUARD | {"snapshots": 0})
        return train(plugin, AsyncCheckpointIO(in_memory=1), *more, every, root=tmp_path)

    one, other = go("one", AtBatch(10, damage)), go("other")
    assert one.counts == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert "snapshot of step 8" in one.plugin.events()[0].text
    assert_same_tree(one.state, other.state, "state")


def test_a_snapshot_that_has_just_given_way_to_a_newer_one_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read before anything is given up for it."""
    calls, load, discard = [], Kept.load, AsyncCheckpointIO.discard_after

    def load_next_time(kept: Kept, *arguments: Any) -> Any:
        calls.append("load")
        if calls == ["load"]:
            raise LookupError
        return load(kept, *arguments)

    def note(io: AsyncCheckpointIO, step: int) -> None:
        calls.append("discard")
        discard(io, step)

    monkeypatch.setattr(Kept, "load", load_next_time)
    monkeypatch.setattr(AsyncCheckpointIO, "discard_after", note)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    plugin = guarded(spike_guard=GUARD | {"snapshots": 0})
    io = AsyncCheckpointIO(in_memory=1)
    written = AtBatch(9, lambda _: io.engine.drain())
    result = train(plugin, io, written, AtBatch(10, damage), every, root=tmp_path)
    assert result.counts == {"spikes": 1, "rollbacks": 1, "healed_from_snapshot": 1}
    assert calls == ["load", "load", "discard"]


def test_a_checkpoint_io_finishes_its_copies_before_a_run_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished only then is not to go back to."""
    io, calls = AsyncCheckpointIO(in_memory=1), []
    monkeypatch.setattr(io.engine, "settle", lambda: calls.append("settled"))
    monkeypatch.setattr(io.engine, "discard_after", lambda step: calls.append(step))
    io.discard_after(3)
    assert calls == [3, "settled"]


def test_a_ring_goes_back_as_far_as_it_says() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    ring = Ring(SpikeGuard(snapshot_every=2, snapshots=2))
    data, weights = torch.zeros(2), []
    for step in range(7):
        tensors = versions(data) if step == 4 else []
        options = group_options([optimizer])
        ring.add(KeptBatch({}, step, step, True, {}, options, lambda: None, tensors), [layer], [optimizer], None)
        weights.append(layer.weight.detach().clone())
        layer(torch.ones(2)).sum().backward()
        optimizer.step()
    assert [snapshot.step for snapshot in ring.snapshots] == [4, 6]
    assert ring.nbytes == 2 * Snapshot.nbytes([layer], [optimizer]) > 0
    assert ring.since(2) == []  # there is no snapshot, so the batches are gone
    assert [batch.step for batch in ring.since(4)] == [4, 5]
    ring.snapshots[0].back()
    assert torch.equal(layer.weight, weights[4])
    assert int(optimizer.state[layer.weight]["step"]) == 4
    ring.discard_after(4)
    assert [snapshot.step for snapshot in ring.snapshots] == [4]
    data += 1  # by a loader that uses its memory again
    assert ring.since(4) == []


def test_memory_for_snapshots_has_a_limit() -> None:
    result = train(guarded(spike_guard=GUARD | {"memory_cap": 100}), AtBatch(9, damage))
    assert result.counts["spikes"] > 0
    assert "rollbacks" not in result.counts


# -- (c) left out -----------------------------------------------------------------------------------------------------


def test_a_batch_that_is_bad_in_itself_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        one = train(guarded(), data=Batches(bad={9: 100.0}))
    other = train(guarded(), data=Batches(without=(9,)))
    assert one.counts == {"spikes": 1, "rollbacks": 1, "skipped": 1}
    assert_same_tree(one.state, other.state, "state")
    assert one.trainer.global_step == 15
    (skipped,) = one.plugin.skipped_batches()
    assert (skipped["epoch"], skipped["batch"], skipped["step"]) == (0, 9, 9)
    assert "in high bits loss" in skipped["reason"]
    assert "Epoch 0, batch 9, step 9: loss" in caplog.text
    assert one.module.hooks[18:20] == ["start 9", "end 9"]
    means = [entry[1]["metric"] for entry in one.logged + other.logged if "metric" in entry[1]]
    assert means[0] == means[1]


@pytest.mark.parametrize("bad", [8, 9])
def test_of_an_accumulated_step_only_the_bad_batch_is_left_out(bad: int) -> None:
    more = {"accumulate_grad_batches": 2}
    one = train(guarded(), data=Batches(bad={bad: 1000.0}), module=Net(plain=True), **more)
    other = train(guarded(spike_guard=None), module=Net(plain=True, ignored=(bad,)), **more)
    assert one.counts["skipped"] == 1
    assert_same_tree(one.state, other.state, "state")


def test_another_level_is_learnt_anew() -> None:
    result = train(
        guarded(spike_guard=GUARD | {"most_skipped": 2}), data=Batches(bad=dict.fromkeys(range(8, 16), 50.0))
    )
    assert result.counts["skipped"] == 2
    assert result.trainer.global_step == 14


def test_a_batch_that_training_step_changes_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class InPlace(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(1.0)
            return super().training_step(batch, batch_idx)

    result = train(guarded(), data=Batches(bad={9: 100.0}), module=InPlace())
    assert result.counts == {"spikes": 1, "skipped": 1}
    assert "changes its batch in place" in result.plugin.skipped_batches()[0]["reason"]


# -- not finite -------------------------------------------------------------------------------------------------------


class Logarithm(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.log()


def test_what_is_not_finite_in_high_bits_too_names_the_operation() -> None:
    module = Net(plain=True)
    module.net.insert(2, Logarithm())  # of zeros
    module.net.insert(2, nn.ReLU())
    with pytest.raises(FloatingPointError, match=r"batch 0, step 0: the loss is not finite.* log in 'net\.3'"):
        train(guarded(), module=module)
    module = Net(plain=True)
    with pytest.raises(FloatingPointError, match=r"the values of 'net\.0\.weight', which"):
        train(guarded(spike_guard=GUARD | {"snapshots": 0}), AtBatch(3, lambda m: m.net[0].weight.data.fill_(math.nan)),
              module=module)  # fmt: skip


def test_a_gradient_that_is_not_finite_names_its_operation() -> None:
    class Root(nn.Module):
        def forward(self, x: Any) -> Any:
            return (x * 0).abs().sqrt()

    module = Net(plain=True)
    module.net.insert(1, Root())
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite.*the gradient of sqrt in 'net\.1'"):
        train(guarded(), module=module)


def test_a_mask_is_not_to_blame() -> None:
    class Masked(nn.Module):
        def forward(self, x: Any) -> Any:
            weights = x.masked_fill(torch.arange(x.shape[-1]) > 2, -math.inf).softmax(-1)
            return weights * (x - x).log().clamp_max(0.0)

    module = Net(plain=True)
    module.net.insert(1, Masked())
    with pytest.raises(FloatingPointError, match=r"log in 'net\.1'"):
        train(guarded(), module=module)


def test_a_network_that_grows_goes_back_to_what_it_has_grown_to() -> None:
    def damage_block(module: Any) -> None:
        with torch.no_grad():
            module.model.blocks[0].attention.output.weight.fill_(math.nan)

    class AfterSwitch(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == max(setting.switches) + 3:
                damage_block(pl_module)

    def go(plugin: RollbackPrecision, *after: Callback) -> Any:
        return fit(setting, build=setting.build() | {"plugins": [plugin]}, after=after)

    setting = named("stack")
    guard = {"window": 6, "snapshot_every": 2}
    one, other = go(guarded(spike_guard=guard), AfterSwitch()), go(guarded(spike_guard=None))
    assert one.trainer.precision_plugin.measurements()["precision/healed_from_snapshot"] == 1
    assert_same_tree(one.weights, other.weights, "weights")
    assert_same_tree(one.optimizers, other.optimizers, "optimizers")
