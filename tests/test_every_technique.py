"""What every technique promises, held to each setting of the registry (G5, G8, X1, X2)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import multiprocessing
import os
import re
import shutil
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import OffloadDDPStrategy, OffloadStrategy, RollbackPrecision, compat, telemetry
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.growth.arrangement import SHORTENED
from tests.helpers.fitting import Run, StopAt, assert_continues, assert_same_tree, fit, make_trainer
from tests.helpers.models import CheckpointedModel, CompiledModel, ManualModel, ScheduledModel, SilentModel
from tests.technique_settings import (
    EPOCH,
    RELATED,
    SETTINGS,
    STEPS,
    TechniqueSetting,
    demo_model,
    every,
    every_with,
    named,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),  # it is what these tests want
]

changes_parameters = every(lambda setting: setting.changes_parameters)


def compiles(setting: TechniqueSetting) -> bool:
    return "compiling" not in setting.refuses


def waits(setting: TechniqueSetting) -> bool:
    return "deferring" not in setting.refuses


def averages(setting: TechniqueSetting) -> bool:
    return "averaging" not in setting.refuses


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are added up in one order, and the other core is left to others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The run of a setting, or of plain Lightning, with nothing but it: made once, for all that compare with it."""

    @functools.cache
    def run(name: str) -> Run:
        return fit(named(name) if name else None, root=tmp_path_factory.mktemp("usual"))

    return lambda setting=None: run(setting.name if setting else "")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def assert_trained(run: Run, *, log_steps: int = 1, as_registered: bool = True) -> None:
    """It learned, everything stayed finite, and it switched where it should have.

    Args:
        run: The run.
        log_steps: The logger's steps for each optimizer step.
        as_registered: Whether its gradients are those of the registered run, so that they agree as much.
    """
    assert mean(run.losses[-4:]) < mean(run.losses[:4]) - 0.1
    assert all(value.isfinite().all() for value in run.weights.values())
    if run.setting is not None and run.setting.changes_parameters:
        steps = sorted({event.step for event in run.events})
        if as_registered:
            assert steps == [step * log_steps for step in run.setting.switches]
        assert steps[-1] == run.setting.switches[-1] * log_steps
        assert set(run.weights) == set(demo_names(run.module))
    known = {name for optimizer in run.optimizers for group in optimizer["names"] for name in group}
    assert known == {name for name, _ in run.module.named_parameters()}
    for optimizer in run.optimizers:
        assert set(optimizer["state"]) == {name for group in optimizer["names"] for name in group}


def demo_names(module: pl.LightningModule) -> list[str]:
    """The names in the ``state_dict`` of a full model of this kind."""
    hyperparameters = dict(module.hparams)
    return list(type(module)(**hyperparameters).state_dict())


# -- it trains, and goes on --------------------------------------------------------------------------------------


@every()
def test_trains_g8(setting: TechniqueSetting, usual: Callable[..., Run]) -> None:
    run = usual(setting)
    assert_trained(run)
    assert run.trainer.global_step == STEPS


@every(lambda setting: setting.exact)
def test_changes_no_result_where_it_says_so(setting: TechniqueSetting, usual: Callable[..., Run]) -> None:
    plain, with_it = usual(), usual(setting)
    assert_continues(dataclasses.replace(with_it, events=[]), plain)


@every()
def test_resumes_bit_equal_around_each_switch_g5_g8_x1(setting: TechniqueSetting, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 4}
    whole = fit(setting, root=tmp_path, checkpoints={}, **arguments)
    around = {step + offset for step in setting.switches for offset in (-1, 0, 1)}
    for step in sorted(around | {1, EPOCH - 1, EPOCH, STEPS - 1}):
        resumed = fit(setting, root=tmp_path / "resumed", ckpt_path=whole.checkpoints[step], **arguments)
        assert len(resumed.losses) == STEPS - step, step
        assert_continues(resumed, whole)


