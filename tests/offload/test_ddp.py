"""Two ranks that divide optimizer state: the same as plain DDP, bit for bit, also from their checkpoints (O3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import AsyncCheckpointIO, OffloadStrategy
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.offload.sharded import transfer
from tests.helpers.fitting import assert_same_tree, fit
from tests.helpers.models import ManualModel, ScheduledModel, SilentModel
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.dividing import DDP, DISK, STEPS, assert_same_checkpoints, ours, run, saved
from tests.technique_settings import CONTEXT, demo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Normalized(ByteLanguageModel):
    """With batch statistics, which DDP takes from rank zero."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.norm = nn.BatchNorm1d(8)
        self.extra = nn.Linear(1, 8, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        values = self.extra(batch[:, :1].float() / 256 + self.global_rank)
        return super().training_step(batch, batch_idx) + 0.1 * self.norm(values).square().mean()


class Unused(ByteLanguageModel):
    """A layer that only every other batch uses, and one that none does."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sometimes, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.sometimes(torch.ones(4)).square().sum() if batch_idx % 2 else loss


class TwoGroups(ByteLanguageModel):
    """Groups with options of their own, channels_last weights, and some that are frozen."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.picture = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.picture.bias.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.picture(torch.ones(1, 2, 3, 3)).square().mean()

    def configure_optimizers(self) -> Any:
        groups: list[list[nn.Parameter]] = [[], []]
        for parameter in self.parameters():
            groups[parameter.dim() > 1].append(parameter)
        return torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=4e-3)


def scheduled(optimizer: str) -> dict[str, Any]:
    return {"module": demo_model(ScheduledModel, optimizer=optimizer)}


