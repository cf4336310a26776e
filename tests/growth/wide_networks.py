"""Networks of every kind that width growth claims to know, as functions of their width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.growth.layers import find_stacks
from lightning_efficient.growth.width import Widened, plan_width

Build = Callable[[int], nn.Module]
"""Builds the network ``k`` times as wide."""

TOKENS = 11


def outside_of(module: nn.Module) -> list[str]:
    """As ``build_growing`` finds it: the paths of what stands behind the repeated layers."""
    try:
        stack = find_stacks(module)[0]
    except ValueError:
        return [path for path, _ in module.named_modules()]
    inside = {id(s) for i in range(len(stack)) for s in module.get_submodule(stack.path(i)).modules()}
    order = list(module.named_modules())
    last = max(n for n, (_, sub) in enumerate(order) if id(sub) in inside)
    return [path for path, _ in order[last + 1 :]]


def widened(build: Build, factor: int, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Widened]]:
    """A narrow model of random weights in float64, and the wide one that growth makes of it."""
    narrow, wide = randomised(build(1)), build(factor).double()
    plan = plan_width(narrow, wide, factor, after_layers=outside_of(narrow), **options)
    fill(narrow, wide, plan)
    return narrow, wide, plan


def fill(narrow: nn.Module, wide: nn.Module, plan: dict[str, Widened]) -> None:
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            wide.get_parameter(name).copy_(plan[name].weight(parameter.detach()))


def randomised(module: nn.Module) -> nn.Module:
    """No zero biases and no norms of one: a wrong rule must show."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.4)
    return module.double()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, (3, 5), generator=torch.Generator().manual_seed(seed))


def byte_transformer(**changes: Any) -> Build:
    heads, kv_heads = changes.pop("heads", 2), changes.pop("kv_heads", None)
    return lambda k: ByteTransformer(
        **{"vocabulary": TOKENS, "layers": 2, "context": 5, **changes},
        width=8 * k,
        heads=heads * k,
        kv_heads=kv_heads and kv_heads * k,
    )


class FusedAttention(nn.Module):
    """Query, key and value in one projection: nanoGPT's ``c_attn``; with fewer key heads, Llama's fused form."""

    def __init__(self, width: int, heads: int, kv_heads: int, name: str, transposed: bool) -> None:
        super().__init__()
        head = width // heads
        self.sizes = [width, kv_heads * head, kv_heads * head]
        self.heads, self.kv_heads, self.name = heads, kv_heads, name
        linear = Conv1D if transposed else nn.Linear
        self.add_module(name, linear(width, sum(self.sizes)))
        self.c_proj = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.get_submodule(self.name)(x).split(self.sizes, dim=-1)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = key.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        value = value.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Conv1D(nn.Module):
    """GPT-2's linear map, which stores its weight as ``[in, out]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class NanoGpt(nn.Module):
    """One block; the head is tied by the module or, as ``tie="functional"``, by ``F.linear`` with the embedding."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        name: str = "c_attn",
        tie: str = "module",
        transposed: bool = False,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.tie = tie
        self.wte = nn.Embedding(TOKENS, width)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FusedAttention(width, heads, kv_heads or heads, name, transposed)
        self.ln_f = nn.LayerNorm(width, elementwise_affine=affine)
        if tie != "functional":
            self.lm_head = nn.Linear(width, TOKENS, bias=tie == "untied")
        if tie == "module":
            self.lm_head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.wte(x)
        x = self.ln_f(x + self.attn(self.ln_1(x)))
        return F.linear(x, self.wte.weight) if self.tie == "functional" else self.lm_head(x)


def nano_gpt(**options: Any) -> Build:
    kv_heads = options.pop("kv_heads", None)
    return lambda k: NanoGpt(8 * k, 2 * k, kv_heads and kv_heads * k, **options)


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` of torch, before or after the norm, and its ``nn.MultiheadAttention``."""

    def __init__(self, k: int, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8 * k)
        layer = nn.TransformerEncoderLayer(
            8 * k, 2 * k, 12 * k, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8 * k, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` over keys of another width, with learned extra keys."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8 * k)
        self.memory = nn.Embedding(TOKENS, 6)
        self.attention = nn.MultiheadAttention(8 * k, 2 * k, kdim=6, vdim=6, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(8 * k, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(x), self.memory(x), self.memory(x), need_weights=False)[0])


class ConvNet(nn.Module):
    """Convolution, batch norm, depthwise convolution, transposed convolution, flatten, classifier."""

    def __init__(self, k: int) -> None:
        super().__init__()
        channels = 4 * k
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.head = nn.Linear(channels * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.norm(self.stem(x)))))
        x = torch.tanh(self.norm2(self.pointwise(x)))
        return self.head(torch.tanh(self.up(x)).flatten(1))


class Plain(nn.Module):
    """Residual linear maps without any norm; ``tied`` to an embedding with a gain in place of the last norm."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6 * k)
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(6 * k, 9 * k), nn.Tanh(), nn.Linear(9 * k, 6 * k)) for _ in range(3)
        )
        self.head = nn.Linear(6 * k, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.maps:
            x = x + block(x)
        return self.head(x)


class ChannelNorm(nn.Module):
    """A norm of each channel by itself: gain and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight + self.bias


class PlainTied(Plain):
    """The same with a tied head behind a norm that does not mix channels."""

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.final = ChannelNorm(6 * k)
        self.head = nn.Linear(6 * k, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.maps:
            x = x + block(x)
        return self.head(self.final(x))


class TwoTables(nn.Module):
    """Encoder and decoder share one embedding; the head is its own."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(TOKENS, 8 * k), nn.Embedding(TOKENS, 8 * k)
        self.target.weight = self.source.weight
        self.norm = nn.LayerNorm(8 * k)
        self.head = nn.Linear(8 * k, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.source(x) + self.target(x.flip(1))))


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
