"""States to be saved, and short cuts through the parts that save them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.checkpointing.archive import StorageLayout
from lightning_efficient.checkpointing.skeleton import Skeleton, take_skeleton
from lightning_efficient.checkpointing.snapshot import Snapshot
from lightning_efficient.core.buffers import HostBuffer


def trained(width: int = 8, **adam: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with BatchNorm and a tied weight, and AdamW with moments."""
    model = nn.Sequential(OrderedDict(a=nn.Linear(width, width), norm=nn.BatchNorm1d(width), b=nn.Linear(width, width)))
    model.b.weight = model.a.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adam)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    optimizer.zero_grad()
    model(torch.randn(4, next(model.parameters()).shape[-1])).square().mean().backward()
    optimizer.step()


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 7}


def layout_of(skeleton: Skeleton) -> StorageLayout:
    return StorageLayout([(number, storage.nbytes()) for number, storage in enumerate(skeleton.storages)])


def snapshot_of(state: Any, step: int = 7, watched: Any = None, expected: Any = None) -> Snapshot:
    """A snapshot of which nothing is copied yet."""
    skeleton = take_skeleton(state)
    layout = layout_of(skeleton)
    buffer = HostBuffer(layout.end + len(skeleton.pickled) + layout.directory_nbytes + (1 << 16))
    snapshot = Snapshot(layout, buffer, step)
    snapshot.describe = lambda: skeleton.pickled
    snapshot.expected = expected or {}
    snapshot.offer(dict(enumerate(skeleton.storages)), watched)
    return snapshot


def write(state: Any, path: Path) -> Path:
    """As a file, without the background."""
    snapshot = snapshot_of(state)
    for _ in snapshot.seal():
        pass
    path.write_bytes(snapshot.buffer.view[: snapshot.archive.nbytes])
    return path


def same(one: Any, other: Any) -> bool:
    """Equal in types and values, tensors bit for bit."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
            and one.stride() == other.stride() and one.requires_grad == other.requires_grad
            and torch.equal(one.detach(), other.detach())
        )  # fmt: skip
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
