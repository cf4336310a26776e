"""Growth and sharing against the plain run, at equal final loss, on the byte-level language model.

Every arm sees the same batches in the same order; the arms of a seed run one after the other, seed by seed. The
recipe (stages, state, LR) was searched on the seeds from 101 on (docs/growth-recipe.md); the seeds here are others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.harness import Options, Result, Table, spread, worst_case_median
from lightning_efficient import EfficiencyMonitor, GrowAndUnshareCallback
from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule
from lightning_efficient.growth.learning_rate import LearningRateScale
from lightning_efficient.growth.loading import build_growing
from lightning_efficient.growth.sharing import sharing_leaders
from lightning_efficient.monitoring.comparison import time_to
from lightning_efficient.monitoring.report import RunReport
from lightning_efficient.monitoring.series import Point

__all__ = ["run"]

CONTEXT, BATCH = 128, 8

STACK: dict[str, Any] = {
    "mode": "stack",
    "stages": [{"depth": 2, "until": 0.25}, {"depth": 4, "until": 0.50}, {"depth": 8}],
}
GONG: dict[str, Any] = {
    "mode": "stack",
    "stages": [{"depth": 2, "until": 0.125}, {"depth": 4, "until": 0.30}, {"depth": 8}],
    "optimizer_state": "reset",
}


@dataclass(frozen=True)
class Arm:
    """One way to train: the model's shape and the callback's arguments (None: plain)."""

    name: str
    model: Mapping[str, Any]
    growth: Mapping[str, Any] | None = None
    slow_steps: int = 0  # first steps with half the learning rate, where the callback does not see to it


DEPTH = [Arm("plain", {"layers": 8}), Arm("stack 2-4-8", {"layers": 8}, STACK), Arm("Gong", {"layers": 8}, GONG)]
SHORT: dict[str, Any] = {"mode": "share", "until": 0.05, "lr_scale": 0.5}
SHARE_12 = [
    Arm("plain", {"layers": 12}),
    Arm("plain, half LR to 5 %", {"layers": 12}, slow_steps=40),
    Arm("share 3 of 12 to 5 %, half LR", {"layers": 12}, {"unit": 3, **SHORT}),
    Arm("share 3 of 12 to 10 %", {"layers": 12}, {"mode": "share", "unit": 3, "until": 0.10}),
]
SHARE_24 = [
    Arm("plain", {"layers": 24, "width": 64}),
    Arm("plain, half LR to 5 %", {"layers": 24, "width": 64}, slow_steps=40),
    Arm("share 6 of 24 to 5 %, half LR", {"layers": 24, "width": 64}, {"unit": 6, **SHORT}),
]


def run(options: Options) -> Result:
    """All arms; about an hour on one core."""
    torch.set_num_threads(options.threads)
    steps = 24 if options.quick else 800
    seeds = options.seeds[:1] if options.quick else options.seeds
    depth = {seed: _arms(DEPTH, seed, steps, options) for seed in seeds}
    share = {seed: _arms(SHARE_12, seed, steps, options) for seed in seeds}
    thin = {seed: _arms(SHARE_24, seed, steps, options) for seed in seeds[:2]}
    ratios = {
        arm.name: [_time_ratio(depth[s]["plain"], depth[s][arm.name], options) for s in seeds] for arm in DEPTH[1:]
    }
    penalties, penalties_24 = _penalties(share), _penalties(thin)
    state_ratio = _state_bytes_ratio(share[seeds[0]])
    switch, width = _switch_difference(), _width_difference()
    stack = ratios["stack 2-4-8"]
    figures = {
        "time_to_loss_ratio": worst_case_median(stack),
        "time_to_loss_ratio_worst": max(float("inf") if value is None else value for value in stack),
        "gong_time_to_loss_ratio": worst_case_median(ratios["Gong"]),
        "final_loss_difference": statistics.median(
            _final(depth[s]["stack 2-4-8"]) - _final(depth[s]["plain"]) for s in seeds
        ),
        "share_state_bytes_ratio": state_ratio,
        "share_loss_penalty": statistics.median(penalties[SHARE_12[2].name]),
        "share_loss_penalty_same_lr": _difference(share, SHARE_12[2], SHARE_12[1]),
        "share_loss_penalty_10": statistics.median(penalties[SHARE_12[3].name]),
        "share_loss_penalty_24_layers": statistics.median(penalties_24[SHARE_24[2].name]),
        "share_loss_penalty_24_layers_same_lr": _difference(thin, SHARE_24[2], SHARE_24[1]),
        "switch_max_abs_diff": switch,
        "width_switch_rel_diff": width,
    }
    clock = "process CPU time of training" if options.device == "cpu" else "wall-clock time of training"
    return Result(
        "growth",
        figures,
        [
            _depth_table(depth, ratios),
            _share_table(share, SHARE_12, penalties),
            _share_table(thin, SHARE_24, penalties_24),
        ],
        raw={"depth": _raw(depth), "share_12": _raw(share), "share_24": _raw(thin)},
        notes=[
            f"Byte-level language model, width 128 (24 layers: 64), context {CONTEXT}, {BATCH * CONTEXT} bytes a step, "
            f"{steps} steps, AdamW (.9, .99), weight decay .1, LR 1.5e-3 with 50 steps of warm-up and a cosine to a "
            "tenth, clipping at 1, bf16-mixed. Validation every 25 steps, outside the measured time.",
            f"Time to loss: {clock} until the validation loss first reaches the plain run's final one, interpolated "
            "between two validations, over the plain run's whole training time. Median (range) over the seeds.",
            "Sharing of 24 layers on the first two seeds, all else on all. The other control of sharing trains plainly "
            "with the learning rate of the shared arm: what the rate alone does is not the sharing's merit.",
            "Gong: the stages and the fresh optimizer state of the stacking paper's recipe, as the declared peer.",
            "State bytes: gradients + optimizer state + all-reduce of one step, in the sharing phase over plain.",
            "switch_max_abs_diff: largest difference of the logits at the moment of unsharing, after 20 steps of "
            "training. width_switch_rel_diff: likewise when the width doubles, relative, in float64.",
        ],
    )


def _arms(arms: Sequence[Arm], seed: int, steps: int, options: Options) -> dict[str, RunReport]:
    reports = {}
    for arm in arms:
        reports[arm.name] = _train(arm, seed, steps, options)
        final = reports[arm.name]
        print(f"seed {seed}  {arm.name:<24} val loss {_final(final):.4f}  {_clock(final, options):.1f} s", flush=True)
    return reports


def _train(arm: Arm, seed: int, steps: int, options: Options) -> RunReport:
    pl.seed_everything(seed, verbose=False)
    monitor = EfficiencyMonitor(report=False, every_n_steps=5)
    callbacks: list[pl.Callback] = [monitor]
    if arm.slow_steps:
        callbacks.append(SlowStart(arm.slow_steps))
    if arm.growth is not None:
        callbacks.append(GrowAndUnshareCallback(layers="blocks.*", **arm.growth))
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        limit_train_batches=steps,
        val_check_interval=min(25, steps),
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = StdlibDataModule(context=CONTEXT, batch_size=BATCH, seed=seed, validation_bytes=24576)
    trainer.fit(ByteLanguageModel(**arm.model), data)
    return monitor.run_report()


class SlowStart(pl.Callback):
    """Half the learning rate for the first ``steps``."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.scale = LearningRateScale()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.scale.attach(trainer.optimizers, lambda: 0.5 if trainer.global_step < self.steps else 1.0)


