"""The demo task: its text, that it is learnt quickly, and that a run of it resumes exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_efficient.demos import ByteLanguageModel, StdlibDataModule, load_corpus
from lightning_efficient.demos.corpus import is_validation
from lightning_efficient.demos.data import WindowDataset
from lightning_efficient.demos.language_model import warmup_cosine

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # a machine with one core
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),  # Python >= 3.12, in torch's workers
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

SMALL: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "context": 16}


def make_data(**changes: Any) -> StdlibDataModule:
    arguments: dict[str, Any] = {"context": 16, "batch_size": 4, "train_bytes": 17 * 4 * 12, "validation_bytes": 17 * 8}
    return StdlibDataModule(**(arguments | changes))


def make_trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **arguments,
    )


def test_learning_rate_schedule() -> None:
    def factor(step: int, total: float = 110) -> float:
        return warmup_cosine(step, warmup_steps=10, total_steps=total)

    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == pytest.approx(1)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == factor(500) == pytest.approx(0.1)
    assert factor(10**6, total=math.inf) == 1


def test_weight_decay_is_for_matrices() -> None:
    model = ByteLanguageModel(**SMALL)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, make_data())
    decayed, plain = trainer.optimizers[0].param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_corpus_is_split_by_path_and_deterministic() -> None:
    corpus = load_corpus()
    assert load_corpus() is corpus
    again = load_corpus.__wrapped__()
    assert again.sha256 == corpus.sha256
    assert again.train.equal(corpus.train)
    assert again.validation.equal(corpus.validation)
    assert corpus.train.dtype == corpus.validation.dtype == torch.uint8

    train, validation = (part.numpy().tobytes().split(b"\0") for part in (corpus.train, corpus.validation))
    assert len(train) + len(validation) == corpus.files
    assert 0.02 < len(validation) / corpus.files < 0.1
    assert not {text for text in train if len(text) > 200} & {text for text in validation if len(text) > 200}
    assert is_validation("json/decoder.py") == is_validation("json/decoder.py")
    assert b"class JSONDecoder" in b"".join(validation if is_validation("json/decoder.py") else train)


def test_windows_do_not_overlap() -> None:
    windows = WindowDataset(torch.arange(11, dtype=torch.uint8), 3)
    assert [window.tolist() for window in (windows[i] for i in range(len(windows)))] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]
    assert windows[0].dtype == torch.int64


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_learns_quickly(kind: str) -> None:
    model = ByteLanguageModel(**SMALL, kind=kind, learning_rate=1e-2, warmup_steps=5)  # type: ignore[arg-type]
    data = make_data(batch_size=16, train_bytes=100_000, validation_bytes=4096)
    trainer = make_trainer(max_steps=60)
    trainer.fit(model, data)
    assert {"train_loss"} <= set(trainer.callback_metrics)
    (validated,) = trainer.validate(model, data, verbose=False)
    assert set(validated) == {"val_loss", "val_bits_per_byte", "val_accuracy"}
    assert validated["val_bits_per_byte"] < 5.5
    assert validated["val_accuracy"] > 0.1
    assert validated["val_bits_per_byte"] == pytest.approx(validated["val_loss"] / math.log(2), rel=0.02)
    # The masks of a validation are always the same.
    assert trainer.validate(model, data, verbose=False) == [validated]
    (tested,) = trainer.test(model, data, verbose=False)
    assert list(tested.values()) == list(validated.values())
    (predicted, *_) = trainer.predict(model, data) or []
    assert predicted.shape == (16, 16)


@pytest.mark.parametrize(
    ("workers", "kind", "length"),
    [
        (0, "decoder", {"max_epochs": 2}),
        (2, "decoder", {"max_epochs": 2}),
        (0, "encoder", {"max_epochs": 2}),
        (0, "decoder", {"max_steps": 20}),
        (0, "decoder", {"max_epochs": 3, "limit_train_batches": 8}),
    ],
)
def test_resumes_bit_equal(tmp_path: Path, workers: int, kind: str, length: dict[str, int]) -> None:
    def fit(save: bool, ckpt_path: Path | None = None) -> ByteLanguageModel:
        torch.manual_seed(0)
        model = ByteLanguageModel(**SMALL, kind=kind)  # type: ignore[arg-type]
        checkpoint = ModelCheckpoint(
            dirpath=tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1 if save else 0
        )
        make_trainer(checkpoint, **length).fit(model, make_data(num_workers=workers), ckpt_path=ckpt_path)
        return model

    whole = fit(save=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 4
    for path in paths[:3] if workers else paths:
        resumed = fit(save=False, ckpt_path=path)
        for name, tensor in resumed.state_dict().items():
            assert tensor.equal(whole.state_dict()[name]), f"{path.name}: {name}"


def test_a_validated_checkpoint_leaves_the_next_fit_alone(tmp_path: Path) -> None:
    def seen(data: StdlibDataModule) -> list[list[int]]:
        data.setup("fit")
        return [batch[:, 0].tolist() for batch in data.train_dataloader()]

    trainer = make_trainer(max_steps=5)
    trainer.fit(ByteLanguageModel(**SMALL), make_data())
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    data = make_data()
    make_trainer().validate(ByteLanguageModel(**SMALL), data, ckpt_path=tmp_path / "middle.ckpt", verbose=False)
    assert seen(data) == seen(make_data())


def test_another_text_is_noticed() -> None:
    data = make_data()
    with pytest.warns(UserWarning, match=r"sources of Python 3\.0\.0"):
        data.load_state_dict(data.state_dict() | {"corpus_sha256": "0" * 64, "python_version": "3.0.0"})


def test_hyperparameters_round_trip(tmp_path: Path) -> None:
    model = ByteLanguageModel(**SMALL, norm="rmsnorm", mlp="swiglu", kv_heads=2, tied=False)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(model, make_data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ByteLanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    tokens = torch.randint(256, (2, 16))
    assert loaded(tokens).equal(model(tokens))
    assert StdlibDataModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).context == 16
