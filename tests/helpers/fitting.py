"""One call of ``Trainer.fit``, and all that a test may want to know of it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_efficient import compat, telemetry
from tests.technique_settings import STEPS, TechniqueSetting, demo_data, demo_model

__all__ = [
    "ListLogger",
    "Run",
    "StopAt",
    "assert_continues",
    "assert_same_tree",
    "fit",
    "make_trainer",
    "optimizer_by_name",
]


class ListLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    name = "list"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.entries.append((-1 if step is None else step, dict(metrics)))


@dataclass
class Run:
    """What happened in a fit.

    Attributes:
        trainer: After the fit.
        module: After the fit.
        setting: What was in the Trainer.
        callbacks: The objects that the setting put into the Trainer's callbacks.
        began_at: Optimizer steps (of the Trainer) before the fit.
        weights: ``state_dict`` at the end of training; of each step too, where asked for.
        optimizers: State at the end of training, by parameter name.
        schedulers: State at the end of training.
        logged: What the logger got.
        logged_before: How many entries of it came before the first batch.
        first_log_step: The logger's step of the first batch.
        batches: ``(epoch, batch_idx, batch)`` of each batch.
        losses: Of each batch, as ``training_step`` returned it.
        rates: The learning rates of all groups before each batch.
        names: The parameters' names at the start of each batch, after all callbacks.
        events: As the techniques report them.
        checkpoints: Path by optimizer steps at which it was written.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    setting: TechniqueSetting | None
    callbacks: list[Any]
    began_at: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    weights_at: list[dict[str, Tensor]] = field(default_factory=list)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    logged_before: int = 0
    first_log_step: int = 0
    batches: list[tuple[int, int, list[Any]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    events: list[telemetry.Event] = field(default_factory=list)
    checkpoints: dict[int, Path] = field(default_factory=dict)

    def logged_values(self, since: int = 0) -> dict[tuple[int, str], float]:
        """The last value of each tag at each step from ``since`` on, without those that measure time or memory.

        And without what was logged before the first batch: an uninterrupted run has no such moment in its middle.
        """
        volatile = self.setting.volatile if self.setting else ()
        return {
            (step, tag): float(value)
            for step, metrics in self.logged[self.logged_before :]
            for tag, value in metrics.items()
            if step >= since and not tag.startswith(tuple(volatile)) and not tag.endswith("_total_ms")  # of clocks
        }

    def switched_at(self) -> list[int]:
        """Batches (counted in this fit) at whose start the parameters' names or number changed."""
        return [i for i in range(1, len(self.names)) if self.names[i] != self.names[i - 1]]


class Recorder(Callback):
    """Writes down what happens; the last callback before ModelCheckpoint."""

    def __init__(self, run: Run, each_step: bool) -> None:
        self.run = run
        self.each_step = each_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run.began_at = trainer.global_step
        self.run.logged_before = len(getattr(trainer.logger, "entries", ()))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.run.batches:
            self.run.first_log_step = compat.log_step(trainer)
        self.run.batches.append((trainer.current_epoch, batch_idx, pytree.tree_map(Tensor.tolist, batch)))
        self.run.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])
        self.run.names.append([f"{name} {tuple(p.shape)}" for name, p in pl_module.named_parameters()])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.run.losses.append(float(outputs["loss"] if isinstance(outputs, Mapping) else outputs))
        if self.each_step:
            self.run.weights_at.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.run.optimizers = [optimizer_by_name(optimizer, pl_module) for optimizer in trainer.optimizers]
        self.run.schedulers = [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]
        self.run.events = telemetry.events(trainer)


class StopAt(Callback):
    """Ends a fit early, as a user or a time limit would, where the Trainer had planned a longer one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def optimizer_by_name(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict[str, Any]:
    """State by parameter name, the names in each group, and the groups' options; all copied."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {order[place]: _copied(state) for place, state in optimizer.state_dict()["state"].items()},
        "names": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "options": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


