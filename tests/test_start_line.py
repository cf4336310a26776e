"""One line at the start says what is on; later ones do not run into the progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_efficient import (
    ActivationCompressionPlugin,
    AsyncCheckpointIO,
    EfficiencyMonitor,
    GrowAndUnshareCallback,
    OffloadStrategy,
    RollbackPrecision,
    __version__,
)
from tests.helpers.fitting import fit
from tests.technique_settings import STEPS, demo_data, demo_model

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

STAGES = [{"depth": 2, "until": 2}, {"depth": 4}]


def growth() -> GrowAndUnshareCallback:
    return GrowAndUnshareCallback(mode="stack", stages=STAGES)


def offload(**arguments: Any) -> OffloadStrategy:
    return OffloadStrategy(offload_dir="swap", place={"optimizer_state": "disk"}, **arguments)


class Before(logging.Handler):
    """What is logged before the first batch."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.callback = pl.Callback()
        self.callback.on_train_batch_start = lambda *_: self.off()  # type: ignore[method-assign]
        logging.getLogger("lightning.pytorch").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if any(word in record.getMessage() for word in ("lightning-efficient", "Growth", "Offload", "Rollback")):
            self.lines.append(record.getMessage())

    def off(self) -> None:
        logging.getLogger("lightning.pytorch").removeHandler(self)


def test_all_of_them_say_one_line_together() -> None:
    techniques = [growth(), AsyncCheckpointIO(), ActivationCompressionPlugin(bits=4), EfficiencyMonitor(report=False)]
    before = Before()
    build = {
        "callbacks": [before.callback, *techniques],
        "plugins": [RollbackPrecision(pre_learning_steps=5)],
        "strategy": offload(),
    }
    fit(None, build=build, max_steps=3)
    [line] = before.lines
    first, *parts = line.split(" | ")
    assert first == f"lightning-efficient {__version__}"
    of_each = {part.split()[0].rstrip(":"): part for part in parts}
    assert list(of_each) == [
        "RollbackPrecision", "GrowAndUnshareCallback", "AsyncCheckpointIO", "ActivationCompressionPlugin",
        "OffloadStrategy",
    ]  # fmt: skip
    assert "begins with 2 layers" in of_each["GrowAndUnshareCallback"]
    assert "grow at step 2 at the latest" in of_each["GrowAndUnshareCallback"]
    assert "needs in 4 bits" in of_each["ActivationCompressionPlugin"]
    assert "disk: optimizer_state" in of_each["OffloadStrategy"]
    assert "the same weights" in of_each["OffloadStrategy"]
    assert "in bf16 for 5 batches, then in int8" in of_each["RollbackPrecision"]
    assert len(line) < 900


ALONE: dict[str, Callable[[], dict[str, Any]]] = {
    "AsyncCheckpointIO has nothing to save": lambda: {"callbacks": [AsyncCheckpointIO()]},
    "saves as often as takes 3.5% of the time": lambda: {"callbacks": [AsyncCheckpointIO(frequency="drive")]},
    "AsyncCheckpointIO saves when ModelCheckpoint says": lambda: {
        "callbacks": [AsyncCheckpointIO(), ModelCheckpoint(every_n_train_steps=1)]
    },
    "within 40% of what it takes, with a plan for each size of batch, shared out as gradients bear it": lambda: {
        "callbacks": [ActivationCompressionPlugin(memory_budget=0.4, adaptive={"every": 2, "target": 0.1})]
    },
    "in 8 bits, from step 0 to 1 towards 2": lambda: {
        "callbacks": [
            ActivationCompressionPlugin(schedule={"initial_bits": 8, "final_bits": 2, "begin": 0.0, "end": 1.0})
        ]
    },
    "with errors up to 0.01": lambda: {"callbacks": [ActivationCompressionPlugin(error_bound=0.01)]},
    "exactly, but each tensor once": lambda: {"callbacks": [ActivationCompressionPlugin(bits="lossless")]},
    "OffloadStrategy waits: nothing is offloaded yet": lambda: {"strategy": OffloadStrategy(enabled=False)},
    "for less of gradients and optimizer state": lambda: {
        "callbacks": [GrowAndUnshareCallback(mode="share", unit=2, until=1)]
    },
    "until limits settle, then in bfp16 (emulated: nothing is faster) where that is healthy, and again in bf16 at a "
    "sign of failure; batches whose loss spikes are done again": lambda: {
        "plugins": [RollbackPrecision(low="bfp16", pre_learning_steps="auto", spike_guard={"factor": 3.0})]
    },
}


@pytest.mark.parametrize("words", ALONE)
def test_each_alone_says_it_too(words: str, tmp_path: Path) -> None:
    before, build = Before(), ALONE[words]()
    fit(None, root=tmp_path, build=build, before=[before.callback], max_steps=1)
    [line] = before.lines
    assert words in line


def test_offload_that_begins_later_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [GrowAndUnshareCallback(mode="stack", stages=STAGES, offload_on_switch=True)]
    with caplog.at_level("INFO"):
        build = {"callbacks": callbacks, "strategy": offload(enabled=False)}
        whole = fit(None, root=tmp_path, build=build, checkpoints=[STEPS - 1])
    said = [text for text in caplog.messages if "disk: optimizer_state" in text]
    assert len(said) == 1
    assert said[0].startswith("OffloadStrategy: ")
    caplog.clear()
    callbacks = [GrowAndUnshareCallback(mode="stack", stages=STAGES, offload_on_switch=True)]
    build = {"callbacks": callbacks, "strategy": offload(enabled=False)}
    with caplog.at_level("INFO"):
        fit(None, build=build, ckpt_path=whole.checkpoints[STEPS - 1])
    [line] = [text for text in caplog.messages if "disk: optimizer_state" in text]
    assert line.startswith("lightning-efficient ")
    assert "GrowAndUnshareCallback: the model has grown" in line


def test_without_a_technique_nothing_is_said() -> None:
    before = Before()
    fit(None, build={"callbacks": [before.callback, EfficiencyMonitor(report=False)]}, max_steps=1)
    assert before.lines == []


def test_the_progress_bar_makes_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logger, handler = logging.getLogger("lightning.pytorch"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        pl.Trainer(
            max_steps=4, limit_val_batches=0, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_model_summary=False, callbacks=[growth()],
        ).fit(demo_model(), demo_data())  # fmt: skip
    finally:
        logger.removeHandler(handler)
    [line] = [line for line in capsys.readouterr().out.split("\n") if "at step 2: 2 layers -> 4 layers" in line]
    drawn, _, said = line.rpartition("\r")
    assert "Epoch 0" in drawn  # there was a bar
    assert said.startswith("GrowAndUnshareCallback")
