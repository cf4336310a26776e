"""The strategy on a GPU against plain Lightning there, bit for bit (O2-O6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_efficient import OffloadStrategy
from lightning_efficient.core.buffers import round_up
from tests.helpers.fitting import assert_same_tree, fit
from tests.helpers.models import ScheduledModel
from tests.technique_settings import demo_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

PLACES = {
    "state-host": {"optimizer_state": "host"},
    "state-disk": {"optimizer_state": "disk"},
    "parameters-host": {"optimizer_state": "host", "parameter": "host"},
    "gradients-disk": {"optimizer_state": "disk", "gradient": "disk"},
    "gradients-host": {"optimizer_state": "host", "gradient": "host"},
    "all-host": dict.fromkeys(("parameter", "gradient", "optimizer_state", "activation"), "host"),
    "all-disk": dict.fromkeys(("parameter", "optimizer_state", "activation"), "disk"),
}
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_on_a_gpu_is_the_same_bit_for_bit_o3_o4(place: str, clip: float | None) -> None:
    arguments = {**GPU, "gradient_clip_val": clip}
    strategy = OffloadStrategy(offload_dir="swap", place=PLACES[place], step_on="device")
    ours = fit(None, build={"strategy": strategy}, **arguments)
    plain = fit(None, **arguments)
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")
    assert_same_tree(ours.optimizers, plain.optimizers, "optimizers")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precisions_on_a_gpu_o3(precision: str) -> None:
    arguments = {**GPU, "precision": precision}
    strategy = OffloadStrategy(place={"optimizer_state": "host"}, step_on="device")
    ours = fit(None, build={"strategy": strategy}, **arguments)
    plain = fit(None, **arguments)
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")


class ForGraphs(ScheduledModel):
    def configure_optimizers(self) -> Any:
        rate = torch.tensor(4e-3, device=self.device)
        return torch.optim.AdamW(self.parameters(), lr=rate, capturable=True, foreach=True)


@pytest.mark.parametrize("site", ["device", "host"])
def test_an_optimizer_for_graphs(site: Any) -> None:
    strategy = OffloadStrategy(place={"optimizer_state": "host"}, step_on=site)
    ours = fit(None, module=demo_model(ForGraphs), build={"strategy": strategy}, **GPU)
    plain = fit(None, module=demo_model(ForGraphs), **GPU)
    if site == "device":
        assert ours.losses == plain.losses
    else:
        assert ours.losses == pytest.approx(plain.losses, rel=1e-3)


def test_what_is_planned_fits_the_budget_of_the_host_o5() -> None:
    place = dict.fromkeys(("optimizer_state", "parameter"), "host")
    planned = fit(
        None, build={"strategy": OffloadStrategy(place=place, step_on="device")}, max_steps=1, **GPU
    ).trainer.strategy._session.placement
    budget = sum(round_up(row.attribute.nbytes) for row in planned.rows if row.tier == "host")
    strategy = OffloadStrategy(place=place, step_on="device", memory_budget={"host": budget})
    assert fit(None, build={"strategy": strategy}, **GPU).losses == fit(None, **GPU).losses


def test_state_is_not_on_the_gpu_between_steps_o2() -> None:
    before = torch.cuda.memory_allocated()
    run = fit(None, build={"strategy": OffloadStrategy(place={"optimizer_state": "host"})}, **GPU)
    held = [v for state in run.trainer.optimizers[0].state.values() for v in state.values() if v.numel() > 1]
    assert all(value.device.type == "cpu" for value in held)
    assert torch.cuda.memory_allocated() - before < 1 << 20
