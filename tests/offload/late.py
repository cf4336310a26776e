"""Runs with late updates, and what they are compared with: a loop that does the same by hand, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient import OffloadStrategy
from lightning_efficient.demos.metrics import IGNORED
from tests.helpers.fitting import Run, assert_same_tree, optimizer_by_name
from tests.technique_settings import EPOCH, demo_model

__all__ = ["AFTER", "CLIPS", "PLACES", "by_hand", "delayed", "same"]

AFTER = 2
PLACES: dict[str, dict[str, str]] = {
    "state": {"optimizer_state": "disk"},
    "host": {"optimizer_state": "host", "optimizer_state:blocks.2.*": "disk"},
    "gradients": dict.fromkeys(("optimizer_state", "gradient"), "disk"),
    "parameters": dict.fromkeys(("optimizer_state", "parameter"), "disk"),
    "everything": dict.fromkeys(("parameter", "optimizer_state", "gradient", "activation"), "disk"),
}
CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.3},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def delayed(after: int = AFTER, place: str = "state", **arguments: Any) -> dict[str, Any]:
    strategy = OffloadStrategy(
        offload_dir="swap", place=PLACES[place], schedule="delayed", delay_after=after, **arguments
    )
    return {"strategy": strategy}


def by_hand(
    plain: Run, *, after: int = AFTER, accumulate: int = 1, clip: str = "none", asked: tuple[int, ...] = ()
) -> Run:
    """What a run does whose updates are late, in plain torch.

    Args:
        plain: The same run without a strategy: for its batches and learning rates.
        after: Steps that are exact.
        accumulate: Batches of a step.
        clip: See ``CLIPS``.
        asked: Steps behind which somebody asks for the weights.
    """
    run = Run(plain.trainer, demo_model(), None, [])
    module = run.module
    parameters = list(module.parameters())
    shared = {"lr": module.learning_rate, "betas": module.betas}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": module.weight_decay, **shared},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **shared},
        ]
    )
    held: tuple[list[Tensor | None], list[float]] | None = None

    def apply() -> None:
        nonlocal held
        if held is not None:
            for parameter, gradient in zip(parameters, held[0], strict=True):
                parameter.grad = gradient
            for group, rate in zip(optimizer.param_groups, held[1], strict=True):
                group["lr"] = rate
            optimizer.step()
            held = None

    step = 0
    for (_, index, batch), rates in zip(plain.batches, plain.rates, strict=True):
        if index % accumulate == 0:
            optimizer.zero_grad()
        tokens = torch.tensor(batch)
        logits = module.model(tokens[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=IGNORED)
        loss = loss / accumulate
        run.losses.append(float(loss.detach()))
        loss.backward()
        if (index + 1) % accumulate and index + 1 < EPOCH:
            continue
        if clip == "norm":
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.3)
        elif clip == "value":
            nn.utils.clip_grad_value_(parameters, 0.01)
        gradients = [parameter.grad for parameter in parameters]
        apply()
        held, step = (gradients, rates), step + 1
        if step <= after or step in asked or index + 1 == EPOCH:
            apply()
        run.weights_at.append({name: value.clone() for name, value in module.state_dict().items()})
    apply()
    run.weights = dict(module.state_dict())
    run.optimizers = [optimizer_by_name(optimizer, module)]
    return run


def same(one: Run, other: Run) -> None:
    assert one.losses == other.losses
    weights = {name: value for name, value in one.weights.items() if name in other.weights}
    assert_same_tree(weights, other.weights, "weights")
    assert_same_tree(one.optimizers[0]["state"], other.optimizers[0]["state"], "optimizers")
