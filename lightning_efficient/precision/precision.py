"""The adapter: when the Trainer trains, backs up and steps, and what of it low bits take part in."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.seeded import derive_seed
from lightning_efficient.precision.engine import Engine, Retry
from lightning_efficient.precision.formats import FORMATS, format_named
from lightning_efficient.precision.nodes import ROLES, Node
from lightning_efficient.precision.operations import Operations
from lightning_efficient.precision.signs import Limits
from lightning_efficient.precision.status import ReturnPolicy

__all__ = ["RollbackPrecision"]

_HIGH = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VERSION = 1
_LINES = 20  # for retries; then a line for every hundredth
_log = logging.getLogger(__name__)


class RollbackPrecision(Precision):
    """Trains in few bits wherever that is healthy, and computes again in many where it is not.

    Linear layers, convolutions and products of matrices are computed in few bits after a first phase in which all is
    in high bits and the limits are learnt. A product that shows a sign of failure is computed again in high bits at
    once, those behind it are too, and few bits come back when that is safe. No batch is lost.

    Args:
        low: Format of few bits: ``"int8"``, ``"int8-row"``, ``"int8-block"``, ``"bfp16"``, ``"fp8"``, ``"fp16"`` or
            ``"bf16"``.
        high: ``"bf16"`` or ``"fp32"``: of many bits.
        inner: The precision plugin that does the rest; None: bf16-mixed or 32-true, as ``high`` says.
        pre_learning_steps: Batches in high bits, in which the limits are learnt.
        return_after: Products in high bits, one after another, behind which few bits are allowed again.
        retry_rate: Of a product's last tries in few bits, the part that had to be computed again, under which they are
            allowed at once.
        thresholds: Limits to use rather than learn: ``overflow``, ``underflow``, ``error``, ``exponent_range``.
        exclude: Patterns of names of operations that stay in high bits, as in ``precision_map()``.
        stochastic_rounding: Up or down at random, rather than to nearest.
        seed: Of that.

    Raises:
        ValueError: If an argument is none of those.
    """

    def __init__(
        self,
        *,
        low: str = "int8",
        high: Literal["bf16", "fp32"] = "bf16",
        inner: Precision | None = None,
        pre_learning_steps: int = 50,
        return_after: int = 20,
        retry_rate: float = 0.05,
        thresholds: Mapping[str, float] | None = None,
        exclude: Sequence[str] = (),
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if high not in _HIGH:
            raise ValueError(f"high={high!r}: it can be {' or '.join(map(repr, _HIGH))}.")
        for name, number, least in (("pre_learning_steps", pre_learning_steps, 0), ("return_after", return_after, 1)):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name}={number!r} must be a whole number, {least} or more.")
        if not 0 <= retry_rate <= 1:
            raise ValueError(f"retry_rate={retry_rate!r} is a part: give a number from 0 to 1.")
        if isinstance(inner, RollbackPrecision):
            raise ValueError("inner= is another RollbackPrecision: give the plugin that it shall wrap.")
        self.inner = inner or (MixedPrecision("bf16-mixed", "cpu") if high == "bf16" else Precision())
        self.precision = self.inner.precision
        self._low, self._policy = format_named(low), ReturnPolicy(return_after, retry_rate)
        self._limits = _limits(thresholds)
        self._pre_learning_steps, self._exclude, self._seed = pre_learning_steps, tuple(exclude), seed
        self.nodes: dict[str, Node] = {}
        self._loaded: dict[str, Any] = {}
        self._engine = Engine(self._low, _HIGH[high], stochastic=stochastic_rounding, protect=True, seed=seed)
        self._operations = Operations(self._engine, self._make, self._takes_part)
        self._module: pl.LightningModule | None = None
        self._batches = 0
        self._reasons: Counter[str] = Counter()

    # When

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Remember the module, and whose device it is."""
        module = model if isinstance(model, pl.LightningModule) else getattr(model, "module", None)
        self._module = module if isinstance(module, pl.LightningModule) else None
        if self._module is not None and isinstance(self.inner, MixedPrecision):
            self.inner.device = self._module.device.type
        connected: tuple[nn.Module, list[Optimizer], list[Any]]
        connected = self.inner.connect(model, optimizers, lr_schedulers)
        return connected

    @contextlib.contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Forward of a training step."""
        engine = self._engine
        engine.learning = self._batches < self._pre_learning_steps
        engine.begin(derive_seed(self._seed, self._batches))
        self._batches += 1
        if self._module is not None:
            self._operations.begin(self._module)
        with self.inner.train_step_context(), self._operations:
            yield

    def backward(
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:  # type: ignore[override]
        """Backward; what checkpointing computes again there is computed as in forward."""
        with self._operations:
            self.inner.backward(tensor, model, optimizer, *args, **kwargs)
        self._report()

    def on_parameters_changed(self, trainer: pl.Trainer, change: Any) -> None:
        """Operations have other weights now."""
        self._operations.forget()

    def _report(self) -> None:
        retries, self._engine.retries = self._engine.retries, []
        for retry in retries:
            self._reasons[_kind_of(retry)] += 1
            count = self._reasons.total()
            if count <= _LINES or count % 100 == 0:
                _log.info("%s, %s in high bits again (retry %d): %s", retry.node, retry.role, count, retry.reason)

    # What

    def _make(self, name: str, kind: str) -> Node:
        node = self.nodes[name] = Node(name, kind, self._policy, self._limits)
        state = self._loaded.pop(name, None)
        if state is not None and state["kind"] == kind:
            node.load_state_dict(state)
        return node

    def _takes_part(self, name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self._exclude)

    def precision_map(self) -> list[dict[str, Any]]:
        """Of each product of each operation: its bits now, its counters, and the last reason to compute it again.

        What multiplies matrices and is not covered has a row with ``"bits": "high, not covered"``.
        """
        self._engine.refresh()
        rows: list[dict[str, Any]] = [
            {
                "operation": name, "product": role, "bits": self._bits(node, role),
                "low": node.products[role].status.low, "high": node.products[role].status.high,
                "retries": node.products[role].status.retries, "last reason": node.products[role].status.reason,
            }
            for name, node in self.nodes.items()
            for role in ROLES
        ]  # fmt: skip
        rows += [
            {"operation": name, "product": "all", "bits": "high, not covered", "low": 0, "high": count, "retries": 0,
             "last reason": ""}
            for name, count in sorted(self._operations.skipped.items())
        ]  # fmt: skip
        return rows

    def _bits(self, node: Node, role: str) -> str:
        product = node.products[role]  # type: ignore[index]
        if product.low_pays is False:
            return f"high, {node.why_high or 'low would take longer'}"
        if self._engine.learning:
            return "high, learning"
        return "high" if product.status.held else self._low.name

    def state_dict(self) -> dict[str, Any]:
        """Of all nodes."""
        self._engine.refresh(wait=True)
        return {
            "version": _VERSION, "batches": self._batches, "high_in_a_row": self._engine.run.high_in_a_row,
            "nodes": self._loaded | {name: node.state_dict() for name, node in self.nodes.items()},
            "reasons": dict(self._reasons), "inner": self.inner.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` returned."""
        version = state_dict.get("version")
        if version != _VERSION:
            raise MisconfigurationException(f"The state of RollbackPrecision has version {version}; known is {_VERSION}.")
        self._batches = state_dict["batches"]
        self._engine.run.high_in_a_row = state_dict["high_in_a_row"]
        self._reasons = Counter(state_dict["reasons"])
        self._loaded = dict(state_dict["nodes"])
        for name, node in self.nodes.items():
            if name in self._loaded:
                node.load_state_dict(self._loaded.pop(name))
        self.inner.load_state_dict(state_dict["inner"])

    # All else is the inner plugin's

    def convert_module(self, module: nn.Module) -> nn.Module:
        return self.inner.convert_module(module)

    def tensor_init_context(self) -> Any:
        return self.inner.tensor_init_context()

    def module_init_context(self) -> Any:
        return self.inner.module_init_context()

    def forward_context(self) -> Any:
        return self.inner.forward_context()

    def val_step_context(self) -> Any:
        return self.inner.val_step_context()

    def test_step_context(self) -> Any:
        return self.inner.test_step_context()

    def predict_step_context(self) -> Any:
        return self.inner.predict_step_context()

    def convert_input(self, data: Any) -> Any:
        return self.inner.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self.inner.convert_output(data)

    def pre_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        return self.inner.pre_backward(tensor, module)

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        return self.inner.post_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        return self.inner.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def main_params(self, optimizer: Optimizer) -> Any:
        return self.inner.main_params(optimizer)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        self.inner.unscale_gradients(optimizer)

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        self.inner.clip_gradients(optimizer, *args, **kwargs)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        self.inner.clip_grad_by_value(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self.inner.clip_grad_by_norm(optimizer, clip_val)

    def teardown(self) -> None:
        self.inner.teardown()


def _limits(thresholds: Mapping[str, float] | None) -> Limits | None:
    if thresholds is None:
        return None
    known = Limits().state_dict()
    for name, value in thresholds.items():
        if name not in known:
            raise ValueError(f"thresholds has {name!r}; there are {', '.join(known)}.")
        if not value >= 0:
            raise ValueError(f"thresholds[{name!r}]={value!r} must be 0 or more.")
    return Limits(**thresholds)


def _kind_of(retry: Retry) -> str:
    """Of the reason, without its figures."""
    return retry.reason.split(" of ")[0].split(" (")[0]
