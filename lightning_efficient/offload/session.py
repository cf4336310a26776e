"""One training run whose optimizer state is spread over tiers: who moves it, and when."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.core.buffers import round_up
from lightning_efficient.offload.on_the_way import TOGETHER_BYTES
from lightning_efficient.offload.placed_run import PlacedRun
from lightning_efficient.offload.placement import Placement, Room, keep_or_replan
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.site_choice import without_values_on_disk
from lightning_efficient.offload.tiers.carriers import carrier_for
from lightning_efficient.offload.updates.crossing import crossing_for
from lightning_efficient.offload.updates.delayed import Delayed
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.handover import Handover
from lightning_efficient.offload.updates.host_staging import HostStaging
from lightning_efficient.offload.updates.host_steps import HostSteps
from lightning_efficient.offload.updates.schedule import AfterBackward, InBackward, Updates
from lightning_efficient.offload.updates.staging import Staging
from lightning_efficient.offload.updates.under_forward import UnderForward

__all__ = ["ADAPT_EVERY", "OffloadSession"]

ADAPT_EVERY = 10
"""Training batches between looks at the free memory."""
_SAVED = 1 << 20  # bytes of a saved tensor below which it stays


class OffloadSession(PlacedRun):
    """Everything that offloading sets up for one run, and takes down again.

    Parameters are placed at once; what belongs to training follows with :meth:`start`. Its arguments are those of
    :class:`~.placed_run.PlacedRun`.
    """

    _before: Handover | None = None  # while an engine is replaced
    _batches = 0  # of training, that have begun
    _rooms_then: Sequence[Room] = ()  # at the last look

    def start(self) -> None:
        """Training starts: the optimizers' state, as it is now, goes to its places, and updates are taken over.

        It may have started before, as where a learning rate is searched for first.
        """
        if self.updates is not None:
            return
        if self._arrangement() != self._placed_for:
            self._place_what_came()
        if self._chosen.site == "host":
            self._staging = HostStaging(self.staging_bytes)
            self._host = HostSteps(
                crossing_for(self._device),
                self._staging,
                master_weights=self._settings.master_weights,
                in_flight_bytes=self._on_the_way("updates on the host"),
            )
        elif self._device.type == "cpu":
            self._staging = Staging(self.staging_bytes)
        else:
            self._staging = DeviceStaging(self.staging_bytes, self._device)
        self.limit.disk_bytes_per_second = self._disk_bytes_per_second()
        self._begin()
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_state_dict_pre_hook(lambda _: self.finish_updates()))
            self._handles.append(optimizer.register_state_dict_post_hook(self._whole_state))
            self._handles.append(optimizer.register_load_state_dict_pre_hook(lambda *_: self.finish_updates()))
            self._handles.append(optimizer.register_load_state_dict_post_hook(self.take_over))

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin_batch(self, *, gradients: bool) -> None:
        """A batch begins: parameters leave that the last one has fetched, and those that come first are fetched.

        Args:
            gradients: Whether it will have a backward.
        """
        if gradients and self.updates is not None and self._arrangement() != self._placed_for:
            self._let_go()  # the optimizers have other parameters, or have them in other groups
            self._before = self._hand_over()
            self._place_what_came()
            self._begin()
        self._accumulates_elsewhere = self.gradients is not None and not self.gradients.empty
        if gradients:
            self._batches += 1
            self._means.step()
            self.limit.step()
        else:
            self.limit.interrupt()
        if self.stream is not None:
            self.stream.end_step()
            self.stream.begin_step(gradients=gradients)

    @contextlib.contextmanager
    def forward(self, *batch: Tensor) -> Iterator[Callable[[Iterable[Tensor]], None]]:
        """Around a forward that is followed by a backward; to be told its results.

        Args:
            *batch: Tensors that stay in memory until after backward.
        """
        if self.updates is None:
            yield lambda results: None
            return
        self.updates.before_forward()
        with self.saved.saving(*batch) if self.saved is not None else contextlib.nullcontext():
            yield self.updates.after_forward

    def finish_updates(self) -> None:
        """The weights may be read."""
        if self.updates is not None:
            self.updates.finish()

    @property
    def torn(self) -> bool:
        """Whether some weights are of this step and others of the last: its updates are going on, or have failed."""
        return self.updates is not None and (self.updates.begun or self.engine.updating)

    @property
    def may_retry(self) -> bool:
        """Whether the step in progress can be done again: nothing has been updated, and no gradient mixed."""
        repeatable = self.updates is None or self.updates.repeatable
        return repeatable and not (self.torn or self._accumulates_elsewhere)

    def give_up_attempt(self) -> None:
        """The step is done again: what it has made so far is of no use."""
        if self.gradients is not None:
            self.gradients.clear()

    # -- what changes while it runs ----------------------------------------------------------------------------------

    def bring_back(self) -> None:
        """Before parameters come or go: all are ordinary ones, and the optimizers have their state and step alone.

        Of what is in tiers they have a view, which takes no memory of what is on a disk.
        """
        self._let_go()
        if self.updates is not None:
            self._before = self._lend()
        if self.stream is not None:
            self.stream.end_step()
            self.stream.detach()
            self.stream = None

    def _hand_over(self) -> Handover | None:
        """What the next engine has state from; None: it is all in the optimizers."""
        return Handover(self.engine)

    def _lend(self) -> Handover | None:
        """Likewise; the optimizers have it for as long."""
        before = Handover(self.engine)
        before.lend()
        return before

    def begin_again(self) -> None:
        """After parameters came or went: everything is placed anew."""
        self._place()
        if self.updates is not None:
            self._begin()

    @property
    def adapts_now(self) -> bool:
        """Whether it is time to look at the free memory, with the batch that has begun."""
        return self._batches % ADAPT_EVERY == 0

    def adapt(self) -> bool:
        """Move state to where there is room now, if that is worth it; results stay the same bit for bit.

        Returns:
            Whether anything is placed differently now.
        """
        if self.updates is None:
            return False
        rooms = self.tiers.rooms(self._parameters, self._optimizers, self.placement)
        if rooms == self._rooms_then:
            return False
        self._rooms_then = rooms
        stay = [row for row in self.placement.rows if row.attribute.kind != "optimizer_state"]
        left = self._left(rooms, Placement(tuple(stay), tuple(rooms)))
        states = [row for row in self.placement.rows if row.attribute.kind == "optimizer_state"]
        current = Placement(tuple(states), tuple(left))
        sizes = {(one.kind, one.name): one for one in self.attributes}  # also of what comes from a disk
        wanted = [sizes.get((row.attribute.kind, row.attribute.name), row.attribute) for row in states]
        better = keep_or_replan(current, wanted, left, self._rules)
        if better is current:
            return False
        if self._schedule != "delayed":  # where that would change the run, by how much memory happens to be free
            self.finish_updates()
        self.placement = without_values_on_disk(Placement((*stay, *better.rows), tuple(rooms)), self._plain)
        return self.engine.move(self._tier_of)

    def rest(self) -> None:
        """No thread, file or hook is left; parameters and state are ordinary, those on a disk mapped from there."""
        with contextlib.ExitStack() as ending:  # in reverse, each whatever became of those before
            ending.callback(self.close)
            if self.stream is not None:
                ending.callback(self.stream.rest)
                ending.callback(self.stream.end_step)
                self.stream = None
            if self.updates is not None:
                ending.callback(self.engine.rest)
            ending.callback(self._let_go)

    def close(self) -> None:
        """Take everything down; what is only in the tiers is gone."""
        with contextlib.ExitStack() as ending:
            ending.callback(self._let_go_of_memory)
            if self._staging is not None:
                ending.callback(self._staging.close)
                self._staging = None
            if self._host is not None:
                ending.callback(self._host.close)
                self._host = None
            for handle in self._handles:
                ending.callback(handle.remove)
            self._handles.clear()
            ending.callback(self._let_go)
        self.updates = None

    # -- the state as a whole ----------------------------------------------------------------------------------------

    def _whole_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What ``Optimizer.state_dict`` returns, with what is in the tiers."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        position = {id(parameter): index for index, parameter in enumerate(parameters)}
        state = dict(state_dict["state"])
        for unit in self.engine.units:
            if unit.optimizer is optimizer and unit.placed is not None:
                for parameter, whole in zip(unit.parameters, self.engine.states(unit), strict=True):
                    if whole:
                        state[position[id(parameter)]] = whole
        return {**state_dict, "state": dict(sorted(state.items(), key=lambda item: str(item[0]).zfill(9)))}

    def take_over(self, optimizer: Optimizer) -> None:
        """The state that was loaded into an optimizer goes to its places; before :meth:`start` it waits."""
        if self.updates is None:
            return
        for unit in self.engine.units:
            if unit.optimizer is optimizer:
                self.engine.adopt(unit, [optimizer.state.get(parameter, {}) for parameter in unit.parameters])

    def _let_go(self) -> None:
        """Nothing is watched any more; updates that were begun are done, and gradients are with their parameters."""
        with contextlib.ExitStack() as ending:
            if self.saved is not None:
                ending.callback(self.saved.close)
            if self.gradients is not None:
                ending.callback(self.gradients.detach)
            if self.updates is not None:
                ending.callback(self.updates.detach)
            self.saved = self.gradients = None

    # -- tiers -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._staging is None:
            raise RuntimeError("start() comes first.")
        if isinstance(self._staging, Staging):
            self._staging.resize(self.staging_bytes)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        self.gradients = self._gradient_store(names)
        self.engine = self._new_engine(names)
        self._before = None
        if (tier := self._elsewhere("activation", "*")) is not None:
            held = [*self._module.parameters(), *self._module.buffers()]
            staged = self._on_the_way("activation")
            self.saved = SavedTensorOffload(
                self.tiers.get(tier),
                staging_bytes=staged,
                minimum_bytes=_SAVED,
                held=lambda: held,
                room_bytes=functools.partial(self._beside_the_plan, tier),
            )
        self.updates = self._new_updates()
        self.tiers.prepare(self._bytes_to_come)
        self._return_freed_memory()

    def _bytes_to_come(self, tier: str) -> int:
        """What the first steps will reserve there, in pages: optimizer state, which a disk has twice, and gradients."""
        here = [row.attribute for row in self.placement.rows if row.tier == tier]
        states = {one.name: one.nbytes for one in here if one.kind == "optimizer_state"}
        units = [unit for unit in self.engine.units if unit.placed is None and unit.tier is self.tiers.get(tier)]
        records = [sum(states.get(name, 0) for name in unit.names) for unit in units]
        records *= 2 if tier == "disk" else 1
        if self.gradients is not None:
            records += [one.nbytes for one in here if one.kind == "gradient"]
        return sum(map(round_up, records))

    def _beside_the_plan(self, tier: str) -> float:
        """Room for what no plan knows the size of, so that it does not take that of optimizer state to come."""
        return self.tiers.room(tier) - self.placement.used(tier)

    def _new_engine(self, names: Mapping[int, str]) -> UpdateEngine:
        return UpdateEngine(self._optimizers, names, self._tier_of, **self._engine_arguments())

    def _engine_arguments(self) -> dict[str, Any]:
        together_bytes = min(TOGETHER_BYTES, self.staging_bytes // 16)  # with their state several fit there
        if self.stream is not None:
            largest = max(self.stream.units.values(), default=0)  # is at work while others are updated beside it
            together_bytes = min(together_bytes, self._window_bytes // 4, self._window_bytes - largest)
        return {
            "staging": self._staging,
            "master_weights": self._settings.master_weights,
            "stream": self.stream,
            "together_bytes": together_bytes,
            "host": self._host,
            "before": self._before,
        }

    def _new_updates(self) -> Updates:
        if self._schedule == "in_backward":
            return InBackward(self.engine, self._optimizers, self._complete, self.gradients)
        if self._schedule == "under_forward":
            return UnderForward(self.engine, self._optimizers, self._module, self.gradients)
        if self._schedule == "delayed":
            return Delayed(
                self.engine, self._optimizers, self._module, self._complete, self.gradients, delays=self._delays
            )
        return AfterBackward(self.engine, self._optimizers, self.gradients)

    def _gradient_store(self, names: Mapping[int, str]) -> GradientStore | None:
        tiers = {
            parameter: self.tiers.get(tier)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (tier := self._elsewhere("gradient", names.get(id(parameter), ""))) is not None
        }
        if not tiers:
            return None
        return GradientStore(
            tiers,
            self._optimizers,
            self._complete,
            carrier_for(self._device, self._on_the_way("gradient")),
            self._on_the_way("gradient"),
            keep_complete=self._schedule == "in_backward",
            two_steps=self._schedule == "delayed",
        )
