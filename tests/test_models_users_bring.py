"""Models that users bring, each as it is: the whole suite trains it, resumes bit-equal and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_efficient import (
    ActivationCompressionPlugin,
    AsyncCheckpointIO,
    EfficiencyMonitor,
    GrowAndUnshareCallback,
    OffloadStrategy,
    RollbackPrecision,
    load_grown,
)
from lightning_efficient.growth.layers import find_stacks
from tests.helpers import brought
from tests.helpers.brought import BroughtData
from tests.helpers.fitting import Run, assert_continues, assert_same_tree, fit
from tests.technique_settings import TechniqueSetting
from tests.test_every_technique import surroundings, traces

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # Adagrad makes such tensors
]

BATCHES = 12
AT = 5  # batches, where runs are resumed: in the middle of an epoch, and of growth

REPEATED = {
    "ResNet": "layer1.{0..2} (3 layers)",
    "Gpt2": "model.transformer.h.{0..3} (4 layers)",
    "Llama": "model.model.layers.{0..3} (4 layers)",
    "Bert": "model.bert.encoder.layer.{0..3} (4 layers)",
    "Vit": "model.vit.layers.{0..3} (4 layers)",
    "Attended": "encoder.layers.{0..3} (4 layers)",
}
"""Which layers growth finds by itself."""
WITHOUT = ["Gan", "SparseTable", "SparseAlone", "Recurrent"]
"""Models that have none."""
MANUAL = ["Gan", "SparseTable"]

SUITE = TechniqueSetting(
    name="suite",
    yaml={},
    volatile=("checkpoint/", "efficiency/", "offload/", "activations/encode_ms", "activations/decode_ms"),
)

every_model = pytest.mark.parametrize("name", [*REPEATED, *WITHOUT])


MODELS = Path(os.environ.get("MODELS", ".venv/models")).resolve()  # now, while this is the repository's folder


@pytest.fixture(autouse=True)
def _hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """``transformers`` lies beside the environment: within it, each process that imports lightning starts late."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path, str(MODELS)])


def model(name: str) -> pl.LightningModule:
    """The same weights each time."""
    torch.manual_seed(0)
    module: pl.LightningModule = getattr(brought, name)()
    return module


def train(name: str, root: Path, built: dict[str, Any] | None = None, **arguments: Any) -> Run:
    """Of ``built``, the techniques' objects; None: plain Lightning."""
    arguments = {"max_steps": BATCHES * steps_of_batch(name)} | arguments
    data = BroughtData(getattr(brought, name).item)
    run = fit(None, module=model(name), data=data, root=root, build=built, **arguments)
    events = [event for event in run.events if event.technique != "offload"]  # what this process placed anew
    return dataclasses.replace(run, setting=SUITE, events=events)


def steps_of_batch(name: str) -> int:
    """That Lightning counts: those of both optimizers."""
    return 2 if name in MANUAL else 1


# -- as it is, with everything on --------------------------------------------------------------------------------


def everything(name: str) -> dict[str, Any]:
    """The whole suite, with low bits that can be repeated, growth where there is something that can grow."""
    low = RollbackPrecision(low="int8", high="fp32", pre_learning_steps=2, return_after=3, only_if_faster=False)
    callbacks = [AsyncCheckpointIO(in_memory=1), ActivationCompressionPlugin(bits=4), EfficiencyMonitor(report=False)]
    if name in REPEATED:
        callbacks.insert(0, GrowAndUnshareCallback())
    strategy = OffloadStrategy(place={"optimizer_state": "disk"}, offload_dir="swap")
    return {"strategy": strategy, "plugins": [low], "callbacks": callbacks}


@every_model
def test_trains_with_everything_on_resumes_bit_equal_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    at = AT * steps_of_batch(name)
    plain = train(name, tmp_path / "plain", checkpoints={at})
    before = surroundings()
    whole = train(name, tmp_path / "whole", everything(name), checkpoints={at})
    assert surroundings() == before
    assert not traces(whole.module, whole.trainer.optimizers) - traces(plain.module, plain.trainer.optimizers)
    assert files(tmp_path / "whole") == files(tmp_path / "plain")
    for run in (plain, whole):
        assert sum(run.losses[-3:]) < sum(run.losses[:3]), "it learns"
    assert {key: value.shape for key, value in whole.weights.items()} == {
        key: value.shape for key, value in plain.weights.items()
    }
    resumed = train(name, tmp_path / "resumed", everything(name), ckpt_path=whole.checkpoints[at])
    assert len(resumed.losses) == BATCHES - AT
    assert_continues(resumed, whole)


def files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*")}


@every_model
def test_what_must_not_change_a_result_does_not(name: str, tmp_path: Path) -> None:
    kinds = ["parameter", "optimizer_state"] + ["gradient"] * (name not in MANUAL)
    exact = {
        "strategy": OffloadStrategy(place=dict.fromkeys(kinds, "disk"), offload_dir="swap"),
        "callbacks": [
            AsyncCheckpointIO(in_memory=1),
            ActivationCompressionPlugin(bits="lossless"),
            EfficiencyMonitor(report=False),
        ],
    }
    ours, plain = train(name, tmp_path / "ours", exact), train(name, tmp_path / "plain")
    assert ours.losses == plain.losses
    assert_same_tree(ours.weights, plain.weights, "weights")
    assert_same_tree(ours.optimizers, plain.optimizers, "optimizers")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # which torch 2.14 says that it does
