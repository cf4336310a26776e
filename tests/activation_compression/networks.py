"""Models, and what runs them with and without compression."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.activation_compression.classify import Classifier
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.demos.model import ByteTransformer

__all__ = ["ConvNet", "classifier", "compressed", "gradients", "language_loss", "relative_error"]


class ConvNet(nn.Module):
    """Convolutions, BatchNorm, ReLU in place and not, max pooling, dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def classifier(bits: float = 99, recompute: bool = True, error_bound: float | None = None) -> Classifier:
    return Classifier(LayerRates(bits, None, error_bound), recompute=recompute)


@contextlib.contextmanager
def compressed(chosen: Classifier, model: nn.Module, *batch: Tensor, key: int = 0) -> Iterator[None]:
    chosen.begin([*model.parameters(), *model.buffers(), *batch], key)
    with torch.autograd.graph.saved_tensors_hooks(chosen.saved.pack, chosen.saved.unpack), chosen.operation:
        yield
    chosen.end()


def gradients(
    model: nn.Module, loss: Callable[[], Tensor], chosen: Classifier | None = None, *batch: Tensor, key: int = 0
) -> list[Tensor]:
    """Of all parameters; the generators are seeded before."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = None
    with compressed(chosen, model, *batch, key=key) if chosen else contextlib.nullcontext():
        value = loss()
    value.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def language_loss(**arguments: Any) -> tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, Tensor]]:
    """A small decoder, its loss on a batch, and that batch."""
    torch.manual_seed(0)
    model = ByteTransformer(**({"layers": 2, "width": 64, "heads": 2, "context": 32} | arguments))
    tokens, targets = torch.randint(0, 256, (2, 4, 32))
    return model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()), (tokens, targets)


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(found, exact, strict=True))
    return float((difference / sum(b.double().square().sum() for b in exact)).sqrt())
