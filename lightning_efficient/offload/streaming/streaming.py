"""Parameters that live in host memory or on a disk, and are on the device while modules compute with them.

Each part of the model (a block, a layer) has its parameters fetched before its forward, and those of the next parts are
fetched meanwhile; backward fetches what its operations saved, in the same way. They are given back when the room is
needed for others. (Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 6; and Zhang et al. 2019, "Efficient
Memory Management for GPU-based Deep Learning Systems", for the swapping of whatever is not in use.)

Nobody computes with a parameter that is away: while no module is at work with it, it is of a class whose operations
fetch it first (``guarded.py``), what autograd saves of it is kept as a place and fetched for backward
(``saved_parameters.py``), and memory that anybody has a view of is not given back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import compiled_entry, saved_tensors_hooks_are_allowed
from lightning_efficient.offload.streaming.access_order import AccessOrder
from lightning_efficient.offload.streaming.instance_methods import InstanceMethod
from lightning_efficient.offload.streaming.placed_parameters import find_slots
from lightning_efficient.offload.streaming.residency import Residency
from lightning_efficient.offload.streaming.saved_parameters import SavedParameters
from lightning_efficient.offload.streaming.slot_records import give_back, keep, place, promote
from lightning_efficient.offload.streaming.slots import Slot
from lightning_efficient.offload.streaming.stream_state import StreamState
from lightning_efficient.offload.streaming.stream_statistics import StreamStatistics
from lightning_efficient.offload.streaming.sub_modules import choose_parts, is_compiled
from lightning_efficient.offload.tiers.tier import Tier, TierError

__all__ = ["ParameterStream"]

_AHEAD = 4  # parts that are fetched before they are needed, if there is room


class ParameterStream:
    """Moves the parameters of a module between tiers and the device.

    A step is what happens between two calls of :meth:`end_step`: any number of forwards and backwards. The order in
    which parts were needed in the last step says which are fetched ahead, and which make room for them.

    Under ``torch.autocast`` operations save casts of parameters, which stay in memory until backward, and beside the
    budget. Train in a true low precision, or checkpoint activations with ``cache_enabled=False``.

    Attributes:
        before_use: Called with each parameter that code is about to use on its own, and not in its module.

    Args:
        module: The model; its parameters stay the same objects. It cannot be deep-copied or pickled meanwhile.
        placed: The tier of each parameter that lives outside the device, by name. Of a parameter with several names one
            is enough. Parameters that share memory need the same tier.
        budget_bytes: Most memory of the device for these parameters together.
        units: Names of modules whose parameters are fetched together; None: blocks that fit well under the budget.
        device: Where they compute; None: where they are. Those that are elsewhere are moved, one after the other.

    Raises:
        ValueError: If ``placed`` names what cannot be streamed, if a unit does not fit under the budget, or if
            ``units`` names what cannot be one.
        TierError: If a tier has no room.
    """

    def __init__(
        self,
        module: nn.Module,
        placed: Mapping[str, Tier],
        *,
        budget_bytes: int,
        units: Sequence[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes={budget_bytes} must be positive.")
        _check_modules(module)
        self._slots = find_slots(module, placed)
        self._by_parameter = {id(parameter): slot for slot in self._slots for parameter in slot.parameters}
        self._parts = choose_parts(module, self._slots, budget_bytes, units)
        for number, part in enumerate(self._parts):
            for slot in part.slots:
                slot.units.append(number)
        self._device = _one_device(self._slots) if device is None else _with_index(device)
        self._order = AccessOrder(range(len(self._parts)))
        self._residency = Residency(self._parts, budget_bytes, self._device, self._order)
        self._saved = SavedParameters(self)
        self._lock = threading.RLock()
        self._methods: list[InstanceMethod] = []
        self.before_use: Callable[[nn.Parameter], None] | None = None
        try:
            for slot in self._slots:
                place(slot, self._device, self._residency)
            self._attach(module)
        except BaseException:
            self.detach()
            raise

    @property
    def units(self) -> dict[str, int]:
        """Bytes of the parameters that are fetched together, by the module's name."""
        return {part.name: part.nbytes for part in self._parts}

    @property
    def statistics(self) -> StreamStatistics:
        """Since the beginning."""
        with self._lock:
            return self._residency.statistics()

    @contextlib.contextmanager
    def ensure(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within it these are on the device, and may be changed; those that are not streamed are passed over.

        Raises:
            BudgetError: If they do not fit.
            TierError: If a transfer failed.
        """
        slots = list(dict.fromkeys(self._streamed(parameters)))
        with self._pinned(slots):
            with self._lock:
                for slot in slots:
                    self._residency.settle(slot)
            yield

    def changed(self, parameter: nn.Parameter) -> None:
        """Its value was changed; it begins to be written to its tier.

        In-place operations are noticed without it, when the memory is given back; what is written to ``.data`` or
        through memory shared with others is not.
        """
        for slot in self._streamed([parameter]):
            with self._lock:
                if slot.resident:
                    self._residency.write(slot)

    def settle(self) -> None:
        """Until all values are in the tiers, also those that were changed and not yet written."""
        with self._lock:
            for slot in self._slots:
                if slot.changed:
                    self._residency.write(slot)
            self._residency.settle_all()

    def begin_step(self, *, gradients: bool = True) -> None:
        """Begin to fetch what the step needs first.

        A parameter that is trained from now on, and was not before, gets a versioned record, and its tier is committed.

        Args:
            gradients: Whether the step will have a backward.
        """
        with self._lock:
            for tier in dict.fromkeys(slot.tier for slot in self._slots if promote(slot, self._residency)):
                tier.commit()
            self._order.expect(gradients)
            self._residency.ahead(self._order.upcoming(_AHEAD), ())

    def end_step(self) -> None:
        """All parameters leave the device, changed ones into their tiers; also after a step that has failed.

        What is within :meth:`ensure`, or what somebody holds a view of, stays.

        Raises:
            TierError: If a value could not be written; it stays on the device.
        """
        with self._lock:
            self._order.finish()
            self._residency.free_all()

    def detach(self, device: torch.device | None = None) -> None:
        """Give the module all its parameters back, and leave it as it was; the stream is of no use then.

        Args:
            device: Where the parameters shall be; None: where they compute. All must fit there. If it is another one,
                no graph that was made before may be used any more.

        Raises:
            TierError: If a value cannot be read.
        """
        with self._lock:
            while self._methods:
                self._methods.pop().remove()
            for slot in self._slots:
                give_back(slot, self._device if device is None else _with_index(device), self._residency)
            self._residency.close()

    def rest(self) -> None:
        """Leave the module as it was, its parameters on memory of their tiers, which can be closed then.

        Of what is on a disk memory is taken only where it is read or changed. The parameters are on the host.

        Raises:
            TierError: If a value cannot be written or mapped.
        """
        with self._lock:
            while self._methods:
                self._methods.pop().remove()
            errors: list[TierError] = []
            for slot in self._slots:
                try:
                    keep(slot, self._residency)
                except TierError as error:
                    errors.append(error)
            self._residency.close()
            if errors:
                raise errors[0]

    def slot_at(self, address: int) -> Slot | None:
        """See :class:`~lightning_efficient.offload.streaming.saved_parameters.Streamed`."""
        return self._residency.by_address.get(address)

    def fetched(self, slot: Slot, view: Callable[[], Tensor]) -> Tensor:
        """See :class:`~lightning_efficient.offload.streaming.saved_parameters.Streamed`."""
        with self._lock:
            if slot.record is not None:  # else the stream was detached
                self._need([slot])
            return view()

    @contextlib.contextmanager
    def using(self, slots: Sequence[Slot]) -> Iterator[None]:
        """See :class:`~lightning_efficient.offload.streaming.guarded.User`."""
        if self.before_use is not None:
            for parameter in (one for slot in slots for one in slot.parameters):
                self.before_use(parameter)
        with self._saved.seen(one_operation=True), self._pinned(slots):
            yield

    @contextlib.contextmanager
    def _pinned(self, slots: Sequence[Slot], part: int | None = None) -> Iterator[None]:
        if not saved_tensors_hooks_are_allowed() and not all(slot.pins for slot in slots):
            raise RuntimeError(
                "Streamed parameters cannot be used within torch.func transforms (grad, vjp, jvp, ...). Have them on "
                "the device meanwhile: with stream.ensure(module.parameters())."
            )
        pinned: list[Slot] = []
        try:
            with self._lock:
                self._need(slots, part)
                for slot in slots:
                    slot.pin()
                    pinned.append(slot)
            yield
        finally:
            with self._lock:
                for slot in pinned:
                    slot.unpin()

    def _need(self, slots: Sequence[Slot], part: int | None = None) -> None:
        """Have them on the device, those of one part or a single one; and what follows on its way."""
        self._residency.begin(slots)
        if part is None and len(slots) == 1:
            part = min(slots[0].units, key=self._order.distance)
        if part is not None and self._order.note(part, torch.is_grad_enabled()):
            self._residency.ahead((part, *self._order.upcoming(_AHEAD)), slots)
        for slot in slots:
            self._residency.arrive(slot)

    def _attach(self, module: nn.Module) -> None:
        parts = {id(part.module): number for number, part in enumerate(self._parts) if part.module is not None}
        inside: set[int] = set()  # of compiled modules: what is done there would be compiled too
        for one in module.modules():
            if id(one) not in inside and is_compiled(one):
                inside.update(id(below) for below in one.modules() if below is not one)
        for one in module.modules():
            owns = any(id(parameter) in self._by_parameter for parameter in one.parameters(recurse=False))
            if id(one) not in inside and (owns or one is module or id(one) in parts):
                entry = compiled_entry(one) or "forward"
                self._methods.append(InstanceMethod(one, entry, self._around_forward(parts.get(id(one)))))
        state = StreamState(module, self._by_parameter, self._residency, self._lock)
        self._methods.extend(state.methods())
        for slot in self._slots:
            slot.user = self

    def _around_forward(self, part: int | None) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self._saved.seen(), self._pinned(self._parts[part].slots if part is not None else (), part):
                return original(*args, **kwargs)

        return torch.compiler.disable(forward)  # it is not traced where a larger region is compiled

    def _streamed(self, parameters: Iterable[nn.Parameter]) -> Iterator[Slot]:
        return (self._by_parameter[id(one)] for one in parameters if id(one) in self._by_parameter)


def _check_modules(module: nn.Module) -> None:
    for name, one in module.named_modules():
        if isinstance(one, torch.jit.ScriptModule):
            raise ValueError(
                f"Module '{name}' is a torch.jit.ScriptModule, whose use of parameters cannot be seen. Use the module "
                "that it was made of, or torch.compile."
            )


def _one_device(slots: Sequence[Slot]) -> torch.device:
    devices = {slot.storage.device for slot in slots}
    if len(devices) > 1:
        raise ValueError(f"placed: parameters are on {len(devices)} devices. Name the one where all compute: device=.")
    return devices.pop() if devices else torch.device("cpu")


def _with_index(device: torch.device) -> torch.device:
    return torch.empty(0, device=device).device
