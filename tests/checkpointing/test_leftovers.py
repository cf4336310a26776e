"""What a killed run meant to do is done by the next one, and what it left unfinished is removed (C10)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightning_efficient.checkpointing.leftovers import Intention, sweep
from lightning_efficient.core.buffers import PAGE, HostBuffer
from lightning_efficient.core.durable_file import DurableFile, durable_link

LONG = ["a" * 250 + ".ckpt", "ü" * 124 + ".ckpt", "日" * 83 + ".ckpt", "a" * 222 + ".ckpt"]


@pytest.mark.parametrize("name", LONG)
def test_names_may_be_as_long_as_the_file_system_lets_them_c10(name: str, tmp_path: Path) -> None:
    path, successor = tmp_path / name, tmp_path / "2.ckpt"
    file = DurableFile(path)
    file.append(HostBuffer(PAGE).view)
    assert sweep(tmp_path) == []
    file.commit(10)
    durable_link(path, tmp_path / f"l{name[1:]}")
    Intention(path, successor).withdraw()
    intention = Intention(path, successor)
    assert sweep(tmp_path) == [], "there is no successor"
    successor.write_text("new")
    intention.fulfil()
    assert sorted(os.listdir(tmp_path)) == sorted(["2.ckpt", f"l{name[1:]}"])


def test_an_intention_is_carried_out_by_the_next_run_c10(tmp_path: Path) -> None:
    old, new = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    old.write_text("old")
    (tmp_path / "last.ckpt").symlink_to("1.ckpt")
    Intention(old, new)
    assert sweep(tmp_path) == [], "its successor never came"
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "last.ckpt"]
    Intention(old, new)
    new.write_text("new")
    assert sweep(tmp_path) == [old]
    assert sorted(os.listdir(tmp_path)) == ["2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "new"


def test_an_intention_that_is_fulfilled_leaves_no_note_c10(tmp_path: Path) -> None:
    (tmp_path / "1.ckpt").write_text("old")
    Intention(tmp_path / "1.ckpt", tmp_path / "2.ckpt").fulfil()
    assert not os.listdir(tmp_path)


def test_a_link_to_what_is_removed_names_its_successor_at_once_c10(tmp_path: Path) -> None:
    """ModelCheckpoint asks for the removal of the old file before it asks for the new ``last.ckpt``."""
    old, new, last = tmp_path / "1.ckpt", tmp_path / "2.ckpt", tmp_path / "last.ckpt"
    old.write_text("old")
    last.symlink_to("1.ckpt")
    intention = Intention(old, new)
    new.write_text("new")
    intention.fulfil()
    assert sorted(os.listdir(tmp_path)) == ["2.ckpt", "last.ckpt"]
    assert last.read_text() == "new"


def test_a_file_that_is_replaced_is_no_successor_yet_c10(tmp_path: Path) -> None:
    """A run killed while it writes a new ``last.ckpt`` must not cost the checkpoint that the old one links to."""
    old, last = tmp_path / "1.ckpt", tmp_path / "last.ckpt"
    old.write_text("old")
    last.symlink_to("1.ckpt")
    Intention(old, last)
    assert sweep(tmp_path) == []
    assert last.read_text() == "old"


def test_the_last_intention_counts_c10(tmp_path: Path) -> None:
    old, new = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    old.write_text("old")
    Intention(old, new)
    new.write_text("new")
    Intention(old, tmp_path / "3.ckpt")
    assert sweep(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["1.ckpt", "2.ckpt"]


def test_a_removal_that_fails_is_not_made_up_for_later_c10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the name may be that of a new file."""
    (tmp_path / "1.ckpt").write_text("old")
    intention = Intention(tmp_path / "1.ckpt", tmp_path / "2.ckpt")
    real = os.unlink

    def unlink(path: Path) -> None:
        if Path(path).suffix == ".ckpt":
            raise PermissionError(errno.EPERM, "immutable")
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(PermissionError):
        intention.fulfil()
    assert os.listdir(tmp_path) == ["1.ckpt"]


def test_links_in_a_circle_do_not_stop_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "1.ckpt").write_text("old")
    (tmp_path / "circle").symlink_to("circle")
    Intention(tmp_path / "1.ckpt", tmp_path / "2.ckpt")
    (tmp_path / "2.ckpt").write_text("new")
    assert sweep(tmp_path) == [tmp_path / "1.ckpt"]
