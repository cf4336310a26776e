"""Streamed parameters: no value is lost, and nobody computes with one that is away."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_efficient.core.step_in_backward import StepInBackward
from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.offload.streaming.guarded import Guarded
from lightning_efficient.offload.streaming.streaming import ParameterStream
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import Tier, TierError
from tests.helpers.fitting import assert_same_tree
from tests.offload.memory_tier import MemoryTier
from tests.offload.streamed import (
    assert_ordinary,
    counted,
    held_bytes,
    mlp,
    step_each,
    stream_of,
)


def test_o8_what_is_not_in_use_makes_room_for_the_next() -> None:
    model, x = mlp(), torch.randn(2, 8)
    stream = stream_of(model, MemoryTier(), 0.2)
    seen = []
    for part in model:
        part.register_forward_pre_hook(
            lambda *_: seen.append([one.untyped_storage().nbytes() for one in model.parameters()])
        )
    model(x)
    assert not any(seen[-1][:8])  # the first are gone when the last begins
    stream.end_step()
    assert held_bytes(model) == 0


@pytest.mark.parametrize("way", ["ensure", "in place", "data", "init"])
def test_o8_changes_reach_the_tier(way: str) -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier(), 0.4)
    parameter = model[2][0].weight
    if way == "ensure":
        with stream.ensure([parameter]):
            parameter.data.fill_(3)
            stream.changed(parameter)
    elif way == "in place":
        with torch.no_grad():
            parameter.fill_(3)
    elif way == "data":
        parameter.data.fill_(3)
    else:
        nn.init.constant_(parameter, 3)
    assert torch.equal(model.state_dict()["2.0.weight"], torch.full((16, 8), 3.0))
    stream.end_step()
    assert not parameter.untyped_storage().nbytes()
    assert parameter.eq(3).all()


def test_o8_what_is_trained_from_now_on_gets_a_versioned_record() -> None:
    model = mlp(2)
    model[0][0].weight.requires_grad_(False)
    stream = stream_of(model, MemoryTier())
    slot = next(slot for slot in stream._slots if slot.parameters[0] is model[0][0].weight)
    assert not slot.record.versioned
    value = model.state_dict()["0.0.weight"].clone()
    model[0][0].weight.requires_grad_(True)
    stream.begin_step()
    assert slot.record.versioned
    assert torch.equal(model.state_dict()["0.0.weight"], value)
    stream.end_step()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": False}])
def test_o6_updates_within_backward(options: dict[str, bool]) -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    stream = stream_of(model, MemoryTier(), 0.4)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, **options) for one in (plain, model)]
    StepInBackward([optimizers[0]], ready=lambda: True).attach()
    StepInBackward([optimizers[1]], ready=lambda: True, updated=lambda one, state: stream.changed(one)).attach()
    for _ in range(3):
        for one in (plain, model):
            one(x).square().mean().backward()
        stream.end_step()
        assert held_bytes(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert stream.statistics.writes == 24 * 4  # the first values, and three updates


def test_o8_walking_over_parameters_fetches_nothing() -> None:
    model = mlp()
    tier = MemoryTier()
    stream = stream_of(model, tier, 0.2)
    calls = tier.calls["read"]
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        assert isinstance(parameter, nn.Parameter)
        assert parameter.numel() == parameter.shape.numel()
        assert parameter.dtype == torch.float32
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.requires_grad_(False).requires_grad_(True)
    optimizer.zero_grad()
    model.zero_grad(set_to_none=False)
    assert list(model.state_dict())
    model.to("cpu", torch.float32).float().cpu().train()
    assert tier.calls["read"] == calls
    stream.detach()


def test_o8_nobody_computes_with_what_is_away() -> None:
    """Also who walks over all parameters, holds one from before, or has it in a list of his own."""
    model = mlp(2)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    held = list(model.parameters())
    stream = stream_of(model, MemoryTier(), 1)
    assert all(type(parameter) is Guarded for parameter in held)
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
    stream.end_step()
    norms = torch._foreach_norm(held)
    assert all(torch.equal(a, b.norm()) for a, b in zip(norms, expected, strict=True))
    stream.end_step()
    view = held[0].t()  # its memory stays until the end of the step
    model(torch.randn(2, 8))
    assert torch.equal(view, expected[0].t())
    assert torch.equal(copy.deepcopy(held[1]), expected[1])
    assert "Parameter containing" in repr(held[2])


def test_o8_state_dict_round_trip_without_fetching() -> None:
    model, other = mlp(), mlp()
    expected = {name: value.clone() for name, value in other.state_dict().items()}
    tier = MemoryTier()
    stream = stream_of(model, tier, 0.2)
    reads = tier.calls["read"]
    assert model.load_state_dict(expected) == nn.Module().load_state_dict({})
    state = model.state_dict()
    assert tier.calls["read"] == reads
    assert stream.statistics.resident_bytes == 0
    assert list(state) == list(expected)
    assert state._metadata == other.state_dict()._metadata
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    x = torch.randn(2, 8)
    assert torch.equal(model(x), other(x))

    halves = {name: value.mul(2).double() for name, value in expected.items()}
    model.load_state_dict(halves)  # some are on the device now
    assert all(torch.equal(value, expected[name] * 2) for name, value in model.state_dict().items())
    assert all(torch.equal(value, expected[name] * 2) for name, value in model.named_parameters())


def test_o8_state_dict_has_changes_that_were_not_announced() -> None:
    model = mlp()
    stream_of(model, MemoryTier(), 0.4)
    with torch.no_grad():
        model[0][0].bias.fill_(7)
    assert model.state_dict()["0.0.bias"].eq(7).all()


def test_o8_load_state_dict_reports_as_ever() -> None:
    model = mlp(1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream_of(model, MemoryTier(), 1)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.2.bias\""):
        model.load_state_dict({name: value for name, value in state.items() if name != "0.2.bias"})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.2.bias"):
        model.load_state_dict({**state, "0.2.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        model.load_state_dict({**state, "more": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"assign=True"):
        model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="keep_vars=True"):
        model.state_dict(keep_vars=True)


def test_o6_tiers_that_fail_are_named_and_nothing_is_lost() -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain, tier = copy.deepcopy(model), MemoryTier()
    stream = stream_of(model, tier, 0.4)
    tier.broken = {"read"}
    with pytest.raises(TierError, match="read failed"):
        model(x)
    tier.broken = set()
    stream.end_step()
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        model[5][2].weight.add_(1)
        plain[5][2].weight.add_(1)
    tier.broken = {"write"}
    with pytest.raises(TierError, match="write failed"):
        stream.end_step()
    assert model[5][2].weight.untyped_storage().nbytes()  # the only copy
    tier.broken = set()
    stream.end_step()
    assert held_bytes(model) == 0
    assert torch.equal(model(x), plain(x))


def tiers(tmp_path: Path) -> list[Tier]:
    return [HostTier("1MiB"), DiskTier(tmp_path / "swap", buffer_bytes="64KiB")]


def test_o6_o9_real_tiers_at_once(tmp_path: Path) -> None:
    """Part of the model on the host, part on a disk."""
    model = ByteTransformer(layers=4, width=16, heads=2, context=8, vocabulary=32)
    plain, x = copy.deepcopy(model), torch.randint(32, (2, 8))
    both = tiers(tmp_path)
    placed = {name: both[number % 2] for number, (name, _) in enumerate(model.named_parameters())}
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    stream = ParameterStream(model, placed, budget_bytes=nbytes // 2)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, foreach=False) for one in (plain, model)]
    for _ in range(3):
        stream.begin_step()
        for one in (plain, model):
            one.zero_grad()
            one(x).square().mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        optimizers[0].step()
        step_each(optimizers[1], stream)
        stream.end_step()
        for tier in both:
            tier.commit()
    assert held_bytes(model) == 0
    assert_same_tree(dict(model.state_dict()), dict(plain.state_dict()), "weights")
    assert stream.statistics.peak_bytes <= nbytes // 2
    assert torch.equal(model(x), plain(x))
    stream.detach()
    assert_ordinary(model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    for tier in both:
        tier.close()


def test_o8_views_keep_the_memory() -> None:
    model = mlp()
    early = model[0][0].weight.detach().t()  # from before the stream
    expected = early.clone()
    stream = stream_of(model, MemoryTier(), 0.4)
    late = model[1][0].weight.t()
    value = late.clone()
    for _ in range(2):
        model(torch.randn(2, 8))
        stream.end_step()
        assert torch.equal(early, expected)
        assert torch.equal(late, value)
        assert stream.statistics.resident_bytes == held_bytes(model) == 512 + 512
    del early, late
    stream.end_step()
    assert held_bytes(model) == 0

    array = model[1][2].bias.detach().numpy()  # torch never gives such memory back
    for _ in range(2):
        array[:] = array + 1
        model[1][2].bias.data  # noqa: B018  (so that it is known to change without trace)
        stream.end_step()
        assert torch.equal(model.state_dict()["1.2.bias"], torch.from_numpy(array))
    assert held_bytes(model) == 32
    stream.detach()


def test_o8_one_stream_after_the_other() -> None:
    model = mlp()
    expected = [one.detach().clone() for one in model.parameters()]
    streams = []
    for share in (0.4, 1.0, 0.3):
        streams.append(stream_of(model, MemoryTier(), share))
        model(torch.randn(2, 8)).sum().backward()
        streams[-1].end_step()
        assert held_bytes(model) == 0
        streams[-1].detach()
        assert_ordinary(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_o8_what_is_written_to_data_again_and_again_reaches_the_tier() -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier(), 0.4)
    data = model[0][0].bias.data
    for value in (1.0, 2.0, 3.0):
        data.fill_(value)
        stream.end_step()
        assert model.state_dict()["0.0.bias"].eq(value).all()
    del data
    stream.end_step()
    assert held_bytes(model) == 0
    assert model[0][0].bias.eq(3).all()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_o8_an_optimizer_that_knows_nothing_of_it_loses_nothing(options: dict[str, bool]) -> None:
    model, x = mlp(), torch.randn(2, 8)
    plain = copy.deepcopy(model)
    stream = stream_of(model, MemoryTier(), 1)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, **options) for one in (plain, model)]
    for _ in range(3):
        for one, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        stream.end_step()
        assert held_bytes(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))


def test_o8_one_pass_over_all_parameters_stays_within_the_budget() -> None:
    """As an average of weights makes, and a penalty."""
    model = mlp()
    average, plain = copy.deepcopy(model), copy.deepcopy(model)
    budget = sum(one.nbytes for one in model.parameters()) // 4
    stream = stream_of(model, MemoryTier(), budget_bytes=budget)
    with counted(model, budget):
        with torch.no_grad():
            for mean, one in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(one.detach() + 1, 0.5)
        penalties = [sum(one.square().sum() for one in model.parameters())]
        penalties[0].backward()
    penalties.append(sum(one.square().sum() for one in plain.parameters()))
    penalties[1].backward()
    assert torch.equal(*penalties)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert all(
        torch.equal(a, b.lerp(b + 1, 0.5)) for a, b in zip(average.parameters(), plain.parameters(), strict=True)
    )
    stream.end_step()
    assert held_bytes(model) == 0


def test_o6_a_step_that_ends_while_parameters_are_held() -> None:
    model = mlp()
    stream = stream_of(model, MemoryTier(), 0.4)
    parameter = model[0][0].weight
    with stream.ensure([parameter]):
        stream.end_step()
        assert held_bytes(model) == 512
        with torch.no_grad():
            parameter.fill_(1)
    stream.settle()
    assert stream.statistics.writes == 25  # the first values, and this one
    stream.end_step()
    assert held_bytes(model) == 0
    assert parameter.eq(1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_o6_on_a_gpu_from_pinned_memory_and_a_disk(pinned: bool, tmp_path: Path) -> None:
    model = ByteTransformer(layers=6, width=256, heads=4, context=64, vocabulary=64)
    plain, x = copy.deepcopy(model).cuda(), torch.randint(64, (4, 64), device="cuda")
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    tier: Tier = HostTier(3 * nbytes, pinned=True) if pinned else DiskTier(tmp_path / "swap")
    before = torch.cuda.memory_allocated()
    placed = {name: tier for name, _ in model.named_parameters()}
    stream = ParameterStream(model, placed, budget_bytes=nbytes // 2, device=torch.device("cuda", 0))
    assert torch.cuda.memory_allocated() - before < nbytes // 10
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, foreach=False) for one in (plain, model)]
    for _ in range(4):
        stream.begin_step()
        for one, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().mean().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
        optimizers[0].step()
        step_each(optimizers[1], stream)
        stream.end_step()
        assert held_bytes(model) == 0
    assert stream.statistics.peak_bytes <= nbytes // 2
    stream.detach(torch.device("cpu"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    tier.close()
