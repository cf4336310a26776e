"""DDP and FSDP2 on two ranks (G5, G8, X2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_efficient.growth import GrowAndUnshareCallback, load_grown
from tests.helpers.fitting import Run, StopAt, assert_same_tree, fit, make_trainer
from tests.helpers.models import CompiledModel, ManualModel, ShardedModel, ShiftedLossModel
from tests.helpers.ranks import RankError, run_on_two_ranks
from tests.helpers.summaries import DDP, assert_ranks_agree, assert_resumed, summary, whole_summary
from tests.technique_settings import SETTINGS, STEPS, TechniqueSetting, demo_model, every, named

changes_parameters = every(lambda setting: setting.changes_parameters)


class GradientsAgree(Callback):
    """Before each update, every parameter has a gradient, and it is the same on both ranks."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        mine = torch.stack([p.grad.double().abs().sum() for p in pl_module.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert torch.equal(*both), f"gradients are not reduced at step {trainer.global_step}"


def ddp_run(rank: int, name: str, root: Path) -> dict[str, Any]:
    """The setting's run, and its resumption from around each switch."""
    setting = named(name)

    def go(**arguments: Any) -> Run:
        return fit(setting, build=setting.build(ranks="ddp"), root=root, after=[GradientsAgree()], **arguments, **DDP)

    where = {step + offset for step in setting.switches[-1:] or (8,) for offset in (0, 1)}
    whole = go(checkpoints=where)
    torch.distributed.barrier()  # rank 0 writes the checkpoints
    resumed = {step: summary(go(ckpt_path=whole.checkpoints[step])) for step in sorted(where)}
    return {"whole": summary(whole), "resumed": resumed}


@every(lambda setting: setting.works_on("ddp"))
def test_ddp_ranks_stay_equal_and_resume_g5_g8_x2(setting: TechniqueSetting, tmp_path: Path) -> None:
    one, other = run_on_two_ranks(ddp_run, tmp_path, setting.name, tmp_path / "run")
    assert_ranks_agree(one["whole"], other["whole"], divided="strategy" in setting.yaml)
    assert [step for step, _ in one["whole"]["events"]] == sorted([*setting.switches, *setting.events])
    for result in (one, other):
        for resumed in result["resumed"].values():
            assert_resumed(resumed, result["whole"])
    # One process that sees both ranks' batches at once computes the same, but for rounding.
    single = fit(setting, data=setting.data(batch_size=8, batches=5), root=tmp_path / "single")
    assert [batch[2] for batch in single.batches] == [
        a[2] + b[2] for a, b in zip(one["whole"]["batches"], other["whole"]["batches"], strict=True)
    ]
    assert [(event.step, event.text.split(":")[0]) for event in single.events] == [
        (step, text.split(":")[0]) for step, text in one["whole"]["events"]
    ]
    means = [(a + b) / 2 for a, b in zip(one["whole"]["losses"], other["whole"]["losses"], strict=True)]
    after_the_last_switch = (setting.switches or (8,))[-1] + 2
    assert means == pytest.approx(single.losses, rel=2e-2)  # Adam makes much of rounding where gradients are small
    assert means[:after_the_last_switch] == pytest.approx(single.losses[:after_the_last_switch], rel=2e-3)


# -- other ways to train under DDP -------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[TechniqueSetting], dict[str, Any]]] = {
    "accumulating": lambda setting: {"accumulate_grad_batches": 2, "max_steps": 12},
    "static-graph": lambda setting: {"strategy": DDPStrategy(static_graph=True)},
    "bucket-view": lambda setting: {"strategy": DDPStrategy(gradient_as_bucket_view=True)},
    "unused": lambda setting: {"strategy": DDPStrategy(find_unused_parameters=True)},
    "manual": lambda setting: {"module": setting.model(ManualModel, optimizers=2), "max_steps": 2 * STEPS},
    "averaged": lambda setting: {"before": [EMAWeightAveraging(decay=0.8)]},
    "bf16": lambda setting: {"precision": "bf16-mixed"},
    "network-compiled": lambda setting: {"module": setting.model(CompiledModel)},
}


