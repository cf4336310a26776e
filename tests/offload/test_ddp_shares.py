"""Each of two ranks has its share of the optimizer state, and moves no more (O2)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_efficient.offload.sharded.exchange import ParameterExchange
from lightning_efficient.offload.sharded.owners import share_out
from lightning_efficient.offload.sharded.ranks import Ranks
from tests.helpers.fitting import fit
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.dividing import DDP, DISK, STEPS, ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_about_equal_and_of_neighbours_o2(ranks: int) -> None:
    parameters = [nn.Parameter(torch.empty(size)) for size in (5, 900, 40, 40, 40, 700, 3, 1200, 64, 10) * 60]
    half = len(parameters) // 2
    optimizers = [torch.optim.AdamW(parameters[:half]), torch.optim.AdamW(parameters[half:])]
    owners = share_out(optimizers, ranks, 1 << 20)
    again = share_out(optimizers, ranks, 1 << 20)
    assert owners == again
    assert set(owners) == {id(parameter) for parameter in parameters}
    loads = [sum(p.numel() for p in parameters if owners[id(p)] == rank) for rank in range(ranks)]
    assert max(loads) <= 1.07 * min(loads)
    order = [owners[id(parameter)] for parameter in parameters]
    assert sum(a != b for a, b in itertools.pairwise(order)) <= 20 * ranks


def exchanged(rank: int) -> dict[str, Any]:
    """Parameters of all kinds, which rank 1 and then rank 0 sends."""
    generator = torch.Generator().manual_seed(rank)

    def parameter(*size: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, generator=generator).to(dtype))

    complexes = nn.Parameter(torch.view_as_complex(torch.randn(3, 2, generator=generator)))
    gaps = nn.Parameter(torch.randn(4, 6, generator=generator)[:, ::2])
    last = nn.Parameter(torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last))
    small = [parameter(), parameter(1, dtype=torch.bfloat16), parameter(3, 2, dtype=torch.float64), parameter(0, 4)]
    messages = [[parameter(50, 7)], small, [complexes], [gaps], [last], [parameter()], [last, gaps], [parameter(0)]]
    exchange = ParameterExchange(Ranks(torch.device("cpu")), cap_bytes=256)
    before = [p.detach().clone() for message in messages for p in message]
    versions = [p._version for message in messages for p in message]
    for number, message in enumerate(messages):
        exchange.post((number + 1) % 2, message)
    exchange.finish()
    return {
        "before": before,
        "after": [p.detach().clone() for message in messages for p in message],
        "changed": [p._version > v for v, p in zip(versions, itertools.chain(*messages), strict=True)],
        "owners": [(number + 1) % 2 for number, message in enumerate(messages) for _ in message],
    }


def test_parameters_of_all_kinds_arrive(tmp_path: Path) -> None:
    both = run_on_two_ranks(exchanged, tmp_path)
    for rank, one in enumerate(both):
        for i, owner in enumerate(one["owners"]):
            source = both[owner]["after" if i > 9 else "before"][i]
            assert torch.equal(one["after"][i], source), i
            assert one["changed"][i] or owner == rank or not source.numel()


class Shares(pl.Callback):
    """What this rank has of the optimizer's state in the optimizer, and what it has moved, behind the last step."""

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        state = trainer.optimizers[0].state
        self.parameters = len(state)
        self.resident = sum(v.numel() * v.element_size() for s in state.values() for v in s.values() if v.numel() > 1)
        self.moved = dict(trainer.strategy.measurements())
        trainer.strategy.barrier()
        self.files = len(list(Path("swap").glob("*.spill")))
        trainer.strategy.barrier()


def shares(rank: int, place: dict[str, str] | None) -> dict[str, Any]:
    watch = Shares()
    finished = fit(None, strategy=ours(place=place), after=[watch], max_steps=STEPS, **DDP)
    parameters = list(finished.module.parameters())
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    return {**vars(watch), "all_parameters": len(parameters), "all_bytes": nbytes}


@pytest.mark.parametrize("place", [DISK, None])
def test_each_rank_has_and_moves_its_share_only_o2(place: dict[str, str] | None, tmp_path: Path) -> None:
    both = run_on_two_ranks(shares, tmp_path, place)
    whole = both[0]["all_bytes"]  # as much as one rank's half of two moments
    assert sum(one["parameters"] for one in both) == both[0]["all_parameters"]
    for one in both:
        assert one["files"] == (0 if place is None else 2)
        moved = {name.removeprefix("offload/"): value for name, value in one["moved"].items()}
        assert moved["sent_bytes"] + moved["received_bytes"] == pytest.approx(whole)
        assert one["resident"] == (pytest.approx(whole, rel=0.15) if place is None else 0)
        if place is not None:  # the last step may still be being written, and the next one's state being read
            assert 0.8 * (STEPS - 1) * whole < moved["total_disk_written_bytes"] < 1.2 * STEPS * whole
            assert 0.8 * (STEPS - 2) * whole < moved["total_disk_read_bytes"] < 1.2 * STEPS * whole
            assert moved["disk_bytes"] < 1.2 * 2 * whole + (1 << 16)
