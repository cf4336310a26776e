"""The demo task as a LightningModule: next-byte prediction, or masked-byte modelling."""

from __future__ import annotations

import functools
import math
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_efficient.demos.metrics import IGNORED, BitsPerByte
from lightning_efficient.demos.model import ByteTransformer

__all__ = ["ByteLanguageModel", "mask_bytes", "warmup_cosine"]


class ByteLanguageModel(pl.LightningModule):
    """A :class:`~lightning_efficient.demos.model.ByteTransformer` and how it is trained.

    Takes batches of int64 ``[batch, context + 1]``. A decoder predicts each next byte; an encoder predicts masked
    bytes among the first ``context``. Logs ``train_loss`` (nats), ``val_loss``, ``val_bits_per_byte``,
    ``val_accuracy``, and the same three with ``test_``.

    Args:
        vocabulary: See :class:`~lightning_efficient.demos.model.ByteTransformer`, like all arguments up to ``tied``.
            The last token stands for a masked byte.
        learning_rate: The highest, after the warm-up; falls on a cosine to a tenth of it.
        weight_decay: Of weights with two or more dimensions; norms and biases have none.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        mask_rate: Share of the bytes that an encoder has to predict.
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
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        tied: bool = True,
        learning_rate: float = 1.5e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        warmup_steps: int = 50,
        mask_rate: float = 0.15,
    ) -> None:
        super().__init__()
        if not 0 < mask_rate < 1:
            raise ValueError(f"mask_rate={mask_rate}; it is a share between 0 and 1.")
        self.save_hyperparameters()
        self.model = ByteTransformer(
            vocabulary=vocabulary,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            context=context,
            kind=kind,
            norm=norm,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            tied=tied,
        )
        self.kind = kind
        self.mask_token = vocabulary - 1
        self.mask_rate = mask_rate
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (beta1, beta2)
        self.warmup_steps = warmup_steps
        # Not in training: there they would cost more time than they tell.
        self.val_metrics = MetricCollection(
            {
                "bits_per_byte": BitsPerByte(),
                "accuracy": MulticlassAccuracy(vocabulary, average="micro", ignore_index=IGNORED, validate_args=False),
            },
            compute_groups=False,
            prefix="val_",
        )
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, time, vocabulary]`` for tokens ``[batch, time]``."""
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch, in nats per predicted byte."""
        # The masks of a step depend on nothing but its place in the run: a resumed or repeated step draws the same.
        inputs, targets = self.task(batch, seed=hash((self.current_epoch, batch_idx, self.global_rank)))
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update and log the ``val_`` metrics."""
        self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update and log the ``test_`` metrics."""
        self._evaluate(batch, batch_idx, self.test_metrics)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The likeliest byte at each position, ``[batch, context]``."""
        inputs, _ = self.task(batch, seed=batch_idx)
        return self.model(inputs).argmax(dim=-1)

    def task(self, batch: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What the model sees and what it has to predict, both int64 ``[batch, context]``.

        Args:
            batch: int64 ``[batch, context + 1]``.
            seed: Of the masks, if the model is an encoder.
        """
        if self.kind == "decoder":
            return batch[:, :-1], batch[:, 1:]
        generator = torch.Generator().manual_seed(seed)
        return mask_bytes(batch[:, :-1], rate=self.mask_rate, mask_token=self.mask_token, generator=generator)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up and a cosine decay over the length of the run."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=self.betas,
        )
        factor = functools.partial(
            warmup_cosine, warmup_steps=self.warmup_steps, total_steps=self.trainer.estimated_stepping_batches
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: Tensor, batch_idx: int, metrics: MetricCollection) -> None:
        # Masks by the number of the batch: each validation of each run has to predict the same bytes.
        inputs, targets = self.task(batch, seed=batch_idx)
        logits, targets = self.model(inputs).flatten(0, 1), targets.flatten()
        metrics.update(logits, targets)
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED)
        self.log(f"{metrics.prefix}loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        self.log_dict(metrics, batch_size=len(batch))


def mask_bytes(tokens: Tensor, *, rate: float, mask_token: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide some tokens; Devlin et al., "BERT", 2019, section 3.1: 80 % masked, 10 % random, 10 % left as they are.

    Args:
        tokens: int64 ``[batch, time]``.
        rate: Share of the positions of each row to predict; at least one is.
        mask_token: What stands for a masked token; random tokens are below it.
        generator: On the CPU, so that the masks do not depend on the device.

    Returns:
        The tokens with some hidden, and the targets: the tokens at the chosen positions, -100 elsewhere.
    """
    batch, time = tokens.shape
    positions = torch.rand(batch, time, generator=generator).argsort(dim=1)[:, : max(1, round(rate * time))]
    chosen = torch.zeros(batch, time, dtype=torch.bool).scatter_(1, positions, True)
    fate = torch.rand(batch, time, generator=generator)
    noise = torch.randint(mask_token, (batch, time), generator=generator).to(tokens.device)
    masked = (chosen & (fate < 0.8)).to(tokens.device)
    replaced = (chosen & (fate >= 0.9)).to(tokens.device)
    inputs = torch.where(replaced, noise, tokens.masked_fill(masked, mask_token))
    return inputs, tokens.masked_fill(~chosen.to(tokens.device), IGNORED)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: float, floor: float = 0.1) -> float:
    """The learning rate at ``step`` over the highest one; an endless run (``total_steps=inf``) stays at the highest."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
