"""A run's choice of where updates are computed whose optimizer state is elsewhere, and what follows for its plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.offload.placement import Attribute, Placement, Row
from lightning_efficient.offload.settings import SiteChoice
from lightning_efficient.offload.site import Site, SiteMeasurements, calibrate, choose_site
from lightning_efficient.offload.tiers.tier import TierError

__all__ = ["ChosenSite", "without_values_on_disk"]


class ChosenSite:
    """Where updates are computed: decided once, when there is something to decide.

    Attributes:
        site: Until then, and where nothing is elsewhere, the device.
        measured: What it was chosen from; None if nothing was measured.

    Args:
        wanted: By the user.
        device: Of the parameters.
    """

    def __init__(self, wanted: SiteChoice, device: torch.device) -> None:
        self.site: Site = "device"
        self.measured: SiteMeasurements | None = None
        self._wanted, self._device = wanted, device

    def choose(
        self,
        away: Sequence[Row],
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        streams: bool,
        master_weights: bool,
        staging_bytes: int,
        directory: Path,
    ) -> None:
        """Choose, and measure before where the user leaves it open.

        Args:
            away: The optimizer state that is not on the device.
            module: That is trained.
            optimizers: Of its parameters.
            streams: Whether parameters are elsewhere too: those come to the device for their update anyway.
            master_weights: See :class:`~lightning_efficient.OffloadStrategy`.
            staging_bytes: Memory that may be taken for a moment.
            directory: Of what goes to a disk; it exists if anything does.
        """
        if not away or self._wanted != "auto" or streams or self.measured is not None:
            self.site = self._wanted if away and self._wanted != "auto" else self.site
            return
        groups = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
        names = {row.attribute.name for row in away}
        largest = max((p for name, p in module.named_parameters() if name in names), key=lambda p: p.numel())
        on_disk = sum(row.attribute.nbytes for row in away if row.tier == "disk")
        try:
            self.measured = calibrate(
                *groups[id(largest)],
                largest,
                device=self._device,
                master_weights=master_weights,
                staging_bytes=staging_bytes,
                on_disk=on_disk / max(1, sum(row.attribute.nbytes for row in away)),
                directory=directory,
            )
        except (TierError, RuntimeError, MemoryError) as error:
            warnings.warn(f"step_on='auto' could not be measured ({error}); updates are on the device.", stacklevel=2)
        else:
            self.site = choose_site(self.measured)

    def summary(self) -> str:
        """In a few words; empty where there was nothing to choose."""
        if self.measured is None:
            return "updates on the host" if self.site == "host" else ""
        found = self.measured
        times = f"{found.host_ns:.2f} ns an element on the host, {found.device_ns:.2f} on the device"
        return f"updates on the {self.site} ({times})"

    def measurements(self) -> dict[str, float]:
        """By tag, without the technique's name."""
        if self.measured is None:
            return {}
        return {
            "host_step_ns_per_element": self.measured.host_ns,
            "device_step_ns_per_element": self.measured.device_ns,
            "link_gigabytes_per_second": self.measured.link_bytes_per_second / 1e9,
        }


def without_values_on_disk(placement: Placement, plain: Sequence[Attribute]) -> Placement:
    """A plan for steps on the host, where values of parameters stay beside their state, but not on a disk.

    Args:
        placement: With values beside all state.
        plain: What there is to place, without them.
    """
    sizes = {(one.kind, one.name): one for one in plain}
    rows = [
        replace(row, attribute=sizes.get((row.attribute.kind, row.attribute.name), row.attribute))
        if row.tier == "disk"
        else row
        for row in placement.rows
    ]
    return Placement(tuple(rows), placement.rooms)
