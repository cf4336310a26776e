"""What a run with all five techniques has saved is ordinary: a plain Trainer and plain torch go on with it (X3)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_efficient import load_grown
from lightning_efficient.demos import ByteLanguageModel
from tests.helpers.fitting import Run, assert_same_tree, fit, optimizer_by_name
from tests.matrix.cells import STEPS, Cell
from tests.technique_settings import demo_data, demo_model, named

GROWN = 7
"""A step behind the growth, with low bits and offload on."""
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With all of them; saved before the growth, and behind it."""
    cell = Cell(("stack", "checkpoint", "activations", "offload", "precision"))
    return fit(
        cell.setting, build=cell.build(), module=cell.model(""), root=tmp_path_factory.mktemp("all"),
        checkpoints=(3, GROWN), max_steps=STEPS,
    )  # fmt: skip


def inputs() -> Tensor:
    data = demo_data()
    data.setup("fit")
    return torch.stack([data.train_windows[n][:-1] for n in range(4)]).long()


def test_a_plain_trainer_goes_on_with_it(run: Run, tmp_path: Path) -> None:
    plain = fit(None, module=demo_model(layers=2), root=tmp_path, ckpt_path=run.checkpoints[GROWN], max_steps=STEPS)
    assert len(plain.losses) == STEPS - GROWN
    assert plain.batches == run.batches[GROWN:]
    assert plain.losses == pytest.approx(run.losses[GROWN:], rel=0.03)  # of which those of the run had few bits
    # As exactly as Trainers with what must not change a result.
    for name in ("checkpoint", "offload"):
        exact = fit(
            named(name), module=demo_model(layers=2), root=tmp_path, ckpt_path=run.checkpoints[GROWN], max_steps=STEPS
        )
        assert_same_tree(exact.weights, plain.weights, f"weights with {name}")
        assert_same_tree(exact.optimizers, plain.optimizers, f"optimizer with {name}")


def test_plain_torch_goes_on_with_it(run: Run) -> None:
    saved = torch.load(run.checkpoints[GROWN], weights_only=True)
    module = ByteLanguageModel(**saved["hyper_parameters"])
    module.load_state_dict(saved["state_dict"])
    loaded = ByteLanguageModel.load_from_checkpoint(run.checkpoints[GROWN])
    with torch.no_grad():
        assert torch.equal(module.model(inputs()), loaded.model(inputs()))
    parameters = list(module.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": [p for p in parameters if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    state = optimizer_by_name(optimizer, module)["state"]
    assert set(state) == {name for name, _ in module.named_parameters()}
    assert all(one["exp_avg"].abs().sum() > 0 for one in state.values())
    before = {name: value.clone() for name, value in module.named_parameters()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        x = inputs()
        loss = torch.nn.functional.cross_entropy(module.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < run.losses[0]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], value) for name, value in module.named_parameters())


def test_one_of_an_early_phase_is_loaded_with_a_word(run: Run) -> None:
    """It has fewer layers: ``load_grown`` says what to do, and does it; its optimizer is that of fewer layers."""
    module = load_grown(demo_model(layers=2), run.checkpoints[3], grown=True)
    assert set(module.state_dict()) == set(demo_model(layers=2).state_dict())
    one, other = (dict(block.state_dict()) for block in module.model.blocks)
    assert_same_tree(one, other, "the second layer is a copy of the first")
