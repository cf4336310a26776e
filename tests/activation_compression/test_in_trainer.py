"""The callback in a Trainer: what it touches, and what it says."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import ActivationCompressionPlugin, GrowAndUnshareCallback
from lightning_efficient.demos import ByteLanguageModel
from tests.technique_settings import demo_data, demo_model


class WithLinearHead(ByteLanguageModel):
    """Its head is fed by a linear layer, and so has a rate of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        width = self.model.head.in_features
        self.model.final_norm = nn.Linear(width, width)


def fit(
    *callbacks: pl.Callback, steps: int = 6, model: type[pl.LightningModule] = ByteLanguageModel, **arguments: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **({"logger": False} | arguments),
    )  # fmt: skip
    trainer.fit(demo_model(model), demo_data())
    return trainer


def test_a_pattern_that_fits_no_module_is_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"overrides\['haed'\] fits no module of ByteLanguageModel"):
        fit(ActivationCompressionPlugin(overrides={"haed": "raw"}))


def test_two_of_them_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ActivationCompressionPlugin`"):
        fit(ActivationCompressionPlugin(), ActivationCompressionPlugin(bits=8))


def test_fractions_need_a_run_with_an_end() -> None:
    schedule = {"initial_bits": 8, "final_bits": 2, "begin": 0.05, "end": 0.5}
    with pytest.raises(MisconfigurationException, match="fractions of a run that has no end"):
        fit(ActivationCompressionPlugin(schedule=schedule), steps=-1, max_epochs=-1)


def test_it_can_be_sent_to_other_processes() -> None:
    plugin = pickle.loads(pickle.dumps(ActivationCompressionPlugin(bits=3)))
    fit(plugin)
    assert plugin.measurements()["activations/bits"] == 3
    pickle.dumps(plugin)


class Bits(pl.Callback):
    def __init__(self, plugin: ActivationCompressionPlugin) -> None:
        self.plugin, self.seen = plugin, list[float]()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.plugin.measurements()["activations/bits"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bits_follow_the_schedule_by_optimizer_steps_a2_a3(accumulate: int) -> None:
    plugin = ActivationCompressionPlugin(schedule={"initial_bits": 8, "final_bits": 2, "begin": 1, "end": 5})
    bits = Bits(plugin)
    fit(plugin, bits, steps=6, accumulate_grad_batches=accumulate)
    curve = [round(2 + 6 * (1 - max(0, step - 1) / 4) ** 3) if step < 5 else 2 for step in range(6)]
    assert bits.seen[::accumulate] == curve


class Differentiating(ByteLanguageModel):
    """Its validation differentiates something."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        x = torch.ones(2, requires_grad=True)
        with torch.enable_grad():
            y = x * x
        self.log("untouched", float(y.grad_fn._saved_self is x))  # type: ignore[union-attr]
        self.log("validation_hooks", float(len(self.model.head._forward_hooks)))

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("training_hooks", float(len(self.model.head._forward_hooks)))


def test_validation_is_untouched() -> None:
    """Modules with hooks would keep out of torch's fast paths."""
    plugin = ActivationCompressionPlugin(bits=2)
    trainer = fit(plugin, steps=3, model=Differentiating, val_check_interval=1, limit_val_batches=1)
    assert trainer.callback_metrics["untouched"] == 1
    assert trainer.callback_metrics["validation_hooks"] == 0
    assert trainer.callback_metrics["training_hooks"] == 1


TAGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "bits": ({"bits": 4}, {"bits"}),
    "error bound": ({"error_bound": 0.1}, {"error_bound"}),
    "budget": ({"memory_budget": 0.2}, {"planned_bytes"}),
    "adaptive": (
        {"adaptive": {"every": 2, "target": 0.1, "guard": 1e-9}},
        {"gradient_error", "gradient_error_predicted", "noise_ratio", "guarded", "bits/model.head/linear"},
    ),
    "adaptive, error bound": (
        {"adaptive": {"every": 2, "target": 0.1}, "error_bound": 0.1},
        {"error_bound", "gradient_error", "guarded", "error_bound/model.head/linear"},
    ),
}


@pytest.mark.parametrize("name", TAGS)
def test_all_that_is_promised_is_logged_and_in_the_summary(name: str) -> None:
    arguments, tags = TAGS[name]
    plugin, seen = ActivationCompressionPlugin(**arguments), dict[str, float]()

    class Remembering(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            seen.update(metrics)

    fit(plugin, steps=6, model=WithLinearHead, logger=Remembering(), log_every_n_steps=1)
    logged = {tag.removeprefix("activations/"): value for tag, value in seen.items() if tag.startswith("activations/")}
    always = {"saved_bytes", "kept_bytes", "live_bytes", "ratio", "encode_ms", "decode_ms"}
    assert tags | always <= set(logged)
    assert {tag for tag in logged if "/" not in tag} <= tags | always | {"gradient_error_predicted", "noise_ratio"}
    assert logged["encode_ms"] > 0
    assert logged["decode_ms"] > 0
    assert logged["live_bytes"] == 0, "backward is over"
    if "guard" in arguments.get("adaptive", {}):
        assert logged["guarded"] > 0
        assert "(guard)" in plugin.summary()


def test_what_is_kept_still_is_said_by_layer() -> None:
    class Hoarding(ByteLanguageModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.held = super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx)

    plugin = ActivationCompressionPlugin()
    fit(plugin, model=Hoarding, steps=2)
    assert plugin.measurements()["activations/live_bytes"] > 0
    (row,) = [row for row in plugin.summary().splitlines() if row.startswith("Kept still (KiB): ")]
    assert "model.blocks.0.mlp " in row


def test_what_was_there_before_is_there_afterwards() -> None:
    """Somebody else's context of the step, and no batch: neither after a run nor after one that ended in an error."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("broken")

    for others in ([], [Failing()]):
        precision, plugin = Precision(), ActivationCompressionPlugin()
        own, entered = precision.train_step_context, list[int]()

        @contextlib.contextmanager
        def counting(own: Any = own, entered: list[int] = entered) -> Iterator[None]:
            entered.append(1)
            with own():
                yield

        precision.train_step_context = counting  # type: ignore[method-assign]
        with pytest.raises(KeyError, match="broken") if others else contextlib.nullcontext():
            fit(*others, plugin, steps=2, plugins=[precision])
        assert entered
        assert vars(precision)["train_step_context"] is counting
        assert plugin._held == []


def test_the_summary_says_what_was_kept_and_how() -> None:
    plugin = ActivationCompressionPlugin(bits=4, overrides={"head": "raw"})
    fit(plugin)
    table = plugin.summary()
    assert "| model.blocks.0.mlp | activation | 4 bits |" in table or "| activation | 4 bits |" in table
    assert "| loss | 8 bits |" in table
    assert "| linear | recomputed |" in table
    values = plugin.measurements()
    assert values["activations/ratio"] > 3
    assert values["activations/saved_bytes"] > 3 * values["activations/kept_bytes"] > 0


def test_an_override_is_heard(tmp_path: Path) -> None:
    plugin = ActivationCompressionPlugin(bits=4, overrides={"blocks.1": "raw", "blocks.2.mlp": 8})
    fit(plugin)
    rows = plugin.summary().splitlines()
    assert not [row for row in rows if "blocks.1." in row and "bits" in row and "exact" not in row]
    assert all("8 bits" in row for row in rows if "blocks.2.mlp " in row and "bits" in row)
    assert [row for row in rows if "blocks.0." in row and "4 bits" in row]


def test_modules_that_come_while_it_trains_are_known() -> None:
    plugin = ActivationCompressionPlugin(bits=4, overrides={"blocks.*": "raw"})
    fit(GrowAndUnshareCallback(stages=[{"depth": 2, "until": 2}, {"depth": 4}]), plugin)
    rows = [row for row in plugin.summary().splitlines() if "blocks.3." in row]
    assert rows
    assert not [row for row in rows if "4 bits" in row]


def test_floats_of_8_bits_train_as_without_compression() -> None:
    plugin, losses = ActivationCompressionPlugin(bits="fp8", overrides={"blocks.1": 4}), dict[str, float]()
    for name, callbacks in (("plain", []), ("fp8", [plugin])):
        trainer = fit(*callbacks, steps=20)
        losses[name] = float(trainer.callback_metrics["train_loss"])
    assert losses["fp8"] == pytest.approx(losses["plain"], rel=0.01)
    assert plugin.measurements()["activations/bits"] == 8
    rows = plugin.summary().splitlines()
    assert [row for row in rows if "blocks.0." in row and "| fp8 |" in row]
    assert [row for row in rows if "blocks.1." in row and "| 4 bits |" in row]
    assert [row for row in rows if "| loss | 8 bits |" in row]
