"""One training run whose optimizer state is spread over tiers: what is where, when it moves, and what that costs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.units import human_bytes
from lightning_efficient.offload.feasible import check_disk, check_staging, plan_with_window, window_bytes
from lightning_efficient.offload.inventory import attributes_of, to_device
from lightning_efficient.offload.limit import LimitMeter, Work
from lightning_efficient.offload.placement import Attribute, Kind, Placement, Room, Rules, keep_or_replan, plan
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.settings import Settings
from lightning_efficient.offload.site import Site
from lightning_efficient.offload.site_choice import ChosenSite, with_values
from lightning_efficient.offload.step_means import StepMeans
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.streaming.sub_modules import used_at_once
from lightning_efficient.offload.tier_set import TierSet
from lightning_efficient.offload.tiers.carriers import carrier_for
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.crossing import crossing_for
from lightning_efficient.offload.updates.delayed import Delayed
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.host_staging import HostStaging
from lightning_efficient.offload.updates.host_steps import HostSteps
from lightning_efficient.offload.updates.schedule import AfterBackward, InBackward, Updates
from lightning_efficient.offload.updates.staging import Staging
from lightning_efficient.offload.updates.under_forward import UnderForward

__all__ = ["TOGETHER_BYTES", "OffloadSession"]

TOGETHER_BYTES = 4 << 20
"""Of parameters that are updated in one go, for records that are worth a disk's while."""
_STAGING = 256 << 20  # bytes for records on their way, if nothing else is said and none is larger
_SAVED = 1 << 20  # bytes of a saved tensor below which it stays
Schedule = Literal["after_backward", "in_backward", "under_forward", "delayed"]


