"""A short, quiet fit of the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.technique_settings import demo_data, demo_model

__all__ = ["train"]


def train(
    root: Path, *callbacks: Callback, module: Any = None, resume: Any = None, **arguments: Any
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Twelve steps without validation, if ``arguments`` of the Trainer do not say otherwise."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "logger": False,
    }
    trainer = pl.Trainer(
        **(settings | arguments),
        default_root_dir=root,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = module or demo_model()
    trainer.fit(module, demo_data(), ckpt_path=resume)
    return trainer, module
