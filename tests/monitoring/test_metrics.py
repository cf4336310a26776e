"""What the name of a metric says, and to which value of the baseline other runs are held."""

from __future__ import annotations

import math

import pytest

from lightning_efficient.monitoring.metrics import NO_RESULT, falls, interest, last_in_words, target_of
from lightning_efficient.monitoring.series import Point


def _points(*values: float) -> tuple[Point, ...]:
    return tuple(Point(i, float(i), float(i), value) for i, value in enumerate(values))


@pytest.mark.parametrize(
    "name",
    [
        "val_loss", "train/loss", "valLoss", "val_logloss", "MSELoss", "val_mse", "RMSE", "top5_err", "error_rate",
        "val_bits_per_byte", "perplexity", "ppl", "dice_loss", "val_accuracy_error", "cross_entropy", "nll", "WER",
    ],
)  # fmt: skip
def test_names_of_what_falls(name: str) -> None:
    assert falls(name, _points(1.0, 2.0))


@pytest.mark.parametrize(
    "name",
    [
        "val_acc", "acc1", "top5_acc", "val/accuracy", "BinaryF1Score", "f1", "val_AUC", "roc_auc", "AUROC", "mIoU",
        "mAP50", "AP@0.5", "recall@5", "precision", "bleu4", "rougeL", "r2", "val_psnr",
    ],
)  # fmt: skip
def test_names_of_what_rises(name: str) -> None:
    assert not falls(name, _points(2.0, 1.0))


@pytest.mark.parametrize("name", ["quality", "lossy", "accumulated", "value", "mapped"])
def test_where_the_name_does_not_say_the_curve_does(name: str) -> None:
    assert falls(name, _points(math.inf, 2.0, 1.0, math.nan))
    assert not falls(name, _points(math.nan, 1.0, 2.0, math.inf))
    assert falls(name)


@pytest.mark.parametrize(
    ("values", "falling", "expected"),
    [
        ((2.0, 1.0), True, (1.0, "final")),
        ((2.0, 1.0, 1.0), True, (1.0, "final")),
        ((2.0, 1.0, 2.5), True, (1.0, "best")),
        ((0.1, 0.4, 0.3), False, (0.4, "best")),
        ((0.1, 0.4), False, (0.4, "final")),
        ((2.0, 1.5, math.nan), True, (1.5, "best")),
        ((2.0, -math.inf), True, (2.0, "best")),
        ((math.nan, math.inf), True, None),
        ((), True, None),
    ],
)
def test_the_target_is_the_final_value_unless_it_was_better_before(
    values: tuple[float, ...], falling: bool, expected: tuple[float, str] | None
) -> None:
    assert target_of(_points(*values), falling=falling) == expected


def test_what_a_reader_looks_for_comes_first() -> None:
    order = [
        ("eval/f1", "valid_loss", "val", "valloss"),
        ("test_acc",),
        ("loss",),
        ("train_loss_epoch",),
        ("acc",),
        ("train_acc_step",),
        ("value", "invalid", "gpu_utilization"),
        (
            "lr-AdamW",
            "lr",
            "train/lr",
            "learning_rate",
            "epoch",
            "trainer/global_step",
            "grad_2.0_norm_total",
            "loss_scale",
        ),
    ]
    assert [{interest(name) for name in names} for names in order] == [{rank} for rank in range(NO_RESULT + 1)]
    assert [interest(name, validated=True) for name in ("acc", "train_loss", "lr")] == [0, 3, NO_RESULT]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((2.0, 1.23456), "1.235"),
        ((2.0, math.nan), "NaN (diverged)"),
        ((2.0, math.inf), "inf (diverged)"),
        ((math.nan,), "NaN"),
        ((math.inf, 1.0), "1"),
    ],
)
def test_the_last_value_in_words(values: tuple[float, ...], words: str) -> None:
    assert last_in_words(_points(*values)) == words