def _penalties(runs: Mapping[int, Mapping[str, RunReport]]) -> dict[str, list[float]]:
    """Final loss of each arm minus the plain one's, by seed."""
    arms = next(iter(runs.values()))
    return {
        name: [_final(reports[name]) - _final(reports["plain"]) for reports in runs.values()]
        for name in arms
        if name != "plain"
    }


def _difference(runs: Mapping[int, Mapping[str, RunReport]], one: Arm, other: Arm) -> float:
    return statistics.median(_final(reports[one.name]) - _final(reports[other.name]) for reports in runs.values())


def _losses(report: RunReport) -> Sequence[Point]:
    return report.metrics["val_loss"]


def _final(report: RunReport) -> float:
    return _losses(report)[-1].value


def _clock(report: RunReport, options: Options) -> float:
    return report.totals["train_cpu_seconds" if options.device == "cpu" else "train_seconds"]


def _time_ratio(plain: RunReport, grown: RunReport, options: Options) -> float | None:
    def clock(point: Point) -> float:
        return point.cpu_seconds if options.device == "cpu" else point.seconds

    reached = time_to(_losses(grown), _final(plain), clock)
    return None if reached is None else reached / clock(_losses(plain)[-1])


def _state_bytes_ratio(runs: Mapping[str, RunReport]) -> float:
    """Of the first phase, which the first logged points after the optimizer has its state show."""
    shared = runs[SHARE_12[2].name].series
    plain = runs["plain"].series
    first = {
        tag: shared[f"growth/{tag}"][1].value for tag in ("gradient_bytes", "optimizer_state_bytes", "all_reduce_bytes")
    }
    gradient = plain["efficiency/gradient_bytes"][-1].value
    return sum(first.values()) / (2 * gradient + plain["efficiency/optimizer_state_bytes"][-1].value)


