"""What a training run has in which tier, and what that costs; ``session.py`` says when it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_efficient.core.balance import Balance
from lightning_efficient.core.freed_memory import ReturnsFreedMemory, return_freed_memory
from lightning_efficient.core.units import human_bytes
from lightning_efficient.offload.balance import offload_balance
from lightning_efficient.offload.feasible import check_rooms, check_staging, check_way, plan_with_window, share_room
from lightning_efficient.offload.inventory import attributes_of, to_device
from lightning_efficient.offload.limit import LimitMeter, Work
from lightning_efficient.offload.on_the_way import STAGING_BYTES, OnTheWay
from lightning_efficient.offload.placement import Attribute, Kind, Placement, Room, Row, Rules, plan
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.settings import Settings
from lightning_efficient.offload.site import Site
from lightning_efficient.offload.site_choice import ChosenSite, without_values_on_disk
from lightning_efficient.offload.step_means import StepMeans
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.streaming.sub_modules import used_at_once
from lightning_efficient.offload.tier_set import TierSet
from lightning_efficient.offload.tiers.disk_bandwidth import bandwidth_for
from lightning_efficient.offload.tiers.tier import Tier
from lightning_efficient.offload.updates.delayed import Delayed
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.host_steps import HostSteps
from lightning_efficient.offload.updates.schedule import Updates
from lightning_efficient.offload.updates.staging import Staging

__all__ = ["PlacedRun", "Schedule"]

Schedule = Literal["after_backward", "in_backward", "under_forward", "delayed"]

_WITH_FREED = 4  # times what is placed, all and what the C library keeps of it (see core/freed_memory.py)


class PlacedRun:
    """The tensors of a run, each in the tier that a plan or the user gives it.

    Attributes:
        placement: What is where.
        stream: Has the parameters that are elsewhere; None if there are none.
        saved: Has what backward needs, if it is elsewhere.
        gradients: Has the gradients that are elsewhere.
        engine: Has the optimizers' state.
        updates: Runs the optimizers' updates; None until training starts.
        limit: Holds the time of steps against what they cannot be shorter than.

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

    engine: UpdateEngine

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
        self.limit = LimitMeter(self._work, behind=device.type != "cpu")
        self._means = StepMeans(self._totals)
        self._handles: list[RemovableHandle] = []
        self._rules = Rules(settings.place, fastest=self.tiers.fastest)
        self.updates: Updates | None = None
        self.gradients: GradientStore | None = None
        self.stream: ParameterStream | None = None
        self.saved: SavedTensorOffload | None = None
        self._staging: Staging | DeviceStaging | None = None
        self._accumulates_elsewhere = False
        self.placement = Placement((), ())
        self._staged_bytes = 0  # what a budget leaves for `staging`
        self._returns: ReturnsFreedMemory | None = None
        try:
            self._place()
        except BaseException:
            self._let_go_of_memory()
            raise

    def _let_go_of_memory(self) -> None:
        """The tiers are gone, and the C library is as it was."""
        try:
            self.tiers.close()
        finally:
            if self._returns is not None:
                self._returns.close()

    def _return_at_once(self) -> None:
        """Freed memory goes back where there is a budget for it, unless there is room for it: to make pages takes time.

        There is if all fits with what the C library keeps beside it: what was freed, two or three times.
        """
        needed = _WITH_FREED * sum(attribute.nbytes for attribute in self.attributes)
        budget = self.tiers.budget_bytes
        wanted = budget is not None and (needed > budget or bool(self._away()))
        if wanted and self._returns is None:
            self._returns = ReturnsFreedMemory()
        elif not wanted and self._returns is not None:
            self._returns.close()
            self._returns = None

    def _return_freed_memory(self) -> None:
        """Of what has gone elsewhere, and was made before freed memory went back at once."""
        if self._returns is not None:
            return_freed_memory()

    @property
    def staging_bytes(self) -> int:
        """Memory for optimizer state on its way: as given, or what is of use; less where a budget leaves less."""
        return self._staged_bytes or self._way().wanted(self.placement)

    @property
    def waited_seconds(self) -> float:
        """That computing waited for transfers, as far as the host sees it: a GPU's streams wait by themselves."""
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

    # -- measurements ------------------------------------------------------------------------------------------------

    @property
    def updates_on_host(self) -> bool:
        """Whether a device's updates are computed on the host, whose kernels round differently."""
        return self._chosen.site == "host"

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
        away, way = self._away(), self._way()
        most = sum(self._on_the_way(kind) for kind in way.kinds(self.placement))
        where = "beside"
        if self.tiers.budgeted:
            most, where = way.total(self.placement, self.staging_bytes), "within"
        parts = [f"staging up to {human_bytes(most)}, {where} the budget"] if most else []
        on_disk = any(row.tier == "disk" for row in away)
        return [*parts, f"files in {self.tiers.directory.absolute()}"] if on_disk else parts

    def _on_the_way(self, kind: str) -> int:
        """Most memory for what is on its way."""
        return OnTheWay.part(kind, self.staging_bytes)

    def _way(self) -> OnTheWay:
        return OnTheWay(
            self._settings.staging_bytes, self._chosen.site == "host", disk_buffer_bytes=self.tiers.disk_buffer_bytes
        )

    @property
    def _way_in_budget(self) -> OnTheWay | None:
        """What is on its way, if that counts within a budget."""
        return self._way() if self.tiers.budgeted else None

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
        return values | self._chosen.measurements() | self.limit.measurements()

    def balance(self) -> Balance:
        """What computing waited so far, and what is elsewhere now."""
        waited = self.waited_seconds if self._device.type == "cpu" else None
        held = self._staging.held_bytes if self._staging is not None else 0
        return offload_balance(self.placement, self.tiers.fastest, waited_seconds=waited, held_bytes=held)

    def _work(self) -> Work:
        """So far."""
        host = self._host.busy_seconds if self._host is not None else 0.0
        return Work(self.tiers.disk_seconds, self.waited_seconds, host, self.tiers.disk_bytes)

    def _disk_bytes_per_second(self) -> float | None:
        """What the disk can move, where that was measured or soon is."""
        if self._chosen.measured is not None and self._chosen.measured.on_disk:
            return self._chosen.measured.disk_bytes_per_second
        return bandwidth_for(self.tiers.directory, self.placement.used("disk"), memory_bytes=self.staging_bytes)

    def _totals(self) -> dict[str, float]:
        """What grows, by the tag of its mean over batches."""
        totals: dict[str, float] = {}
        if self.updates is not None and self._staging is not None:
            waited = (self._host or self._staging).waited_seconds
            totals["wait_ms"] = (waited + self.engine.waited_seconds) * 1e3
            if self._device.type == "cpu":
                totals["update_ms"] = self.engine.update_seconds * 1e3
        if self.stream is not None:
            streamed = self.stream.statistics
            totals["parameter_wait_ms"] = streamed.wait_seconds * 1e3
            totals["parameter_fetches"] = float(streamed.fetches)
        if self.saved is not None:
            stash = self.saved.statistics().stash
            totals["activation_wait_ms"] = (stash.wait_seconds + stash.back_pressure_seconds) * 1e3
        return totals | self.tiers.totals()

    # -- placing -----------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Plan, and give each parameter its place."""
        self._parameters = list(self._module.parameters())  # where they are used; a look at these is no use of them
        self._values_stay = False  # on the host, beside their state
        self.attributes = self._plain = self._attributes()
        self._return_at_once()
        self._placed_for = self._arrangement()
        rooms, at_once = (
            self.tiers.rooms(self._parameters, self._optimizers, self.placement),
            used_at_once(self._module),
        )
        self.placement = plan_with_window(self.attributes, rooms, self._rules, at_once, self._way_in_budget)
        self._choose_site()
        streams = any(row.attribute.kind == "parameter" for row in self._away())
        if self._chosen.site == "host":
            self._values_stay = not streams  # what is streamed has its value with it
            self.attributes = self._attributes()
            with_values = plan_with_window(self.attributes, rooms, self._rules, at_once, self._way_in_budget)
            self.placement = without_values_on_disk(with_values, self._plain)
        self._window_bytes, self._staged_bytes = share_room(self.placement, at_once, self._way_in_budget)
        named = self.tiers.unbudgeted({row.tier for row in self._away()})
        check_rooms(self.placement, self._rules, named, self._settings.stays)
        check_way(self.placement, self._way_in_budget)
        check_staging(self.placement, self._module, self._optimizers, self._settings, values_stay=self._values_stay)
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
        self._return_at_once()
        self._return_freed_memory()

    def _choose_site(self) -> None:
        away = self._away()
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
                staging_bytes=self._settings.staging_bytes or STAGING_BYTES,
                directory=self.tiers.directory,
            )

    def _away(self) -> list[Row]:
        """What is not where it is used."""
        return [row for row in self.placement.rows if row.tier != self.tiers.fastest]

    def _place_what_came(self) -> None:
        """Plan for what the optimizers have now and had not; the rest stays where it is."""
        known = {(row.attribute.kind, row.attribute.name) for row in self.placement.rows}
        self.attributes = self._attributes()
        self._placed_for = self._arrangement()
        came = [attribute for attribute in self.attributes if (attribute.kind, attribute.name) not in known]
        came_to = plan(came, self._left(self.placement.rooms, self.placement), self._rules)
        self.placement = Placement((*self.placement.rows, *came_to.rows), self.placement.rooms)
        if (way := self._way_in_budget) is not None:
            self._staged_bytes = max(self._staged_bytes, way.fitted(self.placement, 0))  # the largest record fits
        self._return_at_once()

    def _left(self, rooms: Sequence[Room], fixed: Placement) -> list[Room]:
        """What of the rooms is left beside what is fixed, and the parameters on their way."""
        taken = {room.tier: fixed.used(room.tier) for room in rooms}
        taken[self.tiers.fastest] += self._window_bytes
        if (way := self._way_in_budget) is not None:
            taken[self.tiers.fastest] += way.total(self.placement, self.staging_bytes)
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

    def _tier_of(self, name: str) -> Tier | None:
        """Where the optimizer state of a parameter goes; None: it stays in the optimizer."""
        tier = self._elsewhere("optimizer_state", name)
        return None if tier is None else self.tiers.get(tier)

    def _elsewhere(self, kind: Kind, name: str) -> str | None:
        """The tier of a tensor; None: it stays where it is used."""
        tier = self.placement.tier(kind, name)
        return None if tier == self.tiers.fastest else tier
