"""What the name of a metric says of it, and which of its values other runs are held against."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_efficient.monitoring.series import Point

__all__ = ["NO_RESULT", "Target", "falls", "interest", "last_in_words", "target_of", "value_in_words"]

NO_RESULT = 7
"""The :func:`interest` of what is no result of training: learning rates, counters, norms of gradients."""

# Of a word of the name, the end of it where that is enough: a ``logloss`` falls.
_FALLS = re.compile(
    r".*(loss|losses|error|entropy)|err|perplexity|ppl|ce|bce|xent|nll|nats|bits|bpb|bpc|r?mse|r?msle|s?mape|mae|wer|cer|"
    r"eer|ece|fid|lpips|brier|deviance|regret|distance|divergence|kl|cost"
)
_RISES = re.compile(
    r".*(acc|accuracy|score)|precision|recall|sensitivity|specificity|f1|fbeta|auc|auroc|auprc|ap|map|mrr|ndcg|m?iou|"
    r"jaccard|dice|bleu|rougel?|meteor|chrf|r2|mcc|kappa|psnr|ssim|correlation|pearson|spearman|reward|return"
)
_VALIDATION = re.compile(r"(val|valid|validation|eval|evaluation)(loss|error|acc|accuracy)?")
_SETTING = re.compile(
    r"(^|[^a-z])lr([^a-z]|$)|learning.?rate|grad.*norm|loss.?scale|(^|/)(epoch|step|global_step|hp_metric)$"
)


class Target(NamedTuple):
    """A value that other runs are to come to, and which one of the baseline's it is: ``final`` or ``best``."""

    value: float
    which: str


def falls(name: str, points: Sequence[Point] = ()) -> bool:
    """Whether smaller values are better: as the name says, else as the metric went."""
    said = _falls_by_name(name)
    if said is not None:
        return said
    values = _finite(points)
    return not values or values[-1] <= values[0]


def target_of(points: Sequence[Point], *, falling: bool) -> Target | None:
    """The final value; the best one if the final is worse, or is not finite; None if none is finite."""
    values = _finite(points)
    if not values:
        return None
    best = min(values) if falling else max(values)
    return Target(best, "final" if points[-1].value == best else "best")


def interest(name: str, *, validated: bool = False) -> int:
    """The smaller, the sooner a metric is shown: validation, test, losses, what else has a known direction, the rest.

    Args:
        name: As it was logged.
        validated: Whether all but ``train_loss`` are known to be of validation, whatever their names.
    """
    if _SETTING.search(name.lower()):
        return NO_RESULT
    words = _words(name)
    if any(map(_VALIDATION.fullmatch, words)) or (validated and name != "train_loss"):
        return 0
    if "test" in words:
        return 1
    falling = _falls_by_name(name)
    if falling is None:
        return NO_RESULT - 1
    return (2 if falling else 4) + bool(words & {"train", "training"})


def value_in_words(value: float) -> str:
    """With four digits that matter."""
    return f"{value:.4g}".replace("nan", "NaN")


def last_in_words(points: Sequence[Point]) -> str:
    """The last value; where it is not finite and earlier ones were, also that it diverged."""
    last = points[-1].value
    diverged = not math.isfinite(last) and bool(_finite(points))
    return value_in_words(last) + " (diverged)" * diverged


def _falls_by_name(name: str) -> bool | None:
    words = _words(name)
    if any(map(_FALLS.fullmatch, words)):  # asked first: a ``dice_loss`` falls
        return True
    return False if any(map(_RISES.fullmatch, words)) else None


def _words(name: str) -> set[str]:
    """Of ``val/top5_acc`` and of ``BinaryF1Score``, in lower case; also each without the digits at its end."""
    parts = re.split(r"[^A-Za-z0-9]+", name) + re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)
    words = {part.lower() for part in parts if part}
    return words | {word.rstrip("0123456789") for word in words}


def _finite(points: Sequence[Point]) -> list[float]:
    return [point.value for point in points if math.isfinite(point.value)]
