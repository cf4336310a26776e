"""The demo model: its shapes, names and masks, and what it is scored by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_efficient.demos import ByteLanguageModel, ByteTransformer
from lightning_efficient.demos.data import WindowDataset
from lightning_efficient.demos.language_model import mask_bytes
from lightning_efficient.demos.metrics import BitsPerByte

SMALL: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "context": 16}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"kind": "encoder"},
    {"norm": "rmsnorm", "mlp": "swiglu", "kv_heads": 2, "tied": False},
    {"norm": "rmsnorm", "mlp_ratio": 2.5},
    {"mlp": "swiglu", "kv_heads": 1},
]


def tokens(batch: int = 2, time: int = 16) -> Tensor:
    return torch.randint(256, (batch, time), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_number_of_parameters(variant: dict[str, Any]) -> None:
    model = ByteTransformer(**(SMALL | variant))
    assert model(tokens()).shape == (2, 16, 257)
    assert model(tokens(time=5)).shape == (2, 5, 257)

    width, layers = 32, 2
    kv_width = 8 * variant.get("kv_heads", 4)
    hidden = round(variant.get("mlp_ratio", 4) * width)
    gated = variant.get("mlp") == "swiglu"
    biased = variant.get("norm") != "rmsnorm"  # of the norms and of the linear layers
    norm = width * (1 + biased)
    attention = 2 * width * width + 2 * width * kv_width + biased * 2 * (width + kv_width)
    mlp = (3 if gated else 2) * width * hidden + biased * ((2 if gated else 1) * hidden + width)
    embeddings = (257 + 16) * width + (not variant.get("tied", True)) * 257 * width
    expected = embeddings + layers * (2 * norm + attention + mlp) + norm
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_module_names() -> None:
    model = ByteTransformer(**SMALL)
    assert [name for name, _ in model.named_children()] == [
        "token_embedding",
        "position_embedding",
        "embedding_dropout",
        "blocks",
        "final_norm",
        "head",
    ]
    block = dict(model.blocks[0].named_children())
    assert list(block) == ["attention_norm", "attention", "mlp_norm", "mlp", "dropout"]
    assert [name for name, _ in block["attention"].named_children()] == ["query", "key", "value", "output"]
    assert [name for name, _ in block["mlp"].named_children()] == ["up", "down"]
    assert model.head.weight is model.token_embedding.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoder_sees_the_past_only(variant: dict[str, Any]) -> None:
    model = ByteTransformer(**(SMALL | variant)).eval()
    text = tokens()
    logits = model(text)
    for position in range(16):
        changed = text.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        difference = (model(changed) - logits).abs().amax(dim=(0, 2))  # [time]
        assert difference[position:].min() > 0
        if variant.get("kind") == "encoder":
            assert difference.min() > 0
        else:
            assert difference[:position].sum() == 0


def test_blocks_can_be_taken_away() -> None:
    model = ByteTransformer(**SMALL)
    before = model(tokens())
    model.blocks = model.blocks[:1]
    assert model(tokens()).shape == before.shape
    assert not model(tokens()).equal(before)


def test_residual_branches_start_small() -> None:
    model = ByteTransformer(**(SMALL | {"width": 256}))
    for block in model.blocks:
        assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
        assert block.attention.output.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "both"}, "kind='both'; allowed are 'decoder', 'encoder'"),
        ({"norm": "batchnorm"}, "norm='batchnorm'"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"width": 30}, "width=30 is not divisible by heads=4"),
        ({"kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
    ],
)
def test_errors_of_the_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteTransformer(**(SMALL | arguments))


def test_errors_of_lengths() -> None:
    with pytest.raises(ValueError, match="17 tokens, longer than the model's context of 16"):
        ByteTransformer(**SMALL)(tokens(time=17))
    with pytest.raises(ValueError, match="window of 9 bytes does not fit a text of 8 bytes"):
        WindowDataset(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="mask_rate=0"):
        ByteLanguageModel(**SMALL, mask_rate=0)


def test_bits_per_byte() -> None:
    metric = BitsPerByte()
    logits, targets = torch.randn(3, 10, 257), torch.randint(257, (3, 10))
    targets[1, :4] = -100
    for batch in range(3):
        metric.update(logits[batch], targets[batch])
    bits = [
        -math.log2(logits[i, j].double().softmax(0)[targets[i, j]].item())
        for i in range(3)
        for j in range(10)
        if targets[i, j] != -100
    ]
    assert len(bits) == 26
    assert metric.compute().item() == pytest.approx(sum(bits) / 26, rel=1e-5)
    uniform = BitsPerByte()
    uniform.update(torch.zeros(5, 256), torch.arange(5))
    assert uniform.compute().item() == pytest.approx(8)


def test_masking() -> None:
    text = torch.randint(256, (64, 100), generator=torch.Generator().manual_seed(1))
    inputs, targets = mask_bytes(text, rate=0.15, mask_token=256, generator=torch.Generator().manual_seed(2))
    chosen = targets != -100
    assert (chosen.sum(dim=1) == 15).all()
    assert targets[chosen].equal(text[chosen])
    assert inputs[~chosen].equal(text[~chosen])
    masked = (inputs[chosen] == 256).float().mean().item()
    kept = (inputs[chosen] == text[chosen]).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.05)
    assert kept == pytest.approx(0.1, abs=0.04)
    _, tiny = mask_bytes(text[:, :2], rate=0.15, mask_token=256, generator=torch.Generator())
    assert (tiny != -100).any(dim=1).all()  # a row without a target would make the loss undefined
