"""Where the updates of parameters are computed whose optimizer state is elsewhere: on their device, or on the host.

On the device all of the state crosses the link, twice; on the host a gradient and a value do, and the host's memory
sets the pace. Which is faster depends on the machine. (Ren et al. 2021, "ZeRO-Offload", 4; Maurya et al. 2024, "Deep
Optimizer States", for a choice from measurements.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_efficient.offload.tiers.carriers import carrier_for
from lightning_efficient.offload.tiers.disk_bandwidth import measure_bandwidth
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.updates.subset_step import for_host_step, state_bytes_per_element, step_alone, twin

__all__ = ["Site", "SiteMeasurements", "calibrate", "choose_site", "host_step_nanoseconds", "link_bytes_per_second"]

Site = Literal["device", "host"]
_WORTH = 0.9  # of the device's time, from which on the host is worth it: its kernels may round differently
_ELEMENTS = 4 << 20  # of a stand-in
_CHUNK = 32 << 20  # bytes that are copied at a time


@dataclass(frozen=True)
class SiteMeasurements:
    """What updates cost for each element of a parameter whose state is elsewhere.

    Attributes:
        host_step_ns: Of a step on the host.
        link_bytes_per_second: In each direction, while both are in use.
        disk_bytes_per_second: In both directions together.
        state_bytes: Of an element, with its value in full precision if there is one.
        gradient_bytes: Likewise.
        value_bytes: Likewise, as the device has it.
        on_disk: The part of the elements whose state is on a disk.
    """

    host_step_ns: float
    link_bytes_per_second: float
    disk_bytes_per_second: float
    state_bytes: float
    gradient_bytes: float
    value_bytes: float
    on_disk: float = 0.0

    @property
    def disk_ns(self) -> float:
        """The state is read and written, wherever the step is taken."""
        return self.on_disk * 2 * self.state_bytes / self.disk_bytes_per_second * 1e9

    @property
    def host_ns(self) -> float:
        """The longest of what overlaps: the step, the ways of gradients and values, the disk."""
        out = self.gradient_bytes + self.on_disk * self.value_bytes  # which has no copy there
        link = max(out, self.value_bytes) / self.link_bytes_per_second * 1e9
        return max(self.host_step_ns, link, self.disk_ns)

    @property
    def device_ns(self) -> float:
        """Likewise for a step on the device, which takes next to no time itself."""
        return max(self.state_bytes / self.link_bytes_per_second * 1e9, self.disk_ns)


def choose_site(measured: SiteMeasurements) -> Site:
    """The faster one; the device, whose results are those of a run in its memory, if the host is hardly faster.

    What the schedule hides behind computing it hides on either, so that it decides nothing.
    """
    return "host" if measured.host_ns < _WORTH * measured.device_ns else "device"


def calibrate(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: Tensor,
    *,
    device: torch.device,
    master_weights: bool = False,
    staging_bytes: int = 256 << 20,
    on_disk: float = 0.0,
    directory: Path | None = None,
) -> SiteMeasurements:
    """Measure, with the code that will run; some tenths of a second.

    Args:
        optimizer: The user's, which is not changed.
        group: The hyperparameters of ``parameter``.
        parameter: The largest one whose state is elsewhere; the others are taken to be like it.
        device: On which it is.
        master_weights: See :class:`~lightning_efficient.OffloadStrategy`.
        staging_bytes: Memory that may be taken, on the device and on the host.
        on_disk: The part of the elements whose state is on a disk.
        directory: Where that is.

    Raises:
        TierError: If there is no memory, or the folder cannot be used.
    """
    full = master_weights and parameter.element_size() < 4
    like = torch.empty([0] * parameter.dim()) if full else parameter
    disk = float("inf")
    if on_disk and directory is not None:
        disk = measure_bandwidth(directory).mixed_bytes_per_second
    return SiteMeasurements(
        host_step_ns=host_step_nanoseconds(optimizer, group, parameter, device=device, in_full=full),
        link_bytes_per_second=link_bytes_per_second(device, staging_bytes),
        disk_bytes_per_second=disk,
        state_bytes=state_bytes_per_element(optimizer, group, like) + 4 * full,
        gradient_bytes=parameter.element_size(),
        value_bytes=parameter.element_size(),
        on_disk=on_disk,
    )


def host_step_nanoseconds(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: Tensor,
    *,
    device: torch.device | None = None,
    in_full: bool = False,
) -> float:
    """Of a step of ``optimizer`` on the host for each element of a parameter like this one: the best of three.

    Args:
        optimizer: The user's, which is not changed.
        group: The hyperparameters of ``parameter``.
        parameter: See above.
        device: For which the host steps; None: that of ``parameter``.
        in_full: Whether values are stepped in float32.
    """
    rows, row = (parameter.shape[0], parameter[0].numel()) if parameter.dim() else (1, 1)
    shape = (max(1, min(rows, _ELEMENTS // max(1, row))), *parameter.shape[1:]) if parameter.dim() else ()
    generator = torch.Generator().manual_seed(0)  # not the one that the user's results depend on
    gradient = torch.randn(shape, generator=generator).to(parameter.dtype)
    value = torch.randn(shape, generator=generator).to(torch.float32 if in_full else parameter.dtype)
    sent = torch.empty_like(gradient)
    hyperparameters = {key: one for key, one in group.items() if key != "params"}
    alone = for_host_step(optimizer, hyperparameters, [value], device or parameter.device)
    probe = twin(optimizer, [value])

    def step() -> None:
        value.grad = gradient.to(value.dtype)
        step_alone(probe, alone, [value])
        if in_full:
            sent.copy_(value)

    with torch.no_grad():
        step()  # which makes the state
        return min(_seconds(step) for _ in range(3)) / value.numel() * 1e9


def link_bytes_per_second(device: torch.device, staging_bytes: int = 256 << 20) -> float:
    """In each direction between ``device`` and pinned memory, while both are in use.

    Raises:
        TierError: If there is no memory.
    """
    chunk = max(1 << 20, min(_CHUNK, staging_bytes // 8))
    tier = HostTier(5 * chunk, pinned=device.type == "cuda", name="calibration")
    carrier = carrier_for(device, staging_bytes)
    try:
        records = tier.reserve([chunk] * 4, versioned=False)
        going, coming = (torch.zeros(chunk, dtype=torch.uint8, device=device) for _ in range(2))

        def move() -> None:
            for number in range(8):
                carrier.send(tier, records[number % 2], going)
                carrier.fetch(tier, records[2 + number % 2], device, into=coming).wait()
            carrier.flush()

        for record in records:
            carrier.send(tier, record, going)
        move()
        return 8 * chunk / min(_seconds(move) for _ in range(3))
    finally:
        carrier.flush()
        tier.close()


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
