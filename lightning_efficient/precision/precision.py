"""The adapter: when the Trainer trains, backs up and steps, and what of it low bits take part in."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient import compat, telemetry
from lightning_efficient.coordination import ParameterChange
from lightning_efficient.core.hardware import hardware
from lightning_efficient.core.seeded import derive_seed
from lightning_efficient.precision.account import GUARDED, LAYOUT, Account, in_words
from lightning_efficient.precision.agreement import Agreement
from lightning_efficient.precision.arguments import limits_of, rounding_of, whole_number
from lightning_efficient.precision.engine import Engine
from lightning_efficient.precision.formats import format_named
from lightning_efficient.precision.guard import Guard
from lightning_efficient.precision.learning import Learning
from lightning_efficient.precision.map import PrecisionMap, precision_map
from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.operations import Operations
from lightning_efficient.precision.registry import Registry
from lightning_efficient.precision.spikes import SpikeGuard
from lightning_efficient.precision.status import ReturnPolicy
from lightning_efficient.precision.wrapping import WrappingPrecision

__all__ = ["RollbackPrecision"]

_HIGH = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VERSION = 1


class RollbackPrecision(WrappingPrecision):
    """Trains in few bits wherever that is healthy, and computes again in many where it is not.

    Linear layers, convolutions and products of matrices are computed in few bits after a first phase in which all is
    in high bits and the limits are learnt. A product that shows a sign of failure is computed again in high bits at
    once, those behind it are too, and few bits come back when that is safe. No batch is lost.

    Args:
        low: Format of few bits: ``"int8"``, ``"int8-row"``, ``"int8-block"``, ``"bfp16"``, ``"fp8"``, ``"fp16"`` or
            ``"bf16"``.
        high: ``"bf16"`` or ``"fp32"``: of many bits.
        inner: The precision plugin that does the rest; None: bf16-mixed or 32-true, as ``high`` says.
        pre_learning_steps: Batches in high bits, in which the limits of an operation are learnt; ``"auto"``: until they
            settle, 10 to 200.
        return_after: Products in high bits, one after another, behind which few bits are allowed again.
        retry_rate: Of a product's last tries in few bits, the part that had to be computed again, under which they are
            allowed at once.
        thresholds: Limits to use rather than learn: ``overflow``, ``underflow``, ``error``, ``exponent_range``.
        spike_guard: Where a loss or the norm of a gradient is far beyond what it was, or not finite, do the batch
            again in high bits, then from the last good snapshot, and leave it out only if that does not help:
            ``{"factor": 3.0, "window": 50}``, and what else ``SpikeGuard`` in ``spikes.py`` has. None: off, and what
            is not finite is not looked for. (Steps that a loss scaler of ``inner`` would leave out are done again in
            any case.)
        exclude: Patterns of names of operations that stay in high bits, as in ``precision_map()``.
        only_if_faster: Leave operations alone for which few bits took longer than many, with all that guards them, as
            they learnt. Formats that are emulated, which take longer always, are not asked. As times differ from run
            to run, the choice may; it is kept in the checkpoint, and made anew on another processor or GPU, or with
            another number of threads.
        adaptive_bits: Products of tensors for which few bits make too large an error (3 % of the mean magnitude) are in
            bfloat16 until that is looked at again; without it such an error is a sign of failure.
        stochastic_rounding: Up or down at random, rather than to nearest, of integers and of blocks: True, False, or
            ``"gradients"``, of which most is too small for few bits and would become zero in each step. None: that, if
            the format can.
        seed: Of that.
        protect: False: no sign is looked for, to see what becomes of it. Not for training.

    Raises:
        ValueError: If an argument is none of those.
    """

    def __init__(
        self,
        *,
        low: str = "int8",
        high: Literal["bf16", "fp32"] = "bf16",
        inner: Precision | None = None,
        pre_learning_steps: int | Literal["auto"] = 50,
        return_after: int = 20,
        retry_rate: float = 0.05,
        thresholds: Mapping[str, float] | None = None,
        spike_guard: dict[str, Any] | None = None,
        exclude: Sequence[str] = (),
        only_if_faster: bool = True,
        adaptive_bits: bool = False,
        stochastic_rounding: bool | Literal["gradients"] | None = None,
        seed: int = 0,
        protect: bool = True,
    ) -> None:
        if high not in _HIGH:
            raise ValueError(f"high={high!r}: it can be {' or '.join(map(repr, _HIGH))}.")
        if pre_learning_steps != "auto":
            whole_number("pre_learning_steps", pre_learning_steps, 0, " or 'auto'")
        whole_number("return_after", return_after, 1)
        if not 0 <= retry_rate <= 1:
            raise ValueError(f"retry_rate={retry_rate!r} is a part: give a number from 0 to 1.")
        if isinstance(exclude, str):
            raise ValueError(f"exclude={exclude!r} is one text: give a list of patterns, as in exclude=[{exclude!r}].")
        if inner is not None and not isinstance(inner, Precision):
            raise ValueError(
                f"inner={inner!r} is no precision plugin of Lightning: give one, such as MixedPrecision('bf16-mixed', "
                "'cpu'), or None for what high= says."
            )
        if isinstance(inner, RollbackPrecision):
            raise ValueError("inner= is another RollbackPrecision: give the plugin that it shall wrap.")
        super().__init__(inner or (MixedPrecision("bf16-mixed", "cpu") if high == "bf16" else Precision()))
        self._low, self._policy = format_named(low), ReturnPolicy(return_after, retry_rate)
        self._limits, self._spikes = limits_of(thresholds), SpikeGuard.of(spike_guard)
        self._learn_until = None if pre_learning_steps == "auto" else pre_learning_steps
        self._timed = only_if_faster and not self._low.emulated
        self._seed = seed
        self._learnt_with = {
            "low": low, "high": high, "thresholds": dict(thresholds) if thresholds is not None else None,
            "only_if_faster": only_if_faster,
        }  # fmt: skip
        self._registry = Registry(self._new, exclude)
        self.nodes = self._registry.nodes
        self._engine = Engine(
            self._low, _HIGH[high], stochastic=rounding_of(stochastic_rounding, self._low), protect=protect, seed=seed,
            adaptive=adaptive_bits, timed=only_if_faster,
        )  # fmt: skip
        self._operations = Operations(
            self._engine, self._registry.make, self._registry.takes_part,
            plain_is_high=_plain_high(self.inner) == _HIGH[high], mixed=isinstance(self.inner, MixedPrecision),
        )  # fmt: skip
        self._module: pl.LightningModule | None = None
        self._known: weakref.ref[pl.LightningModule] | None = None
        self._trainer: pl.Trainer | None = None
        self._lifecycle = _Lifecycle(self)
        self._agreement: Agreement | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._registry.forget()
        self._operations.forget()
        self._engine.on_devices.clear()
        self._engine.run.high_in_a_row = self._engine.low_work = self._engine.work = 0
        self._batches = 0
        self._account = Account(self._engine, self.nodes)
        guards = self._spikes is not None or self.scaler is not None
        self._guard = Guard(self._spikes, self, self.scaler) if guards else None

    @property
    def judges_batches(self) -> bool:
        """Whether a batch may be done again between its backward pass and the update."""
        return self._spikes is not None

    # When

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Remember the module, whose device it is, and with which ranks to agree."""
        module = model if isinstance(model, pl.LightningModule) else getattr(model, "module", None)
        self._module = module if isinstance(module, pl.LightningModule) else None
        self._trainer = trainer = compat.trainer_of(self._module) if self._module is not None else None
        if self._module is not None and (self._known is None or self._known() is not self._module):
            if self._known is not None:
                self._begin_anew()
            self._known = weakref.ref(self._module)
        if self._module is not None:
            self._operations.skip_scripted(self._module)
        if trainer is not None:
            if isinstance(self.inner, MixedPrecision):
                self.inner.device = trainer.strategy.root_device.type
            if self._lifecycle not in trainer.callbacks:  # type: ignore[attr-defined]
                trainer.callbacks.insert(0, self._lifecycle)  # type: ignore[attr-defined]
            self._agreement = _agreement(trainer, self._new("", "")) if trainer.world_size > 1 else None
            if self._guard is not None and trainer.state.fn == TrainerFn.FITTING:
                self._guard.attach(trainer)
        return super().connect(model, optimizers, lr_schedulers)

    @contextlib.contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Forward of a training step."""
        rank = self._module.global_rank if self._module is not None else 0
        self._engine.begin(derive_seed(self._seed, self._batches, rank), self._batches)
        self._batches += 1
        self._operations.begin(self._module)
        with self.inner.train_step_context(), self._operations:
            yield

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """The guard sees the loss before a scaler does."""
        if self._guard is not None:
            self._guard.before_backward(tensor)
        return super().pre_backward(tensor, module)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Backward; what checkpointing computes again there is computed as in forward."""
        try:
            with self._operations:
                self.inner.backward(tensor, model, optimizer, *args, **kwargs)
        except RuntimeError as error:
            if "once_differentiable" not in str(error):
                raise
            raise RuntimeError(
                "The loss holds gradients of gradients, as a gradient penalty does, and products in few bits are "
                "differentiable once. Leave the operations that they go through out: RollbackPrecision(exclude=[...])."
            ) from error
        self._account.note_retries(self._trainer)

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """The guard has it done again if need be."""
        loss = super().post_backward(tensor, module)
        if self._guard is not None:
            self._guard.after_backward()
        return loss

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Any, **kwargs: Any
    ) -> Any:
        """The step; behind it ranks agree."""
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        self._engine.weights_changed()
        if self._agreement is not None:
            self._engine.refresh(wait=True)
            self._agreement(self.nodes, self._engine.run)
            self._engine.put_back()
        return result

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """What is new or other than it was learns anew."""
        self._operations.forget()
        self._registry.drop((*change.added, *change.removed, *change.replaced))
        self._account.all_learnt = False
        if self._guard is not None:
            self._guard.parameters_changed()

    def compute_high(self, high: bool) -> None:
        """Everything from now on; or as is decided for each product again."""
        self._engine.force_high = high

    def kept(self) -> Callable[[], None]:
        """Note what is known of the network; returns what goes back to that, as often as it is called."""
        self._engine.refresh(wait=True)
        states = self._registry.states()
        engine, batches = self._engine, self._batches
        counted = engine.run.high_in_a_row, engine.low_work, engine.work

        def back() -> None:
            self._registry.go_back(states)
            engine.run.high_in_a_row, engine.low_work, engine.work = counted
            engine.retries = []
            engine.put_back()
            self._batches = batches

        return back

    def teardown(self) -> None:
        """Leave the Trainer as it was."""
        if self._trainer is not None and self._lifecycle in self._trainer.callbacks:  # type: ignore[attr-defined]
            self._trainer.callbacks.remove(self._lifecycle)  # type: ignore[attr-defined]
        if self._guard is not None:
            self._guard.detach()
        self._module = self._trainer = self._agreement = None
        super().teardown()

    # What

    def _new(self, name: str, kind: str) -> Node:
        learning = Learning(self._learn_until, timed=self._timed)
        return Node(name, kind, self._policy, self._limits, learning, adaptive=self._engine.adaptive)

    def precision_map(self) -> PrecisionMap:
        """Of each product of each operation: its bits now, its counters, and the last reason to compute it again."""
        operations = self._operations
        self._engine.refresh()
        return precision_map(self.nodes, self._low.name, operations.skipped, operations.reasons)

    @property
    def state_key(self) -> str:
        """What the Trainer asks of callbacks, of which this is none.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException("RollbackPrecision is no callback. Give it as Trainer(plugins=[...]).")

    def measurements(self) -> Mapping[str, float]:
        """Share of low bits since the last time it was logged, and what had to be computed again so far."""
        return self._account.measurements() | self._guard_says()

    def balance(self) -> telemetry.Balance:
        """What few bits, and looking after them, cost and saved in this process."""
        return self._account.balance(self._guard_says().get("precision/snapshot_bytes"))

    def _guard_says(self) -> dict[str, float]:
        return self._guard.measurements() if self._guard is not None else {}

    def charts(self) -> Mapping[str, Mapping[str, list[object]]]:
        """What TensorBoard's page shows of it."""
        if self._guard is None:
            return LAYOUT
        return {category: {**charts, "batches done again": GUARDED} for category, charts in LAYOUT.items()}

    def events(self) -> Sequence[telemetry.Event]:
        """When operations had learnt; each batch that spiked, and what became of it."""
        spikes = self._guard.events() if self._guard is not None else []
        return sorted([*self._account.events, *spikes], key=lambda event: event.step)

    def skipped_batches(self) -> list[dict[str, Any]]:
        """The last batches that the spike guard has left out: their ``epoch``, ``batch``, ``step`` and ``reason``."""
        return list(self._guard.incidents.skipped) if self._guard is not None else []

    def state_dict(self) -> dict[str, Any]:
        """Of all nodes."""
        self._engine.refresh(wait=True)
        return {
            "version": _VERSION, "batches": self._batches, "high_in_a_row": self._engine.run.high_in_a_row,
            "nodes": self._registry.states(), "learnt_with": self._learnt_with, "measured_on": self._hardware(),
            "account": self._account.state_dict(), "inner": self.inner.state_dict(),
            "guard": self._guard.state_dict() if self._guard is not None else None,
        }  # fmt: skip

    def _hardware(self) -> str:
        return hardware(self._trainer.strategy.root_device if self._trainer is not None else torch.device("cpu"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        version = state_dict.get("version")
        if version != _VERSION:
            raise MisconfigurationException(
                f"The state of RollbackPrecision has version {version}; known is {_VERSION}."
            )
        self._batches = state_dict["batches"]
        self._engine.run.high_in_a_row = state_dict["high_in_a_row"]
        self._account.load_state_dict(state_dict["account"])
        self._load_nodes(state_dict)
        self._operations.forget()
        self._engine.on_devices.clear()
        self.inner.load_state_dict(state_dict["inner"])
        if self._guard is not None:
            self._guard.load_state_dict(state_dict.get("guard"))

    def _load_nodes(self, state_dict: dict[str, Any]) -> None:
        states, before = state_dict["nodes"], state_dict.get("learnt_with", self._learnt_with)
        here, there = self._hardware(), state_dict.get("measured_on", "")
        others = [f"{name}={before.get(name)!r}" for name, value in self._learnt_with.items()
                  if before.get(name) != value]  # fmt: skip
        elsewhere = there not in ("", here) and self._learnt_with["only_if_faster"]
        if states and others:
            rank_zero_warn(f"The checkpoint was trained with {', '.join(others)}: all operations learn anew.")
            states = {}
        elif states and elsewhere:
            rank_zero_warn(
                f"The checkpoint was written on other hardware ({there}; here: {here}): whether low bits are faster is "
                "measured anew, while all operations learn once more in high bits."
            )
        if others or elsewhere:
            self._account.all_learnt = False
        self._registry.load(states, timed=not elsewhere)


class _Lifecycle(pl.Callback):
    """Tells the plugin what precision plugins do not hear."""

    def __init__(self, plugin: RollbackPrecision) -> None:
        self._plugin = plugin

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        telemetry.lay_out(trainer, {})  # also where no monitor is
        telemetry.introduce(trainer, self)

    def start_line(self, trainer: pl.Trainer) -> str:
        plugin = self._plugin
        low, high = plugin._low, str(plugin._learnt_with["high"])
        return in_words(low, high, plugin._learn_until, timed=plugin._timed, guarded=plugin._spikes is not None)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        plugin = self._plugin
        plugin._account.batch_ended(trainer, plugin._guard_says(), plugin._registry.unmet)


def _agreement(trainer: pl.Trainer, like: Node) -> Agreement:
    def reduce(numbers: Tensor) -> Tensor:
        reduced: Tensor = trainer.strategy.reduce(numbers.to(trainer.strategy.root_device), reduce_op="max")
        return reduced

    def gather(names: list[str]) -> list[list[str]]:
        gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, names)
        return gathered

    return Agreement(like, reduce, gather)


def _plain_high(inner: Precision) -> torch.dtype | None:
    """What operations compute in by themselves within ``inner``, if that is known."""
    if type(inner) is Precision:
        return torch.float32
    return torch.bfloat16 if isinstance(inner, MixedPrecision) and inner.precision == "bf16-mixed" else None
