"""What each saved tensor is, and so how it may be kept: by reference, exactly in fewer bits, or with an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_efficient.activation_compression.host import HostMemory, OnHost
from lightning_efficient.activation_compression.ledger import Ledger, PassSizes
from lightning_efficient.activation_compression.operations import CurrentOperation, Kind
from lightning_efficient.activation_compression.recompute import recomputation
from lightning_efficient.activation_compression.records import (
    Lossy,
    Raw,
    Recomputed,
    Record,
    narrowed,
    signs,
    two_valued,
)
from lightning_efficient.activation_compression.store import Demand, Kept, SavedTensors, Unit
from lightning_efficient.activation_compression.streamed import streamed
from lightning_efficient.core.quantization import Code, Quantized, Rounding, quantize
from lightning_efficient.core.random import mix
from lightning_efficient.core.saved_tensors import is_plain, parameter_of
from lightning_efficient.core.torch_internals import without_torch_function

__all__ = ["BOUNDED", "EXACT", "FP8", "Classifier", "Rates", "held_by"]

EXACT = 99
"""The level of what must not change."""
BOUNDED = 50
"""The level of what has as many bits as the error bound takes."""
FP8 = 5.5
"""The level of floats of 8 bits: where numbers are near the largest of their group, they are no better than 5 bits."""

_SMALL = 1024  # numbers that are not worth the work
_STATISTICS = 8  # times smaller than another tensor of its operation: means, scales, normalizers
_LOSSY = (torch.float32, torch.bfloat16, torch.float16)
_VIEWS = ("TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0", "UnsafeViewBackward0")
_PARAMETRIZATIONS = ".parametrizations."  # in the names of modules that compute a weight


class Rates(Protocol):
    """Says how many bits there are for what."""

    def of(self, kind: Kind, layer: str) -> tuple[float, float]:
        """Bits of a number that an operation of ``kind`` saves in ``layer``, and how many would do.

        :data:`FP8`, or :data:`EXACT` for all of them.
        """

    def bound(self, unit: Unit) -> float | None:
        """Of the errors of what is at the level :data:`BOUNDED`."""


class Classifier:
    """Chooses for :class:`SavedTensors`; within :attr:`operation`'s context it knows who saves.

    Args:
        rates: Bits, by kind of operation and layer.
        group_size: See :func:`quantize`.
        recompute: Whether cheap operations are done again rather than their results kept.

    Attributes:
        layers: Names of the modules whose forward is going on, outermost first.
        ledger: What was kept.
        sizes: What the pass saved, for plans.
        offloaded: Units whose compressed numbers wait in the host's memory.
        after: Called with name, arguments and result of each operation, and its layer; None: nobody listens.
    """

    def __init__(self, rates: Rates, *, group_size: int = 128, recompute: bool = True) -> None:
        self.rates = rates
        self.ledger = Ledger()
        self.saved = SavedTensors(self, self.ledger)
        self.operation = CurrentOperation(partial(streamed, self.saved), self._note_result)
        self._recompute = recompute
        self.layers: list[str] = []
        self.sizes = PassSizes()
        self.offloaded: frozenset[Unit] = frozenset()
        self._host = HostMemory()
        self.after: Callable[[str, tuple[Any, ...], Mapping[str, Any], Any, str], None] | None = None
        self._group_size = group_size
        self._references: set[int] = set()
        self._versions: dict[int, int] = {}  # of parameters, by id
        self._key = self._count = 0

    def begin(self, held: Iterable[Tensor], key: int) -> None:
        """A new forward pass begins.

        Args:
            held: What stays in memory until after its backward pass: parameters, buffers, the batch.
            key: Of its noise.
        """
        self.end()
        held = list(held)
        self._references = {tensor.untyped_storage()._cdata for tensor in held if is_plain(tensor)}
        self._versions = {id(tensor): tensor._version for tensor in held if isinstance(tensor, nn.Parameter)}
        self._key, self._count = key, 0
        self.layers.clear()  # what an exception may have left
        self.ledger.open()
        self.sizes = PassSizes()

    def leave(self, nbytes: int) -> None:
        """A forward pass begins in which autograd keeps what it saves, ``nbytes``."""
        self.end()
        self.ledger.open()
        self.ledger.passed("", "all", "uncompressed", nbytes, nbytes)

    def end(self) -> None:
        """It is over; what it kept stays."""
        self.saved.clear()

    # -- for SavedTensors --------------------------------------------------------------------------------------------

    def by_reference(self, tensor: Tensor) -> Callable[[], Tensor] | Tensor | None:
        if not is_plain(tensor):
            return tensor.detach()
        if parameter_of(tensor) is not None:
            return tensor.detach()
        if tensor.untyped_storage()._cdata in self._references:
            return tensor.detach()
        parameter = _cast_of(tensor)
        if parameter is None:
            return None
        version = parameter._version
        if version != self._versions.get(id(parameter), version):  # autocast uses again what it made before an update
            return None
        return partial(_cast, parameter, version, tensor.dtype)

    def demand(self, tensor: Tensor) -> Demand:
        operation = self.operation
        size = tensor.numel()
        if operation.name:
            operation.largest = max(operation.largest, size)
        unit = operation.kind, self.layers[-1] if self.layers else ""
        if tensor.dtype not in _LOSSY:
            return Demand(EXACT, EXACT, unit)
        if operation.name in ("relu", "relu_"):
            return Demand(EXACT, EXACT, unit, "signs")
        if size < _SMALL or size * _STATISTICS <= operation.largest or operation.is_statistic(tensor):
            return Demand(EXACT, EXACT, unit)
        if operation.is_factorization or operation.is_weight(tensor) or _PARAMETRIZATIONS in f".{unit[1]}":
            return Demand(EXACT, EXACT, unit)
        return Demand(*self.rates.of(*unit), unit)

    def record(self, numbers: Tensor, tensor: Tensor, demand: Demand) -> Record:
        record = self._record(numbers, tensor, demand)
        if demand.least < EXACT and isinstance(record, Raw | Lossy | OnHost):
            self.sizes.add(demand.unit, numbers.numel(), numbers.element_size())
        else:
            self.sizes.fixed[demand.unit[1]] += record.nbytes
        return record

    def _record(self, numbers: Tensor, tensor: Tensor, demand: Demand) -> Record:
        self._count += 1
        if demand.of == "signs":
            return signs(numbers)
        exact = _fewer_bits(numbers, not tensor.requires_grad) if numbers.numel() >= _SMALL else None
        if exact is not None:
            return exact
        if demand.level < EXACT:
            code = _code(demand.level)
            rounding: Rounding = "dither" if demand.level > 2 else "stochastic"
            # To ask a GPU whether all is finite is to wait for it. Where it must be asked all the same: an error bound
            # depends on the numbers; in compiled modules neither the operation nor requires_grad is known.
            unasked = code is not None and tensor.is_cuda and tensor.requires_grad and self.operation.needs_finite
            encoded = quantize(
                numbers,
                code,
                group_size=self._group_size,
                rounding=rounding,
                key=mix(self._key, self._count),
                error_bound=self.rates.bound(demand.unit) if code is None else None,
                nonfinite="propagate" if unasked else "refuse",
            )
            if encoded is not None and encoded.nbytes < numbers.nbytes and not _may_overflow(encoded):
                return self._host.keep(encoded) if demand.unit in self.offloaded else Lossy(encoded)
        if numbers.untyped_storage().nbytes() > numbers.nbytes:  # a part of what is freed soon
            numbers = numbers.clone()
        return Raw(numbers, numbers.nbytes)

    def kept(self, record: Record, nbytes: int, instead_of: Kept | None) -> None:
        layer = self.layers[-1] if self.layers else ""
        if instead_of is not None:
            self.freed(instead_of.record, instead_of.unit)
            nbytes = 0  # it counts already
        self.sizes.saved[layer] += nbytes
        self.ledger.add(layer, self.operation.kind, record.way, nbytes, record.nbytes)

    def freed(self, record: Record, unit: Unit) -> None:
        self.ledger.freed(unit[1], record.nbytes)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _note_result(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if self.after is not None:
            self.after(name, args, kwargs, result, self.layers[-1] if self.layers else "")
        if self._recompute:
            with without_torch_function():
                found = recomputation(self.saved, name, args, kwargs, result)
                if found is None:
                    return
                source, again = found
                if source.level != BOUNDED or source.record.exact:
                    self.saved.derive(
                        result, source, lambda kept: Recomputed(partial(again, kept), kept.record.exact, again.nbytes)
                    )


def held_by(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are mere attributes of its modules, as tables of positions often are."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def _code(level: float) -> Code | None:
    """What to ask :func:`quantize` for."""
    if level == FP8:
        return "fp8"
    return None if level == BOUNDED else int(level)


def _may_overflow(encoded: Quantized) -> bool:
    """Whether a number may become infinite when it is decoded; float16 ends where activations may well be."""
    if encoded.dtype != torch.float16 or encoded.minimum is None or encoded.bits == "fp8":
        return False
    scale, minimum = encoded.scale.float(), encoded.minimum.float()
    farthest = torch.maximum(minimum + scale * (1 << encoded.bits), scale - minimum)
    return bool(farthest.amax() > torch.finfo(encoded.dtype).max)


def _fewer_bits(numbers: Tensor, may_be_a_mask: bool) -> Record | None:
    """An exact record that is smaller, if there is one."""
    if numbers.dtype.is_floating_point or numbers.dtype.is_complex:
        return two_valued(numbers) if may_be_a_mask and numbers.dtype in _LOSSY else None
    return two_valued(numbers) if numbers.dtype == torch.bool else narrowed(numbers)


def _cast_of(tensor: Tensor) -> nn.Parameter | None:
    """The parameter of which ``tensor`` is the copy, or a view of the copy, that autocast made; as it was made."""
    copy = tensor if tensor._base is None else tensor._base
    if tensor._version:
        return None
    node = tensor.grad_fn
    for _ in range(3):
        if node is None or node.name() not in _VIEWS:
            break
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return None
    leaf = node.next_functions[0][0]
    parameter = getattr(leaf, "variable", None)
    if not isinstance(parameter, nn.Parameter) or parameter.dtype == copy.dtype or parameter.device != copy.device:
        return None
    same = parameter.shape == copy.shape and parameter.stride() == copy.stride()
    return parameter if same and copy.nbytes == copy.untyped_storage().nbytes() else None


def _cast(parameter: nn.Parameter, version: int, dtype: torch.dtype) -> Tensor:
    if parameter._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"parameter of shape {list(parameter.shape)} is at version {parameter._version}; expected version "
            f"{version} instead. Update it after the backward pass."
        )
    return parameter.detach().to(dtype)
