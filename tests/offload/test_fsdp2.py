"""Two ranks with sharded parameters (FSDP2): as with ModelParallelStrategy, bit for bit, also in checkpoints (O3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lightning_efficient.offload import session
from tests.helpers.fitting import assert_same_tree
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.sharding import DISK, ShardedModel, assert_same_checkpoints, local, ours, plain, run, sharded

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class OddBlock(nn.Module):
    """With parameters that two ranks cannot halve, of one of which the second rank has nothing."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.odd, self.single = nn.Linear(5, 3), nn.Parameter(torch.ones(1, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + 0.1 * self.odd(x[..., :5]).mean(-1, keepdim=True) * self.single.mean()


class Uneven(ShardedModel):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks = nn.ModuleList(OddBlock(block) for block in self.model.blocks)


class Repeated(ShardedModel):
    """Two of its blocks are the same module."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks[2] = self.model.blocks[0]


class Product(torch.autograd.Function):
    """``x @ weight.T`` that saves memory of the weight which nobody can tell from any other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight.data.view(-1))
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.view(gradient.shape[-1], -1), gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class RawBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.weight, self.frozen = nn.Parameter(torch.eye(32)), nn.Parameter(torch.eye(32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(Product.apply(self.block(x), self.weight), self.frozen)


class Raw(ShardedModel):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.blocks = nn.ModuleList(RawBlock(block) for block in self.model.blocks)


class Compiled(ShardedModel):
    """With compiled blocks."""

    def configure_model(self) -> None:
        if not self.is_sharded:
            super().configure_model()
            for block in self.model.blocks:
                block.compile(backend="aot_eager")


class Parallel(ShardedModel):
    """Its layers are divided among the ranks, and its shards are not (tensor parallelism)."""

    def configure_model(self) -> None:
        if self.is_sharded:
            return
        for block in self.model.blocks:
            plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
        super().configure_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.distributed.broadcast(batch, 0)
        return super().training_step(batch, batch_idx)


class Recomputed(ShardedModel):
    """Each block computes its activations again in backward."""

    def __init__(self, *, inside: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.inside = inside

    def configure_model(self) -> None:
        if self.is_sharded:
            return
        if self.inside:
            self.model.blocks = nn.ModuleList(Again(block) for block in self.model.blocks)
        super().configure_model()
        if not self.inside:
            self.model.blocks = nn.ModuleList(Again(block) for block in self.model.blocks)


class Again(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Sometimes(ShardedModel):
    """A block that only every other batch uses."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        blocks = self.model.blocks
        if batch_idx % 2:
            self.model.blocks = blocks[:-1]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.model.blocks = blocks


class Manual(ShardedModel):
    """Two optimizers, by hand."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


def parameters(module: nn.Module, *, matrices: bool) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad and (p.dim() == 2) == matrices]


def groups(module: nn.Module) -> Any:
    """Several, with options of their own; some parameters are frozen."""
    module.model.blocks[1].requires_grad_(False)
    matrices, others = (parameters(module, matrices=kind) for kind in (True, False))
    frozen = list(module.model.blocks[1].parameters())
    first = {"params": others, "weight_decay": 0.0, "lr": 1e-3}
    return torch.optim.AdamW([first, {"params": matrices}, {"params": frozen}], lr=4e-3)


def both(module: nn.Module) -> Any:
    return (
        torch.optim.AdamW(parameters(module, matrices=False), lr=4e-3),
        torch.optim.SGD(parameters(module, matrices=True), lr=1e-2, momentum=0.9),
    )


def muon(module: nn.Module) -> Any:
    matrices = [p for p in parameters(module, matrices=True) if len(p) > 1]
    return torch.optim.Muon(matrices, lr=1e-2, ns_steps=1)  # of each the ranks talk for long


def by(name: str, **options: Any) -> Callable[[], dict[str, Any]]:
    """The optimizer of torch of this name."""

    def make(module: nn.Module) -> Any:
        return getattr(torch.optim, name)(module.parameters(), **({"lr": 4e-3} | options))

    return lambda: {"module": sharded(make_optimizers=make)}


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

CASES: dict[str, Any] = {
    "auto": lambda: {},
    "behind-backward": lambda: {"offload": {"schedule": "after_backward"}},
    "in-one-file": lambda: {"strategy": {"save_distributed_checkpoint": False}},
    "clipped-by-norm": lambda: {"gradient_clip_val": 0.3},
    "clipped-by-value": lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulating": lambda: {"accumulate_grad_batches": 2, "max_steps": 3},
    "accumulating-clipped": lambda: {"accumulate_grad_batches": 3, "max_steps": 3, "gradient_clip_val": 0.3},
    "fused": by("AdamW", fused=True),
    "momentum": by("SGD", momentum=0.9),
    "rmsprop": by("RMSprop", momentum=0.9),
    "muon": lambda: {"module": sharded(make_optimizers=muon)},
    "one-cycle": lambda: {"module": sharded(schedule="onecycle")},
    "groups": lambda: {"module": sharded(make_optimizers=groups)},
    "uneven": lambda: {"module": sharded(Uneven)},
    "uneven-muon": lambda: {"module": sharded(Uneven, make_optimizers=muon)},
    "not-tied": lambda: {"module": sharded(tied=False)},
    "repeated": lambda: {"module": sharded(Repeated)},
    "compiled": lambda: {"module": sharded(Compiled), "max_steps": 3},
    "tensor-parallel": lambda: {
        "module": sharded(Parallel),
        "strategy": {"data_parallel_size": 1, "tensor_parallel_size": 2},
    },
    "recomputed-inside": lambda: {"module": sharded(Recomputed, inside=True)},
    "sometimes": lambda: {"module": sharded(Sometimes)},
    "stays-gathered": lambda: {"module": sharded(sharding={"reshard_after_forward": False})},
    "manual": lambda: {"module": sharded(Manual, make_optimizers=both), "max_steps": 4},
    "bf16-policy": lambda: {"module": sharded(sharding={"mp_policy": BF16})},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "validated": lambda: {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1},
    "activations": lambda: {"offload": {"place": DISK | {"activation": "disk"}}},
    "activations-of-data": lambda: {"module": sharded(Raw), "offload": {"place": DISK | {"activation": "disk"}}},
    "activations-compiled": lambda: {
        "module": sharded(Compiled),
        "max_steps": 3,
        "offload": {"place": DISK | {"activation": "disk"}},
    },
}


def compared(rank: int, names: list[str], root: Path) -> dict[str, str]:
    """Each case with plain FSDP2 and with ours; by which schedule."""
    session.TOGETHER_BYTES, session._SAVED = 1 << 12, 1 << 10  # everything is small here
    schedules = {}
    for name in names:
        runs = []
        for who, build in (("plain", plain), ("ours", ours)):
            case = CASES[name]()
            case.setdefault("max_steps", 3)
            strategy, offload = case.pop("strategy", {}), case.pop("offload", {})
            made = build(**strategy, **(offload if who == "ours" else {}))
            last = case["max_steps"]
            runs.append(run(root / name / who, made, each_step=True, checkpoints=(last,), **case))
        one, mine = runs
        assert mine.losses == one.losses, name
        assert_same_tree(local(mine.weights_at), local(one.weights_at), f"{name}: weights")
        assert_same_tree(local(mine.optimizers), local(one.optimizers), f"{name}: optimizers")
        assert_same_checkpoints(mine, one, last, f"{name}: checkpoint")
        assert not list((root / name / "ours").rglob("*.spill")), name
        schedules[name] = mine.trainer.strategy._schedule
        torch.distributed.barrier()
    return schedules


BEHIND = {
    "behind-backward", "clipped-by-norm", "clipped-by-value", "accumulating-clipped", "muon",
    "uneven-muon", "manual",
}  # fmt: skip


PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_results_and_checkpoints_are_those_of_plain_fsdp2_o3(part: int, tmp_path: Path) -> None:
    names = list(CASES)[part::PARTS]
    for schedules in run_on_two_ranks(compared, tmp_path, names, tmp_path, timeout=400):
        assert schedules == {name: "after_backward" if name in BEHIND else "in_backward" for name in names}
