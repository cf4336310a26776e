"""No byte of a checkpoint changes unnoticed, and what is damaged has a name."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_efficient.checkpointing.engine import CheckpointEngine
from lightning_efficient.checkpointing.retention import step_of
from lightning_efficient.checkpointing.verification import CheckpointDamagedError, top_level_keys, verify
from tests.checkpointing.states import checkpoint_of, same, trained, write


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
    for nbytes in [*range(100), *range(100, len(content) - 200, 13), *range(len(content) - 200, len(content))]:
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


def test_checkpoints_of_torch_that_are_cut_are_noticed(tmp_path: Path) -> None:
    path, bad = tmp_path / "torch.ckpt", tmp_path / "bad.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}}, path)
    content = path.read_bytes()
    for nbytes in range(len(content)):
        bad.write_bytes(content[:nbytes])
        with pytest.raises(CheckpointDamagedError):
            verify(bad)


def test_a_state_without_tensors_is_as_safe(tmp_path: Path) -> None:
    path = write({"epoch": 3}, tmp_path / "good.ckpt")
    verify(path)
    for at in range(path.stat().st_size):
        with pytest.raises(CheckpointDamagedError):
            verify(flipped(path, at, tmp_path / "bad.ckpt"))


def test_ours_is_known_without_its_first_bytes(state: dict[str, Any], tmp_path: Path) -> None:
    """A lost sector at either end, or at both."""
    content = write(state, tmp_path / "good.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    for damaged in (bytes(512) + content[512:], b"XXXX" + content[4:-512], b"XXXX" + content[4:-40] + bytes(40)):
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointDamagedError):
            verify(bad)


def test_what_has_no_checksums_is_left_to_torch(state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    verify(path)
    assert same(torch.load(path, weights_only=True), state)
    path.write_bytes(path.read_bytes()[:-100])
    verify(path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)
    path.write_bytes(pickle.dumps({"lightning_efficient.json": "lightning_efficient seal 1: 00000000"}))
    verify(path)
    computes = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        set_crc32_options(computes)
    verify(path)


def test_compressed_archives_are_read_too(tmp_path: Path) -> None:
    path, packed = tmp_path / "torch.ckpt", tmp_path / "packed.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    verify(packed)
    with zipfile.ZipFile(packed) as archive:
        member = archive.getinfo("torch/data/0")
    assert member.compress_size < member.file_size
    inside = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    with pytest.raises(CheckpointDamagedError, match=r"the bytes of 'state_dict.weight' \(record 'data/0'\)"):
        verify(flipped(packed, inside, tmp_path / "bad.ckpt"))


def test_any_two_damages_have_a_name(state: dict[str, Any], tmp_path: Path) -> None:
    """And not an error of the module that reads archives."""
    path = write(state, tmp_path / "good.ckpt")
    content, bad, chance = path.read_bytes(), tmp_path / "bad.ckpt", random.Random(0)
    tail = content.rindex(b"archive/data.pkl") - 46
    places = [*range(200), *range(tail, len(content))]  # the headers of the first records, and the directory's end
    for _ in range(2000):
        damaged = bytearray(content)
        for at in chance.sample(places, 2):
            damaged[at] ^= chance.randrange(1, 256)
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointDamagedError):
            verify(bad)


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "text.ckpt"
    path.write_text("no archive")
    verify(path)
    assert step_of(path) is None
    assert top_level_keys(path) == frozenset()
    path.write_bytes(b"")
    with pytest.raises(CheckpointDamagedError, match="it is empty"):
        verify(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/some.txt", "text")
    verify(path)
    with pytest.raises(CheckpointDamagedError, match=r"the bytes of record 'some.txt' have changed"):
        verify(flipped(path, path.read_bytes().index(b"text"), path))


def test_the_keys_are_read_without_running_code_of_the_file(state: dict[str, Any], tmp_path: Path) -> None:
    state["anything"] = [_Runs(tmp_path / "ran"), _Runs.Inside()]
    path = write(state, tmp_path / "ours.ckpt")
    torch.save(state, tmp_path / "torch.ckpt")
    for each in (path, tmp_path / "torch.ckpt"):
        assert top_level_keys(each) == {"state_dict", "optimizer_states", "global_step", "anything"}
    assert not (tmp_path / "ran").exists()
    assert top_level_keys(write([1, 2], path)) == frozenset()


class _Runs:
    """Writes a file when it is unpickled."""

    class Inside:
        pass

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


# -- files of released versions --------------------------------------------------------------------------------------

FIXTURE = Path(__file__).parent / "data" / "format1.pt"
"""Of the first format, written by :func:`write_fixture`; it must be readable for ever, and is never written again."""


def released_state() -> dict[str, Any]:
    """What is in it: of each kind something, the same on every machine."""
    tied = torch.arange(6.0).view(2, 3)
    weights = OrderedDict(encoder=tied, decoder=tied, half=torch.arange(5).to(torch.bfloat16) / 4, transposed=tied.t())
    weights["count"] = torch.tensor(12)
    weights._metadata = OrderedDict({"": {"version": 1}, "norm": {"version": 2}})  # type: ignore[attr-defined]
    moments = {"step": torch.tensor(3.0), "exp_avg": tied / 8, "exp_avg_sq": tied.square() / 64}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "params": [0]}
    return {
        "epoch": 1,
        "global_step": 3,
        "state_dict": weights,
        "optimizer_states": [{"state": {0: moments}, "param_groups": [group]}],
        "callbacks": {"Counter{'every': 2}": {"seen": [1, 2, None], "best": float("inf"), "mask": torch.ones(3) > 0}},
    }


def write_fixture(path: Path = FIXTURE) -> None:
    """By hand, once for each version of the format."""
    engine = CheckpointEngine(memory_cap=None)
    engine.save(released_state(), path, 3)
    engine.close()
    assert not engine.take_failures()


def test_a_file_of_the_first_format_is_read_as_it_was_meant() -> None:
    verify(FIXTURE)
    assert step_of(FIXTURE) == 3
    loaded, meant = torch.load(FIXTURE, weights_only=True), released_state()
    assert same(loaded, meant)
    weights = loaded["state_dict"]
    assert weights._metadata == meant["state_dict"]._metadata
    assert len({weights[name].untyped_storage().data_ptr() for name in ("encoder", "decoder", "transposed")}) == 1


def test_today_the_same_is_written(tmp_path: Path) -> None:
    """Or the format is another, and needs a number and a file of its own."""
    write_fixture(tmp_path / "now.pt")
    with zipfile.ZipFile(FIXTURE) as one, zipfile.ZipFile(tmp_path / "now.pt") as other:
        assert [(m.filename, m.header_offset) for m in one.infolist() if "data/" in m.filename] == [
            (m.filename, m.header_offset) for m in other.infolist() if "data/" in m.filename
        ]
        assert one.read("archive/lightning_efficient.json") == other.read("archive/lightning_efficient.json")
