"""Whether a loss is what it was declared to be: a mean, or a sum, over the samples of a batch.

A part of ``micro_batches.py``. A mean over something else (tokens that are not padding, positives, pairs) has other
weights in parts of a batch than in the batch, and training would silently be another one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_efficient.compat_steps import as_training_step, logs_kept
from lightning_efficient.offload.batches.free_memory import is_out_of_memory

__all__ = ["check_loss"]

_log = logging.getLogger(__name__)
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-3}
_RELATIVE_LOW = 2e-2  # with activations of 16 bits, for which other sizes may mean other kernels


def check_loss(
    trainer: pl.Trainer, batch: Any, weighted: Sequence[tuple[Any, float]], rest: Sequence[Any], reduction: str
) -> bool:
    """Compare the loss of a batch with that of its parts.

    The module is in evaluation mode meanwhile, and nothing is logged; the caller puts generators, buffers and metrics
    back. What cannot be compared, because the loss depends on chance or the whole batch does not fit even without
    gradients, is said and taken as right.

    Args:
        trainer: That trains.
        batch: The whole.
        weighted: Its parts, and their weights.
        rest: Further arguments of ``training_step``.
        reduction: As declared.

    Returns:
        Whether losses of this run can be compared.

    Raises:
        ValueError: If they differ.
    """
    module = trainer.lightning_module
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), as_training_step(module), logs_kept(trainer):
            parts = [_loss(trainer, part, rest) for part, _ in weighted]
            again = _loss(trainer, weighted[0][0], rest)
            if any(loss is None for loss in parts):
                return True
            expected = sum(float(loss) * weight for loss, (_, weight) in zip(parts, weighted, strict=True))
            tolerance = _tolerance(trainer, parts[0])
            if not _close(float(parts[0]), float(again), tolerance):
                _log.warning("The loss depends on chance; that it is a %s over samples was not checked.", reduction)
                return False
            found = float(_loss(trainer, batch, rest))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("No memory to check that the loss is a %s over samples; taken as right.", reduction)
        return False
    finally:
        for part in training:
            part.training = True
    if not _close(found, expected, tolerance):
        raise ValueError(
            f"The loss of a batch is {found:.6g}, and put together from its {len(weighted)} micro-batches it is "
            f"{expected:.6g}: it is no {reduction} over samples (loss_reduction={reduction!r}), and training on parts "
            "would be another one. Tokens that are not counted (ignore_index), pairs within the batch, and weights by "
            "class have that effect. Return a loss that is a mean or a sum over samples, or turn batch feedback off."
        )
    return True


def _loss(trainer: pl.Trainer, batch: Any, rest: Sequence[Any]) -> Any:
    with trainer.precision_plugin.train_step_context():
        output = trainer.lightning_module.training_step(batch, *rest)
    return output["loss"] if isinstance(output, Mapping) else output


def _tolerance(trainer: pl.Trainer, loss: Tensor) -> float:
    low = str(trainer.precision_plugin.precision).startswith(("16", "bf16", "transformer"))
    return _RELATIVE_LOW if low else _RELATIVE.get(loss.dtype, _RELATIVE_LOW)


def _close(one: float, other: float, tolerance: float) -> bool:
    finite = abs(one) < float("inf") and abs(other) < float("inf")
    return not finite or abs(one - other) <= tolerance * max(abs(one), abs(other))
