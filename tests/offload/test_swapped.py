"""Whole tensors that are out while nobody uses them, and back bit for bit (O8)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_efficient.offload.saved.swapped import Swapped
from lightning_efficient.offload.tiers.tier import TierError
from tests.offload.file_tier import FileTier


@pytest.fixture
def tier() -> Iterator[FileTier]:
    tier = FileTier()
    yield tier
    tier.open.set()
    tier.close()


def tensors() -> list[Tensor]:
    base = torch.randn(40, 50)
    return [
        base.t(), base[3:], torch.arange(1000), torch.randn(300, dtype=torch.bfloat16), torch.rand(99) > 0.5,
        torch.tensor(3.0), torch.empty(0), nn.Parameter(torch.randn(8, 8)),
        torch.tensor([float("nan"), -0.0], dtype=torch.complex64),
    ]  # fmt: skip


def same(found: Tensor, wanted: Tensor) -> bool:
    bits = [one.detach().contiguous().view(-1).view(torch.uint8) for one in (found, wanted)]
    return torch.equal(*bits) and found.stride() == wanted.stride()


def test_out_and_back_bit_for_bit_o8(tier: FileTier) -> None:
    held = tensors()
    wanted = [one.detach().clone(memory_format=torch.preserve_format) for one in held]
    versions = [one._version for one in held]
    swapped = Swapped(held, tier)
    assert swapped.nbytes == 40 * 50 * 4 + 8000 + 600 + 99 + 4 + 8 * 8 * 4 + 16
    for _ in range(3):
        swapped.out()
        swapped.wait()
        assert swapped.away_bytes == swapped.nbytes
        assert not any(one.untyped_storage().nbytes() for one in held)
        swapped.back()
        swapped.wait()
        assert swapped.away_bytes == 0
        assert all(same(one, value) for one, value in zip(held, wanted, strict=True))
        with torch.no_grad():
            held[2].add_(1)
            wanted[2].add_(1)
    assert [one._version for one in held] == [version + 3 * (place == 2) for place, version in enumerate(versions)]
    swapped.close()
    assert not tier.reserved


def test_neither_way_holds_up_the_caller_and_back_stops_what_has_not_left(tier: FileTier) -> None:
    held = tensors()
    wanted = [one.detach().clone(memory_format=torch.preserve_format) for one in held]
    swapped = Swapped(held, tier)
    tier.open.clear()
    swapped.out()
    swapped.back()
    tier.open.set()
    swapped.wait()
    assert swapped.away_bytes == 0
    assert not tier.reads
    swapped.out()
    swapped.wait()
    tier.open.clear()
    swapped.back()
    tier.open.set()
    swapped.close()  # brings back
    assert all(same(one, value) for one, value in zip(held, wanted, strict=True))
    with pytest.raises(RuntimeError, match=r"close\(\) has been called"):
        swapped.out()
    swapped.close()


def test_what_is_not_in_use_is_not_in_memory_while_it_is_out(tier: FileTier) -> None:
    optimizer = torch.optim.AdamW([parameter := nn.Parameter(torch.randn(64, 64))], lr=0.1)
    again = nn.Parameter(parameter.detach().clone())
    plain = torch.optim.AdamW([again], lr=0.1)
    swapped = None
    for step in range(4):
        for one in (parameter, again):
            one.grad = torch.full((64, 64), 1.0 + step)
        if swapped is not None:
            swapped.back()
            swapped.wait()
        optimizer.step()
        plain.step()
        if swapped is None:
            swapped = Swapped([value for value in optimizer.state[parameter].values() if value.dim()], tier)
        swapped.out()
    assert torch.equal(parameter, again)
    assert swapped is not None
    swapped.close()
    assert torch.equal(optimizer.state[parameter]["exp_avg"], plain.state[again]["exp_avg"])


def test_what_cannot_be_given_up_stays(tier: FileTier) -> None:
    foreign = torch.from_numpy(torch.randn(100).numpy())
    sparse = torch.eye(8).to_sparse()
    swapped = Swapped([foreign, sparse, torch.randn(10)], tier)
    assert swapped.stayed_bytes == 400 + 256
    assert swapped.nbytes == 40
    swapped.out()
    swapped.wait()
    assert foreign.untyped_storage().nbytes() == 400
    swapped.close()


def test_nothing_is_lost_when_the_tier_fails(tier: FileTier) -> None:
    held = tensors()
    wanted = [one.detach().clone(memory_format=torch.preserve_format) for one in held]
    swapped = Swapped(held, tier)
    tier.fail = True
    swapped.out()
    with pytest.raises(TierError, match="the disk is dying"):
        swapped.wait()
    assert all(same(one, value) for one, value in zip(held, wanted, strict=True))
    tier.fail = False
    swapped.out()
    swapped.wait()
    tier.fail = True
    swapped.back()
    with pytest.raises(TierError, match="the disk is dying"):
        swapped.wait()
    assert swapped.away_bytes == swapped.nbytes
    with pytest.raises(TierError, match="the disk is dying"):
        swapped.close()
    tier.fail = False
    swapped.close()
    assert all(same(one, value) for one, value in zip(held, wanted, strict=True))
    assert not tier.reserved


def test_a_tier_without_room_says_so_at_once() -> None:
    tier = FileTier(capacity_bytes=100)
    with pytest.raises(TierError, match="full"):
        Swapped([torch.randn(100)], tier)
    tier.close()


def test_the_meta_device_is_refused(tier: FileTier) -> None:
    with pytest.raises(ValueError, match="Tensors on meta cannot be moved"):
        Swapped([torch.empty(10, device="meta")], tier)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["host", "file"])
def test_device_memory_is_out_and_back(tier: FileTier, kind: str) -> None:
    from lightning_efficient.offload.tiers.host import HostTier

    place = tier if kind == "file" else HostTier("64MiB", pinned=True)
    held = [torch.randn(1 << 20, device="cuda"), torch.arange(1000, device="cuda")]
    wanted = [one.clone() for one in held]
    swapped = Swapped(held, place)
    for _ in range(3):
        swapped.out()
        swapped.wait()
        assert swapped.away_bytes == swapped.nbytes
        swapped.back()
        swapped.wait()
        assert all(torch.equal(one, value) for one, value in zip(held, wanted, strict=True))
    swapped.close()