def step_compiled() -> dict[str, Any]:
    module = demo_model(SilentModel)
    return {"module": module, "compiled": torch.compile(module, backend="eager"), "max_steps": 3}


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)  # the first steps overflow
    return {"plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


CASES: dict[str, Any] = {
    "auto": lambda: {},
    "asked-for": lambda: {"offload": {"schedule": "after_backward"}},
    "on-the-host": lambda: {"offload": {"place": None}},
    "clipped-by-norm": lambda: {"gradient_clip_val": 0.3},
    "clipped-by-value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulating": lambda: {"accumulate_grad_batches": 2, "max_steps": 3},
    "accumulating-clipped": lambda: {"accumulate_grad_batches": 3, "max_steps": 3, "gradient_clip_val": 0.3},
    "sgd": lambda: scheduled("SGD"),
    "adagrad": lambda: scheduled("Adagrad"),
    "adafactor": lambda: scheduled("Adafactor"),
    "batch-norm": lambda: {"module": demo_model(Normalized)},
    "unused": lambda: {"module": demo_model(Unused), "ddp": {"find_unused_parameters": True}},
    "static-graph": lambda: {"ddp": {"static_graph": True}},
    "bucket-view": lambda: {"ddp": {"gradient_as_bucket_view": True}},
    "groups": lambda: {"module": demo_model(TwoGroups)},
    "manual": lambda: {"module": demo_model(ManualModel, optimizers=2), "max_steps": 6},
    "averaged": lambda: {"before": [EMAWeightAveraging(decay=0.8)]},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "scaled": scaled,
    "step-compiled": step_compiled,
    "validated": lambda: {"limit_val_batches": 1, "val_check_interval": 2},
    "activations": lambda: {"offload": {"place": DISK | {"activation": "disk"}}},
    "asynchronous": lambda: {"saver": lambda: AsyncCheckpointIO(in_memory=1)},
}


def compared(rank: int, names: list[str], root: Path) -> None:
    """Each case with plain DDP and with ours."""
    for name in names:
        runs = []
        for who in ("plain", "ours"):
            case = CASES[name]()
            ddp, offload, saver = case.pop("ddp", {}), case.pop("offload", {}), case.pop("saver", None)
            strategy = DDPStrategy(**ddp) if who == "plain" else ours(**ddp, **offload)
            case.setdefault("after", [saver()] if saver is not None and who == "ours" else [])
            steps = (2, case.get("max_steps", STEPS))  # to save and load at each takes longer than to train
            runs.append(run(root / name / who, strategy, each_step=True, checkpoints=steps, **case))
        plain, mine = runs
        assert mine.losses == plain.losses, name
        assert_same_tree(mine.weights_at, plain.weights_at, f"{name}: weights")
        assert_same_checkpoints(mine, plain, f"{name}: checkpoint")
        whole = dict(mine.module.state_dict())
        assert_same_tree(whole, dict(plain.module.state_dict()), f"{name}: module")
        assert not list((root / name / "ours").rglob("*.spill")), name
        torch.distributed.barrier()
        assert not list(Path("swap").glob("*.spill")), name


@pytest.mark.parametrize("part", range(3))
def test_results_and_checkpoints_are_those_of_plain_ddp_o3(part: int, tmp_path: Path) -> None:
    run_on_two_ranks(compared, tmp_path, list(CASES)[part::3], tmp_path)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def resumed(rank: int, root: Path) -> None:
    transfer._PIECE = 1000  # so that states take several messages
    pairs = (("plain", DDPStrategy()), ("ours", ours()))
    whole, mine = (run(root / name, strategy, checkpoints=(2, STEPS)) for name, strategy in pairs)
    torch.distributed.barrier()
    own, plain = mine.checkpoints[2], whole.checkpoints[2]
    for path, strategy in ((own, ours()), (own, DDPStrategy()), (plain, ours(place=None))):
        again = run(root / "again", strategy, ckpt_path=path, checkpoints=(STEPS,))
        assert again.losses == whole.losses[2:]
        assert_same_checkpoints(again, whole, f"with {type(strategy).__name__}", STEPS)


def test_resumed_runs_go_on_bit_for_bit_o3(tmp_path: Path) -> None:
    run_on_two_ranks(resumed, tmp_path, tmp_path)


def three_batches() -> DataLoader:
    """Of any run, whatever its ranks."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randint(0, 256, (12, CONTEXT + 1), generator=generator)
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def on_two_ranks(rank: int, root: Path, max_steps: int, ckpt_path: Path | None, name: str) -> Path:
    """A part of a run."""
    strategy = ours() if name == "ours" else DDPStrategy()
    return run(root / name, strategy, data=three_batches(), max_steps=max_steps, ckpt_path=ckpt_path).checkpoints[
        max_steps
    ]


def test_two_ranks_then_one_then_two_o3(tmp_path: Path) -> None:
    ends = {}
    for name in ("ours", "plain"):
        path, _ = run_on_two_ranks(on_two_ranks, tmp_path, tmp_path, 3, None, name)
        build = {"strategy": OffloadStrategy(offload_dir="swap", place=DISK)} if name == "ours" else {}
        arguments = {"data": three_batches(), "root": tmp_path / name, "checkpoints": {}, "max_steps": 6}
        alone = fit(None, build=build, ckpt_path=path, **arguments)
        ends[name], _ = run_on_two_ranks(on_two_ranks, tmp_path, tmp_path, 9, alone.checkpoints[6], name)
    one, other = (torch.load(ends[name], weights_only=True) for name in ("ours", "plain"))
    assert_same_tree(one["state_dict"], other["state_dict"], "state_dict")
    assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")


def saved_after_training(rank: int, root: Path) -> None:
    for name, strategy in (("ours", ours()), ("plain", DDPStrategy())):
        finished = fit(None, strategy=strategy, root=root, max_steps=STEPS, **DDP)
        for state in finished.trainer.optimizers[0].state.values() if name == "ours" else ():
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        finished.trainer.save_checkpoint(root / name)
    one, other = (torch.load(root / name, weights_only=True) for name in ("ours", "plain"))
    assert_same_tree(one["optimizer_states"], other["optimizer_states"], "optimizer_states")
    torch.distributed.barrier()
    assert not list(Path("swap").glob("*.spill"))


def test_saved_after_training_has_ended_o3(tmp_path: Path) -> None:
    run_on_two_ranks(saved_after_training, tmp_path, tmp_path)


def in_full_precision(rank: int, root: Path) -> None:
    arguments: dict[str, Any] = {"precision": "bf16-true", "max_steps": 6, "checkpoints": (3, 6)}
    whole = run(root / "whole", ours(master_weights=True), **arguments)
    on_host = run(root / "host", ours(master_weights=True, place=None), **arguments)
    again = run(root / "again", ours(master_weights=True), ckpt_path=whole.checkpoints[3], **arguments)
    torch.distributed.barrier()
    for other in (on_host, again):
        assert_same_checkpoints(other, whole, "checkpoint", 6)
    one = saved(whole, 6)[6]
    state = one["optimizer_states"][0]["state"]
    assert len(state) == len(list(whole.module.parameters()))
    assert {value["master_weight"].dtype for value in state.values()} == {torch.float32}


def test_full_precision_beside_weights_of_16_bits_o3(tmp_path: Path) -> None:
    run_on_two_ranks(in_full_precision, tmp_path, tmp_path)
