"""The updates of parameters whose optimizer state is not in the optimizer, but in records of a tier.

For the time of a unit's update its state is put into the user's own optimizer object, which is then stepped for these
parameters alone; for any optimizer that updates parameter by parameter that is, bit for bit, what one step for all
does. (Rajbhandari et al. 2021, "ZeRO-Infinity", 5.2: optimizer states are brought in chunk by chunk, and the read of
the next overlaps with the write of the last.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.core.torch_internals import not_compiling
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.tiers.host import keeps_versions
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.full_precision import in_16_bits, in_full_precision
from lightning_efficient.offload.updates.gradients import GradientClaim, taken
from lightning_efficient.offload.updates.handover import Handover
from lightning_efficient.offload.updates.host_steps import HostSteps
from lightning_efficient.offload.updates.layout import VALUE, Layout, is_bulk
from lightning_efficient.offload.updates.staging import Lease, Placed, Staging
from lightning_efficient.offload.updates.subset_step import step_subset
from lightning_efficient.offload.updates.turn import Turn, value_of
from lightning_efficient.offload.updates.units import Unit, make_units

__all__ = ["UpdateEngine"]


class UpdateEngine:
    """Keeps the state of optimizers in tiers, and updates their parameters unit by unit.

    Attributes:
        units: All, in the order of the optimizers and their groups.
        stream: See below.
        host: Likewise.
        updating: Whether an update has begun and not ended; also if it failed, and weights may be half new.
        waited_seconds: For tiers to commit; what records on their way were waited for, ``staging`` knows.
        update_seconds: In :meth:`update`, with what it waited there.

    Args:
        optimizers: The user's, of classes that :func:`~.subset_step.check_parameter_by_parameter` admits.
        names: The name of each parameter by ``id``.
        tier_of: Where the state of a parameter goes, by its name; None: it stays in the optimizer.
        staging: For records on their way.
        together_bytes: See :func:`~.units.make_units`.
        master_weights: Keep parameters of fewer than 32 bits in float32 too, and update those.
        stream: Has the parameters that are elsewhere; None: all are where they are used.
        host: Steps the units whose state is elsewhere; None: they are stepped where their parameters are.
        before: Has the state that an engine before this one kept, with the same ``staging``, ``stream`` and ``host``.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        names: Mapping[int, str],
        tier_of: Callable[[str], Tier | None],
        staging: Staging | DeviceStaging,
        *,
        together_bytes: int = 4 << 20,
        master_weights: bool = False,
        stream: ParameterStream | None = None,
        host: HostSteps | None = None,
        before: Handover | None = None,
    ) -> None:
        self.stream, self.host = stream, host
        self._staging = staging
        self._master_weights = master_weights
        self.units = self._make_units(optimizers, names, tier_of, together_bytes)
        if before is not None:
            self.units = [before.same(unit) for unit in self.units]
        self.unit_of = {parameter: unit for unit in self.units for parameter in unit.parameters}
        self.updating = False
        self.waited_seconds = self.update_seconds = 0.0
        for unit in self.units:
            if before is not None:
                before.make_way(unit)
            self._move_out(unit)
        if before is not None:
            before.finish()

    def _make_units(
        self,
        optimizers: Sequence[Optimizer],
        names: Mapping[int, str],
        tier_of: Callable[[str], Tier | None],
        together_bytes: int,
    ) -> list[Unit]:
        return [unit for optimizer in optimizers for unit in make_units(optimizer, names, tier_of, together_bytes)]

    @property
    def tiers(self) -> list[Tier]:
        """That hold records, each once."""
        return list(dict.fromkeys(unit.tier for unit in self.units if unit.tier is not None))

    def commit(self) -> None:
        """What has been written is the state to go back to."""
        self._staging.flush()
        begin = time.perf_counter()
        for tier in self.tiers:
            tier.commit()
        self.waited_seconds += time.perf_counter() - begin

    def settle(self) -> None:
        """Nothing is on its way, and what was read ahead is not what is in the records any more."""
        self.join()
        if self.host is not None:
            self.host.settle()
        self._staging.flush()
        self._staging.forget()

    def follow_groups(self, optimizer: Optimizer) -> None:
        """Its groups may be others than before, of the same parameters.

        Raises:
            RuntimeError: If they are not of the same parameters, or divide those of a unit.
        """
        units = [unit for unit in self.units if unit.optimizer is optimizer]
        index = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        known = {parameter for unit in units for parameter in unit.parameters}
        if index.keys() != known:
            came, went = len(index.keys() - known), len(known - index.keys())
            raise RuntimeError(
                f"{type(optimizer).__name__} has other parameters than when the batch began: {came} came, {went} went. "
                "Change groups between batches, in on_train_batch_start or on_train_epoch_start, or make all in "
                "`configure_optimizers`."
            )
        for unit in units:
            numbers = {index[parameter] for parameter in unit.parameters}
            if len(numbers) > 1:
                raise RuntimeError(
                    f"{unit.names[0]} and {unit.names[-1]} are in different groups of {type(optimizer).__name__} now, "
                    "and were in one when offloading began. Make all groups in `configure_optimizers`."
                )
            unit.group_index = numbers.pop()

    def expect(self, units: Iterable[Unit]) -> None:
        """These are updated next, in this order; not yet known where the host is at work on others."""
        if self.host is not None and self.host.under_way:
            return  # it needs what it expects, and a record that it is about to change would be read too early
        self._staging.expect(unit.placed for unit in units if unit.placed is not None)

    def on_host(self, unit: Unit) -> bool:
        """Whether the host steps ``unit``, so that :meth:`update` begins that, and :meth:`join` ends it."""
        return self.host is not None and unit.tier is not None

    def join(self, units: Iterable[Unit] | None = None) -> None:
        """Updates of these units, or of all, that the host was asked for are done.

        Raises:
            BaseException: What one of them ended with.
        """
        if self.host is not None:
            with self._torn_if_that_fails():
                self.host.join(units)

    @contextlib.contextmanager
    def _torn_if_that_fails(self) -> Iterator[None]:
        before, self.updating = self.updating, True
        yield
        self.updating = before

    def relieve(self) -> None:
        """Until little of the device's memory is held by gradients on their way to the host."""
        if self.host is not None:
            self.host.relieve()

    def update(self, unit: Unit, group: Mapping[str, Any], gradients: Sequence[Tensor | GradientClaim | None]) -> None:
        """Step the optimizer for the parameters of ``unit`` that have a gradient.

        Args:
            unit: One of :attr:`units`.
            group: The hyperparameters, as in ``param_groups``.
            gradients: One for each of its parameters.

        Raises:
            SubsetStepError: If the optimizer turns out to need all parameters together.
            TierError: If the state cannot be read, or earlier states could not be written.
            MemoryError: If the state of the unit is larger than the memory for records on their way.
        """
        with self._torn_if_that_fails():
            if self.host is not None and unit.tier is not None:
                self.host.begin(unit, group, gradients, self._keep, self.stream)
            else:
                begin = time.perf_counter()
                self._update(unit, group, gradients)
                self.update_seconds += time.perf_counter() - begin

    def _update(self, unit: Unit, group: Mapping[str, Any], gradients: Sequence[Tensor | GradientClaim | None]) -> None:
        with (
            torch.inference_mode(False),  # validation begins in it, and state that is made in it could not be changed
            torch.no_grad(),
            not_compiling(),
            self.stream.ensure(unit.parameters) if self.stream else contextlib.nullcontext(),
        ):
            lease = self._lease(unit)
            try:
                turns = self._step(unit, group, gradients, lease)
            except BaseException:  # who comes after it, if only on the way out, would wait for this memory for ever
                if lease is not None:
                    self._staging.drop(lease)
                raise
            if not turns:
                if lease is not None:
                    self._staging.drop(lease)
                return
            if self.stream is not None:
                for turn in turns:
                    if turn.gradient is not None:
                        self.stream.changed(turn.parameter)
            if unit.tier is not None:
                self._keep(unit, lease, [turn.state for turn in turns])

    def _step(
        self,
        unit: Unit,
        group: Mapping[str, Any],
        gradients: Sequence[Tensor | GradientClaim | None],
        lease: Lease | None,
    ) -> list[Turn]:
        """Let the optimizer step with the state in ``lease``; one turn for each parameter, none if none steps."""
        optimizer = unit.optimizer
        bulk = unit.layout.views(lease.data, len(unit.parameters)) if lease else [{} for _ in unit.parameters]
        turns = [
            Turn(parameter, gradient, held if parameter in optimizer.state else value_of(held))
            for parameter, gradient, held in zip(unit.parameters, taken(gradients), bulk, strict=True)
        ]
        stepping = [turn for turn in turns if turn.gradient is not None]
        if not stepping:
            return []
        try:
            for turn in stepping:
                turn.show(optimizer, in_full=self._master_weights)
            step_subset(optimizer, group, [turn.shown for turn in stepping], [turn.parameter for turn in stepping])
        finally:
            for turn in stepping:
                turn.hide(optimizer, resident=unit.tier is None)
        return turns

    def _lease(self, unit: Unit) -> Lease | None:
        """The bytes of the unit's record, if it has one."""
        return self._staging.read(unit.placed) if unit.placed is not None else None

    def states(self, unit: Unit) -> list[dict[str, Any]]:
        """The whole state of each parameter, to be read only, without taking memory for what is on a disk."""
        if unit.placed is None:
            return [dict(unit.optimizer.state.get(parameter, {})) for parameter in unit.parameters]
        self._staging.flush()  # what is on its way from a device, the tier may not have been asked to write yet
        return self._states_on(unit, unit.placed.tier.mapped(unit.placed.record))

    @staticmethod
    def _states_on(unit: Unit, record: Tensor) -> list[dict[str, Any]]:
        small = [unit.optimizer.state.get(parameter, {}) for parameter in unit.parameters]
        merged = []
        for state, bulk, keys in zip(
            small, unit.layout.views(record, len(small), to_save=True), unit.keys, strict=True
        ):
            whole = {key: value for key, value in {**state, **bulk}.items() if key != VALUE}
            merged.append({key: whole[key] for key in dict.fromkeys((*keys, *whole)) if key in whole})
        return merged

    def rest(self) -> None:
        """The tiers can be closed: all state is in the optimizers, on memory that what was on a disk need not take."""
        self.settle()
        for unit in self.units:
            if unit.placed is not None:
                self.put(unit, self._states_on(unit, unit.placed.tier.keep(unit.placed.record)))
                unit.placed, unit.tier = None, None

    def adopt(self, unit: Unit, states: Sequence[Mapping[str, Any]]) -> None:
        """Take ``states``, one for each parameter, for the state of the unit."""
        self.settle()
        self.put(unit, states)
        if not any(is_bulk(value) for state in states for value in state.values()):
            self.release(unit)
        self._move_out(unit)

    def move(self, tier_of: Callable[[str], Tier | None]) -> bool:
        """Put each unit's state where ``tier_of`` says now, one after another; returns whether any moved.

        A unit stays together: it goes where most of it is to be.
        """
        moved = False
        for unit in self.units:
            votes: dict[Tier | None, int] = {}
            for name, parameter in zip(unit.names, unit.parameters, strict=True):
                votes[tier_of(name)] = votes.get(tier_of(name), 0) + parameter.numel()
            tier = max(votes, key=votes.__getitem__)
            if tier is not unit.tier:
                self.take_back(unit)
                unit.tier = tier
                self._move_out(unit)
                moved = True
        return moved

    def bring_back(self) -> None:
        """All state is in the optimizers, as if nothing had ever been moved; records are given back."""
        for unit in self.units:
            self.take_back(unit)

    def take_back(self, unit: Unit) -> None:
        """Its state is in the optimizer, where the optimizer would have it, and its record is given back."""
        if unit.placed is None and not self.on_host(unit):
            return
        self.settle()
        self.put(
            unit,
            [
                {key: self.at_home(unit, parameter, key, value) for key, value in state.items()}
                for parameter, state in zip(unit.parameters, self.states(unit), strict=True)
            ],
        )
        self.release(unit)

    def at_home(self, unit: Unit, parameter: nn.Parameter, key: str, value: Any) -> Any:
        """A value of a state, where an optimizer that steps on the parameter's device has it."""
        if is_bulk(value):
            return value.to(parameter.device, copy=True) if unit.placed is not None else value
        if not (self.on_host(unit) and isinstance(value, Tensor)):
            return value
        counts_there = unit.group.get("capturable") or unit.group.get(
            "fused"
        )  # as ``Optimizer.load_state_dict`` has it
        return value.to(parameter.device if key != "step" or counts_there else "cpu")

    def _move_out(self, unit: Unit) -> None:
        """From the optimizer to the record; the optimizer keeps what is small, or all if there is no tier for it."""
        for parameter in unit.parameters if self._master_weights else ():
            if in_16_bits(parameter) and parameter in unit.optimizer.state:
                unit.optimizer.state[parameter] = in_full_precision(unit.optimizer.state[parameter])
        states = [dict(unit.optimizer.state.get(parameter, {})) for parameter in unit.parameters]
        if unit.tier is not None and any(is_bulk(value) for state in states for value in state.values()):
            self._keep(unit, None, states)
            for parameter, state in zip(unit.parameters, states, strict=True):
                if state:  # an entry, be it empty, says that there is more in the record
                    unit.optimizer.state[parameter] = {k: v for k, v in state.items() if not is_bulk(v)}

    @staticmethod
    def put(unit: Unit, states: Sequence[Mapping[str, Any]]) -> None:
        """Into the optimizer."""
        for parameter, state in zip(unit.parameters, states, strict=True):
            if state:
                unit.optimizer.state[parameter] = dict(state)
            else:
                unit.optimizer.state.pop(parameter, None)

    @staticmethod
    def release(unit: Unit) -> None:
        """Its record is not needed any more."""
        if unit.placed is not None:
            unit.placed.tier.release([unit.placed.record])
            unit.placed, unit.layout = None, Layout((), 0)

    def _keep(self, unit: Unit, lease: Lease | None, states: Sequence[Mapping[str, Any]]) -> None:
        """Write the bulk of ``states``, which may lie in ``lease``, to the unit's record."""
        layout, tier = Layout.of(states), unit.tier
        if tier is None or not layout.nbytes:  # an optimizer without state, or one that keeps numbers only
            if lease is not None:
                self._staging.drop(lease)
                self.release(unit)
            return
        keys = unit.keys or [[] for _ in states]
        unit.keys = [list(state) if len(state) >= len(old) else old for state, old in zip(states, keys, strict=True)]
        if lease is not None and layout != unit.layout:  # state came that there was not before
            states = [
                {key: value.clone() if is_bulk(value) else value for key, value in state.items()} for state in states
            ]
            for device in {value.device for state in states for value in state.values() if is_bulk(value)}:
                if device.type == "cuda":  # what was in the lease may still be on its way there
                    torch.cuda.current_stream(device).synchronize()
            self._staging.drop(lease)
            lease = None
        if lease is None:
            lease = self._staging.room(layout.nbytes)
            try:
                self._make_place(unit, tier, layout)
            except BaseException:
                self._staging.drop(lease)
                raise
        layout.fill(lease.data, states)
        self._staging.write(lease, unit.placed)

    def _make_place(self, unit: Unit, tier: Tier, layout: Layout) -> None:
        if unit.placed is not None and unit.placed.record.nbytes != layout.nbytes:
            self.release(unit)
        if unit.placed is None:
            unit.placed = Placed(tier, tier.reserve([layout.nbytes], versioned=keeps_versions(tier))[0])
        unit.layout = layout
