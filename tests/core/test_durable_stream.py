"""A file written in pieces of any length is what was written, or is not there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_efficient.core import durable_stream as module
from lightning_efficient.core.buffers import PAGE
from lightning_efficient.core.durable_stream import durable_stream


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_length_follow_each_other(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 2 * PAGE)
    chance, expected = random.Random(seed), b""
    with durable_stream(tmp_path / "a") as stream:
        for _ in range(chance.randrange(30)):
            piece = chance.randbytes(chance.choice((0, 1, 100, PAGE, 2 * PAGE, 5 * PAGE + 3)))
            kind = chance.randrange(3)
            data = (piece, memoryview(piece), np.frombuffer(piece, np.uint8))[kind]
            assert stream.write(data) == len(piece)
            expected += piece
        stream.flush()
        assert stream.nbytes == len(expected)
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a"]


def test_elements_count_by_their_bytes(tmp_path: Path) -> None:
    data = torch.arange(1000, dtype=torch.float64).numpy()
    with durable_stream(tmp_path / "a") as stream:
        assert stream.write(data) == 8000
    assert (tmp_path / "a").read_bytes() == data.tobytes()


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with durable_stream(tmp_path / "a") as stream:
            stream.write(bytes(3 * PAGE))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
