"""Training that the planner is tried on: a network of convolutions, and batches of different lengths."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.demos.corpus import load_corpus

__all__ = ["ConvNet", "Images", "Lengths"]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(images + self.layers(images))


class ConvNet(pl.LightningModule):
    """A small ResNet.

    Args:
        channels: Of all layers.
        blocks: Of two convolutions each.
    """

    def __init__(self, *, channels: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[_Residual(channels) for _ in range(blocks)])
        self.head = nn.Linear(channels, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.blocks(self.stem(images)).mean((2, 3))), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Images(pl.LightningDataModule):
    """Random images with random labels.

    Args:
        side: Pixels.
        batch_size: Images.
    """

    def __init__(self, *, side: int = 32, batch_size: int = 64) -> None:
        super().__init__()
        self.side, self.batch_size = side, batch_size

    def train_dataloader(self) -> Any:
        images = torch.randn(8 * self.batch_size, 3, self.side, self.side)
        labels = torch.randint(0, 10, (len(images),))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=self.batch_size)


class Lengths(pl.LightningDataModule):
    """Real text in batches of very different lengths, as sentences padded to the longest of their batch have.

    Args:
        longest: Bytes.
        batch_size: Rows.
        batches: Of an epoch.
    """

    def __init__(self, *, longest: int = 256, batch_size: int = 8, batches: int = 40) -> None:
        super().__init__()
        self.longest, self.batch_size, self.batches = longest, batch_size, batches

    def train_dataloader(self) -> Any:
        text, lengths = load_corpus().train, random.Random(0)
        found = []
        for number in range(self.batches):
            length = 1 + max(16, round(self.longest * lengths.random() ** 2))
            begin = number * self.batch_size * (self.longest + 1)
            found.append(text[begin : begin + self.batch_size * length].long().view(self.batch_size, length))
        return torch.utils.data.DataLoader(found, batch_size=None, shuffle=True)  # type: ignore[arg-type]