def ddp_variant(rank: int, names: list[str], variant: str, root: Path) -> dict[str, Any]:
    results = {}
    for name in names:
        setting = named(name)
        if variant == "averaged" and "averaging" in setting.refuses:
            continue
        arguments = {"strategy": DDPStrategy(), **VARIANTS[variant](setting)}
        run = fit(setting, root=root / name, after=[GradientsAgree()], **DDP, **arguments)
        results[name] = summary(run) | {"module": {k: v.clone() for k, v in run.module.state_dict().items()}}
    return results


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_ddp_in_other_ways_g8_x2(variant: str, tmp_path: Path) -> None:
    names = ["stack", "share", "width", "monitor"]
    one, other = run_on_two_ranks(ddp_variant, tmp_path, names, variant, tmp_path)
    for name in one:
        assert_ranks_agree(one[name], other[name])
        assert_same_tree(one[name]["module"], other[name]["module"], f"{name} after the fit")
        assert [step for step, _ in one[name]["events"]] == list(named(name).switches)
        assert one[name]["losses"][-1] < one[name]["losses"][0]


# -- ranks decide alike ------------------------------------------------------------------------------------------

TRIGGERS: dict[str, dict[str, Any]] = {
    # The loss of rank 0 is about 5.5 and falls, that of rank 1 is 4 higher: the mean begins near 7.5.
    "loss-below": {"mode": "share", "unit": 2, "until": {"step": 14, "loss_below": 7.35}},
    "plateau": {"mode": "share", "unit": 2, "until": {"step": 14, "plateau": 2}},
    "correlation": {"mode": "share", "unit": 1, "until": {"step": 14, "correlation_below": 0.99}},
    "monitor": {"mode": "share", "unit": 2, "monitor": "shifted", "until": {"step": 14, "loss_below": 7.35}},
}


class PlateauModel(ShiftedLossModel):
    """The loss of rank 0 rises from step 3 on; that of rank 1 falls, by less."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        slope = -0.5 if self.global_rank else 2.0
        return loss + slope * max(0, self.global_step - 3)


def ddp_trigger(rank: int, root: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for name, arguments in TRIGGERS.items():
        callback = GrowAndUnshareCallback(check_every_n_steps=1, correlation_every_n_steps=2, **arguments)
        model = demo_model(PlateauModel if name == "plateau" else ShiftedLossModel)
        run = fit(None, module=model, strategy=DDPStrategy(), before=[callback], root=root / name, **DDP)
        results[name] = summary(run)
    return results


def test_ranks_with_different_losses_switch_together_g5(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(ddp_trigger, tmp_path, tmp_path)
    for name in TRIGGERS:
        assert_ranks_agree(one[name], other[name])
        [(step, reason)] = one[name]["events"]
        assert 2 < step < 14, f"{name}: {reason}"
        assert "cap" not in reason
    for name in ("loss-below", "monitor"):
        assert other[name]["losses"][0] > 9 > 7.35 > one[name]["losses"][0]
        means = [(a + b) / 2 for a, b in zip(one[name]["losses"], other[name]["losses"], strict=True)]
        smoothed = smooth(means)
        expected = next(step for step, value in enumerate(smoothed, start=1) if value < 7.35)
        assert one[name]["events"][0][0] == expected


def smooth(values: list[float]) -> list[float]:
    """A mean in which a value counts half after ten others, without a bias to zero."""
    total, weight, decay, smoothed = 0.0, 0.0, 0.5**0.1, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


# -- FSDP2 -------------------------------------------------------------------------------------------------------


def sharded_runs(rank: int, names: list[str], root: Path) -> dict[str, Any]:
    """Each setting's run, and its resumption from the middle."""
    results = {}
    for name in names:
        setting = named(name)

        def go(setting: TechniqueSetting = setting, **arguments: Any) -> Run:
            arguments |= {"module": setting.model(ShardedModel), "root": root / setting.name, "max_steps": 10, **DDP}
            return fit(setting, build=setting.build(ranks="fsdp2"), **arguments)

        run = go(checkpoints={"every_n_train_steps": 6})
        torch.distributed.barrier()  # rank 0 writes the checkpoints
        results[name] = {"whole": whole_summary(run), "resumed": whole_summary(go(ckpt_path=run.checkpoints[6]))}
    return results


def test_fsdp2_ranks_stay_equal_and_resume_x2(tmp_path: Path) -> None:
    names = ["monitor", "activations"]  # the others that shard are together in test_matrix.py
    settings = [named(name) for name in names]
    assert all(setting.works_on("fsdp2") for setting in settings)
    ranks = run_on_two_ranks(sharded_runs, tmp_path, names, tmp_path / "runs")
    for setting in settings:
        one, other = (rank[setting.name] for rank in ranks)
        assert_ranks_agree(one["whole"], other["whole"])
        for result in (one, other):
            assert_resumed(result["resumed"], result["whole"])
        data = setting.data(batch_size=8, batches=5)
        single = fit(setting, data=data, root=tmp_path / "single" / setting.name, max_steps=10)
        means = [(a + b) / 2 for a, b in zip(one["whole"]["losses"], other["whole"]["losses"], strict=True)]
        assert means == pytest.approx(single.losses, rel=5e-3)


