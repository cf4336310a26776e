"""What each of two ranks has of sharded parameters' optimizer state, and where it is (O1, O2)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_efficient.core.torch_internals import local_part
from lightning_efficient.offload import session
from lightning_efficient.offload.local_shards.modules import own_parameters, sharded_modules, show_shards
from lightning_efficient.offload.updates.layout import Layout, is_bulk
from lightning_efficient.offload.updates.subset_step import updates_by_element
from tests.helpers.fitting import assert_same_tree
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.sharding import STEPS, local, ours, plain, run, sharded
from tests.offload.test_fsdp2 import Repeated, Uneven, muon

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Shares(pl.Callback):
    """What this rank has in its optimizer and on its disk behind the last step."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = trainer.optimizers[0].state
        values = [local_part(value) for entry in state.values() for value in entry.values()]
        self.resident = sum(value.numel() * value.element_size() for value in values if value.numel() > 1)
        self.units = [unit.names for unit in trainer.strategy._session.engine.units]
        self.tiers = [unit.tier is not None for unit in trainer.strategy._session.engine.units]
        self.moved = dict(trainer.strategy.measurements())
        trainer.strategy.barrier()
        self.files = len(list(Path("swap").glob("*.spill")))
        trainer.strategy.barrier()

    @property
    def found(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("resident", "units", "tiers", "moved", "files")}


def shares(rank: int, root: Path) -> dict[str, Any]:
    watch = Shares()
    validated = {"limit_val_batches": 1, "num_sanity_val_steps": 1}  # leaves parameters gathered
    module = sharded(Uneven, optimizer="AdamW")
    finished = run(root, ours(), module=module, after=[watch], checkpoints=None, **validated)
    sizes = [local_part(p).numel() * 4 for p in finished.module.parameters()]
    return {**watch.found, "sizes": sizes}


def test_each_rank_moves_the_state_of_its_shards_only_o2(tmp_path: Path) -> None:
    one, other = run_on_two_ranks(shares, tmp_path, tmp_path)
    assert one["units"] == other["units"]
    for mine in (one, other):
        assert mine["files"] == 2
        assert mine["resident"] == 0
        moved = {name.removeprefix("offload/"): value for name, value in mine["moved"].items()}
        assert moved["states_elsewhere"] == len(mine["sizes"])
        whole = 2 * sum(mine["sizes"])  # two moments
        assert 0.8 * (STEPS - 1) * whole < moved["total_disk_written_bytes"] < 1.3 * STEPS * whole
        assert 0.8 * (STEPS - 2) * whole < moved["total_disk_read_bytes"] < 1.3 * STEPS * whole


def otherwise(rank: int, root: Path, with_muon: bool) -> dict[str, Any]:
    """The ranks have other tiers for other parameters."""
    mine = {"optimizer_state:blocks.0*": "disk"} if rank else {"optimizer_state:*.weight": "disk"}
    watch, arguments = Shares(), {"make_optimizers": muon if with_muon else None}
    one = run(root / "plain", plain(), module=sharded(**arguments), checkpoints=None)
    other = run(root / "ours", ours(place=mine), module=sharded(**arguments), checkpoints=None, after=[watch])
    assert other.losses == one.losses
    assert_same_tree(local(other.weights), local(one.weights), "weights")
    assert_same_tree(local(other.optimizers), local(one.optimizers), "optimizers")
    return watch.found


@pytest.mark.parametrize("with_muon", [False, True])
def test_ranks_agree_on_units_whatever_their_tiers_are_o2(with_muon: bool, tmp_path: Path) -> None:
    one, other = run_on_two_ranks(otherwise, tmp_path, tmp_path, with_muon)
    assert one["units"] == other["units"]
    assert one["tiers"] != other["tiers"]


# -- switched on later -----------------------------------------------------------------------------------------------


