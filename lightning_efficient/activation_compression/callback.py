"""Activation compression as a Lightning callback: around each training step, and nothing else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_efficient import compat, telemetry
from lightning_efficient.activation_compression.batches import tensors_in
from lightning_efficient.activation_compression.blocks import Blocks
from lightning_efficient.activation_compression.classify import EXACT, FP8, Classifier, held_by
from lightning_efficient.activation_compression.compiled import CompiledModules, stored_bits
from lightning_efficient.activation_compression.control import AdaptiveControl, BudgetControl
from lightning_efficient.activation_compression.graph_codec import seed_noise
from lightning_efficient.activation_compression.layers import follow_modules, outermost
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.activation_compression.schedule import CubicSchedule
from lightning_efficient.activation_compression.settings import (
    check_group_size,
    parse_adaptive,
    parse_bits,
    parse_budget,
    parse_error_bound,
    parse_overrides,
    parse_schedule,
)
from lightning_efficient.activation_compression.trainer import around_training_steps, momentum_of
from lightning_efficient.activation_compression.words import compiled_in_words, rate_in_words
from lightning_efficient.coordination import ParameterChange
from lightning_efficient.core.seeded import derive_seed
from lightning_efficient.core.torch_internals import graph_hooks_are_shown_graphs
from lightning_efficient.run_length import steps_done, total_steps

__all__ = ["ActivationCompressionPlugin"]

FORMAT = 1
"""Of the state in checkpoints."""


class ActivationCompressionPlugin(Callback):
    """Keep what backward needs in few bits, with an error that is bounded and, from 3 bits on, zero on average.

    Only training steps are touched, and only what is saved for backward: the forward pass computes what it always did.
    Parameters, buffers and the batch are not kept again; masks, indices and small tensors are kept exactly.

    Args:
        bits: For the inputs of linear layers and convolutions, 1 to 8; 4 if nothing is given. Normalizations get 2 at
            least, other operations 4, losses 8, for their errors reach the gradients of all layers before.
            ``"fp8"``: floats of 8 bits (e4m3), small errors for small numbers, but biased; losses keep 8 bits.
            ``"lossless"``: only what is exact (one copy of each tensor, masks in one bit, narrow integers). Beside a
            ``schedule`` of bits, which is for the inputs of linear layers then: the least for the other operations, if
            that is more than they get anyway.
        error_bound: In place of ``bits``: as many as it takes that no kept number is off by more, whatever the
            operation.
        memory_budget: In place of ``bits``: bytes (``"512MiB"``) that saved tensors may take, or the part (float) of
            what they take without compression. Each size of batch gets a plan: what stays raw, how many bits the rest
            gets, what waits in the host's memory (on a GPU), and which repeated modules are made again in backward.
        schedule: ``{initial_bits: 8, final_bits: 2, begin: 0.05, end: 0.5}`` in place of ``bits``: from one to the
            other on a cubic curve [Zhu & Gupta 2017] between two steps (int), or fractions of the run (float). Likewise
            with ``initial_error_bound`` and ``final_error_bound``, or ``initial_memory_budget`` and so on.
        adaptive: ``{every: 100, target: 0.1}``: every 100 steps, measure what errors do to the gradient of each linear
            layer and convolution, and give bits (or error bounds) where they do most. ``target``: the acceptable
            deviation of a gradient, over its size, or over the momentum's where the optimizer has one; nobody gets more
            bits than that takes. ``guard`` (0.1): the most that its variance may be over the variance from batch to
            batch; who is above gets more bits, whatever the budget.
        overrides: Bits, ``"fp8"`` or ``"raw"``, by pattern of a module's name (``"head"``, ``"blocks.*.mlp"``), for
            what it and the modules in it save; the first that fits counts.
        group_size: Neighbours that share a scale and a minimum: a power of two from 64 on.
        recompute: Whether normalizations and activation functions are done again in backward rather than their results
            kept.
        seed: Of the rounding. Your random numbers (dropout, shuffling) are the same with and without compression.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if a pattern fits no module.
    """

    keeps_saved_tensors = True  # so that nobody else does

    def __init__(
        self,
        *,
        bits: int | Literal["fp8", "lossless"] | None = None,
        error_bound: float | None = None,
        memory_budget: int | float | str | None = None,
        schedule: dict[str, int | float | str] | None = None,
        adaptive: dict[str, int | float] | None = None,
        overrides: dict[str, int | str] | None = None,
        group_size: int = 128,
        recompute: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_group_size(group_size)
        self._schedule = parse_schedule(schedule)
        beside = self._schedule is not None and self._schedule.of == "bits" and isinstance(bits, int)
        given = {"error_bound": error_bound, "memory_budget": memory_budget, "schedule": schedule}
        if not beside:
            given["bits"] = bits
        ways = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are ways to say the same. Keep one of them.")
        if adaptive is not None and isinstance(bits, str):
            raise ValueError(f"adaptive={adaptive!r} chooses among bits, and bits={bits!r} leaves no choice. Keep one.")
        bound = parse_error_bound(error_bound) if error_bound is not None else None
        level = parse_bits(4 if bits is None else bits)
        self._rates = LayerRates(level, parse_overrides(overrides), bound, least=int(level) if beside else None)
        self._average = float(level) if bits is not None else None
        self._curve: CubicSchedule | None = None
        self._classifier = Classifier(self._rates, group_size=group_size, recompute=recompute)
        rules = parse_adaptive(adaptive)
        self._adaptive = AdaptiveControl(self._rates, rules) if rules is not None else None
        self._budget = self._budget_control(memory_budget, group_size)
        self._events: list[telemetry.Event] = []
        self._take_rate(0)
        self._seed = seed
        self._held: list[Tensor] = []
        self._batch = (0, 0, 0)
        self._passes = self._step = 0
        self._left: float | None = None  # bytes of the batch that goes on, if it is left to autograd
        self._compiled = CompiledModules(self._classifier, group_size)
        self._sees_compiled = self._compiled_step = self._clocked = False
        self._knows_operations = True
        self._undo = contextlib.ExitStack()
        self._followed = contextlib.ExitStack()
        self._hooks = contextlib.ExitStack()

    def _budget_control(self, memory_budget: int | float | str | None, group_size: int) -> BudgetControl | None:
        if memory_budget is not None:
            budget = parse_budget(memory_budget)
        elif self._schedule is not None and self._schedule.of == "memory_budget":
            budget = int(self._schedule.initial)
        else:
            return None
        blocks = Blocks(self._classifier.operation)
        return BudgetControl(self._rates, budget, isinstance(budget, float), group_size, blocks)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._undo.close()
        self._reset()
        names = [name for name, _ in pl_module.named_modules()]
        if unused := self._rates.unused(names):
            raise MisconfigurationException(
                f"overrides[{unused[0]!r}] fits no module of {type(pl_module).__name__}. Its modules have names like "
                f"{', '.join(repr(name) for name in names[1:4])}; a pattern may be the end of a name, and contain '*'."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clocked = trainer.strategy.root_device.type == "cpu"
        self._undo.close()  # what follows is not for setup: after that come configure_model, and the run's length
        if self._schedule is not None:
            total = total_steps(trainer) if self._schedule.uses_fractions else math.inf
            try:
                self._curve = self._schedule.over(total)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
        self._undo.callback(around_training_steps(trainer, partial(self._compressing, pl_module)))
        compiled = compat.compiled_parts(pl_module)
        if compiled and (self._adaptive is not None or self._budget is not None):
            what = "adaptive" if self._adaptive is not None else "memory_budget"
            raise MisconfigurationException(
                f"{what} needs to know which layer saves what, and that cannot be seen in compiled modules "
                f"({compiled[0]}). Give bits, or do not compile."
            )
        self._compiled_step = compat.step_is_compiled(pl_module)
        self._sees_compiled = bool(compiled) and graph_hooks_are_shown_graphs()
        self._knows_operations = not self._compiled_step
        if compiled and not self._sees_compiled:
            self._compiled_step = self._knows_operations = False
        if self._knows_operations:
            self._follow(pl_module)
        telemetry.introduce(trainer, self)

    def start_line(self, trainer: pl.Trainer) -> str:
        """In how many bits, where that can be said, and what of it is otherwise in compiled modules."""
        kept = rate_in_words(self._rates, self._schedule, self._curve)
        if self._budget is not None and self._curve is None:
            kept = self._budget.in_words()
        if self._adaptive is not None:
            kept += ", shared out as gradients bear it"
        parts = [f"ActivationCompressionPlugin keeps what backward needs {kept}"]
        if compiled := compat.compiled_parts(trainer.lightning_module):
            parts.append(compiled_in_words(compiled, self._rates, seen=self._sees_compiled))
        return "; ".join(parts)

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """Modules may have come with them."""
        if self._adaptive is not None:
            self._adaptive.again()
        if self._budget is not None:
            self._budget.again()
        if self._knows_operations:
            self._follow(trainer.lightning_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._held = tensors_in(batch)
        if self._budget is not None and not self._held:
            raise MisconfigurationException(
                "memory_budget plans by the shapes of the tensors in a batch, and a batch of "
                f"{type(batch).__name__} has none that can be seen. Put them in a mapping, a sequence or a dataclass, "
                "or give bits."
            )
        self._batch = trainer.global_rank, trainer.current_epoch, batch_idx
        self._passes = 0
        step = self._step = steps_done(trainer)
        self._take_rate(step)
        if self._budget is not None:
            self._budget.begin(step, self._held, self._classifier)
        if self._adaptive is not None:
            self._adapt()
            self._adaptive.begin(step, self._classifier, partial(momentum_of, trainer))
        measuring = self._adaptive is not None and self._adaptive.measuring
        plan = self._budget.plan if self._budget is not None and not measuring else None
        self._left = plan.predicted_bytes if plan is not None and plan.uncompressed else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._held = []
        seen = self._classifier.sizes if self._left is None else None
        if self._budget is not None and self._budget.end(seen):
            self._events.append(telemetry.Event(compat.log_step(trainer), "activations", self._budget.event()))
            if self._budget.fits:
                telemetry.say(trainer, self._budget.event())
            else:
                rank_zero_warn(self._budget.event())
        if self._adaptive is not None and self._adaptive.end(self._step, self._classifier, trainer.strategy.broadcast):
            self._adapt()
        if telemetry.due(trainer):
            telemetry.log(trainer, self.measurements())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hooks.close()  # modules that have none take torch's fast paths, which differ in the last bits

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._knows_operations and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._hook(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()
        self._held = []
        if self._adaptive is not None:
            self._adaptive.abandon(self._classifier)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()
        self._held = []

    def measurements(self) -> Mapping[str, float]:
        """What the last forward pass kept, and instead of what."""
        ledger = self._classifier.ledger
        values = {
            "activations/saved_bytes": float(ledger.saved_bytes),
            "activations/kept_bytes": float(ledger.kept_bytes),
            "activations/live_bytes": float(ledger.live_bytes),
            "activations/ratio": ledger.saved_bytes / max(1, ledger.kept_bytes),
            "activations/encode_ms": ledger.encode_seconds * 1e3,
            "activations/decode_ms": ledger.decode_seconds * 1e3,
        }
        if self._rates.error_bound is not None:
            values["activations/error_bound"] = self._rates.error_bound
        elif self._rates.bits < EXACT and self._rates.chosen is None:
            values["activations/bits"] = 8.0 if self._rates.bits == FP8 else float(self._rates.bits)
            if self._sees_compiled:
                values["activations/bits_compiled"] = float(stored_bits(self._rates.bits))
        if self._adaptive is not None:
            values |= {f"activations/{name}": value for name, value in self._adaptive.measurements().items()}
        if self._budget is not None and self._budget.plan is not None:
            values["activations/planned_bytes"] = self._budget.plan.predicted_bytes
        return values

    def balance(self) -> telemetry.Balance:
        """What encoding and decoding took so far, and what the last forward pass did not keep."""
        clocked = self._clocked and not (self._sees_compiled or self._compiled_step)
        return self._classifier.ledger.balance(clocked=clocked)

    def events(self) -> Sequence[telemetry.Event]:
        """Each plan for a new size of batch."""
        return tuple(self._events)

    def summary(self) -> str:
        """A table of what the last forward pass kept, and how, in Markdown; then the plans, if there is a budget."""
        tables = [self._classifier.ledger.table()]
        if self._adaptive is not None:
            tables.append(self._adaptive.table())
        if self._budget is not None:
            tables.append(self._budget.table())
        return "\n\n".join(tables)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"format": FORMAT}
        if self._adaptive is not None:
            state["adaptive"] = self._adaptive.state_dict()
        if self._budget is not None:
            state["budget"] = self._budget.state_dict()
        if self._events:
            state["events"] = [[event.step, event.text] for event in self._events]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("format", FORMAT) != FORMAT:
            raise MisconfigurationException(
                f"This checkpoint has the state of {type(self).__name__} in format {state_dict['format']}, and this "
                f"version reads format {FORMAT}. Install the version that wrote it."
            )
        if self._adaptive is not None and "adaptive" in state_dict:
            self._adaptive.load_state_dict(state_dict["adaptive"])
        if self._budget is not None and "budget" in state_dict:
            self._budget.load_state_dict(state_dict["budget"])
        self._events = [telemetry.Event(step, "activations", text) for step, text in state_dict.get("events", [])]

    def _reset(self) -> None:
        """What an earlier run measured says nothing of this one."""
        self._events = []
        self._rates.chosen, self._rates.bounds = None, {}
        if self._adaptive is not None:
            self._adaptive.reset(self._classifier)
        if self._budget is not None:
            self._budget.reset()

    def _adapt(self) -> None:
        """Take the rates that follow from what was measured."""
        if self._adaptive is None:
            return
        average, sizes = self._average, None
        if self._budget is not None:
            share = self._budget.share(self._adaptive.adaptive.sizes())
            if share is None:
                return
            average, sizes = share
        choice = self._adaptive.choose(average, sizes)
        if choice is not None:
            self._rates.bounds = choice.bounds
            planned = self._budget.plan.levels if self._budget is not None and self._budget.plan is not None else {}
            self._rates.chosen = {**planned, **choice.bits}

    def _follow(self, module: pl.LightningModule) -> None:
        self._followed.close()
        self._hook(module)
        self._followed.callback(self._hooks.close)
        compiled = outermost(compat.compiled_parts(module))
        self._followed.enter_context(self._compiled.attached({name: module.get_submodule(name) for name in compiled}))
        if self._budget is not None:
            self._followed.enter_context(self._budget.blocks.wrapping(module))
        self._undo.callback(self._followed.close)

    def _hook(self, module: pl.LightningModule) -> None:
        self._hooks.close()
        compiled = outermost(compat.compiled_parts(module))
        self._hooks.enter_context(follow_modules(module, self._classifier.layers, compiled))

    def _take_rate(self, step: int) -> None:
        if self._schedule is None:
            return
        value = self._curve.at(step) if self._curve is not None else self._schedule.initial
        if self._schedule.of == "bits":
            self._rates.bits, self._average = round(value), value
        elif self._budget is not None:
            self._budget.budget = value
        else:
            self._rates.error_bound = value

    @contextlib.contextmanager
    def _compressing(self, module: nn.Module) -> Iterator[None]:
        classifier = self._classifier
        if self._left is not None:
            classifier.leave(int(self._left))
            yield
            return
        key = derive_seed(self._seed, *self._batch, self._passes)
        self._passes += 1
        seed_noise(key)
        classifier.begin([*held_by(module), *self._held], key)
        pack, unpack = classifier.saved.pack, classifier.saved.unpack
        if not self._knows_operations:  # they run among compiled code, and shall not be compiled
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, unpack),
                classifier.operation if self._knows_operations else contextlib.nullcontext(),
                self._compiled.inside("", module) if self._compiled_step else contextlib.nullcontext(),
            ):
                yield
        finally:
            classifier.end()
