"""What a run goes on from is intact and complete, whatever else lies in its directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_efficient.checkpointing import retention
from lightning_efficient.checkpointing.retention import newest_intact, step_of
from tests.checkpointing.states import snapshot_of

WEIGHTS = {"pytorch-lightning_version": "2.6", "loops": {}, "state_dict": {"weight": torch.ones(3)}}
"""As Lightning saves with ``save_weights_only=True``."""


def save(path: Path, step: int, state: dict[str, Any] | None = None) -> Path:
    snapshot = snapshot_of(state or {"step": torch.tensor(step)}, step)
    list(snapshot.seal())
    path.write_bytes(snapshot.buffer.view[: snapshot.archive.nbytes])
    return path


def damage(path: Path, at: int = 70) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_newest_intact_is_found(tmp_path: Path) -> None:
    files = {step: save(tmp_path / f"{step}.ckpt", step) for step in (3, 9, 12)}
    (tmp_path / "last.ckpt").symlink_to("12.ckpt")
    assert {step: step_of(path) for step, path in files.items()} == {3: 3, 9: 9, 12: 12}
    assert newest_intact(tmp_path) == files[12]
    assert newest_intact(tmp_path, besides=tmp_path / "last.ckpt") == files[9]
    damage(files[12])
    assert newest_intact(tmp_path) == files[9]
    assert newest_intact(tmp_path, besides=files[9]) == files[3]
    assert newest_intact(tmp_path / "nowhere") is None


def test_of_the_same_step_it_is_the_newest(tmp_path: Path) -> None:
    for seconds, name in enumerate(("b.ckpt", "c.ckpt", "a.ckpt")):
        os.utime(save(tmp_path / name, 3), (seconds, seconds))
    assert newest_intact(tmp_path) == tmp_path / "a.ckpt"


@pytest.mark.parametrize("optimizers", [[], [{"state": {}}]])
def test_what_has_only_weights_is_nothing_to_go_on_from(optimizers: list[Any], tmp_path: Path) -> None:
    """A run without optimizers has nothing of them either, and says so."""
    whole = save(tmp_path / "3.ckpt", 3, {**WEIGHTS, "optimizer_states": optimizers})
    weights = save(tmp_path / "9.ckpt", 9, WEIGHTS)
    assert newest_intact(tmp_path) == whole
    assert newest_intact(tmp_path, complete=False) == weights
    damage(whole)
    assert newest_intact(tmp_path) is None


def test_strange_things_do_not_get_in_the_way(tmp_path: Path) -> None:
    good = save(tmp_path / "3.ckpt", 3)
    (tmp_path / "directory.ckpt").mkdir()
    (tmp_path / "dangling.ckpt").symlink_to("nothing.ckpt")
    (tmp_path / "circle.ckpt").symlink_to("circle.ckpt")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    os.mkfifo(tmp_path / "pipe.ckpt")  # opening it would wait for ever
    torch.save({"global_step": 99}, tmp_path / "torch.ckpt")
    assert newest_intact(tmp_path) == good
    for name in ("dangling.ckpt", "circle.ckpt", "directory.ckpt", "gone.ckpt", "gone/gone.ckpt"):
        assert newest_intact(tmp_path, besides=tmp_path / name) == good


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By permissions, or because another process has removed it meanwhile."""
    good, other = save(tmp_path / "3.ckpt", 3), save(tmp_path / "9.ckpt", 9)
    real = retention.step_of

    def then_remove(path: Path) -> int | None:
        step = real(path)
        if path == other:
            path.unlink()
        return step

    monkeypatch.setattr(retention, "step_of", then_remove)
    assert newest_intact(tmp_path) == good


def test_every_damage_to_the_note_is_no_error(tmp_path: Path) -> None:
    path = save(tmp_path / "3.ckpt", 3)
    content = path.read_bytes()
    for at in range(content.index(b"archive/data.pkl") - 30, len(content)):
        path.write_bytes(content)
        damage(path, at)
        assert step_of(path) in (3, None)
