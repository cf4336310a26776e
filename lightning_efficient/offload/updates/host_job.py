"""One unit on its way through a step on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.updates.crossing import Crossing, Mark
from lightning_efficient.offload.updates.full_precision import current_master, in_16_bits
from lightning_efficient.offload.updates.gradients import GradientClaim
from lightning_efficient.offload.updates.host_staging import HostStaging
from lightning_efficient.offload.updates.layout import MASTER, VALUE, Layout, is_bulk
from lightning_efficient.offload.updates.staging import Lease
from lightning_efficient.offload.updates.subset_step import for_host_step, step_alone, twin
from lightning_efficient.offload.updates.units import Unit

__all__ = ["HostJob", "Keep", "fingerprint"]

Keep = Callable[[Unit, Lease | None, Sequence[Mapping[str, Any]]], None]
_VALUES = (MASTER, VALUE)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HostJob:
    """What is needed to step a unit on the host, packed where it is asked for, and what came of it.

    :meth:`pack` and :meth:`deliver` are for the thread that computes, :meth:`fetch` for either, :meth:`step` for the
    one that steps.

    Attributes:
        changing: The parameters that have a gradient.
        group: Their hyperparameters.
        nbytes: Memory of the host for what is on its way.
        previous: When what the host steps had been sent the last time; None: it was not.
        stream: Has the parameters that are not on the device; None: all are there.
        arrived: When the host has what it needs; None: it has not been asked for.
        sent: When the device has the new values, where the thread has sent them.
        done: Whether it has been stepped, or never will be.

    Args:
        unit: To be stepped.
        gradients: One for each of its parameters.
        crossing: Between the device and the host.
        staging: Of the state.
        keep: Puts new state into the record of a unit.
        in_full: Whether values of 16 bits are stepped in full precision.
    """

    def __init__(
        self,
        unit: Unit,
        gradients: Sequence[Tensor | GradientClaim | None],
        crossing: Crossing,
        staging: HostStaging,
        keep: Keep,
        *,
        in_full: bool,
    ) -> None:
        self.group: dict[str, Any] = {}
        self.nbytes = 0
        self.previous: Mark | None = None
        self.stream: ParameterStream | None = None
        self.arrived: Mark | None = None
        self.sent: Mark | None = None
        self.done = False
        self._unit, self._gradients = unit, list(gradients)
        self._device = unit.parameters[0].device
        self._crossing, self._staging, self._keep = crossing, staging, keep
        self._in_full = in_full
        self._small: list[dict[str, Any] | None] = []  # what the optimizer has of each parameter; None: nothing
        self._targets: dict[int, Tensor] = {}
        self._full: set[int] = set()  # whose value in full precision is stepped
        self._way: dict[tuple[Any, ...], Tensor] = {}  # what is on its way to the host, and then there
        self._values: dict[int, Tensor] = {}  # new ones, in memory from which they can be sent

    @property
    def changing(self) -> list[nn.Parameter]:
        return [self._unit.parameters[index] for index in self._stepping]

    @property
    def _stepping(self) -> list[int]:
        return [index for index, gradient in enumerate(self._gradients) if gradient is not None]

    # -- in the thread that computes ---------------------------------------------------------------------------------

    def pack(self, group: Mapping[str, Any], known: Mapping[Tensor, tuple[int, Tensor]]) -> None:
        """Note all that may be another when the step is taken.

        Args:
            group: The hyperparameters.
            known: Of each parameter whose value is on the host, how often it had been changed, and its bits' sum.
        """
        unit, way = self._unit, self._way
        self._twin = twin(unit.optimizer)
        way.update({("own", key): one for key, one in vars(self._twin).items() if isinstance(one, Tensor)})
        self.group = {key: value for key, value in group.items() if key != "params"}
        way.update({("group", key): value for key, value in self.group.items() if isinstance(value, Tensor)})
        self._small = [unit.optimizer.state.get(parameter) for parameter in unit.parameters]
        # A value stays on the host beside its state, but not on a disk, which takes longer than its way does.
        self._keeps = unit.tier is not None and self._staging.lends(unit.tier) and self.stream is None
        for index in self._stepping:
            parameter, gradient = unit.parameters[index], self._gradients[index]
            if isinstance(gradient, Tensor):
                way["gradient", index] = gradient
            small = self._small[index] or {}
            way.update({("small", index, k): one for k, one in small.items() if isinstance(one, Tensor)})
            if self._in_full and in_16_bits(parameter):
                self._full.add(index)
            if self.stream is not None:
                with self.stream.ensure([parameter]):
                    way["value", index] = parameter.detach().clone()
                continue
            self._targets[index] = target = parameter.data
            if self._stays(index) and parameter in known and known[parameter][0] == parameter._version:
                way["changed", index] = fingerprint(target) != known[parameter][1]
            else:
                way["value", index] = target
            torch.autograd.graph.increment_version(parameter)  # whoever has saved it for backward must not use it now
        self.nbytes = sum(one.numel() * one.element_size() for one in way.values() if one.layout == torch.strided)
        self._after = self._crossing.mark()

    def _stays(self, index: int) -> bool:
        """Whether there is a value beside the state from one step to the next, of which a parameter may differ."""
        return (self._keeps or index in self._full) and self._unit.parameters[index].numel() > 1

    def deliver(self) -> dict[Tensor, tuple[int, Tensor]]:
        """The step was taken: the parameters have their values, and the optimizer its state.

        Returns:
            Of each parameter whose value is on the host too, how often it has been changed, and its bits' sum.
        """
        unit, known = self._unit, dict[Tensor, tuple[int, Tensor]]()
        if self.sent is not None:
            self._crossing.follow(self.sent)
        for index in self._stepping:
            parameter, small = unit.parameters[index], self._small[index]
            if small is not None:
                unit.optimizer.state[parameter] = small
            if self.stream is not None:
                with self.stream.ensure([parameter]):
                    parameter.copy_(self._values[index], non_blocking=True)
                self.stream.changed(parameter)
                continue
            if self._stays(index):
                known[parameter] = parameter._version, fingerprint(self._targets[index])
        return known

    # -- copies ------------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Begin to bring to the host what is needed there; the device's memory of it is not held any more."""
        found, self.arrived = self._crossing.to_host(list(self._way.values()), self._after)
        self._way = dict(zip(self._way, found, strict=True))
        for (kind, *where), there in self._way.items():
            if kind == "gradient":
                self._gradients[where[0]] = there

    # -- in the thread that steps ------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all that the step needs is on the host."""
        if self.arrived is None:
            raise RuntimeError("fetch() comes first.")
        self.arrived.synchronize()
        self._after.synchronize()  # of gradients that are elsewhere nothing may have had to arrive
        if self.previous is not None:
            self.previous.synchronize()

    def step(self) -> None:
        """Step, begin to send the new values, and keep the new state.

        Raises:
            SubsetStepError: If the optimizer turns out to need all parameters together.
            TierError: If the state cannot be read, or earlier states could not be written.
            MemoryError: If the state of the unit is larger than the memory for records on their way.
        """
        unit, stepping = self._unit, self._stepping
        lease = self._staging.read(unit.placed) if unit.placed is not None else None
        bulk = unit.layout.views(lease.data, len(unit.parameters)) if lease else [{} for _ in unit.parameters]
        states: list[dict[str, Any]] = [
            held if small is not None else {key: held[key] for key in _VALUES if key in held}  # somebody took it out
            for held, small in zip(bulk, self._small, strict=True)
        ]
        shown: dict[int, Tensor] = {}
        for index in stepping:
            whole = {**self._small_on_host(index), **states[index]}
            shown[index] = self._shown(index, whole)
            if state := {key: one for key, one in whole.items() if key not in _VALUES}:
                self._twin.state[shown[index]] = state
        vars(self._twin).update({key[1]: one for key, one in self._way.items() if key[0] == "own"})  # as scalers set
        step_alone(self._twin, self._group_on_host(list(shown.values())), list(shown.values()))
        for index, value in shown.items():
            value.grad = None
            states[index] = state = dict(self._twin.state.get(value, {}))
            if index in self._full:
                state[MASTER] = value
            if state or self._small[index] is not None:
                self._small[index] = {key: one for key, one in state.items() if not is_bulk(one)}
            if index not in self._full and self._keeps:
                state[VALUE] = value
        self._send(shown)
        if self.sent is not None and lease is not None and Layout.of(states) != unit.layout:
            self.sent.synchronize()  # the record that values are read from is about to be given up
        self._keep(unit, lease, states)
        self._way.clear()
        self._twin.state.clear()

    def _shown(self, index: int, whole: Mapping[str, Any]) -> Tensor:
        """The value that is stepped, with its gradient."""
        full, changed = index in self._full, self._way.get(("changed", index))
        held: Tensor | None = whole.get(MASTER if full else VALUE)
        written = self._way.get(("value", index))
        if written is None and held is not None and not (changed is not None and bool(changed)):
            value = held
        else:
            if written is None:  # somebody wrote to the parameter's memory
                (written,), there = self._crossing.to_host([self._targets[index]], self._after)
                there.synchronize()
            value = current_master(held, written) if full else written
        gradient = self._way.get(("gradient", index), self._gradients[index])
        if isinstance(gradient, GradientClaim):
            gradient = gradient.take(on_host=True)
        value.grad = None if gradient is None else gradient.to(value.dtype)
        return value

    def _small_on_host(self, index: int) -> dict[str, Any]:
        small = self._small[index] or {}
        return {key: self._way.get(("small", index, key), value) for key, value in small.items()}

    def _group_on_host(self, shown: Sequence[Tensor]) -> dict[str, Any]:
        group = {key: self._way.get(("group", key), value) for key, value in self.group.items()}
        return for_host_step(self._twin, group, shown, self._device)

    def _send(self, shown: Mapping[int, Tensor]) -> None:
        pairs = []
        for index, value in shown.items():
            dtype = self._unit.parameters[index].dtype
            if self.stream is not None:
                self._values[index] = value.to(dtype, copy=True)  # what it is in is used for others meanwhile
                continue
            target = self._targets[index]
            pairs.append((target, value if value.dtype == dtype else self._crossing.like(target).copy_(value)))
        if pairs:
            self.sent = self._crossing.to_device(pairs, self._after)


def fingerprint(value: Tensor) -> Tensor:
    """The sum of the bits of its elements as integers, an int64 scalar; to notice what changes no version of it."""
    bits = torch.view_as_real(value) if value.is_complex() else value
    return bits.view(_BITS[bits.element_size()]).sum(dtype=torch.int64)