def sharding_is_refused(rank: int, names: list[str]) -> dict[str, str]:
    said = dict.fromkeys(names, "nothing was refused")
    for name in names:
        try:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            fit(named(name), module=demo_model(ShardedModel), strategy=strategy, enable_checkpointing=False, **DDP)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def train_sharded(rank: int, checkpoint: Path, root: Path) -> dict[str, Any]:
    """The documented route: the full model is built from a checkpoint of the first phase, then sharded."""
    model = load_grown(demo_model(ShardedModel), checkpoint, grown=True)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    save = ModelCheckpoint(dirpath=root, filename="last", every_n_train_steps=8)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = make_trainer(Losses(), save, strategy=strategy, max_steps=8, **DDP)
    trainer.fit(model, named("stack").data())
    weights = {name: value.full_tensor().clone() for name, value in model.state_dict().items() if "model." in name}
    return {"losses": losses, "weights": weights}


def test_fsdp2_is_refused_with_a_route_g8_x2(tmp_path: Path) -> None:
    refusing = {setting.name: setting.refuses["sharding"] for setting in SETTINGS if "sharding" in setting.refuses}
    for said in run_on_two_ranks(sharding_is_refused, tmp_path, list(refusing)):
        for name, message in refusing.items():
            assert message in said[name]
            assert "load_grown(..., grown=True)" in said[name]


@changes_parameters
def test_fsdp2_goes_on_from_a_first_phase_g8_x2(setting: TechniqueSetting, tmp_path: Path) -> None:
    first = fit(setting, root=tmp_path, checkpoints=(3,), after=[StopAt(3)])
    checkpoint = first.checkpoints[3]
    sharded, same = run_on_two_ranks(train_sharded, tmp_path, checkpoint, tmp_path / "sharded")
    assert_same_tree(sharded["weights"], same["weights"], "weights")
    alone = fit(
        None,
        module=load_grown(demo_model(), checkpoint, grown=True),
        data=setting.data(batch_size=8, batches=5),
        max_steps=8,
        enable_checkpointing=False,
    )
    means = [(a + b) / 2 for a, b in zip(sharded["losses"], same["losses"], strict=True)]
    assert means == pytest.approx(alone.losses, rel=1e-2)
    assert len(sharded["weights"]) == len([name for name in alone.weights if "model." in name])
    saved = torch.load(tmp_path / "sharded" / "last.ckpt", weights_only=True)
    loaded = demo_model()
    loaded.load_state_dict(saved["state_dict"])
    assert_same_tree({k: v for k, v in loaded.state_dict().items() if "model." in k}, sharded["weights"], "saved")


# -- the helper itself -------------------------------------------------------------------------------------------


def fail_on_one_rank(rank: int) -> None:
    if rank == 1:
        raise ValueError("only on rank one")
    torch.distributed.barrier()


def wait_for_ever(rank: int) -> None:
    if rank == 0:
        torch.distributed.barrier()
    else:
        time.sleep(60)


def test_the_helper_shows_the_traceback_of_the_rank_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1:[\s\S]*fail_on_one_rank[\s\S]*only on rank one"):
        run_on_two_ranks(fail_on_one_rank, tmp_path)


def test_the_helper_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="did not end in time"):
        run_on_two_ranks(wait_for_ever, tmp_path, timeout=2)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def fail_on_rank_zero(rank: int, folder: Path) -> str:
    """The disk of the rank that writes is full."""
    if rank == 0:
        import os

        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        os.pwrite = full
    try:
        fit(
            named("checkpoint"),
            root=folder,
            checkpoints={"every_n_train_steps": 2},
            strategy="ddp",
            max_steps=400,
            **DDP,
        )
    except Exception as error:
        return type(error).__name__
    return "ended"


def test_a_rank_that_cannot_write_ends_the_run_on_all_c10(tmp_path: Path) -> None:
    began = time.monotonic()
    one, other = run_on_two_ranks(fail_on_rank_zero, tmp_path, tmp_path, timeout=90)
    assert one == "CheckpointSaveError"
    assert other != "ended"
    assert time.monotonic() - began < 80
    assert not list(tmp_path.rglob("*.ckpt"))