class Engages(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.strategy.enable_offload(trainer)


class Regroups(pl.Callback):
    """From the third step on a parameter is in a group of its own."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            optimizer = trainer.optimizers[0]
            last = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": [last], "lr": 1e-3})


def changed(rank: int, root: Path) -> None:
    engaged = {"limit_val_batches": 1, "val_check_interval": 2}
    for name, arguments, options in (
        ("engaged", engaged, {"enabled": False}),
        ("regrouped", {"before": [Regroups()]}, {}),
    ):
        watch = Shares()
        mine = dict(arguments) | ({"before": [Engages()]} if name == "engaged" else {})
        one = run(root / name / "plain", plain(), module=sharded(optimizer="AdamW"), **arguments)
        other = run(root / name / "ours", ours(**options), module=sharded(optimizer="AdamW"), after=[watch], **mine)
        assert other.losses == one.losses, name
        assert_same_tree(local(other.weights), local(one.weights), f"{name}: weights")
        assert_same_tree(local(other.optimizers), local(one.optimizers), f"{name}: optimizers")
        assert watch.resident == 0, name
        assert watch.moved["offload/states_elsewhere"] == len(list(other.module.parameters())), name


def test_switched_on_and_regrouped_while_training_g6(tmp_path: Path) -> None:
    run_on_two_ranks(changed, tmp_path, tmp_path)


# -- the pieces ------------------------------------------------------------------------------------------------------


def in_time(rank: int, root: Path) -> dict[str, Any]:
    """Where modules run once and twice: what was left for the optimizer's step."""
    session.TOGETHER_BYTES = 1  # a unit for each parameter
    found = {}
    for name, cls in (("once", None), ("twice", Repeated)):
        late: list[str] = []

        class Late(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                if trainer.global_step:
                    return
                updates = trainer.strategy._session.updates
                step = updates._step

                def noting(units: Any, late: list[str] = late, updates: Any = updates, step: Any = step) -> None:
                    late += [
                        name for unit in units for name in unit.names if unit.parameters[0] not in updates._updated
                    ]
                    step(units)

                updates._step = noting

        module = sharded(optimizer="AdamW") if cls is None else sharded(cls, optimizer="AdamW")
        run(root / name, ours(), module=module, after=[Late()], max_steps=3, checkpoints=None)
        found[name] = late
    return found


def test_all_is_updated_in_backward(tmp_path: Path) -> None:
    for found in run_on_two_ranks(in_time, tmp_path, tmp_path):
        assert found == {"once": [], "twice": []}


def spread(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).view(5, 3)
    tensor, row = distribute_tensor(whole, mesh, [Shard(0)]), distribute_tensor(whole[:1], mesh, [Shard(0)])
    assert is_bulk(tensor)
    assert is_bulk(row) == (rank == 0)
    states = [{"step": torch.tensor(1.0), "moment": tensor, "row": row}, {"moment": whole}]
    layout = Layout.of(states)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.fill(buffer, states)
    first, second = layout.views(buffer, 2)
    assert set(first) == ({"moment", "row"} if rank == 0 else {"moment"})
    assert torch.equal(first["moment"].full_tensor(), whole)
    assert first["moment"].placements == tensor.placements
    assert torch.equal(second["moment"], whole)
    assert type(second["moment"]) is torch.Tensor
    assert Layout.of([{**states[0], **first}, second]) == layout


def test_records_hold_this_ranks_part_of_a_spread_tensor(tmp_path: Path) -> None:
    run_on_two_ranks(spread, tmp_path)


def modules(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for part in (model[1], model):
        fully_shard(part, mesh=mesh)
    shards = list(model.parameters())
    assert list(sharded_modules(model)) == [model, model[1]]
    assert list(own_parameters(model)) == shards[:2]
    assert list(own_parameters(model[1])) == shards[2:]
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert not set(own_parameters(model)) & set(shards)  # as torch leaves the outermost one
    show_shards(model)
    assert list(model.parameters()) == shards


def test_parameters_belong_to_the_nearest_sharded_module(tmp_path: Path) -> None:
    run_on_two_ranks(modules, tmp_path)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "Adafactor", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_optimizers_update_each_element_by_itself(name: str, dtype: torch.dtype) -> None:
    shapes = [(6, 3)] if name == "Muon" else [(6, 3), (5,), (2, 2, 2), (3, 2, 2, 1), ()]
    options = {"fused": True} if name in ("AdamW", "SGD") else {}
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.0, **options)
    before = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone() for parameter in parameters]
    assert updates_by_element(optimizer, optimizer.param_groups[0]) == (name not in ("Adafactor", "Muon"))
    assert_same_tree((optimizer.state_dict(), parameters), before, "what is the user's")
