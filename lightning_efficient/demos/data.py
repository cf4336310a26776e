"""The standard library's sources as batches of bytes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_efficient.core.resumable import ResumableDataLoader
from lightning_efficient.demos.corpus import load_corpus

__all__ = ["StdlibDataModule", "WindowDataset"]


class WindowDataset(Dataset[Tensor]):
    """Consecutive windows of a text that do not overlap; a rest shorter than a window is left out.

    Args:
        text: uint8 ``[bytes]``.
        window: Bytes of a window.
    """

    def __init__(self, text: Tensor, window: int) -> None:
        if not 0 < window <= text.numel():
            raise ValueError(f"A window of {window} bytes does not fit a text of {text.numel()} bytes.")
        self.text = text
        self.window = window

    def __len__(self) -> int:
        """Number of windows."""
        return self.text.numel() // self.window

    def __getitem__(self, index: int) -> Tensor:
        """int64 ``[window]``."""
        start = index * self.window
        return self.text[start : start + self.window].long()


class StdlibDataModule(pl.LightningDataModule):
    """Batches of int64 ``[batch, context + 1]``: enough for ``context`` predictions of a next byte.

    A run that is interrupted in the middle of an epoch goes on with the batch after the last one it trained on.

    Args:
        context: Bytes that the model sees at once.
        batch_size: Windows in a batch, of each rank.
        num_workers: Worker processes of each DataLoader.
        seed: Of the order of the training windows.
        train_bytes: Use only so many bytes of the training text. None: all.
        validation_bytes: Likewise for the validation text.
    """

    def __init__(
        self,
        *,
        context: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        train_bytes: int | None = None,
        validation_bytes: int | None = 65536,
    ) -> None:
        super().__init__()
        # Not to the logger: there, names that the model has too (context) would have to be equal.
        self.save_hyperparameters(logger=False)
        self.context = context
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_bytes = train_bytes
        self.validation_bytes = validation_bytes
        self._train_loader: ResumableDataLoader | None = None
        self._loader_state: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """Read the text and cut it into windows."""
        corpus = load_corpus()
        self.train_windows = WindowDataset(corpus.train[: self.train_bytes], self.context + 1)
        self.validation_windows = WindowDataset(corpus.validation[: self.validation_bytes], self.context + 1)

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled anew in each epoch; resumes in the middle of one."""
        self._train_loader = ResumableDataLoader(
            dataset=self.train_windows,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            num_workers=self.num_workers,
        )
        if self._loader_state is not None:
            self._train_loader.load_state_dict(self._loader_state)
            self._loader_state = None
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Tensor]:
        """All validation windows, in the order of the text."""
        return DataLoader(
            self.validation_windows,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            # Else each validation would draw from the global generator, and so change the training that follows.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The validation windows: the corpus has no third part."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """The validation windows."""
        return self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """Forget a state that no fit took up: validating from a checkpoint leaves one."""
        self._loader_state = None

    def state_dict(self) -> dict[str, Any]:
        """Which text this is, and where in it the training stands.

        Lightning keeps the state of a stateful train loader by itself, but forgets to restore it where
        ``configure_optimizers`` asks for ``trainer.estimated_stepping_batches``, for the loader is then built before
        the checkpoint's loops are read. A data module's state comes early enough.
        """
        corpus = load_corpus()
        state: dict[str, Any] = {"corpus_sha256": corpus.sha256, "python_version": corpus.python_version}
        if self._train_loader is not None:
            state["train_loader"] = self._train_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the training where :meth:`state_dict` left it; the loader follows when it is built."""
        corpus = load_corpus()
        if state_dict["corpus_sha256"] != corpus.sha256:
            rank_zero_warn(
                f"The checkpoint was trained on the sources of Python {state_dict['python_version']} "
                f"(SHA-256 {state_dict['corpus_sha256'][:12]}), this is Python {corpus.python_version} "
                f"({corpus.sha256[:12]}): the texts differ, and losses cannot be compared."
            )
        self._loader_state = state_dict.get("train_loader")