@every(turn=0)
def test_resumes_bit_equal_from_the_end_of_an_epoch_g8_x1(setting: TechniqueSetting, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": -1, "max_epochs": 4, "limit_val_batches": 1}
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    whole = fit(setting, data=setting.data(batches=4), root=tmp_path, checkpoints=when, **arguments)
    assert sorted(whole.checkpoints) == [4, 8, 12, 16]
    for step in (4, 8):
        path = whole.checkpoints[step]
        resumed = fit(setting, data=setting.data(batches=4), root=tmp_path / "r", ckpt_path=path, **arguments)
        assert len(resumed.losses) == STEPS - step
        assert_continues(resumed, whole)


@every(turn=1)
def test_resumes_bit_equal_while_gradients_accumulate_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    arguments = {"accumulate_grad_batches": 2, "max_steps": 12}
    steps = {11, *setting.switches}
    whole = fit(setting, root=tmp_path, checkpoints=steps, **arguments)
    for step in steps:
        resumed = fit(setting, root=tmp_path / "resumed", ckpt_path=whole.checkpoints[step], **arguments)
        assert_continues(resumed, whole)


@every(turn=2)
def test_the_same_objects_resume_from_an_earlier_phase_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    build, module, data = setting.build(), setting.model(), setting.data()
    steps = (2, *setting.switches)
    whole = fit(setting, module=module, data=data, build=build, root=tmp_path, checkpoints=steps)
    for step in steps:
        path = whole.checkpoints[step]
        again = fit(setting, module=module, data=setting.data(), build=build, root=tmp_path / "again", ckpt_path=path)
        assert_continues(again, whole)


@every(turn=3)
def test_a_second_fit_of_the_trainer_continues_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    first = 4
    run = fit(setting, root=tmp_path, after=[StopAt(first)])
    assert run.trainer.global_step == first
    run.trainer.fit(run.module, run.trainer.datamodule)
    assert run.trainer.global_step == STEPS
    assert_trained(run)
    assert run.batches[first][:2] == (1, 0), "a second fit begins with the next epoch"
    assert run.names[first] == run.names[first - 1] or first in setting.switches, "it goes on in its phase"


@every(lambda setting: setting.exact)
def test_a_second_fit_is_that_of_plain_lightning_where_it_says_so(
    setting: TechniqueSetting, fitted_twice: Run, tmp_path: Path
) -> None:
    run = fit_twice(setting, tmp_path)
    assert run.losses == fitted_twice.losses
    assert_same_tree(run.weights, fitted_twice.weights, "weights")


@pytest.fixture(scope="module")
def fitted_twice(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """By plain Lightning."""
    return fit_twice(None, tmp_path_factory.mktemp("twice"))


def fit_twice(setting: TechniqueSetting | None, root: Path) -> Run:
    run = fit(setting, root=root, after=[StopAt(6)])
    run.trainer.fit(run.module, run.trainer.datamodule)
    return run


@every(turn=4)
def test_evaluates_after_fit_and_checkpoints_of_earlier_phases_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    run = fit(setting, root=tmp_path, checkpoints=(2, STEPS), each_step=True, limit_val_batches=2)
    early, last = run.checkpoints[2], run.checkpoints[STEPS]
    quiet = {"datamodule": setting.data(), "verbose": False}
    fresh = make_trainer(*setting.build().get("callbacks", []), limit_val_batches=2, default_root_dir=tmp_path)
    losses = []
    for trainer, module in ((run.trainer, run.module), (fresh, setting.model())):
        [at_the_end] = trainer.validate(module, ckpt_path=last, **quiet)
        [validated] = trainer.validate(module, ckpt_path=early, **quiet)
        assert_same_tree(dict(module.state_dict()), run.weights_at[1], "weights of the second step")
        [tested] = trainer.test(module, ckpt_path=early, **quiet)
        assert validated["val_loss"] == tested["test_loss"] > at_the_end["val_loss"]
        assert len(trainer.predict(module, datamodule=setting.data(), ckpt_path=early)) == 2
        assert [at_the_end] == trainer.validate(module, ckpt_path=last, **quiet)
        assert_same_tree(dict(module.state_dict()), run.weights, "weights at the end")
        losses.append((validated["val_loss"], at_the_end["val_loss"]))
    assert losses[0] == losses[1]


# -- it leaves nothing behind ------------------------------------------------------------------------------------


def traces(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Counter[str]:
    """Hooks by owner, and the attributes of the modules."""
    found: Counter[str] = Counter()
    for path, sub in module.named_modules():
        for name, value in vars(sub).items():
            if "hooks" in name:
                found[f"{path}.{name}"] = len(value or ())
            else:
                found[f"{path} has {name}"] = 1
    for name, parameter in module.named_parameters():
        found[f"{name} backward"] = len(parameter._backward_hooks or ())
        found[f"{name} accumulated"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
        found.update(f"{name} has {attribute}" for attribute in vars(parameter))
        assert parameter.is_leaf
    for i, optimizer in enumerate(optimizers):
        found.update({f"{i}.{k}": len(v or ()) for k, v in vars(optimizer).items() if "hooks" in k})
    for place in ("torch.nn.modules.module", "torch.optim.optimizer"):
        found.update(
            {k: len(v or ()) for k, v in vars(sys.modules[place]).items() if k.startswith("_global_") and "hook" in k}
        )
    return +found


def surroundings() -> tuple[set[int], set[int], int]:
    gc.collect()
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    assert not multiprocessing.active_children()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return {thread.ident for thread in threading.enumerate() if thread.ident}, children, int(hooks is not None)


def interrupted(setting: TechniqueSetting | None, root: Path, at: int | None) -> Run:
    """A run that ends in step ``at``; None: as it should."""
    module = demo_model()
    when = {"every_n_train_steps": 8}
    if at is None:
        return fit(setting, module=module, root=root, checkpoints=when)
    interruption = Interruption(at)
    with pytest.raises(RuntimeError, match="interrupted on purpose"):
        fit(setting, module=module, root=root, checkpoints=when, after=[interruption])
    return Run(interruption.trainer, module, setting, [])


@pytest.fixture(scope="module")
def left_by_lightning(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int | None], tuple[Counter[str], set[Path]]]:
    """What a plain run leaves behind: traces, and files."""

    @functools.cache
    def left(at: int | None) -> tuple[Counter[str], set[Path]]:
        root = tmp_path_factory.mktemp("plain")
        plain = interrupted(None, root, at)
        return traces(plain.module, plain.trainer.optimizers), {path.relative_to(root) for path in root.rglob("*")}

    return left


@every_with({name: {"interrupted_at": at} for name, at in {"whole": None, "0": 0, "2": 2, "9": 9}.items()})
def test_leaves_nothing_behind(
    setting: TechniqueSetting, tmp_path: Path, interrupted_at: int | None, left_by_lightning: Callable[..., Any]
) -> None:
    expected_traces, expected_files = left_by_lightning(interrupted_at)
    before = surroundings()
    ours = interrupted(setting, tmp_path, interrupted_at)
    assert surroundings() == before
    left = traces(ours.module, ours.trainer.optimizers) - expected_traces
    if interrupted_at is not None and len(ours.module.model.blocks) < 4:
        left.pop(f"model.blocks has {SHORTENED}")  # the mark by which the next run knows that layers are missing
    assert not left, f"left behind: {left}"
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == expected_files


class Interruption(Callback):
    """Ends a fit in the middle of a step, between forward and backward."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self.trainer = trainer
        if trainer.global_step == self.at:
            raise RuntimeError("interrupted on purpose")


class GoneInTime(Callback):
    """Holds no batch, output or loss, and looks at how many of those of earlier batches somebody holds."""

    def __init__(self) -> None:
        self.seen: list[list[weakref.ref[Tensor]]] = []
        self.held: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.model.register_forward_hook(lambda module, args, output: self.note(*args, output))  # type: ignore[union-attr, operator]

    def note(self, *tensors: Tensor) -> None:
        self.seen[-1] += map(weakref.ref, tensors)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.note(loss)

    def on_train_batch_start(self, *_: Any) -> None:
        self.held.append(sum(tensor() is not None for batch in self.seen[:-1] for tensor in batch))
        self.seen.append([])


@every()
def test_a_batch_is_freed_without_pythons_collector(setting: TechniqueSetting, tmp_path: Path) -> None:
    """A cycle of references would hold its tensors for some more batches."""
    gone = GoneInTime()
    gc.collect()
    gc.disable()
    try:
        fit(setting, root=tmp_path, after=[gone])
    finally:
        gc.enable()
    assert min(map(len, gone.seen)) >= 1
    assert len(gone.seen[0]) >= 3, "an input, an output, a loss, until growth replaces the network"
    assert len(gone.seen) >= STEPS
    assert max(gone.held) == 0


@changes_parameters
def test_a_first_form_is_not_taken_for_the_full_model(setting: TechniqueSetting) -> None:
    """A module that another callback left in its first form is refused; this one cannot know what is missing."""
    left = fit(setting, after=[StopAt(2)], enable_checkpointing=False)
    with pytest.raises((ValueError, MisconfigurationException)):
        fit(setting, module=left.module, enable_checkpointing=False)


@every(turn=5)
def test_its_objects_serve_another_model_and_another_fit(setting: TechniqueSetting, tmp_path: Path) -> None:
    build = setting.build()
    whole = fit(setting, build=build, root=tmp_path)
    other = fit(setting, build=build, root=tmp_path)
    assert other.module is not whole.module
    assert_continues(other, whole)
    more = fit(setting, build=build, module=other.module, root=tmp_path)
    assert not more.switched_at()
    assert mean(more.losses) < mean(whole.losses)
    assert len(more.weights) == len(whole.weights)


# -- it keeps what the Trainer promises --------------------------------------------------------------------------


class GradientWatch(Callback):
    """What the gradients are after each update, and that nobody touches them in the middle of an accumulation."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.pending: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.pending.append(trainer.fit_loop.epoch_loop._should_accumulate() is False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        assert all(gradient is not None for gradient in gradients)
        self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        self.largest.append(max(float(g.abs().max()) for g in gradients))


@every_with({"even-epochs": {"batches": 10}, "odd-epochs": {"batches": 5}})
def test_accumulates_gradients_g5_g8(setting: TechniqueSetting, tmp_path: Path, batches: int) -> None:
    data = setting.data(batches=batches)
    watch = [] if setting.frees_gradients else [GradientWatch()]
    run = fit(setting, data=data, root=tmp_path, accumulate_grad_batches=2, max_steps=12, after=watch)
    assert_trained(run)
    for batch in run.switched_at():
        assert run.batches[batch][1] % 2 == 0, "parameters changed while gradients accumulated"
    if batches == 10:  # the windows of two batches are those of one batch of twice the size
        large = fit(setting, data=setting.data(batch_size=8, batches=5), root=tmp_path, max_steps=12)
        pairs = [mean(run.losses[i : i + 2]) for i in range(0, len(run.losses), 2)]
        scale = large.losses[0] / pairs[0]  # Lightning reports the share of the accumulated loss
        assert scale == pytest.approx(2, rel=1e-4) or scale == pytest.approx(1, rel=1e-4)
        # Adam divides rounding errors of the first steps by gradients near zero; a mistake would be of another size.
        assert [pair * scale for pair in pairs] == pytest.approx(large.losses, rel=2e-2)


@every_with({"norm": {"algorithm": "norm"}, "value": {"algorithm": "value"}})
def test_clips_gradients_g8(setting: TechniqueSetting, tmp_path: Path, algorithm: str) -> None:
    watch, limit = GradientWatch(), {"norm": 0.05, "value": 0.002}[algorithm]
    arguments = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    run = fit(setting, root=tmp_path, after=[watch], **arguments)
    assert_trained(run)
    clipped = watch.norms if algorithm == "norm" else watch.largest
    assert max(clipped) <= limit * 1.001
    assert clipped == pytest.approx([limit] * STEPS, rel=1e-3), "every step of this model is clipped"


@every_with(
    {
        "one": {"optimizers": 1, "accumulate": 1},
        "two": {"optimizers": 2, "accumulate": 1},
        "one-accumulating": {"optimizers": 1, "accumulate": 2},
        "two-accumulating": {"optimizers": 2, "accumulate": 2},
    },
    waits,
)
def test_manual_optimization_g8(setting: TechniqueSetting, tmp_path: Path, optimizers: int, accumulate: int) -> None:
    arguments = {"max_steps": 12 * optimizers}
    model = lambda: setting.model(ManualModel, optimizers=optimizers, accumulate=accumulate)  # noqa: E731
    steps = {7, *setting.switches}
    saved = {step * optimizers for step in steps}
    whole = fit(setting, module=model(), root=tmp_path, checkpoints=saved, **arguments)
    assert len(whole.optimizers) == optimizers
    assert_trained(whole, log_steps=accumulate, as_registered=False)
    for batch in whole.switched_at():
        assert whole.batches[batch][1] % accumulate == 0
    for step in steps:
        path = whole.checkpoints[step * optimizers]
        resumed = fit(setting, module=model(), root=tmp_path / "resumed", ckpt_path=path, **arguments)
        assert_continues(resumed, whole)


@every(turn=1)
def test_bf16_mixed_precision_g8(setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path) -> None:
    def in_bf16() -> dict[str, Any]:
        return within(setting, MixedPrecision("bf16-mixed", "cpu"))

    step = (setting.switches or (8,))[-1]
    whole = fit(setting, root=tmp_path, checkpoints=(step,), **in_bf16())
    assert_trained(whole)
    assert whole.losses != usual(setting).losses
    path = whole.checkpoints[step]
    assert_continues(fit(setting, root=tmp_path / "r", ckpt_path=path, **in_bf16()), whole)


def within(setting: TechniqueSetting, precision: MixedPrecision) -> dict[str, Any]:
    """Arguments of :func:`fit` with this precision, or with the setting's own around it."""
    if "plugins" not in setting.yaml:
        return {"plugins": [precision]}
    (spec,) = setting.yaml["plugins"]
    return {"build": setting.build() | {"plugins": [RollbackPrecision(**spec["init_args"], inner=precision)]}}


def half(scale: float) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@every(waits, turn=0)
def test_fp16_mixed_precision_with_a_scaler_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    step = (setting.switches or (8,))[0]
    whole = fit(setting, root=tmp_path, checkpoints=(step,), **within(setting, half(2.0**8)))
    assert_trained(whole)
    scaler = whole.trainer.precision_plugin.scaler
    assert scaler.get_scale() == 2.0 ** (8 + STEPS // 3), "no step was skipped, and none forgotten"
    resumed = fit(setting, root=tmp_path / "r", ckpt_path=whole.checkpoints[step], **within(setting, half(2.0**8)))
    assert_continues(resumed, whole)
    assert resumed.trainer.precision_plugin.scaler.get_scale() == scaler.get_scale()


@every(turn=2)
def test_activation_checkpointing_inside_the_layers_g7(
    setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path
) -> None:
    plain = usual(setting)
    checkpointed = fit(setting, module=setting.model(CheckpointedModel), root=tmp_path)
    if setting.lossy:
        assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-3)
        return
    assert checkpointed.losses == plain.losses
    weights = {name.replace(".block.", "."): value for name, value in checkpointed.weights.items()}
    assert_same_tree(weights, plain.weights, "weights")


# -- compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Nothing compiled stays from test to test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_with(
    {f"{what}-{by}": {"what": what, "backend": by} for what in ("network", "module") for by in ("eager", "aot_eager")},
    compiles,
)
@pytest.mark.usefixtures("dynamo")
def test_compiled_x2(
    setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path, backend: str, what: str
) -> None:
    plain, step = usual(setting), (setting.switches or (8,))[-1]
    if what == "module" and (message := setting.refuses.get("compiling the step")):
        with pytest.raises(MisconfigurationException, match=message):
            fit(setting, compiled=torch.compile(setting.model(SilentModel), backend=backend), root=tmp_path)
        return
    if what == "network":
        steps = (step, step + 1)
        run = fit(setting, module=setting.model(CompiledModel, backend=backend), root=tmp_path, checkpoints=steps)
    else:
        module = setting.model(SilentModel)
        compiled = torch.compile(module, backend=backend)
        run = fit(setting, module=module, compiled=compiled, root=tmp_path, checkpoints=(step,))
    assert_trained(run)
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)
    if backend == "eager" and what == "network":
        for offset in (0, 1) if setting.switches else (0,):
            path = run.checkpoints[step + offset]
            module = setting.model(CompiledModel, backend=backend)
            assert_continues(fit(setting, module=module, root=tmp_path / "r", ckpt_path=path), run)


# Inductor takes long: of those that differ in what grows or in what they see, not in what is compiled, one of a kind.
@every(
    lambda s: (
        compiles(s)
        and s.name not in ("stack", "width", "share-by-correlation", "interleave-reset", "monitor", "offload")
    )
)
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("dynamo")
def test_compiled_with_inductor_x2(setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path) -> None:
    plain = usual(setting)
    run = fit(setting, module=setting.model(CompiledModel, backend="inductor"), root=tmp_path)
    assert_trained(run)
    assert run.losses == pytest.approx(plain.losses, rel=1e-3)


@every(lambda setting: "compiling" in setting.refuses)
@pytest.mark.usefixtures("dynamo")
def test_refuses_compiled_modules_by_name_x2(setting: TechniqueSetting, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=setting.refuses["compiling"]):
        fit(setting, module=setting.model(CompiledModel, backend="eager"), root=tmp_path)


# -- averaged weights --------------------------------------------------------------------------------------------


def layers_in(weights: dict[str, Tensor]) -> int:
    return len({match[1] for name in weights if (match := re.search(r"blocks\.(\d+)\.", name))})


def follow_growth(setting: TechniqueSetting, average: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The average of a model that has just grown to ``depth`` layers: each layer's is that of the one it came from."""
    before = layers_in(average)
    if depth == before:
        return average
    interleaves = setting.arguments["mode"] == "interleave"
    grown = {name: value for name, value in average.items() if "blocks." not in name}
    for layer in range(depth):
        source = layer * before // depth if interleaves else layer % before
        for name, value in average.items():
            if f"blocks.{source}." in name:
                grown[name.replace(f"blocks.{source}.", f"blocks.{layer}.")] = value
    return grown


def independent_average(run: Run, update: Any, points: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average ``points`` with ``update(average, value, number)``."""
    average: dict[str, Tensor] = dict(points[0])
    for number, weights in enumerate(points[1:], start=1):
        if run.setting and run.setting.changes_parameters:
            average = follow_growth(run.setting, average, layers_in(weights))
        average = {
            name: update(average[name], value, number) if value.is_floating_point() else value
            for name, value in weights.items()
        }
    return average


def parameters_of(run: Run, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the buffers of metrics and the like."""
    names = {name for name, _ in run.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in weights.items() if name in names}


@every_with(
    {
        "ema-average-first": {"kind": "ema", "first": True},
        "ema-technique-first": {"kind": "ema", "first": False},
        "mean-average-first": {"kind": "mean", "first": True},
        "mean-technique-first": {"kind": "mean", "first": False},
    },
    averages,
)
def test_weight_averaging_g8(
    setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path, kind: str, first: bool
) -> None:
    def averaging() -> WeightAveraging:
        return EMAWeightAveraging(decay=0.8) if kind == "ema" else WeightAveraging()

    def run(**arguments: Any) -> Run:
        where = "before" if first else "after"
        return fit(
            setting, each_step=True, **{where: [averaging()]}, limit_val_batches=1, val_check_interval=4, **arguments
        )

    switch = (setting.switches or (8,))[-1]
    whole = run(root=tmp_path, checkpoints=(switch, switch + 1))
    assert whole.losses == usual(setting).losses, "averaging watches and does not change the training"
    update = {"ema": lambda a, w, n: 0.8 * a + 0.2 * w, "mean": lambda a, w, n: a + (w - a) / (n + 1)}[kind]
    expected = independent_average(whole, update, whole.weights_at)
    at_the_end = parameters_of(whole, dict(whole.module.state_dict()))
    for name, value in at_the_end.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    for step in (switch, switch + 1):
        resumed = run(root=tmp_path / "resumed", ckpt_path=whole.checkpoints[step])
        assert_continues(resumed, whole)
        assert_same_tree(dict(resumed.module.state_dict()), dict(whole.module.state_dict()), "averaged")


@every_with({"average-first": {"first": True}, "technique-first": {"first": False}}, averages)
def test_stochastic_weight_averaging_g8(setting: TechniqueSetting, tmp_path: Path, first: bool) -> None:
    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=4e-3, swa_epoch_start=1, annealing_epochs=1)

    def run(*watchers: Callback, **arguments: Any) -> Run:
        where = "before" if first else "after"
        return fit(
            setting,
            module=setting.model(ScheduledModel),
            data=setting.data(batches=2),
            **{where: [averaging(), *watchers]},
            each_step=True,
            max_steps=-1,
            max_epochs=8,
            **arguments,
        )

    switch = (setting.switches or (8,))[-1]
    whole = run(root=tmp_path, checkpoints=(switch, switch + 1))
    assert_trained(whole)
    initial = {name: value for name, value in fit_start(setting).items() if name in whole.weights_at[0]}
    starts = [initial, *whole.weights_at[1:-1:2]]  # at the beginning of each epoch
    expected = independent_average(whole, lambda a, w, n: a + (w - a) / (n + 1), starts)
    for name, value in parameters_of(whole, dict(whole.module.state_dict())).items():
        grown = follow_growth(setting, expected, 4) if setting.changes_parameters else expected
        torch.testing.assert_close(value, grown[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    # Lightning itself restores another learning rate than the one that SWA had set, so that only the loaded state,
    # not the rest of the run, can be compared: the averaged model as it was, and the loss of the next batch.
    for step in (switch, switch + 1):
        saved = torch.load(whole.checkpoints[step], weights_only=True)
        loaded = AverageAtStart()
        resumed = run(loaded, root=tmp_path / "resumed", ckpt_path=whole.checkpoints[step])
        assert_trained(resumed)
        assert resumed.losses[0] == whole.losses[step]
        [state] = [state for key, state in saved["callbacks"].items() if "StochasticWeightAveraging" in key]
        if state["average_model_state"] is not None:
            assert_same_tree(loaded.weights, dict(state["average_model_state"]), "averaged")


class AverageAtStart(Callback):
    """The averaged model as it is when training begins."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        [average] = compat.averaged_models(trainer)
        self.weights = {name: value.clone() for name, value in average.state_dict().items()}


def fit_start(setting: TechniqueSetting) -> dict[str, Tensor]:
    """The weights that a run begins with, in its first form."""
    seen: dict[str, Tensor] = {}

    class First(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(setting, module=setting.model(ScheduledModel), after=[First(), StopAt(1)], enable_checkpointing=False)
    return seen


@every(lambda setting: "deferring" in setting.refuses)
@pytest.mark.parametrize("why", ["manual", "scaler"])
def test_refuses_to_defer_updates_by_name_x2(setting: TechniqueSetting, tmp_path: Path, why: str) -> None:
    module = setting.model(ManualModel) if why == "manual" else setting.model()
    scaled = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))] if why == "scaler" else None
    with pytest.raises(MisconfigurationException, match=setting.refuses["deferring"]):
        fit(setting, module=module, root=tmp_path, plugins=scaled)


@every(lambda setting: "averaging" in setting.refuses)
@pytest.mark.parametrize("first", [True, False], ids=["average-first", "technique-first"])
@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(), lambda: WeightAveraging(), lambda: StochasticWeightAveraging(swa_lrs=1e-3)],
    ids=["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"],
)
def test_refuses_averaging_by_name_g4(setting: TechniqueSetting, averaging: Any, first: bool) -> None:
    callback = averaging()
    message = setting.refuses["averaging"].format(callback=type(callback).__name__)
    where = "before" if first else "after"
    with pytest.raises(MisconfigurationException, match=message):
        fit(setting, **{where: [callback]}, enable_checkpointing=False)


# -- schedules and logs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The run of plain Lightning with a schedule, from its beginning or from a step."""

    @functools.cache
    def run(schedule: str, step: int = 0) -> Run:
        module, root = demo_model(ScheduledModel, schedule=schedule), tmp_path_factory.mktemp("scheduled")
        checkpoints = {} if schedule == "plateau" and not step else None
        return fit(
            None, module=module, root=root, checkpoints=checkpoints,
            ckpt_path=run(schedule).checkpoints[step] if step else None,
        )  # fmt: skip

    return run


@every_with({name: {"schedule": name} for name in ("onecycle", "exponential", "plateau")})
def test_the_users_learning_rates_are_unchanged_g8(
    setting: TechniqueSetting, scheduled: Callable[..., Run], tmp_path: Path, schedule: str
) -> None:
    def run(name: str, **arguments: Any) -> Run:
        return fit(setting, module=demo_model(ScheduledModel, schedule=schedule), root=tmp_path / name, **arguments)

    step = (setting.switches or (8,))[-1]
    plain, whole = scheduled(schedule), run("ours", checkpoints=(step,))
    assert_trained(whole, as_registered=False)
    assert whole.rates == plain.rates
    assert_same_tree(whole.schedulers, plain.schedulers, "schedulers")
    assert_same_tree(whole.optimizers[0]["options"], plain.optimizers[0]["options"], "options")
    resumed = run("resumed", ckpt_path=whole.checkpoints[step])
    if schedule == "plateau":  # Lightning saves before it updates this scheduler, and then misses one update
        assert resumed.rates == scheduled(schedule, step).rates
    else:
        assert_continues(resumed, whole)


@every_with({name: {"optimizer": name} for name in ("SGD", "Adagrad", "Adafactor")})
def test_other_optimizers_resume_bit_equal_g8(setting: TechniqueSetting, tmp_path: Path, optimizer: str) -> None:
    if optimizer == "Adafactor" and "width" in setting.name:
        module = setting.model(ScheduledModel, optimizer=optimizer)
        with pytest.raises(MisconfigurationException, match=r"cannot follow Adafactor.*optimizer_state='reset'"):
            fit(setting, module=module, root=tmp_path)
        return
    arguments = {"max_steps": 12}
    step = (setting.switches or (5,))[-1]
    steps = (step, step + 1)
    whole = fit(
        setting,
        module=setting.model(ScheduledModel, optimizer=optimizer),
        root=tmp_path,
        checkpoints=steps,
        **arguments,
    )
    assert all(value.isfinite().all() for value in whole.weights.values())
    for path in (whole.checkpoints[step] for step in steps):
        module = setting.model(ScheduledModel, optimizer=optimizer)
        assert_continues(fit(setting, module=module, root=tmp_path / "r", ckpt_path=path, **arguments), whole)


@changes_parameters
def test_optimizer_state_is_resumed_by_name_g8(setting: TechniqueSetting, tmp_path: Path) -> None:
    """Code that lists the parameters in another order after a restart would get others' moments by position."""
    steps = {step + offset for step in setting.switches for offset in (0, 1)}
    whole = fit(setting, module=setting.model(ScheduledModel), root=tmp_path, checkpoints=steps)
    for path in (whole.checkpoints[step] for step in steps):
        module = setting.model(ScheduledModel, backwards=True)
        resumed = fit(setting, module=module, root=tmp_path / "r", ckpt_path=path)
        assert_same_tree(resumed.weights, whole.weights, "weights")
        assert_same_tree(resumed.optimizers[0]["state"], whole.optimizers[0]["state"], "state")


@changes_parameters
def test_logs_each_switch_g5(setting: TechniqueSetting, tmp_path: Path) -> None:
    run = fit(setting, root=tmp_path, log_every_n_steps=1000)
    values = {(step, tag): value for step, metrics in run.logged for tag, value in metrics.items()}
    for tag in ("growth/parameters", "growth/phase", "growth/gradient_bytes", "growth/optimizer_state_bytes"):
        at = [step for step, name in values if name == tag]
        assert at == [0, *setting.switches], tag
        assert [values[step, tag] for step in at] == sorted(values[step, tag] for step in at)
    full = sum(p.numel() for p in run.module.parameters())
    assert values[setting.switches[-1], "growth/parameters"] == full
    assert [event.step for event in run.events] == list(setting.switches)
    assert all("->" in event.text and ": " in event.text for event in run.events)


@every(turn=3)
def test_runs_without_a_logger_and_with_two(setting: TechniqueSetting, tmp_path: Path) -> None:
    silent = fit(setting, root=tmp_path, logger=False)
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    noisy = fit(setting, root=tmp_path, logger=loggers, log_every_n_steps=3)
    assert silent.losses == noisy.losses
    table = Path(loggers[0].log_dir, "metrics.csv").read_text()
    assert "train_loss" in table
    assert ("growth/parameters" in table) == setting.changes_parameters


@every(lambda setting: setting.name != "monitor")
def test_says_what_it_cost_and_saved_x5(setting: TechniqueSetting, usual: Callable[..., Run]) -> None:
    run = usual(setting)
    [balance] = telemetry.balances(run.trainer)
    assert balance.technique in {tag.partition("/")[0] for tag in telemetry.measurements(run.trainer)} | {"checkpoint"}
    assert balance.time  # how it was measured, or that it was not
    measured = balance.measurements()
    assert all(value >= 0 for value in measured.values())
    if balance.technique != "checkpoint":  # which has nothing to save in this run
        assert balance.verdict
        assert f"{balance.technique}/cost_total_ms" in measured
    if setting.changes_parameters:
        assert measured["growth/cost_total_ms"] > 0  # of its switches
    if balance.technique == "activations":
        assert measured["activations/cost_total_ms"] > sum(
            telemetry.measurements(run.trainer)[f"activations/{way}_ms"] for way in ("encode", "decode")
        )  # of all batches, not of the last one


# -- from a config -----------------------------------------------------------------------------------------------


@every()
def test_comes_from_yaml_x1(
    setting: TechniqueSetting, usual: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # the CLI leaves its seed in the environment; not for other tests
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning 2.6 calls
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "limit_val_batches": 0, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    overlay = copy.deepcopy(dict(setting.yaml))
    config = {"seed_everything": 0, "trainer": {**trainer, **quiet, "default_root_dir": str(tmp_path), **overlay}}
    cli = LightningCLI(
        ByteLanguageModel, StdlibDataModule, run=False, args=config, save_config_callback=None, parser_kwargs={}
    )
    module = setting.model()
    cli.trainer.fit(module, setting.data())
    assert_same_tree(dict(module.state_dict()), usual(setting).weights, "weights")


def test_names_are_unique() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert named("stack") is SETTINGS[0]


def test_of_related_settings_each_has_its_turn() -> None:
    related = {name for names in RELATED for name in names}
    assert sum(map(len, RELATED)) == len(related)
    assert related < {setting.name for setting in SETTINGS}
    turns = [{setting.name for setting in every(turn=turn).args[1]} for turn in range(6)]
    assert set().union(*turns) == {setting.name for setting in SETTINGS}
    assert all(len(turn.intersection(names)) == 1 for names in RELATED for turn in turns)
    assert set.intersection(*turns) == {setting.name for setting in SETTINGS} - related


@pytest.mark.parametrize("misplaced", [RollbackPrecision, OffloadStrategy, OffloadDDPStrategy])
def test_what_is_given_among_callbacks_and_is_none_says_where_it_belongs(misplaced: type) -> None:
    where = "plugins=" if misplaced is RollbackPrecision else "strategy="
    with pytest.raises(MisconfigurationException, match=f"{misplaced.__name__} is no callback.*{where}"):
        make_trainer(misplaced()).fit(SilentModel())
