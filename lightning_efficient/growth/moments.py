"""Optimizer state that follows its parameter through a switch.

A statistic that is linear in the gradient (Adam's first moment) scales with the gradient, one that is quadratic
(Adam's second moment) with its square; step counts and the like are copied. What scales how is known by name for the
optimizers of ``torch.optim``; for others the state is carried over only where it can be copied unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_efficient.growth.operators import Transfer

__all__ = ["transfer_state", "unsupported_optimizer"]

WEIGHT = -1
"""Marks a statistic that follows the weight itself (ASGD's running average)."""

DEGREES: dict[str, int] = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "square_avg": 2,
    "sum": 2,
    "acc_delta": 0,
    "prev": 1,
    "step_size": 0,
    "ax": WEIGHT,
}
"""Degree in the gradient of each tensor that ``torch.optim`` keeps per parameter."""

EXCEPTIONS: dict[tuple[str, str], int] = {("RMSprop", "momentum_buffer"): 0}
"""RMSprop's momentum is of the gradient divided by its own scale."""

StateMode = Literal["copy", "reset"]


KNOWN = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "Muon")
"""Optimizers of ``torch.optim`` whose every statistic is in :data:`DEGREES`, element by element."""


def unsupported_optimizer(optimizer: Optimizer, *, scaled: bool = False) -> str | None:
    """Why the parameters of ``optimizer`` cannot be changed while it runs, or None where they can.

    Args:
        optimizer: One of the run.
        scaled: Whether its statistics will have to be scaled rather than copied.
    """
    if scaled and type(optimizer).__name__ not in KNOWN:
        return "keeps statistics of which it is not known how they scale (optimizer_state='reset' needs none)"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "keeps one flat history over all parameters"
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        return "partitions its parameters over the ranks when it is built"
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
        return "does not keep the state of each parameter in `state`"
    return None


@torch.no_grad()
def transfer_state(optimizers: Iterable[Optimizer], transfers: Sequence[Transfer], mode: StateMode) -> None:
    """Give each target of ``transfers`` the optimizer state of its source, or a fresh one.

    Args:
        optimizers: Those of the run; a source that none of them holds has no state to carry.
        transfers: From the switch.
        mode: ``"copy"`` carries the state over; ``"reset"`` starts every parameter of the changed layers afresh.

    Raises:
        ValueError: If a statistic would have to be scaled and it is not known how.
    """
    for optimizer in optimizers:
        moved: dict[nn.Parameter, dict[str, Any]] = {}
        for transfer in transfers:
            if transfer.source not in optimizer.state:
                if transfer.target in optimizer.state:
                    moved[transfer.target] = {}
            elif mode == "reset":
                moved[transfer.target] = _initial_state(optimizer, transfer)
            elif not transfer.nothing_to_do:
                state = optimizer.state[transfer.source]
                moved[transfer.target] = {key: _follow(optimizer, key, value, transfer) for key, value in state.items()}
        for parameter, state in moved.items():
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state


def _follow(optimizer: Optimizer, key: str, value: Any, transfer: Transfer) -> Any:
    if not isinstance(value, Tensor):
        return value
    name = type(optimizer).__name__
    degree = EXCEPTIONS.get((name, key), DEGREES.get(key))
    counts = degree is None and value.dim() == 0
    if transfer.operator.exact_copy or counts:
        return value.clone()
    if degree is None or value.shape != transfer.source.shape:
        raise ValueError(
            f"{name} keeps '{key}' of shape {tuple(value.shape)} for a parameter of shape "
            f"{tuple(transfer.source.shape)}, and how it scales with the gradient is not known. "
            "Use optimizer_state='reset', or an optimizer of torch.optim that keeps its statistics element by element."
        )
    return transfer.operator.weight(value) if degree == WEIGHT else transfer.operator.moment(value, degree)


def _initial_state(optimizer: Optimizer, transfer: Transfer) -> dict[str, Any]:
    """What an optimizer that fills its state when it is built (Adagrad) would give the target; mostly nothing."""
    group = next(g for g in optimizer.param_groups if any(transfer.source is p for p in g["params"]))
    options = {key: value for key, value in group.items() if key in optimizer.defaults}
    try:
        fresh = type(optimizer)([transfer.target], **options)
    except TypeError:  # its arguments are not its defaults; then it is not one of those that fill their state early
        return {}
    return dict(fresh.state.get(transfer.target, {}))
