"""The strategy in a Trainer: what is the same as without it, what it says, and what it refuses (O1-O5, G6)."""

from __future__ import annotations

import itertools
import os
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_efficient import ActivationCompressionPlugin, AsyncCheckpointIO, GrowAndUnshareCallback, OffloadStrategy
from lightning_efficient.core.buffers import round_up
from lightning_efficient.offload import session as offload_session
from lightning_efficient.offload import tier_set
from lightning_efficient.offload.placement import Attribute
from lightning_efficient.offload.tiers import numa
from lightning_efficient.offload.tiers.direct_file import SystemCalls
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from tests.helpers.fitting import Run, assert_same_tree, fit, make_trainer
from tests.technique_settings import demo_data, demo_model

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")

DISK = {"optimizer_state": "disk"}
CLIPS: list[dict[str, Any]] = [
    {"gradient_clip_val": 0.3},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
]


def offload(**arguments: Any) -> dict[str, Any]:
    return {"strategy": OffloadStrategy(**({"offload_dir": "swap", "place": DISK} | arguments))}


def same(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    assert_same_tree(one.weights, other.weights, "weights")
    assert_same_tree(one.optimizers, other.optimizers, "optimizers")


@pytest.mark.parametrize("schedule", ["auto", "after_backward", "in_backward", "under_forward"])
def test_a_run_is_the_same_bit_for_bit_o3(schedule: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 3, "each_step": True}
    ours, plain = fit(None, build=offload(schedule=schedule), **arguments), fit(None, **arguments)
    same(ours, plain)
    assert_same_tree(ours.weights_at, plain.weights_at, "weights at each step")


def test_the_string_stands_for_it() -> None:
    run = fit(None, strategy="offload")
    assert isinstance(run.trainer.strategy, OffloadStrategy)
    same(run, fit(None))


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({}, "in_backward: nothing needs all gradients together"),
        ({"gradient_clip_val": 0.5}, "under_forward: gradients are clipped"),
        ({"precision": "16-mixed"}, "after_backward: the gradient scaler"),
    ],
)
def test_auto_takes_the_first_schedule_that_the_run_allows(
    arguments: dict[str, Any], schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    if "precision" in arguments:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        arguments = {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    with caplog.at_level("INFO"):
        fit(None, build=offload(), max_steps=2, **arguments)
    assert schedule in caplog.text


class SeesGradients(pl.Callback):
    """Wants all gradients before the step."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(all(p.grad is not None for p in pl_module.parameters()))


def test_whoever_looks_at_gradients_sees_them() -> None:
    watch = SeesGradients()
    same(fit(None, build=offload(), after=[watch]), fit(None))
    assert all(watch.seen)
    with pytest.raises(MisconfigurationException, match="SeesGradients has on_before_optimizer_step"):
        fit(None, build=offload(schedule="in_backward"), after=[SeesGradients()])


def test_clipping_needs_all_gradients() -> None:
    with pytest.raises(MisconfigurationException, match=r"schedule='in_backward' .*gradients are clipped"):
        fit(None, build=offload(schedule="in_backward"), gradient_clip_val=1.0)


@pytest.mark.parametrize("clip", CLIPS)
def test_clipped_runs_are_the_same_o3(clip: dict[str, Any]) -> None:
    same(fit(None, build=offload(), **clip), fit(None, **clip))


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_on_the_disk_o3_o4(clip: dict[str, Any], accumulate: int) -> None:
    arguments = {**clip, "accumulate_grad_batches": accumulate, "max_steps": 5}
    place = {"optimizer_state": "disk", "gradient": "disk"}
    same(fit(None, build=offload(place=place), **arguments), fit(None, **arguments))


def test_gradients_that_others_look_at_stay() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"place\['gradient'\]='disk' cannot be: gradients leave .*Sees"
    ):
        fit(None, build=offload(place={"gradient": "disk"}), after=[SeesGradients()])
    run = fit(None, build=offload(place=None, memory_budget="540KiB"), after=[SeesGradients()], max_steps=2)
    assert "| gradient | backward to update | host |" in run.trainer.strategy.placement()


EVERYTHING = dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk")


@pytest.mark.parametrize("clip", [{}, CLIPS[0]])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_on_the_disk_o3_o6_o8(
    clip: dict[str, Any], accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload_session, "_SAVED", 1024)
    arguments = {**clip, "accumulate_grad_batches": accumulate, "max_steps": 5, "limit_val_batches": 1}
    arguments |= {"val_check_interval": 3}
    ours = fit(None, build=offload(place=EVERYTHING), root=tmp_path, checkpoints={}, **arguments)
    plain = fit(None, root=tmp_path / "plain", checkpoints={}, **arguments)
    same(ours, plain)
    tags = {tag for _, metrics in ours.logged for tag in metrics}
    assert {"offload/parameter_fetches", "offload/activation_wait_ms"} <= tags
    for step in (2, 5):
        one, other = (torch.load(run.checkpoints[step], weights_only=True) for run in (ours, plain))
        assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
    resumed = fit(None, build=offload(place=EVERYTHING), ckpt_path=plain.checkpoints[2], **arguments)
    same(resumed, fit(None, ckpt_path=ours.checkpoints[2], **arguments))
    assert not any((tmp_path / "swap").glob(".*"))


def test_a_model_that_is_larger_than_the_budget_o6(tmp_path: Path) -> None:
    place = {"parameter": "disk", "optimizer_state": "disk"}
    run = fit(None, build=offload(place=place, memory_budget={"host": "160KiB"}), max_steps=4)
    same(run, fit(None, max_steps=4))
    peak = max(m["offload/parameter_resident_bytes"] for _, m in run.logged if "offload/parameter_resident_bytes" in m)
    assert 0 < peak <= 160 * 1024
    with pytest.raises(ValueError, match="budget"):
        fit(None, build=offload(place=place, memory_budget={"host": "10KiB"}), max_steps=1)


def test_evaluated_with_parameters_elsewhere_o6(tmp_path: Path) -> None:
    module, plain = demo_model(), demo_model()
    strategy = OffloadStrategy(offload_dir="swap", place={"parameter": "disk"})
    one, other = (make_trainer(limit_val_batches=2, **extra) for extra in ({"strategy": strategy}, {}))
    found = [t.validate(m, demo_data(), verbose=False) for t, m in ((one, module), (other, plain))]
    assert found[0] == found[1]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_two_that_keep_what_backward_needs_are_refused_x2() -> None:
    build = {**offload(place={"activation": "disk"}), "callbacks": [ActivationCompressionPlugin(bits=4)]}
    with pytest.raises(MisconfigurationException, match="ActivationCompressionPlugin decides itself"):
        fit(None, build=build)


# -- placement -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_goes_to_the_disk_o2_o5() -> None:
    run = fit(None, build=offload(place=None, memory_budget={"host": "600KiB"}), max_steps=3)
    table = run.trainer.strategy.placement()
    assert "| optimizer_state | update to update | disk |" in table
    assert "| parameter | forward to update | host | 68 |" in table
    same(run, fit(None, max_steps=3))


def test_one_amount_is_of_the_fastest_memory_o5() -> None:
    run = fit(None, build=offload(place=None, memory_budget="600KiB"), max_steps=2)
    assert "no room in host" in run.trainer.strategy.placement()


def state_of_blocks(attribute: Attribute) -> str | None:
    """Named in a configuration too, see ``test_cli.py``."""
    return "disk" if attribute.kind == "optimizer_state" and "blocks" in attribute.name else None


@pytest.mark.parametrize("place", [state_of_blocks, {"optimizer_state": f"{__name__}.state_of_blocks"}])
def test_a_function_places_o2(place: Any) -> None:
    run = fit(None, build=offload(place=place))
    table = run.trainer.strategy.placement()
    assert "| optimizer_state | update to update | disk |" in table
    assert "state_of_blocks |" in table
    assert "| optimizer_state | update to update | host |" in table
    same(run, fit(None))


def test_a_function_is_not_asked_about_what_must_stay_o2() -> None:
    run = fit(None, build=offload(place=lambda _: "disk"), after=[SeesGradients()], max_steps=2)
    assert "| gradient | backward to update | host |" in run.trainer.strategy.placement()


def test_placed_anew_when_the_free_memory_changes_o5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_session, "ADAPT_EVERY", 4)
    free = {4: 0, 8: 1 << 24}
    now = SawBatches()
    monkeypatch.setattr(tier_set, "free_bytes", lambda device: free.get(now.begun, 1 << 20))
    run = fit(None, build=offload(place=None), before=[now], log_every_n_steps=1000)
    texts = [event.text for event in run.events]
    assert [event.step for event in run.events] == [3, 7]  # no matter where logs are due
    assert "disk: " in texts[0]
    assert "disk: " not in texts[1]
    same(run, fit(None))


class SawBatches(pl.Callback):
    """How many batches of training have begun."""

    begun = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1


def test_measurements_are_logged_o4() -> None:
    run = fit(None, build=offload(), max_steps=4)
    tags = set().union(*(metrics for _, metrics in run.logged))
    assert {
        "offload/wait_ms",
        "offload/update_ms",
        "offload/disk_bytes",
        "offload/disk_read_gigabytes_per_second",
    } <= tags


def test_its_balance_says_what_it_moved_and_that_it_would_have_fitted_x5() -> None:
    run = fit(None, build=offload(), max_steps=4)
    balance = run.trainer.strategy.balance()
    trained = sum(p.numel() for p in run.module.parameters())
    assert balance.spared_bytes == pytest.approx(2 * 4 * trained, rel=0.1)  # both of Adam's moments
    last = run.trainer.strategy.measurements()
    assert balance.cost_ms is not None
    assert balance.cost_ms >= 0
    assert last["offload/update_ms"] > 0
    assert last["offload/wait_ms"] >= 0
    assert "of optimizer state on disk, because it was told to" in balance.verdict
    assert "would have fitted" in balance.verdict


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["in_backward", "under_forward"])
def test_checkpoints_are_plain_both_ways_o3(schedule: str, tmp_path: Path) -> None:
    ours = fit(None, build=offload(schedule=schedule), root=tmp_path / "ours", checkpoints={"every_n_train_steps": 4})
    plain = fit(None, root=tmp_path / "plain", checkpoints={"every_n_train_steps": 4})
    for step in (4, 8):
        one, other = (torch.load(run.checkpoints[step], weights_only=True) for run in (ours, plain))
        assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
        from_plain = fit(None, build=offload(schedule=schedule), ckpt_path=plain.checkpoints[step])
        same(from_plain, fit(None, ckpt_path=ours.checkpoints[step]))


def test_beside_asynchronous_checkpoints_x2(tmp_path: Path) -> None:
    build = lambda: {**offload(), "callbacks": [AsyncCheckpointIO(verify="checksum", in_memory=1)]}  # noqa: E731
    ours = fit(None, build=build(), root=tmp_path, checkpoints={})
    plain = fit(None, root=tmp_path / "plain", checkpoints={})
    for step in (1, 5, 16):
        one, other = (torch.load(run.checkpoints[step], weights_only=True) for run in (ours, plain))
        assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
        assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
    same(fit(None, build=build(), ckpt_path=ours.checkpoints[5]), fit(None, ckpt_path=plain.checkpoints[5]))


def test_two_that_step_in_backward_are_refused_x2() -> None:
    build = {**offload(), "callbacks": [AsyncCheckpointIO(optimizer_in_backward=True)]}
    with pytest.raises(MisconfigurationException, match=r"AsyncCheckpointIO\(optimizer_in_backward=True\) and Offload"):
        fit(None, build=build)


def test_saved_after_training_has_ended_o3(tmp_path: Path) -> None:
    ours, plain = fit(None, build=offload(), root=tmp_path), fit(None, root=tmp_path)
    for name, run in (("ours", ours), ("plain", plain)):
        run.trainer.save_checkpoint(tmp_path / name)
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("ours", "plain"))
    assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")


def test_the_optimizer_is_an_ordinary_one_after_training_o3() -> None:
    ours, plain = fit(None, build=offload()), fit(None)
    for run in (ours, plain):
        for parameter in run.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.trainer.optimizers[0].step()
    assert_same_tree(dict(ours.module.state_dict()), dict(plain.module.state_dict()), "weights")


def test_the_state_is_loaded_while_it_runs_o3(tmp_path: Path) -> None:
    """As a spike guard does: back to an earlier state."""

    class GoBack(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5 and not hasattr(self, "state"):
                self.state = {
                    "state_dict": {k: v.clone() for k, v in trainer.strategy.lightning_module_state_dict().items()},
                    "optimizer_states": [trainer.strategy.optimizer_state(trainer.optimizers[0])],
                }
                self.state = torch.load(_saved(self.state, tmp_path / "state"), weights_only=True)
            if trainer.global_step == 9:
                trainer.strategy.load_model_state_dict(self.state)
                trainer.strategy.load_optimizer_state_dict(self.state)

    same(fit(None, build=offload(), after=[GoBack()]), fit(None, after=[GoBack()]))


def _saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


# -- with growth -----------------------------------------------------------------------------------------------------


def grow(**arguments: Any) -> GrowAndUnshareCallback:
    return GrowAndUnshareCallback(mode="stack", stages=[{"depth": 2, "until": 5}, {"depth": 4}], **arguments)


def test_begins_at_the_switch_and_keeps_state_g6(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        ours = fit(None, build={**offload(enabled=False), "callbacks": [grow(offload_on_switch=True)]})
    same(ours, fit(None, build={"callbacks": [grow()]}))
    told = caplog.text
    assert told.index("2 layers -> 4 layers") < told.index("OffloadStrategy:")


def test_resumed_behind_the_switch_it_is_offloaded_too_g6(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Run:
        return fit(None, build={**offload(enabled=False), "callbacks": [grow(offload_on_switch=True)]}, **arguments)

    whole = run(root=tmp_path, checkpoints={})
    resumed = run(root=tmp_path / "resumed", ckpt_path=whole.checkpoints[10])
    assert "| optimizer_state | update to update | disk |" in resumed.trainer.strategy.placement()
    assert resumed.losses == whole.losses[10:]
    assert_same_tree(resumed.weights, whole.weights, "weights")


def test_growth_while_offloaded_keeps_state_g6() -> None:
    ours = fit(None, build={**offload(), "callbacks": [grow()]})
    same(ours, fit(None, build={"callbacks": [grow()]}))
    assert len([event for event in ours.events if event.technique == "offload"]) == 1


SHARE: dict[str, Any] = {"mode": "share", "unit": 2, "correlation_every_n_steps": 2}


@pytest.mark.parametrize(
    ("arguments", "schedule"),
    [
        ({"mode": "stack", "stages": [{"depth": 2, "until": 5}, {"depth": 4}]}, "in_backward"),
        (SHARE | {"until": 5}, "in_backward"),
        (SHARE | {"until": {"correlation_below": 0.9, "step": 5}}, "under_forward"),
        ({"width": {"factor": 2, "until": 5}}, "under_forward"),
    ],
)
def test_growth_updates_in_backward_unless_it_looks_at_gradients_g6(
    arguments: dict[str, Any], schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = DISK | ({"gradient": "disk"} if schedule == "in_backward" else {})
    with caplog.at_level("INFO"):
        ours = fit(None, build={**offload(place=place), "callbacks": [GrowAndUnshareCallback(**arguments)]})
    assert f"schedule {schedule}: " in caplog.text
    same(ours, fit(None, build={"callbacks": [GrowAndUnshareCallback(**arguments)]}))


# -- full precision --------------------------------------------------------------------------------------------------


def test_full_precision_beside_weights_of_16_bits_o3(tmp_path: Path) -> None:
    run = fit(None, build=offload(master_weights=True), precision="bf16-true", root=tmp_path, checkpoints={})
    plain = fit(None, precision="bf16-true")
    assert sum(run.losses[-4:]) <= sum(plain.losses[-4:]) + 0.05
    saved = torch.load(run.checkpoints[8], weights_only=True)["optimizer_states"][0]["state"][0]
    assert saved["master_weight"].dtype == saved["exp_avg"].dtype == torch.float32
    resumed = fit(None, build=offload(master_weights=True), precision="bf16-true", ckpt_path=run.checkpoints[8])
    assert resumed.losses == run.losses[8:]
    assert_same_tree(resumed.weights, run.weights, "weights")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_without_full_precision_in_between_o3(tmp_path: Path) -> None:
    """Its weights count, and not the values in full precision of before, which torch has carried along."""
    arguments: dict[str, Any] = {"precision": "bf16-true", "checkpoints": {}}
    full = lambda **more: offload(master_weights=True, **more)  # noqa: E731
    first = fit(None, build=full(), root=tmp_path / "first", max_steps=3, **arguments)
    for build in ({}, full(enabled=False)):
        between = fit(
            None, build=build, root=tmp_path / f"{len(build)}", max_steps=9, ckpt_path=first.checkpoints[3], **arguments
        )
        last = fit(None, build=full(), max_steps=12, ckpt_path=between.checkpoints[9], precision="bf16-true")
        plain = fit(None, max_steps=12, ckpt_path=between.checkpoints[9], precision="bf16-true")
        assert last.losses[0] == plain.losses[0]
        assert last.losses[1] == pytest.approx(plain.losses[1], abs=0.01)
        state = last.trainer.optimizers[0].state_dict()["state"][0]
        assert {state[key].dtype for key in ("master_weight", "exp_avg", "exp_avg_sq")} == {torch.float32}


def test_full_precision_that_begins_at_the_switch_g6() -> None:
    arguments: dict[str, Any] = {"enabled": False, "master_weights": True}
    build = {**offload(**arguments), "callbacks": [grow(offload_on_switch=True)]}
    run = fit(None, build=build, precision="bf16-true")
    plain = fit(None, build={"callbacks": [grow()]}, precision="bf16-true")
    assert run.losses[:6] == plain.losses[:6]
    assert sum(run.losses[-4:]) <= sum(plain.losses[-4:]) + 0.1
    assert {value.dtype for value in run.trainer.optimizers[0].state_dict()["state"][0].values()} == {torch.float32}


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "later"}, "schedule='later' is not allowed. Use one of auto, after_backward"),
        ({"place": {"optimizer_state": "cloud"}}, r"place\['optimizer_state'\]: 'cloud' is no tier"),
        ({"place": {"state:blocks.*": "disk"}}, r"'state' is no kind of tensor. Use one of parameter, gradient"),
        (
            {"place": {"activation:blocks.*": "disk"}},
            r"place\['activation:blocks.\*'\] would do nothing: what backward",
        ),
        (
            {"place": "disk"},
            r"place='disk' is not allowed. Give a mapping, such as \{'optimizer_state': 'disk'\}, or a",
        ),
        ({"place": {"gradient": "os.nothing"}}, r"place\['gradient'\]: 'os.nothing' is no tier, and no function"),
        ({"place": "os.sep"}, "place: 'os.sep' is no function but '/'"),
        ({"memory_budget": {"gpu": 1}}, "memory_budget: 'gpu' is no tier"),
        ({"memory_budget": {"host": "much"}}, r"memory_budget\['host'\]='much' is no amount of memory"),
        ({"memory_budget": 0}, "memory_budget=0 must be more than nothing"),
        ({"staging": "none"}, "staging='none' is no amount of memory"),
    ],
)
def test_what_is_not_allowed_is_said_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadStrategy(**arguments)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"place\['layer.\*'\] is no kind of tensor .* fits no"):
        fit(None, build=offload(place={"layer.*": "disk"}))


class LbfgsModel(type(demo_model())):  # type: ignore[misc]
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def test_an_optimizer_that_needs_all_parameters_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match="OffloadStrategy: LBFGS cannot be stepped without a closure"):
        fit(None, build=offload(), module=demo_model(LbfgsModel))


def test_a_folder_that_cannot_be_made_is_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no file to offload to can be made in this folder"):
        fit(None, build=offload(offload_dir=tmp_path / "file" / "swap"))


class Steps(pl.Callback):
    """Counts the batches that began."""

    begun = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1


def assert_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch, most: int, message: str) -> None:
    """On a disk on which the file can have no more than ``most`` bytes."""

    def fallocate(descriptor: int, offset: int, nbytes: int) -> None:
        if offset + nbytes > most:
            raise OSError(28, "No space left on device")
        os.posix_fallocate(descriptor, offset, nbytes)

    full, steps = SystemCalls(fallocate=fallocate), Steps()
    monkeypatch.setattr(tier_set, "DiskTier", lambda directory, **others: DiskTier(directory, system=full, **others))
    with pytest.raises(OSError, match=message):
        fit(None, build=offload(), before=[steps])
    assert steps.begun == 0


def test_a_full_disk_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"no room to offload to: .* bytes free and .* bytes more are needed"
    assert_said_before_the_first_step(monkeypatch, 400 << 10, message)  # the state takes twice 471 KiB


def test_room_that_is_short_by_pages_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fit(None, build=offload(), max_steps=1).trainer.strategy._session
    needed = 2 * sum(row.attribute.nbytes for row in session.placement.rows if row.tier == "disk")
    assert_said_before_the_first_step(monkeypatch, needed + (16 << 10), "no room to offload to")  # beside the header


def test_the_disks_budget_is_kept_to() -> None:
    with pytest.raises(ValueError, match=r"memory_budget\['disk'\] allows 1 KiB, and 628 KiB would go there"):
        fit(None, build=offload(memory_budget={"disk": "1KiB"}))


def test_a_disk_that_dies_stops_the_run_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = itertools.count()

    def pwritev(*arguments: Any) -> int:
        if next(writes) > 60:
            raise OSError(5, "Input/output error")
        return os.pwritev(*arguments)

    dying = SystemCalls(pwritev=pwritev)
    monkeypatch.setattr(tier_set, "DiskTier", lambda directory, **others: DiskTier(directory, system=dying, **others))
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    with pytest.raises(OSError, match="Input/output error"):
        fit(None, build=offload(), after=[checkpoint], enable_checkpointing=True)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    step = int(last.stem.partition("=")[2])
    resumed = fit(None, ckpt_path=last)
    assert resumed.losses == fit(None).losses[step:]
    assert not list((tmp_path / "swap").glob(".*"))


# -- batches -----------------------------------------------------------------------------------------------------------


class OutOfMemoryOnce(pl.Callback):
    """The device has no room for the whole batch, once."""

    def __init__(self, step: int, module: torch.nn.Module) -> None:
        self.step, self.failed, self.now = step, 0, 0
        module.model.head.register_forward_hook(self.fail)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.now = trainer.global_step

    def fail(self, module: Any, args: Any, output: Tensor) -> None:
        if self.now == self.step and output.shape[0] == 4 and torch.is_grad_enabled():
            self.failed += 1
            raise torch.OutOfMemoryError("made for this test")


@pytest.mark.parametrize("schedule", ["in_backward", "under_forward", "after_backward"])
def test_a_step_without_room_is_done_again_in_parts_o7(schedule: str, tmp_path: Path) -> None:
    module = demo_model()
    short = OutOfMemoryOnce(6, module)
    arguments = {"batch_feedback": True, "schedule": schedule}
    ours = fit(None, build=offload(**arguments), module=module, before=[short], root=tmp_path, checkpoints={})
    plain = fit(None)
    assert short.failed == 1
    assert ours.losses[:6] == plain.losses[:6]
    assert ours.losses == pytest.approx(plain.losses, rel=1e-3)
    assert ours.trainer.strategy.measurements()["offload/samples_per_part"] == 2
    resumed = fit(None, build=offload(**arguments), ckpt_path=ours.checkpoints[9])
    assert resumed.losses == ours.losses[9:]
    assert_same_tree(resumed.weights, ours.weights, "weights")


def test_what_a_validation_has_loaded_is_not_for_the_next_fit_o7(tmp_path: Path) -> None:
    module = demo_model()
    saved = fit(
        None,
        build=offload(batch_feedback=True),
        module=module,
        before=[OutOfMemoryOnce(1, module)],
        root=tmp_path,
        checkpoints={},
        max_steps=3,
    )
    assert saved.trainer.strategy.measurements()["offload/samples_per_part"] == 2
    trainer, module = make_trainer(max_steps=1, **offload(batch_feedback=True)), demo_model()
    trainer.validate(module, demo_data(), ckpt_path=saved.checkpoints[3], verbose=False)
    trainer.fit(module, demo_data())
    assert "offload/samples_per_part" not in trainer.strategy.measurements()


def test_batches_that_cannot_be_split_are_refused_by_name() -> None:
    class Normalized(type(demo_model())):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.extra = torch.nn.BatchNorm1d(3)

    with pytest.raises(ValueError, match=r"Batches cannot be split: extra \(BatchNorm1d\)"):
        fit(None, build=offload(batch_feedback=True), module=demo_model(Normalized))


# -- coherent memory ---------------------------------------------------------------------------------------------------


def numa_or_skip() -> None:
    try:
        HostTier(1 << 20, numa_node=0).reserve([4096], versioned=False)
    except OSError as error:
        pytest.skip(f"this machine does not let memory be bound to a node: {error}")


def test_state_on_a_numa_node_o9(caplog: pytest.LogCaptureFixture) -> None:
    numa_or_skip()
    with caplog.at_level("INFO"):
        run = fit(None, build=offload(place={"optimizer_state": "numa:0"}))
    assert "| optimizer_state | update to update | numa:0 |" in run.trainer.strategy.placement()
    assert "numa:0: optimizer_state" in caplog.text
    [*_, logged] = [metrics for _, metrics in run.logged if "offload/numa_0_read_bytes" in metrics]
    state = 2 * sum(p.numel() * 4 for p in run.module.parameters())  # of which small neighbours have gaps between
    for moved in ("read", "written"):  # in one step, or, where a thread was late, in the next
        tag = f"offload/numa_0_{moved}_bytes"
        assert state <= statistics.median(values[tag] for _, values in run.logged if tag in values) < 1.1 * state
    for way in ("read", "write"):  # not of a step in which nothing was moved
        tag = f"offload/numa_0_{way}_gigabytes_per_second"
        assert [values[tag] for _, values in run.logged if tag in values][-1] > 0
    assert logged["offload/total_numa_0_read_bytes"] >= 14 * state
    same(run, fit(None))


@pytest.mark.parametrize("kinds", [("optimizer_state",), ("optimizer_state", "parameter", "gradient")])
def test_what_is_planned_fits_the_budget_of_memory_o5(kinds: tuple[str, ...]) -> None:
    numa_or_skip()
    place = dict.fromkeys(kinds, "numa:0")
    planned = fit(None, build=offload(place=place), max_steps=2).trainer.strategy._session.placement
    rows = [row for row in planned.rows if row.tier == "numa:0"]
    budget = sum(round_up(row.attribute.nbytes) for row in rows)
    run = fit(None, build=offload(place=place, memory_budget={"numa:0": budget}))
    same(run, fit(None))


def test_what_backward_needs_leaves_room_for_state_that_is_still_to_come_o8(monkeypatch: pytest.MonkeyPatch) -> None:
    numa_or_skip()
    monkeypatch.setattr(offload_session, "_SAVED", 1024)
    place = {"optimizer_state": "numa:0", "activation": "numa:0"}
    with pytest.warns(UserWarning, match=r"Saved tensors stay in memory, .* Beside what is planned there"):
        run = fit(None, build=offload(place=place, memory_budget={"numa:0": "700KiB"}))
    same(run, fit(None))


def test_a_node_without_room_is_said_before_the_first_step_o9(monkeypatch: pytest.MonkeyPatch) -> None:
    numa_or_skip()
    monkeypatch.setattr(numa, "free_bytes", lambda node: 100 << 10)
    steps = Steps()
    place = {"optimizer_state": "numa:0"}
    with pytest.raises(OSError, match="NUMA node 0 has 102,400 bytes free"):
        fit(None, build=offload(place=place, memory_budget={"numa:0": "1GiB"}), before=[steps])
    assert steps.begun == 0


def test_a_node_that_there_is_not_is_said_before_the_first_step_o9() -> None:
    with pytest.raises((OSError, ValueError), match="node"):
        fit(None, build=offload(place={"optimizer_state": "numa:77"}))