class OffloadSession:
    """Everything that offloading sets up for one run, and takes down again.

    Parameters are placed at once; what belongs to training follows with :meth:`start`.

    Attributes:
        placement: What is where.
        stream: Has the parameters that are elsewhere; None if there are none.
        saved: Has what backward needs, if it is elsewhere.
        gradients: Has the gradients that are elsewhere.
        engine: Has the optimizers' state.
        updates: Runs the optimizers' updates; None until training starts.

    Args:
        module: That is trained, or evaluated.
        optimizers: Its optimizers.
        settings: Of the user.
        device: On which it computes.
        directory: For what goes to a disk.
        schedule: When updates take place.
        complete: Asked at each gradient whether it is complete.
        accumulates: Whether several backwards add to the gradients of a step.
        delays: With ``schedule="delayed"``: asked at each step whether its update may be late.
        site: Where updates are computed, whatever the settings say.

    Raises:
        TierError: If there is no room.
        ValueError: If parameters cannot be streamed, or a budget is too small for the largest part of the model.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        settings: Settings,
        *,
        device: torch.device,
        directory: Path,
        schedule: Schedule,
        complete: Callable[[], bool],
        accumulates: bool = False,
        delays: Callable[[], bool] = lambda: True,
        site: Site | None = None,
    ) -> None:
        self._accumulates, self._delays = accumulates, delays
        self._chosen = ChosenSite(site or (settings.step_on if device.type != "cpu" else "device"), device)
        self._host: HostSteps | None = None
        self._module, self._optimizers, self._settings = module, list(optimizers), settings
        self._device, self._schedule, self._complete = device, schedule, complete
        self.tiers = TierSet(device, directory, settings.budgets, host_share=self._host_share)
        self._limit, self._means = LimitMeter(), StepMeans(self._totals)
        self._handles: list[RemovableHandle] = []
        on_cpu = device.type == "cpu"  # where the device's memory is that of the host
        place = {rule: "host" if on_cpu and tier == "device" else tier for rule, tier in settings.place.items()}
        self._rules = Rules(place)
        self.updates: Updates | None = None
        self.gradients: GradientStore | None = None
        self.stream: ParameterStream | None = None
        self.saved: SavedTensorOffload | None = None
        self._staging: Staging | DeviceStaging | None = None
        self._accumulates_elsewhere = False
        self.placement = Placement((), ())
        try:
            self._place()
        except BaseException:
            self.tiers.close()
            raise

    @property
    def staging_bytes(self) -> int:
        """Memory for records on their way: as given, or enough for two of the largest ones."""
        if self._settings.staging_bytes is not None:
            return self._settings.staging_bytes
        sizes = [a.nbytes for a in self.attributes if self._elsewhere(a.kind, a.name) is not None]
        return max(_STAGING, 2 * max(sizes, default=0) + TOGETHER_BYTES)

    @property
    def _waited_seconds(self) -> float:
        """That computing waited for transfers."""
        updating = self._host or self._staging  # what the host waits for, computing does not
        waited = updating.waited_seconds if updating is not None else 0.0
        if self.updates is not None:
            waited += self.engine.waited_seconds
        if self.stream is not None:
            waited += self.stream.statistics.wait_seconds
        if self.saved is not None:
            stash = self.saved.statistics().stash
            waited += stash.wait_seconds + stash.back_pressure_seconds
        return waited

    @property
    def _host_share(self) -> int:
        """Processes that share the memory of the host."""
        return 1

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
                in_flight_bytes=self.staging_bytes // 2,
            )
        elif self._device.type == "cpu":
            self._staging = Staging(self.staging_bytes)
        else:
            self._staging = DeviceStaging(self.staging_bytes, self._device)
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
            self.engine.bring_back()
            self._place_what_came()
            self._begin()
        self._accumulates_elsewhere = self.gradients is not None and not self.gradients.empty
        if gradients:
            self._means.step()
            host = self._host.busy_seconds if self._host is not None else 0.0
            self._limit.step(Work(self.tiers.disk_seconds, self._waited_seconds, host))
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
        """Before parameters come or go: all are ordinary ones, and the optimizers have their state and step alone."""
        self._let_go()
        if self.updates is not None:
            self.engine.bring_back()
        if self.stream is not None:
            self.stream.end_step()
            self.stream.detach()
            self.stream = None

    def begin_again(self) -> None:
        """After parameters came or went: everything is placed anew."""
        self._place()
        if self.updates is not None:
            self._begin()

    def adapt(self) -> bool:
        """Move state to where there is room now, if that is worth it; results stay the same bit for bit.

        Returns:
            Whether anything is placed differently now.
        """
        if self.updates is None:
            return False
        rooms = self.tiers.rooms(self._parameters, self._optimizers)
        stay = [row for row in self.placement.rows if row.attribute.kind != "optimizer_state"]
        left = self._left(rooms, Placement(tuple(stay), tuple(rooms)))
        states = [row for row in self.placement.rows if row.attribute.kind == "optimizer_state"]
        current = Placement(tuple(states), tuple(left))
        better = keep_or_replan(current, [row.attribute for row in states], left, self._rules)
        if better is current:
            return False
        if self._schedule != "delayed":  # where that would change the run, by how much memory happens to be free
            self.finish_updates()
        self.placement = Placement((*stay, *better.rows), tuple(rooms))
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
            ending.callback(self.tiers.close)
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

    # -- measurements ------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """In a few words, what is where."""
        parts = []
        if all(row.tier == self.tiers.fastest for row in self.placement.rows):
            parts.append("everything fits")
        tiers = [room.tier for room in self.placement.rooms] + [row.tier for row in self.placement.rows]
        for tier in dict.fromkeys(tiers):  # a node may have no budget, and so no room
            kinds: dict[str, int] = {}
            for row in self.placement.rows:
                if row.tier == tier and row.attribute.nbytes:
                    kinds[row.attribute.kind] = kinds.get(row.attribute.kind, 0) + row.attribute.nbytes
            if kinds:
                amounts = ", ".join(f"{kind} {human_bytes(amount)}" for kind, amount in kinds.items())
                parts.append(f"{tier}: {amounts}")
        if site := self._chosen.summary():
            parts.append(site)
        return "; ".join(parts)

    def ways(self) -> list[str]:
        """Of what is elsewhere: the memory for it on its way, and the folder of what is on a disk."""
        tiers = {row.tier for row in self.placement.rows} - {self.tiers.fastest}
        parts = [f"staging up to {human_bytes(self.staging_bytes)}, beside the budget"] if tiers else []
        return [*parts, f"files in {self.tiers.directory.absolute()}"] if "disk" in tiers else parts

    def look(self) -> None:
        """As a batch begins: the means among the measurements are of the batches since the last look from now on."""
        self._means.look()

    def measurements(self) -> dict[str, float]:
        """By tag, without the technique's name: what is where now, and means over training batches."""
        values: dict[str, float] = {}
        if self.updates is not None and self._staging is not None:
            away = [unit for unit in self.engine.units if unit.placed is not None]
            values["states_elsewhere"] = float(sum(len(unit.names) for unit in away))
            values["staging_bytes"] = float(self._staging.held_bytes)
        if isinstance(self.updates, Delayed):
            values["updates_behind"] = float(self.updates.behind)
        if self.stream is not None:
            values["parameter_resident_bytes"] = float(self.stream.statistics.resident_bytes)
        if self.saved is not None:
            values["activation_resident_bytes"] = float(self.saved.statistics().stash.peak_resident_bytes)
        values |= self.tiers.measurements(self._means.means())
        return values | self._chosen.measurements() | self._limit.measurements()

    def _totals(self) -> dict[str, float]:
        """What grows, by the tag of its mean over batches."""
        totals: dict[str, float] = {}
        if self.updates is not None and self._staging is not None:
            waited = (self._host or self._staging).waited_seconds
            totals["wait_ms"] = (waited + self.engine.waited_seconds) * 1e3
        if self.stream is not None:
            streamed = self.stream.statistics
            totals["parameter_wait_ms"] = streamed.wait_seconds * 1e3
            totals["parameter_fetches"] = float(streamed.fetches)
        if self.saved is not None:
            stash = self.saved.statistics().stash
            totals["activation_wait_ms"] = (stash.wait_seconds + stash.back_pressure_seconds) * 1e3
        return totals | self.tiers.totals()

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

    # -- placing -----------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Plan, and give each parameter its place."""
        self._parameters = list(self._module.parameters())  # where they are used; a look at these is no use of them
        self._values_stay = False  # on the host, beside their state
        self.attributes = self._attributes()
        self._placed_for = self._arrangement()
        rooms = self.tiers.rooms(self._parameters, self._optimizers)
        self.placement = plan_with_window(self.attributes, rooms, self._rules, used_at_once(self._module))
        self._window_bytes = window_bytes(self.placement)
        self._choose_site()
        check_disk(self.placement)
        check_staging(self.placement, self._module, self._optimizers, self._settings)
        placed = {
            name: self.tiers.get(tier)
            for name, _ in self._module.named_parameters()
            if (tier := self._elsewhere("parameter", name)) is not None
        }
        if self._device.type != "cpu":
            to_device(self._module, self._device, placed)
        if placed:
            self.stream = ParameterStream(
                self._module, placed, budget_bytes=max(self._window_bytes, 1), device=self._device
            )
            self.tiers.commit()
            self._parameters = [p for name, p in self._module.named_parameters() if name not in placed]

    def _choose_site(self) -> None:
        away = [row for row in self.placement.rows if row.tier != self.tiers.fastest]
        states = [row for row in away if row.attribute.kind == "optimizer_state"]
        if self.updates is None:
            if any(row.tier == "disk" for row in states):
                self.tiers.get("disk")  # makes its folder
            self._chosen.choose(
                states,
                self._module,
                self._optimizers,
                streams=any(row.attribute.kind == "parameter" for row in away),
                master_weights=self._settings.master_weights,
                staging_bytes=self._settings.staging_bytes or _STAGING,
                directory=self.tiers.directory,
            )
        if self._chosen.site == "host":
            plain, self._values_stay = self.attributes, True
            self.attributes = self._attributes()
            self.placement = with_values(self.placement, plain, self.attributes, self._rules)

    def _place_what_came(self) -> None:
        """Plan for what the optimizers have now and had not; the rest stays where it is."""
        known = {(row.attribute.kind, row.attribute.name) for row in self.placement.rows}
        self.attributes = self._attributes()
        self._placed_for = self._arrangement()
        came = [attribute for attribute in self.attributes if (attribute.kind, attribute.name) not in known]
        came_to = plan(came, self._left(self.placement.rooms, self.placement), self._rules)
        self.placement = Placement((*self.placement.rows, *came_to.rows), self.placement.rooms)

    def _left(self, rooms: Sequence[Room], fixed: Placement) -> list[Room]:
        """What of the rooms is left beside what is fixed, and the parameters on their way."""
        taken = {room.tier: fixed.used(room.tier) for room in rooms}
        taken[self.tiers.fastest] += self._window_bytes
        return [Room(r.tier, None if r.nbytes is None else max(0, r.nbytes - taken[r.tier])) for r in rooms]

    def _arrangement(self) -> list[list[int]]:
        """Which parameters the optimizers have, by group."""
        return [[id(p) for p in group["params"]] for optimizer in self._optimizers for group in optimizer.param_groups]

    def _attributes(self) -> list[Attribute]:
        stay = self._schedule != "in_backward" or self._accumulates or self._settings.batch_feedback
        steps = 2 if self._schedule == "delayed" else 1
        return attributes_of(
            self._module,
            self._optimizers,
            self._settings,
            gradients_stay=stay,
            steps_of_gradients=steps,
            values_stay=self._values_stay,
        )

    # -- tiers -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._staging is None:
            raise RuntimeError("start() comes first.")
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        self.gradients = self._gradient_store(names)
        self.engine = self._new_engine(names)
        if (tier := self._elsewhere("activation", "*")) is not None:
            held = [*self._module.parameters(), *self._module.buffers()]
            staged = self.staging_bytes // 2
            self.saved = SavedTensorOffload(
                self.tiers.get(tier), staging_bytes=staged, minimum_bytes=_SAVED, held=lambda: held
            )
        self.updates = self._new_updates()
        self.tiers.prepare_disk(self._disk_bytes_to_come())

    def _disk_bytes_to_come(self) -> int:
        """What the first steps will reserve on a disk: optimizer state in two slots, gradients in one."""
        made = {name for unit in self.engine.units if unit.placed is not None for name in unit.names}
        slots = {"optimizer_state": 2, "gradient": int(self.gradients is not None)}
        rows = [row for row in self.placement.rows if row.tier == "disk" and row.attribute.name not in made]
        return sum(slots.get(row.attribute.kind, 0) * row.attribute.nbytes for row in rows)

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
            carrier_for(self._device, self.staging_bytes // 4),
            self.staging_bytes // 4,
            keep_complete=self._schedule == "in_backward",
            two_steps=self._schedule == "delayed",
        )

    def _tier_of(self, name: str) -> Tier | None:
        """Where the optimizer state of a parameter goes; None: it stays in the optimizer."""
        tier = self._elsewhere("optimizer_state", name)
        return None if tier is None else self.tiers.get(tier)

    def _elsewhere(self, kind: Kind, name: str) -> str | None:
        """The tier of a tensor; None: it stays where it is used."""
        tier = self.placement.tier(kind, name)
        return None if tier == self.tiers.fastest else tier
