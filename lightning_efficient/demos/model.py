"""A GPT-like decoder or BERT-like encoder over bytes, in plain modules."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "ByteTransformer", "GeluMlp", "SwigluMlp"]

Norm = Literal["layernorm", "rmsnorm"]


class ByteTransformer(nn.Module):
    """A pre-norm transformer with learned positions (GPT-2's layout).

    Args:
        vocabulary: Number of tokens: 256 bytes, and one that stands for a masked byte.
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Attention heads; ``width`` is divisible by them.
        kv_heads: Heads of keys and values; fewer than ``heads`` is grouped-query attention. None: as many.
        context: The longest sequence, in bytes.
        kind: ``decoder``: a position sees itself and those before it; ``encoder``: all of them.
        norm: ``layernorm`` (linear layers have biases) or ``rmsnorm`` (they have none).
        mlp: ``gelu`` (up, down) or ``swiglu`` (gate, up, down).
        mlp_ratio: Width of the MLP's hidden layer over ``width``.
        dropout: Of the embeddings, the attention weights, and the output of each branch.
        tied: Whether the head's weight is the token embedding's.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 257,
        layers: int = 8,
        width: int = 128,
        heads: int = 4,
        kv_heads: int | None = None,
        context: int = 128,
        kind: Literal["decoder", "encoder"] = "decoder",
        norm: Norm = "layernorm",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("kind", kind, ("decoder", "encoder"))
        _check_choice("norm", norm, ("layernorm", "rmsnorm"))
        _check_choice("mlp", mlp, ("gelu", "swiglu"))
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.embedding_dropout = nn.Dropout(dropout)
        bias = norm == "layernorm"
        mlp_class = GeluMlp if mlp == "gelu" else SwigluMlp
        self.blocks = nn.ModuleList(
            Block(
                attention_norm=_norm(norm, width),
                attention=Attention(
                    width=width,
                    heads=heads,
                    kv_heads=heads if kv_heads is None else kv_heads,
                    causal=kind == "decoder",
                    bias=bias,
                    dropout=dropout,
                ),
                mlp_norm=_norm(norm, width),
                mlp=mlp_class(width=width, hidden=round(mlp_ratio * width), bias=bias),
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.final_norm = _norm(norm, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialize()
        if tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, time, vocabulary]`` for int64 tokens ``[batch, time]``.

        Raises:
            ValueError: If the sequences are longer than the context.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"Got sequences of {time} tokens, longer than the model's context of {self.context}.")
        positions = torch.arange(time, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # [batch, time, width]
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))

    def _initialize(self) -> None:
        """Normal(0, 0.02), and smaller at the end of each branch, so that depth does not widen the residual stream.

        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith(("attention.output", "mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if ends_branch else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Attention, then an MLP; each reads a normalized copy of the residual stream and adds to it."""

    def __init__(
        self, *, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[batch, time, width]`` after this block."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention."""

    def __init__(self, *, width: int, heads: int, kv_heads: int, causal: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}.")
        if heads % kv_heads:
            raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}.")
        self.heads = heads
        self.kv_heads = kv_heads
        self.causal = causal
        self.dropout = dropout
        kv_width = width // heads * kv_heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, kv_width, bias=bias)
        self.value = nn.Linear(width, kv_width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """What each position gathers from those it sees, ``[batch, time, width]``."""
        # [batch, time, heads * head_width] -> [batch, heads, time, head_width]
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        gathered = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads < self.heads,
        )
        return self.output(gathered.transpose(1, 2).flatten(-2))


class GeluMlp(nn.Module):
    """``down(gelu(up(x)))``."""

    def __init__(self, *, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each position by itself, ``[batch, time, width]``."""
        return self.down(F.gelu(self.up(x)))


class SwigluMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``; Shazeer, "GLU Variants Improve Transformer", 2020, equation 6."""

    def __init__(self, *, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Each position by itself, ``[batch, time, width]``."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _norm(kind: Norm, width: int) -> nn.Module:
    return nn.LayerNorm(width) if kind == "layernorm" else nn.RMSNorm(width, eps=1e-5)


def _check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r}; allowed are {', '.join(map(repr, allowed))}.")