def test_a_sparse_buffer_is_kept_and_saved(tmp_path: Path) -> None:
    whole = train("Graph", tmp_path / "whole", everything("Graph"), checkpoints={AT})
    resumed = train("Graph", tmp_path / "resumed", everything("Graph"), ckpt_path=whole.checkpoints[AT])
    assert resumed.losses == whole.losses[AT:]
    assert torch.equal(resumed.module.edges.to_dense(), model("Graph").edges.to_dense())


# -- what is done by default, and what is said where nothing can be ----------------------------------------------


@pytest.mark.parametrize("name", REPEATED)
def test_growth_finds_the_layers_by_itself(name: str) -> None:
    assert [str(stack) for stack in find_stacks(model(name))] == [REPEATED[name]]


@pytest.mark.parametrize("name", WITHOUT)
def test_growth_without_repeated_layers_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"No repeated layers were found in {name}.*leave .* out"):
        train(name, tmp_path, {"callbacks": [GrowAndUnshareCallback()]})


@pytest.mark.parametrize("name", ["Recurrent", "Bert"])
def test_low_bits_say_what_they_do_not_cover(name: str, tmp_path: Path) -> None:
    low = RollbackPrecision(low="int8", high="fp32", pre_learning_steps=1, only_if_faster=False)
    train(name, tmp_path, {"plugins": [low]}, max_steps=3)
    rows = low.precision_map()
    left = {row["operation"] for row in rows if row["bits"] == "high, not covered"}
    assert left == ({"lstm"} if name == "Recurrent" else {"scaled_dot_product_attention"})
    assert "int8" in {row["bits"] for row in rows}


def test_what_needs_to_decide_about_steps_is_refused_with_manual_optimization(tmp_path: Path) -> None:
    disk = {"offload_dir": "swap"}
    for message, built in {
        "spike_guard .* Leave one of the two out": {"plugins": [RollbackPrecision(high="fp32", spike_guard={})]},
        "Batch feedback needs automatic optimization": {"strategy": OffloadStrategy(batch_feedback=True, **disk)},
        r"place\['gradient'\]='disk' cannot be: .* optimizes manually. Leave this rule out": {
            "strategy": OffloadStrategy(place={"gradient": "disk"}, **disk)
        },
        "schedule='under_forward' .* cannot be: .* optimizes manually. Use schedule='auto'": {
            "strategy": OffloadStrategy(schedule="under_forward", **disk)
        },
    }.items():
        with pytest.raises(MisconfigurationException, match=message):
            train("Gan", tmp_path, built)


class Penalised(brought.Gan):
    """With a gradient penalty, as in WGAN-GP; that alone."""

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        _, optimizer = self.optimizers()
        pictures = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.discriminator(pictures).sum(), pictures, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        self.manual_backward(penalty)
        optimizer.step()
        return {"loss": penalty.detach()}


def test_a_gradient_penalty_is_refused_with_what_to_do_which_works() -> None:
    def losses(**built: Any) -> list[float]:
        torch.manual_seed(0)
        return fit(None, module=Penalised(), data=BroughtData(brought.Gan.item), build=built, max_steps=4).losses

    low: dict[str, Any] = {"low": "int8", "high": "fp32", "only_if_faster": False}
    with pytest.raises(RuntimeError, match=r"gradient penalty.*exclude=\["):
        losses(plugins=[RollbackPrecision(**low)])
    with pytest.raises(RuntimeError, match=r"gradients of gradients.*'raw' for the modules"):
        losses(callbacks=[ActivationCompressionPlugin()])
    plain = losses()
    assert losses(callbacks=[ActivationCompressionPlugin(bits="lossless")]) == plain
    assert losses(plugins=[RollbackPrecision(exclude=["discriminator.*"], **low)]) == plain
    # The norm and the square of the penalty itself are still compressed.
    near = losses(callbacks=[ActivationCompressionPlugin(overrides={"discriminator.*": "raw"})])
    assert near == pytest.approx(plain, abs=0.01)


def test_a_checkpoint_of_an_early_phase_becomes_their_model(tmp_path: Path) -> None:
    run = train("Gpt2", tmp_path, {"callbacks": [GrowAndUnshareCallback()]}, checkpoints={2}, max_steps=8)
    saved = torch.load(run.checkpoints[2])["state_dict"]
    network = load_grown(brought.Gpt2().model, run.checkpoints[2], prefix="model.", grown=True)
    assert len(network.transformer.h) == 4
    for layer in range(4):
        name = "attn.c_attn.weight"
        assert torch.equal(network.transformer.h[layer].get_parameter(name), saved[f"model.transformer.h.0.{name}"])


# -- the page that tells of it -----------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "your-own-model.md"
SECTIONS = {
    "All of it, for a model with repeated layers": "Llama",
    "Convolutional networks": "ResNet",
    "Hugging Face transformers": "Gpt2",
    "GANs and other manual optimization": "Gan",
    "Sparse embeddings": "SparseTable",
    "Attention and recurrence of torch": "Attended",
}


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer
    quiet = {"max_steps": 4, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    monkeypatch.setattr(L, "Trainer", lambda **given: trainer(**(given | quiet)))
    monkeypatch.setattr(EfficiencyMonitor, "on_fit_end", lambda *_: None)  # which draws, for seconds
    names: dict[str, Any] = {"torch": torch}
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert [heading for heading, _ in sections] == list(SECTIONS)
    for heading, text in sections:
        names |= {"model": model(SECTIONS[heading]), "data": BroughtData(getattr(brought, SECTIONS[heading]).item)}
        [block] = re.findall(r"```python\n(.*?)```", text, re.S)
        exec(block, names)
    saved = type(names["writer"].model).from_pretrained("my-model")
    assert_same_tree(dict(saved.state_dict()), dict(names["writer"].model.state_dict()), "saved")
