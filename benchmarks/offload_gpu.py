"""Offloading on one GPU: against training in its memory, and against others that keep optimizer state on the host.

``python -m benchmarks offload --device cuda``. Time: wall time of whole steps, a run of them for each arm, with the arm
in the GPU's memory first and last. The limit is the largest of computing, the link, the host's step and the disk, each
measured in the same run with the code that does it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.gpu_arms import ALL_ELSEWHERE, ARMS, BASE, RIVALS, Arm, Job, Size, Skipped, built
from benchmarks.harness import Options, Result, Table
from lightning_efficient.offload.site import SiteMeasurements, calibrate

__all__ = ["Plan", "limit_seconds", "measure", "run"]

DEVICE, HOST, CHOSEN = list(ARMS)[1:]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        timed: Whose steps are timed.
        steps: Of each arm.
        exact: That is compared bit for bit, and for how many steps.
        exact_steps: See above.
        flat: That is trained for long, and for how many steps.
        flat_steps: See above.
        fixed_bytes: Of the device, for the largest model.
        layers: That are tried in it, one after another.
        width: Of those.
    """

    timed: Size
    steps: int
    exact: Size
    exact_steps: int
    flat: Size
    flat_steps: int
    fixed_bytes: int
    layers: Sequence[int]
    width: int


SMALL = Size(2, 256, 256, 4)
FULL = Plan(Size(22, 2048, 2048, 8), 12, SMALL, 50, SMALL, 1000, 2 << 30, (8, 12, 16, 24, 32, 48, 64, 96), 1024)
QUICK = Plan(Size(8, 1024, 1024, 4), 4, SMALL, 6, SMALL, 50, 1 << 30, (4, 8, 16, 24), 1024)


# -- time --------------------------------------------------------------------------------------------------------------


def limit_seconds(measured: SiteMeasurements, elements: int, computing_seconds: float, *, on_host: bool) -> float:
    """What a step cannot be shorter than: the longest of what can overlap.

    Args:
        measured: Of an element.
        elements: Whose state is elsewhere.
        computing_seconds: Forward and backward.
        on_host: Where updates are computed.
    """
    update = (measured.host_ns if on_host else measured.device_ns) * elements / 1e9
    return max(computing_seconds, update)


def _seconds_a_step(job: Job, steps: int) -> float:
    for _ in range(3):  # what the first ones take, learn and compile
        job.step()
    job.finish()
    begin = time.perf_counter()
    for _ in range(steps):
        job.step()
    job.finish()
    return (time.perf_counter() - begin) / steps


def _times(plan: Plan, device: torch.device, folder: Path, clip: float | None) -> dict[str, float | str]:
    """Seconds of a step by arm, or why it was skipped; ``BASE`` is measured first and last."""
    found: dict[str, float | str] = {}
    arms = {**ARMS, **RIVALS}
    for turn, (name, arm) in enumerate([*arms.items(), (f"{BASE}, again", ARMS[BASE])]):
        try:
            with built(arm, plan.timed, device, folder / f"{turn}-{clip}", clip) as job:
                found[name] = _seconds_a_step(job, plan.steps)
                if name == CHOSEN and job.session is not None:
                    print(job.session.summary(), flush=True)
        except (Skipped, torch.OutOfMemoryError) as error:
            found[name] = "does not fit" if isinstance(error, torch.OutOfMemoryError) else str(error)
        print(f"{name}: {found[name]}", flush=True)
    return found


def _calibrated(plan: Plan, device: torch.device, folder: Path) -> tuple[SiteMeasurements, int, float]:
    """What an element costs, how many there are, and the seconds of forward and backward alone."""
    with built(ARMS[BASE], plan.timed, device, folder / "calibration") as job:
        job.updates = False
        computing = _seconds_a_step(job, plan.steps)
        largest = max(job.model.parameters(), key=lambda parameter: parameter.numel())
        optimizer = job.optimizer
        on_disk = float(device.type != "cuda")
        measured = calibrate(
            optimizer, optimizer.param_groups[0], largest, device=device, on_disk=on_disk, directory=folder
        )
        return measured, job.elements, computing


