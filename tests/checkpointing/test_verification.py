"""No byte of a checkpoint changes unnoticed, and what is damaged has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.checkpointing.retention import newest_intact, step_of
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, verify
from tests.checkpointing.states import checkpoint_of, trained, write


@pytest.fixture
def state() -> dict[str, Any]:
    return checkpoint_of(*trained())


def flipped(path: Path, at: int, to: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    to.write_bytes(content)
    return to


def test_every_flipped_bit_is_noticed(state: dict[str, Any], tmp_path: Path) -> None:
    path = write(state, tmp_path / "good.ckpt")
    verify(path)
    for at in range(path.stat().st_size):
        with pytest.raises(CheckpointDamagedError):
            verify(flipped(path, at, tmp_path / "bad.ckpt"))


def test_every_truncation_is_noticed(state: dict[str, Any], tmp_path: Path) -> None:
    content = write(state, tmp_path / "good.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    for nbytes in [*range(0, len(content), 13), len(content) - 1]:
        bad.write_bytes(content[:nbytes])
        with pytest.raises(CheckpointDamagedError, match=r"is damaged: (it ends too early|it is empty|a header)"):
            verify(bad)


def test_bytes_at_the_end_are_noticed(state: dict[str, Any], tmp_path: Path) -> None:
    path = write(state, tmp_path / "good.ckpt")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointDamagedError):
        verify(path)


def test_the_damaged_tensor_is_named(state: dict[str, Any], tmp_path: Path) -> None:
    path = write(state, tmp_path / "good.ckpt")
    content = path.read_bytes()
    for name, tensor in (
        ("state_dict.norm.running_mean", state["state_dict"]["norm.running_mean"]),
        ("optimizer_states.0.state.1.exp_avg", state["optimizer_states"][0]["state"][1]["exp_avg"]),
    ):
        at = content.index(tensor.numpy().tobytes())
        with pytest.raises(CheckpointDamagedError, match=rf"the bytes of '{name}' \(record 'data/\d+'\) have changed"):
            verify(flipped(path, at, tmp_path / "bad.ckpt"))


def test_checkpoints_of_torch_are_verified_as_far_as_they_can(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "torch.ckpt"
    torch.save(state, path)
    verify(path)
    at = path.read_bytes().index(state["state_dict"]["norm.running_mean"].numpy().tobytes())
    with pytest.raises(CheckpointDamagedError, match=r"'state_dict.norm.running_mean'"):
        verify(flipped(path, at, tmp_path / "bad.ckpt"))
    assert step_of(path) is None


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "text.ckpt"
    path.write_text("no archive")
    with pytest.raises(CheckpointDamagedError, match="ends too early"):
        verify(path)
    assert step_of(path) is None


def test_the_newest_intact_is_found(tmp_path: Path) -> None:
    from tests.checkpointing.states import snapshot_of

    for step in (3, 9, 12):
        snapshot = snapshot_of({"step": torch.tensor(step)}, step)
        list(snapshot.seal())
        (tmp_path / f"{step}.ckpt").write_bytes(snapshot.buffer.view[: snapshot.archive.nbytes])
    (tmp_path / "last.ckpt").symlink_to("12.ckpt")
    assert [step_of(tmp_path / f"{step}.ckpt") for step in (3, 9, 12)] == [3, 9, 12]
    assert newest_intact(tmp_path) == tmp_path / "12.ckpt"
    flipped(tmp_path / "12.ckpt", 70, tmp_path / "12.ckpt")
    assert newest_intact(tmp_path) == tmp_path / "9.ckpt"
    assert newest_intact(tmp_path, besides=tmp_path / "9.ckpt") == tmp_path / "3.ckpt"
    assert newest_intact(tmp_path / "nowhere") is None
