"""Models, what runs them with saved tensors on another tier, and what is left then."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from tests.offload.file_tier import FileTier

__all__ = [
    "CASES",
    "Case",
    "Cells",
    "Views",
    "autocast",
    "cells",
    "channels_last",
    "check_balance",
    "checkpointed",
    "computed_weights",
    "convolutions",
    "encoder",
    "gradients",
    "language",
    "mlp",
    "offload",
    "recurrent",
    "selective",
    "views",
]

Case = tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, ...]]


def offload(tier: FileTier, model: nn.Module | None = None, **settings: Any) -> SavedTensorOffload:
    held = [*model.parameters(), *model.buffers()] if model is not None else []
    return SavedTensorOffload(
        tier, **({"staging_bytes": 1 << 20, "minimum_bytes": 1 << 10} | settings), held=lambda: held
    )


def gradients(
    model: nn.Module, loss: Callable[[], Tensor], chosen: SavedTensorOffload | None, *batch: Tensor
) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    with chosen.saving(*batch) if chosen is not None else contextlib.nullcontext():
        value = loss()
    value.backward()
    return [value.detach(), *(one.grad for one in model.parameters() if one.grad is not None)]


def check_balance(tier: FileTier, chosen: SavedTensorOffload) -> None:
    """Nothing is in use any more, and all room comes back."""
    patience = time.monotonic() + 10
    while chosen.statistics().stash.tier_bytes and time.monotonic() < patience:  # threads may hold what failed
        gc.collect()
        time.sleep(0.01)
    assert chosen.statistics().stash.tier_bytes == 0
    tier.flush()
    assert chosen.statistics().stash.resident_bytes == 0
    chosen.close()
    assert not tier.reserved


# -- models -----------------------------------------------------------------------------------------------------------


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    x, y = torch.randn(64, 32), torch.randint(0, 8, (64,))
    return model, lambda: F.cross_entropy(model(x), y), (x, y)


def language(**settings: Any) -> Case:
    model = ByteTransformer(**({"layers": 2, "width": 32, "heads": 2, "context": 32} | settings))
    tokens, targets = torch.randint(0, 256, (2, 4, 32))
    return model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()), (tokens, targets)


def convolutions() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 36, 4),
    )  # fmt: skip
    x = torch.randn(8, 3, 16, 16)
    return model, lambda: model(x).square().mean(), (x,)


def channels_last() -> Case:
    model, _, (x,) = convolutions()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(memory_format=torch.channels_last)
    return model, lambda: model(x).square().mean(), (x,)


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, mask = torch.randn(4, 16, 32), torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 12:] = True
    return model, lambda: model(x, src_key_padding_mask=mask).square().mean(), (x, mask)


def recurrent(kind: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> Case:
    model = kind(16, 32, 2, batch_first=True, dropout=0.1)
    x = torch.randn(8, 12, 16, requires_grad=True)
    return model, lambda: model(x)[0].square().mean(), (x,)


class Cells(nn.Module):
    """Its gates are parts of one storage that are changed in place, each with a count of changes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return state[1]


def cells() -> Case:
    model, x = Cells(), torch.randn(8, 5, 16)
    return model, lambda: model(x).square().mean(), (x,)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 48) / 7)
        self.wave = nn.Parameter(torch.randn(32, 48, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight
        q, k, v = h.view(8, 4, 3, 16).unbind(2)
        a = torch.einsum("bij,bkj->bik", q, k).softmax(-1) @ v
        first = h[2:4].exp() * h[2:4].t().contiguous().t() + h[::2].sin()[:2]
        wide = h[0].expand(32, 48) * h  # saves what is repeated
        wave = torch.fft.fft(h) * self.wave * h.to(torch.complex64).conj()
        masked = torch.where(h > 0, h, h * 0.5).masked_fill(h < -1, 0.0)
        return a.sum() + first.sum() + wide.square().sum() + wave.abs().sum() + (masked * h.flip(0)).sum()


def views() -> Case:
    model, x = Views(), torch.randn(32, 48)
    return model, lambda: model(x), (x,)


def autocast() -> Case:
    model, loss, batch = language()

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    return model, mixed, batch


def computed_weights() -> Case:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(64, 8)),
    )  # fmt: skip
    x = torch.randn(64, 32)
    return model, lambda: model(x).square().mean(), (x,)


def checkpointed(**settings: Any) -> Case:
    model, _, (tokens, targets) = language(layers=4, dropout=0.1)

    parts: Any = model

    def loss() -> Tensor:
        hidden = parts.token_embedding(tokens)
        for block in parts.blocks:
            hidden = checkpoint(block, hidden, **settings)
        return F.cross_entropy(parts.head(parts.final_norm(hidden)).flatten(0, 1), targets.flatten())

    return model, loss, (tokens, targets)


def selective() -> Any:
    return create_selective_checkpoint_contexts(
        lambda context, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "gpt with dropout": lambda: language(dropout=0.2),
    "untied, rmsnorm, swiglu, grouped queries": lambda: language(
        tied=False, norm="rmsnorm", mlp="swiglu", heads=4, kv_heads=2
    ),
    "convolutions": convolutions,
    "channels last": channels_last,
    "nn.TransformerEncoder": encoder,
    "lstm": recurrent,
    "gru": lambda: recurrent(nn.GRU),
    "lstm cells": cells,
    "views, expanded, complex, masks": views,
    "bf16 autocast": autocast,
    "computed weights": computed_weights,
    "checkpoint": lambda: checkpointed(use_reentrant=False),
    "reentrant checkpoint": lambda: checkpointed(use_reentrant=True),
    "selective checkpoint": lambda: checkpointed(use_reentrant=False, context_fn=selective),
}  # fmt: skip
