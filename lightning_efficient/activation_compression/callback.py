"""Activation compression as a Lightning callback: around each training step, and nothing else."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_efficient import compat, telemetry
from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.compiled import CompiledModules, seed_noise, stored_bits
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.activation_compression.schedule import CubicSchedule
from lightning_efficient.activation_compression.settings import (
    check_group_size,
    parse_bits,
    parse_error_bound,
    parse_overrides,
    parse_schedule,
)
from lightning_efficient.coordination import ParameterChange
from lightning_efficient.core.seeded import derive_seed
from lightning_efficient.core.torch_internals import graph_hooks_are_shown_graphs
from lightning_efficient.run_length import steps_done, total_steps

__all__ = ["ActivationCompressionPlugin", "follow_modules"]


class ActivationCompressionPlugin(Callback):
    """Keep what backward needs in few bits, with an error that is bounded and, from 3 bits on, zero on average.

    Only training steps are touched, and only what is saved for backward: the forward pass computes what it always did.
    Parameters, buffers and the batch are not kept again; masks, indices and small tensors are kept exactly.

    Args:
        bits: For the inputs of linear layers and convolutions, 1 to 8; 4 if nothing is given. Normalizations get 2 at
            least, other operations 4, losses 8, for their errors reach the gradients of all layers before.
            ``"lossless"``: only what is exact (one copy of each tensor, masks in one bit, narrow integers).
        error_bound: In place of ``bits``: as many as it takes that no kept number is off by more, whatever the
            operation.
        schedule: ``{initial_bits: 8, final_bits: 2, begin: 0.05, end: 0.5}`` in place of ``bits``: from one to the
            other on a cubic curve [Zhu & Gupta 2017] between two steps (int), or fractions of the run (float). Likewise
            with ``initial_error_bound`` and ``final_error_bound``.
        overrides: Bits, or ``"raw"``, by pattern of a module's name (``"head"``, ``"blocks.*.mlp"``), for what it and
            the modules in it save; the first that fits counts.
        group_size: Neighbours that share a scale and a minimum: a power of two from 64 on.
        recompute: Whether normalizations and activation functions are done again in backward rather than their results
            kept.
        seed: Of the rounding. Your random numbers (dropout, shuffling) are the same with and without compression.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if a pattern fits no module.
    """

    def __init__(
        self,
        *,
        bits: int | Literal["lossless"] | None = None,
        error_bound: float | None = None,
        schedule: dict[str, int | float] | None = None,
        overrides: dict[str, int | str] | None = None,
        group_size: int = 128,
        recompute: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {"bits": bits, "error_bound": error_bound, "schedule": schedule}
        ways = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} are ways to say the same. Keep one of them.")
        check_group_size(group_size)
        self._schedule = parse_schedule(schedule)
        bound = parse_error_bound(error_bound) if error_bound is not None else None
        level = parse_bits(4 if bits is None else bits)
        self._rates = LayerRates(level, parse_overrides(overrides), bound)
        self._curve: CubicSchedule | None = None
        self._take_rate(0)
        self._classifier = Classifier(self._rates, group_size=group_size, recompute=recompute)
        self._seed = seed
        self._held: list[Tensor] = []
        self._batch = (0, 0, 0)
        self._passes = 0
        self._compiled = CompiledModules(self._classifier, group_size)
        self._compiled_step = False
        self._knows_operations = True
        self._undo = contextlib.ExitStack()
        self._followed = contextlib.ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._undo.close()
        own = [callback for callback in trainer.callbacks if isinstance(callback, type(self))]  # type: ignore[attr-defined]
        if len(own) > 1:
            raise MisconfigurationException(f"This Trainer has {len(own)} {type(self).__name__} objects. Keep one.")
        names = [name for name, _ in pl_module.named_modules()]
        if unused := self._rates.unused(names):
            raise MisconfigurationException(
                f"overrides[{unused[0]!r}] fits no module of {type(pl_module).__name__}. Its modules have names like "
                f"{', '.join(repr(name) for name in names[1:4])}; a pattern may be the end of a name, and contain '*'."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()
        if self._schedule is not None:
            total = total_steps(trainer) if self._schedule.uses_fractions else math.inf
            try:
                self._curve = self._schedule.over(total)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
        self._undo.callback(self._wrap_training_step(trainer, pl_module))
        compiled = compat.compiled_parts(pl_module)
        self._compiled_step = compat.step_is_compiled(pl_module)
        self._knows_operations = not self._compiled_step
        if compiled and not graph_hooks_are_shown_graphs():
            self._compiled_step = self._knows_operations = False
            rank_zero_info(
                "ActivationCompressionPlugin cannot see into compiled modules with this torch: all that they save gets "
                "4 bits at least, after their forward pass."
            )
        elif compiled:
            rank_zero_info(f"ActivationCompressionPlugin compresses inside {self._what_is_compiled(compiled)}.")
        if self._knows_operations:
            self._follow(pl_module)

    def on_parameters_changed(self, trainer: pl.Trainer, change: ParameterChange) -> None:
        """Modules may have come with them."""
        if self._knows_operations:
            self._follow(trainer.lightning_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._held = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._batch = trainer.global_rank, trainer.current_epoch, batch_idx
        self._passes = 0
        self._take_rate(steps_done(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._held = []
        if telemetry.due(trainer):
            telemetry.log(trainer, self.measurements())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()
        self._held = []

    def measurements(self) -> Mapping[str, float]:
        """What the last forward pass kept, and instead of what."""
        ledger = self._classifier.ledger
        values = {
            "activations/saved_bytes": float(ledger.saved_bytes),
            "activations/kept_bytes": float(ledger.kept_bytes),
            "activations/ratio": ledger.saved_bytes / max(1, ledger.kept_bytes),
            "activations/encode_ms": ledger.encode_seconds * 1e3,
            "activations/decode_ms": ledger.decode_seconds * 1e3,
        }
        if self._rates.error_bound is not None:
            values["activations/error_bound"] = self._rates.error_bound
        elif self._rates.bits < EXACT:
            values["activations/bits"] = float(self._rates.bits)
        return values

    def summary(self) -> str:
        """A table of what the last forward pass kept, and how, in Markdown."""
        return self._classifier.ledger.table()

    def _what_is_compiled(self, compiled: list[str]) -> str:
        what = ", ".join(outermost(compiled)) if compiled[0] else "the compiled LightningModule"
        if self._rates.error_bound is not None:
            return f"{what}: after the forward pass, for how many bits a bound takes is not known before"
        bits = stored_bits(self._rates.bits)
        return f"{what}: " + (f"{bits} bits, and 8 for losses" if bits < EXACT else "masks only, for all is exact")

    def _follow(self, module: pl.LightningModule) -> None:
        self._followed.close()
        compiled = outermost(compat.compiled_parts(module))
        self._followed.enter_context(follow_modules(module, self._classifier.layers, compiled))
        self._followed.enter_context(self._compiled.attached({name: module.get_submodule(name) for name in compiled}))
        self._undo.callback(self._followed.close)

    def _take_rate(self, step: int) -> None:
        if self._schedule is None:
            return
        value = self._curve.at(step) if self._curve is not None else self._schedule.initial
        if self._schedule.of == "bits":
            self._rates.bits = round(value)
        else:
            self._rates.error_bound = value

    def _wrap_training_step(self, trainer: pl.Trainer, module: nn.Module) -> Callable[[], None]:
        plugin = trainer.precision_plugin
        own = plugin.train_step_context

        @contextlib.contextmanager
        def train_step_context() -> Iterator[None]:
            with own(), self._compressing(module):
                yield

        plugin.__dict__["train_step_context"] = train_step_context
        return lambda: plugin.__dict__.pop("train_step_context", None)

    @contextlib.contextmanager
    def _compressing(self, module: nn.Module) -> Iterator[None]:
        classifier = self._classifier
        key = derive_seed(self._seed, *self._batch, self._passes)
        self._passes += 1
        seed_noise(key)
        classifier.begin([*module.parameters(), *module.buffers(), *self._held], key)
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


@contextlib.contextmanager
def follow_modules(module: nn.Module, layers: list[str], compiled: Collection[str] = ()) -> Iterator[None]:
    """Within it, ``layers`` has the names of the modules in ``module`` whose forward is going on, outermost first.

    Not of the ``compiled`` ones and those in them: their hooks would be compiled too.
    """
    with contextlib.ExitStack() as hooks:
        for name, part in module.named_modules():
            if name and not any(is_in(name, other) for other in compiled):
                hooks.enter_context(part.register_forward_pre_hook(partial(_enter, layers, name), prepend=True))
                hooks.enter_context(part.register_forward_hook(partial(_leave, layers, name), always_call=True))
        yield


def outermost(names: Collection[str]) -> list[str]:
    """Names of the modules that are in no other of them."""
    return [name for name in names if not any(name != other and is_in(name, other) for other in names)]


def is_in(name: str, other: str) -> bool:
    """Whether the module ``name`` is ``other`` or in it."""
    return not other or name == other or name.startswith(f"{other}.")


def _enter(layers: list[str], name: str, *_: Any) -> None:
    layers.append(name)


def _leave(layers: list[str], name: str, *_: Any) -> None:
    if layers and layers[-1] == name:
        layers.pop()
