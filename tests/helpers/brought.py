"""Models as users bring them, none written for this suite: each in a LightningModule of a few lines, with random data.

What they have in common is that nothing in them knows of the techniques. The Hugging Face ones are built from a
config with random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_efficient.core.resumable import ResumableDataLoader

__all__ = [
    "Attended",
    "Bert",
    "Brought",
    "BroughtData",
    "Gan",
    "Gpt2",
    "Graph",
    "Llama",
    "Recurrent",
    "ResNet",
    "SparseAlone",
    "SparseTable",
    "Vit",
]

BATCH = 8


class BroughtData(pl.LightningDataModule):
    """Six batches an epoch of random items, the same each time; a resumed run finds its place in them.

    Args:
        item: Makes one.
    """

    def __init__(self, item: Callable[[], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.items = [item() for _ in range(6 * BATCH)]

    def train_dataloader(self) -> ResumableDataLoader:
        return ResumableDataLoader(dataset=_Items(self.items), batch_size=BATCH, shuffle=True)


class _Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Brought(pl.LightningModule):
    """As a user writes it.

    Attributes:
        rate: Of learning.
    """

    rate = 3e-3

    @staticmethod
    def item() -> Any:
        """One random item of its data."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


# -- pictures ----------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """As in torchvision."""

    def __init__(self, planes_in: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or planes_in != planes:
            self.downsample = nn.Sequential(nn.Conv2d(planes_in, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(Brought):
    """torchvision's, for small pictures: batch norms, strides, shortcuts, sums and ReLUs in place."""

    def __init__(self, width: int = 8, blocks: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        planes = width
        for number, count in enumerate(blocks):
            stages = []
            for block in range(count):
                wanted = width << number
                stages.append(BasicBlock(planes, wanted, 2 if number and not block else 1))
                planes = wanted
            self.add_module(f"layer{number + 1}", nn.Sequential(*stages))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(planes, 4)

    @staticmethod
    def item() -> tuple[Tensor, Tensor]:
        label = torch.randint(4, ())
        return torch.randn(3, 32, 32) + label, label

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(self(pictures), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# -- Hugging Face ------------------------------------------------------------------------------------------------

TEXT = 24
WORDS = 50


def hugging_face() -> Any:
    """Their package; without it the test is skipped."""
    return pytest.importorskip("transformers", reason="MODELS names no folder with transformers; make test does")


class HuggingFace(Brought):
    """``self.model(**batch).loss``, as their documentation has it."""

    def __init__(self, model: nn.Module, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        if checkpointing:
            model.gradient_checkpointing_enable()

    @staticmethod
    def item() -> dict[str, Tensor]:
        ids = (torch.arange(TEXT) * 3 + torch.randint(WORDS, ())) % WORDS
        mask = (torch.arange(TEXT) < torch.randint(TEXT // 2, TEXT + 1, ())).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss


class Gpt2(HuggingFace):
    """A decoder with tied embeddings, dropout and checkpointed blocks."""

    def __init__(self) -> None:
        transformers = hugging_face()

        config = transformers.GPT2Config(
            vocab_size=WORDS, n_positions=TEXT, n_embd=32, n_layer=4, n_head=4, pad_token_id=0
        )
        super().__init__(transformers.GPT2LMHeadModel(config), checkpointing=True)


class Llama(HuggingFace):
    """A decoder with grouped-query attention, rotary embeddings and gated layers."""

    def __init__(self) -> None:
        transformers = hugging_face()

        config = transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TEXT,
            tie_word_embeddings=True,
        )
        super().__init__(transformers.LlamaForCausalLM(config))


class Bert(HuggingFace):
    """An encoder; its head is tied to its embeddings, bias and all."""

    def __init__(self) -> None:
        transformers = hugging_face()

        config = transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TEXT,
        )
        super().__init__(transformers.BertForMaskedLM(config))


class Vit(HuggingFace):
    """A vision transformer."""

    def __init__(self) -> None:
        transformers = hugging_face()

        config = transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=4,
        )
        super().__init__(transformers.ViTForImageClassification(config))

    @staticmethod
    def item() -> dict[str, Tensor]:
        label = torch.randint(4, ())
        return {"pixel_values": torch.randn(3, 16, 16) + label, "labels": label}


# -- other loops, other gradients, other layers ---------------------------------------------------------------------


class Gan(Brought):
    """Two networks, two optimizers, manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(256, 1)
        )

    @staticmethod
    def item() -> Tensor:
        return torch.rand(1, 8, 8).round() * torch.linspace(-1, 1, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        of_generator, of_discriminator = self.optimizers()
        noise = torch.randn(len(batch), 8, 1, 1)

        self.toggle_optimizer(of_discriminator)
        real, fake = self.discriminator(batch), self.discriminator(self.generator(noise).detach())
        apart = F.softplus(-real).mean() + F.softplus(fake).mean()
        of_discriminator.zero_grad()
        self.manual_backward(apart)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)

        self.toggle_optimizer(of_generator)
        fooled = F.softplus(-self.discriminator(self.generator(noise))).mean()
        of_generator.zero_grad()
        self.manual_backward(fooled)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.log_dict({"apart": apart.detach(), "fooled": fooled.detach()})
        return {"loss": apart.detach()}

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        )


class SparseTable(Brought):
    """Recommends: a table with sparse gradients beside dense layers, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.Embedding(500, 16, sparse=True)
        self.bag = nn.EmbeddingBag(100, 16, mode="sum", sparse=True)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    @staticmethod
    def item() -> dict[str, Tensor]:
        seen = torch.randint(100, (5,))
        return {"user": torch.randint(500, ()), "seen": seen, "liked": (seen[0] > 50).float()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = torch.cat([self.table(batch["user"]), self.bag(batch["seen"])], -1)
        loss = F.binary_cross_entropy_with_logits(self.layers(features)[:, 0], batch["liked"])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        tables = [*self.table.parameters(), *self.bag.parameters()]
        return torch.optim.SparseAdam(tables, lr=3e-2), torch.optim.AdamW(self.layers.parameters(), lr=1e-2)


class SparseAlone(SparseTable):
    """One optimizer that takes sparse gradients and dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = torch.cat([self.table(batch["user"]), self.bag(batch["seen"])], -1)
        return F.binary_cross_entropy_with_logits(self.layers(features)[:, 0], batch["liked"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.1)


class Graph(Brought):
    """Layers of a graph, whose edges are a sparse buffer."""

    rate = 1e-2

    def __init__(self) -> None:
        super().__init__()
        edges = (torch.rand(24, 24) < 0.2).float()
        self.register_buffer("edges", (edges / edges.sum(1, keepdim=True).clamp(min=1)).to_sparse())
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    @staticmethod
    def item() -> tuple[Tensor, Tensor]:
        labels = torch.randint(4, (24,))
        return torch.randn(24, 8) + labels[:, None], labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes, labels = batch[0][0], batch[1][0]
        hidden = torch.sparse.mm(self.edges, self.one(nodes)).relu()
        return F.cross_entropy(torch.sparse.mm(self.edges, self.two(hidden)), labels)


class Attended(Brought):
    """torch's own encoder layers around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, WORDS)

    item = staticmethod(HuggingFace.item)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(TEXT)
        x = self.encoder(self.embed(batch["input_ids"]), mask=causal, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())


class Recurrent(Brought):
    """An LSTM of two layers."""

    rate = 3e-2

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, WORDS)

    item = staticmethod(HuggingFace.item)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = self.lstm(self.embed(batch["input_ids"]))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())