def _switch_difference() -> float:
    torch.manual_seed(0)
    module = ByteLanguageModel(layers=8)
    growing = build_growing(module, "blocks.*", "share", None)
    growing.restore(sharing_leaders(8, "cycle", 2), "wide")
    with growing.expanded() as names:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    growing.plan_optimizers([optimizer], names)
    tokens = torch.randint(256, (4, CONTEXT))
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        before = module(tokens)
        growing.grow_layers(tuple(range(8)), range(8), state="copy")
        return (module(tokens) - before).abs().max().item()


def _width_difference() -> float:
    from lightning_efficient.growth.settings import parse_width

    torch.manual_seed(0)
    module = ByteLanguageModel(layers=2).double()
    growing = build_growing(module, "blocks.*", None, parse_width({"factor": 2, "until": 1}))
    module.double()
    tokens = torch.randint(256, (4, CONTEXT))
    with torch.no_grad():
        before = module(tokens)
        growing.grow_width(state="copy")
        return ((module(tokens) - before).norm() / before.norm()).item()


def _depth_table(runs: Mapping[int, Mapping[str, RunReport]], ratios: Mapping[str, Sequence[float | None]]) -> Table:
    rows = []
    for arm in DEPTH:
        finals = [_final(reports[arm.name]) for reports in runs.values()]
        cost = [
            reports[arm.name].totals["train_cpu_seconds"] / reports["plain"].totals["train_cpu_seconds"]
            for reports in runs.values()
        ]
        ratio = spread(ratios[arm.name]) if arm.name in ratios else "1"
        rows.append((arm.name, spread(finals), spread(cost), ratio))
    return Table(
        "Depth growth, 8 layers", ("arm", "final val loss (nats)", "CPU time / plain", "time to loss / plain"), rows
    )


def _share_table(
    runs: Mapping[int, Mapping[str, RunReport]], arms: Sequence[Arm], penalties: Mapping[str, Sequence[float]]
) -> Table:
    rows = []
    for arm in arms:
        finals = [_final(reports[arm.name]) for reports in runs.values()]
        penalty = spread(penalties[arm.name], 4) if arm.name in penalties else "0"
        rows.append((arm.name, spread(finals), penalty))
    layers = arms[0].model["layers"]
    return Table(f"Sharing, {layers} layers", ("arm", "final val loss (nats)", "loss minus plain's (nats)"), rows)


def _raw(runs: Mapping[int, Mapping[str, RunReport]]) -> dict[str, Any]:
    return {
        str(seed): {
            name: {"val_loss": [list(point) for point in _losses(report)], "events": [list(e) for e in report.events]}
            for name, report in reports.items()
        }
        for seed, reports in runs.items()
    }