def _copied(tree: Any) -> Any:
    """A copy; ``deepcopy`` cannot copy tensors that are spread over ranks."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v), tree)


def make_trainer(*callbacks: Callback, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU that neither validates nor writes files unless told to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | arguments))


def fit(
    setting: TechniqueSetting | None,
    *,
    module: pl.LightningModule | None = None,
    data: pl.LightningDataModule | None = None,
    root: Path | None = None,
    ckpt_path: Path | None = None,
    before: Iterable[Callback] = (),
    after: Iterable[Callback] = (),
    build: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Any] | Collection[int] | None = None,
    each_step: bool = False,
    compiled: Any = None,
    **trainer_arguments: Any,
) -> Run:
    """Train once.

    Args:
        setting: The technique; None for plain Lightning.
        module: None: the setting's.
        data: None: the setting's.
        root: The Trainer's ``default_root_dir``, and where checkpoints go.
        ckpt_path: To resume from.
        before: Callbacks before those of the technique.
        after: Callbacks after them.
        build: The technique's objects; None: new ones.
        checkpoints: Arguments of a ModelCheckpoint that keeps all it writes; ``{}``: after each step; a set or a list
            of steps: after those, for a file takes as long as a step.
        each_step: Whether to keep the weights of each step.
        compiled: What to hand to ``Trainer.fit`` in place of ``module``: a compiled form of it.
        **trainer_arguments: See :func:`make_trainer`.
    """
    torch.set_num_threads(1)
    built = dict(build if build is not None else setting.build() if setting else {})
    own = list(built.pop("callbacks", []))
    module = module or (setting.model if setting else demo_model)()
    data = data or (setting.data if setting else demo_data)()
    run = Run(None, module, setting, own)  # type: ignore[arg-type]
    if "strategy" in built:
        built["strategy"].accelerator = None  # Lightning refuses the flag where an earlier Trainer has set this
    callbacks = [*before, *own, *after, Recorder(run, each_step)]
    if checkpoints is not None:
        steps = None if isinstance(checkpoints, Mapping) else set(checkpoints)
        when = checkpoints if isinstance(checkpoints, Mapping) and checkpoints else {"every_n_train_steps": 1}
        callbacks.append(_NotedCheckpoint(run, steps, dirpath=root / "checkpoints", save_top_k=-1, **when))
    if root is not None:
        trainer_arguments["default_root_dir"] = root
    logger = trainer_arguments.setdefault("logger", ListLogger())
    run.trainer = make_trainer(*callbacks, **built, **trainer_arguments)
    run.trainer.fit(module if compiled is None else compiled, data, ckpt_path=ckpt_path)
    run.logged = logger.entries if isinstance(logger, ListLogger) else []
    return run


class _NotedCheckpoint(ModelCheckpoint):
    """Tells the run which file was written at which step; each file has a name of its own, also among ranks' runs."""

    def __init__(self, run: Run, steps: Collection[int] | None, **arguments: Any) -> None:
        super().__init__(filename="{step}-{epoch}", **arguments)
        self.run, self.steps = run, steps

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self.steps is None or trainer.global_step in self.steps:
            super()._save_checkpoint(trainer, filepath)
            self.run.checkpoints[trainer.global_step] = Path(filepath)


def assert_continues(resumed: Run, whole: Run) -> None:
    """``resumed`` did bit for bit what ``whole`` did from there on, and ended where it ended."""
    batches = len(whole.batches) - len(resumed.batches)
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert resumed.batches == whole.batches[batches:]
    assert resumed.losses == whole.losses[batches:]
    assert resumed.rates == whole.rates[batches:]
    assert resumed.names == whole.names[batches:]
    since = resumed.first_log_step
    assert_same_tree(resumed.logged_values(since), whole.logged_values(since), "logged")
    assert_same_tree(resumed.weights, whole.weights, "weights")
    assert_same_tree(resumed.optimizers, whole.optimizers, "optimizers")
    assert_same_tree(resumed.schedulers, whole.schedulers, "schedulers")
    assert resumed.events == whole.events


def assert_same_tree(one: Any, other: Any, where: str) -> None:
    """Two trees of dicts, lists, tensors and numbers are bit for bit the same."""
    if isinstance(one, Mapping):
        assert list(one) == list(other) or set(one) == set(other), f"{where}: {set(one) ^ set(other)}"
        for key in one:
            assert_same_tree(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_tree(a, b, f"{where}[{i}]")
    elif isinstance(one, Tensor):
        assert isinstance(other, Tensor), where
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where} differs by {(one.double() - other.double()).abs().max():.2e}"
    else:
        assert one == other, f"{where}: {one!r} is not {other!r}"