def step_table(
    title: str, times: Mapping[str, float | str], limits: Mapping[str, float], note: str
) -> tuple[Table, dict[str, dict[str, float]]]:
    """Each arm's step against that in the GPU's memory, and ours against what it cannot be shorter than."""
    again = times.get(f"{BASE}, again")
    base = statistics.mean(value for value in (times[BASE], again) if isinstance(value, float))
    rows, found = [], {}
    for name, seconds in times.items():
        if isinstance(seconds, str):
            rows.append((name, f"skipped: {seconds}", "", ""))
            continue
        found[name] = {"seconds": seconds, "ratio": seconds / base}
        fraction = ""
        if name in limits:
            found[name]["fraction"] = limits[name] / seconds
            fraction = f"{limits[name] / seconds:.2f}"
        rows.append((name, f"{seconds * 1e3:.0f}", f"{seconds / base:.2f}", fraction))
    header = ("", "step (ms)", "time / in the GPU's memory", "fraction of the limit")
    return Table(title, header, rows, note), found


# -- exact -------------------------------------------------------------------------------------------------------------


def _trained(plan: Plan, arm: Arm, device: torch.device, folder: Path, clip: float | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with built(arm, plan.exact, device, folder, clip) as job:
        for _ in range(plan.exact_steps):
            tokens, targets = torch.randint(0, 256, (2, *job.tokens.shape), generator=generator)
            job.tokens, job.targets = tokens.to(device), targets.to(device)
            job.step()
        job.finish()
        return {name: value.cpu().clone() for name, value in job.model.state_dict().items()}


def _exact(plan: Plan, device: torch.device, folder: Path) -> tuple[Table, bool, float]:
    """Bit-equal where the device steps; how far apart where the host does."""
    rows, exact, apart = [], True, 0.0
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for clip in (None, 0.5):
            plain = _trained(plan, ARMS[BASE], device, folder / f"plain-{clip}", clip)
            for number, name in enumerate((DEVICE, HOST)):
                ours = _trained(plan, ARMS[name], device, folder / f"{number}-{clip}", clip)
                same = all(torch.equal(ours[key], value) for key, value in plain.items())
                norm = sum(float(value.norm() ** 2) for value in plain.values()) ** 0.5
                difference = sum(float((ours[key] - value).norm() ** 2) for key, value in plain.items()) ** 0.5 / norm
                if name == DEVICE:
                    exact &= same
                else:
                    apart = max(apart, difference)
                clipped = "no clipping" if clip is None else f"clipped to {clip}"
                rows.append((name, clipped, "yes" if same else "no", f"{difference:.1e}"))
    finally:
        torch.use_deterministic_algorithms(before)
    note = "Steps on the host are those of torch's CPU kernels, which round differently."
    header = ("", "", "weights bit-equal", "difference / norm")
    return Table(f"{plan.exact_steps} steps, against AdamW on the device", header, rows, note), exact, apart


# -- memory ------------------------------------------------------------------------------------------------------------


def _flat(plan: Plan, device: torch.device, folder: Path) -> tuple[Table, bool]:
    """Memory after a tenth of the steps, and after all."""
    rows, flat = [], True
    for number, name in enumerate((DEVICE, HOST)):
        with built(ARMS[name], plan.flat, device, folder / f"flat-{number}") as job:
            seen = []
            for step in range(plan.flat_steps):
                job.step()
                if step + 1 in (max(1, plan.flat_steps // 10), plan.flat_steps):
                    job.finish()
                    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                    seen.append((allocated, psutil.Process().memory_info().rss))
        grown = [after - before for before, after in zip(seen[0], seen[-1], strict=True)]
        flat &= grown[0] <= 1 << 20 and grown[1] <= 64 << 20
        rows.append((name, *(f"{amount / 1e6:+.1f}" for amount in grown)))
    header = ("", "device (MB)", "host (MB)")
    return Table(
        f"Memory that was taken between step {plan.flat_steps // 10} and {plan.flat_steps}", header, rows
    ), flat


def _largest(plan: Plan, device: torch.device, folder: Path) -> tuple[Table, dict[str, tuple[int, float]]]:
    """The most layers that train in a fixed memory, by arm, and the step at that size."""
    cuda = device.type == "cuda"
    fraction = plan.fixed_bytes / torch.cuda.get_device_properties(device).total_memory if cuda else 1.0
    arms = {BASE: ARMS[BASE], HOST: ARMS[HOST], "ours, all on the host": ALL_ELSEWHERE, **RIVALS}
    rows, found = [], {}
    try:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(fraction, device)
        for number, (name, arm) in enumerate(arms.items()):
            ended = "did not fit"
            for layers in plan.layers:
                size = Size(layers, plan.width, 512, 1)
                try:
                    with built(arm, size, device, folder / f"largest-{number}-{layers}") as job:
                        found[name] = job.elements, _seconds_a_step(job, 2)
                except (Skipped, torch.OutOfMemoryError) as error:
                    ended = f"skipped: {error}" if isinstance(error, Skipped) else "then out of memory"
                    break
                ended = "the largest that was tried"
            elements, seconds = found.get(name, (0, 0.0))
            rows.append((name, f"{elements / 1e6:.0f}", f"{seconds * 1e3:.0f}" if elements else "", ended))
            print("  ".join(rows[-1]), flush=True)
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    header = ("", "parameters (millions)", "step (ms)", "")
    return Table(f"The largest model in {plan.fixed_bytes / 2**30:.0f} GiB of the device", header, rows), found


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(plan: Plan, device: torch.device, folder: Path) -> Result:
    """All of it, on a device of any kind."""
    exact_table, exact, apart = _exact(plan, device, folder)
    measured, elements, computing = _calibrated(plan, device, folder)
    sites = {DEVICE: limit_seconds(measured, elements, computing, on_host=False)}
    sites[HOST] = limit_seconds(measured, elements, computing, on_host=True)
    limits = {**sites, CHOSEN: min(sites.values())}
    device_ms, host_ms = (ns * elements / 1e6 for ns in (measured.device_ns, measured.host_ns))
    note = (
        f"{elements / 1e6:.0f} million parameters. Limits: forward and backward {computing * 1e3:.0f} ms; updates on "
        f"the device {device_ms:.0f} ms (link {measured.link_bytes_per_second / 1e9:.1f} GB/s each way), on the host "
        f"{host_ms:.0f} ms ({measured.host_step_ns:.2f} ns an element)."
    )
    tables, found = [exact_table], {}
    for title, clip in (("no clipping", None), ("clipped", 1.0)):
        times = _times(plan, device, folder / title, clip)
        table, found[title] = step_table(f"{plan.timed}: {title}", times, limits, note)
        tables.append(table)
    flat_table, flat = _flat(plan, device, folder)
    largest_table, largest = _largest(plan, device, folder)
    ours = max((HOST, "ours, all on the host"), key=lambda name: largest.get(name, (0, 0.0))[0])
    rivals = [largest[name][0] for name in RIVALS if name in largest]
    return Result(
        "offload",
        {
            "exact": int(exact),
            "host_difference": apart,
            "fraction_of_limit": found["no clipping"][CHOSEN]["fraction"],
            "step_ratio": found["no clipping"][CHOSEN]["ratio"],
            "clipped_step_ratio": found["clipped"][CHOSEN]["ratio"],
            "largest_millions": largest.get(ours, (0, 0.0))[0] / 1e6,
            "rivals_largest_millions": max(rivals, default=0) / 1e6,
            "memory_flat": int(flat),
        },
        [*tables, flat_table, largest_table],
        raw={"steps": found, "limits": limits, "largest": largest, "computing_seconds": computing},
        notes=["GPT (byte-level), AdamW (fused), float32 parameters, bfloat16 computing. State of ours on the host."],
    )


def run(options: Options) -> Result:
    """All of it; about nine minutes, or two if it is quick.

    Raises:
        SystemExit: If there is no GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # that results can be compared
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks offload --device cuda needs a CUDA device, and there is none.")
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir=Path.cwd()))
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return measure(QUICK if options.quick else FULL, device, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
