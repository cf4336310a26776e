"""Saved tensors on another tier: the same bits, the same errors, and what goes there (O2, O3, O8)."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_efficient.core.torch_internals import WeakStorage
from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from tests.offload.file_tier import FileTier
from tests.offload.saving import (
    CASES,
    Case,
    check_balance,
    checkpointed,
    gradients,
    offload,
)


@pytest.fixture
def tier() -> Iterator[FileTier]:
    tier = FileTier()
    yield tier
    tier.open.set()
    tier.close()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.mark.parametrize("keep_bytes", [0, 10_000])
@pytest.mark.parametrize("staging_bytes", [20_000, 1 << 20])
def test_gradients_are_those_of_plain_training_o2(
    case: Case, tier: FileTier, keep_bytes: int, staging_bytes: int
) -> None:
    model, loss, batch = case
    states = {name: value.clone() for name, value in model.state_dict().items()}
    exact = [gradients(model, loss, None) for _ in range(3)]
    model.load_state_dict(states)
    chosen = offload(tier, model, keep_bytes=keep_bytes, staging_bytes=staging_bytes)
    for step in range(3):
        found = gradients(model, loss, chosen, *batch)
        assert all(torch.equal(a, b) for a, b in zip(found, exact[step], strict=True))
    statistics = chosen.statistics()
    assert statistics.stash.written_bytes > 0
    check_balance(tier, chosen)


@pytest.mark.parametrize("name", ["mlp", "gpt with dropout", "convolutions", "checkpoint", "bf16 autocast"])
@pytest.mark.parametrize("kind", ["disk", "host"])
def test_gradients_are_those_of_plain_training_on_a_real_disk_and_in_host_memory_o2(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, loss, batch = CASES[name]()
    states = {key: value.clone() for key, value in model.state_dict().items()}
    exact = [gradients(model, loss, None) for _ in range(3)]
    model.load_state_dict(states)
    place = DiskTier(tmp_path / "swap") if kind == "disk" else HostTier("16MiB")
    chosen = SavedTensorOffload(place, staging_bytes=100_000, minimum_bytes=1024, held=model.parameters)
    for step in range(3):
        found = gradients(model, loss, chosen, *batch)
        assert all(torch.equal(a, b) for a, b in zip(found, exact[step], strict=True))
    assert chosen.statistics().stash.written_bytes > 0
    gc.collect()
    assert chosen.statistics().stash.tier_bytes == 0
    chosen.close()
    if isinstance(place, HostTier):
        assert place.reserved_bytes == 0
    place.close()


# -- what goes, and what stays ----------------------------------------------------------------------------------------


def test_only_inputs_of_checkpointed_blocks_go_o3(tier: FileTier) -> None:
    model, loss, batch = checkpointed(use_reentrant=False)
    chosen = offload(tier, model)
    inputs: set[int] = set()
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda module, args: inputs.add(args[0].nbytes))
    with chosen.saving(*batch):
        value = loss()
    statistics = chosen.statistics()
    hidden = inputs.pop()
    assert not inputs
    assert statistics.put_bytes - 4 * hidden < 2 * hidden + 4 * 32 * 257 * 4 + 2 * 4 * 32 * 4  # the head
    value.backward()
    assert chosen.statistics().put == statistics.put, "what is computed again stays where it is"
    del value
    check_balance(tier, chosen)


def test_what_is_computed_again_within_the_context_stays(tier: FileTier) -> None:
    """As in manual optimization, where backward runs within the training step."""
    model, loss, batch = checkpointed(use_reentrant=True)
    chosen = offload(tier, model)
    with chosen.saving(*batch):
        value = loss()
        put = chosen.statistics().put
        value.backward()
    assert chosen.statistics().put == put
    assert chosen.statistics().stayed["in backward"][0] > 0
    del value
    check_balance(tier, chosen)


def test_views_of_one_storage_go_once(tier: FileTier) -> None:
    chosen = offload(tier)
    x = torch.randn(2, 64, 3 * 64, requires_grad=True)
    with chosen.saving(x):
        qkv = x * 1.0
        queries, keys, values = (part.view(2, 64, 2, 32).transpose(1, 2) for part in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(queries, keys, values)
        extra = (qkv.exp() + qkv[1].sin()).sum()
    assert chosen.statistics().put == 4  # all three, the output, the exponential, the log-sum-exp
    assert chosen.statistics().shared == 3
    (out.sum() + extra).backward()


def test_tensors_that_share_memory_and_not_their_counts_are_told_apart(tier: FileTier) -> None:
    chosen = offload(tier)
    base = torch.randn(1000)
    handles, wanted = [], []
    for _ in range(3):
        alias = base.data  # with a count of its own, which begins at nought
        alias.add_(1)
        wanted.append(alias.clone())
        with chosen.saving():
            pass
        handles.append(chosen._pack(alias))
        tier.flush()
    assert chosen.statistics().put == 3
    assert all(torch.equal(handle.tensor(), value) for handle, value in zip(handles, wanted, strict=True))


def test_a_small_view_does_not_hold_its_storage(tier: FileTier) -> None:
    chosen = offload(tier)
    x = torch.randn(100_000, requires_grad=True)
    seen: list[WeakStorage] = []
    with chosen.saving(x):
        large = x * 2
        seen.append(WeakStorage(large.untyped_storage()))
        out = large[:100].exp().sum() + large[501:601].sin().sum() + large[700:702].cos().sum()
        del large
    assert seen[0].get() is None
    assert chosen.statistics().put == 0
    exact = x.detach().clone().requires_grad_()
    large = exact * 2
    (large[:100].exp().sum() + large[501:601].sin().sum() + large[700:702].cos().sum()).backward()
    out.backward()
    assert torch.equal(x.grad, exact.grad)  # type: ignore[arg-type]


def test_parameters_buffers_and_the_batch_stay(tier: FileTier) -> None:
    weight, buffer, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64), torch.randn(64, 64)
    chosen = SavedTensorOffload(tier, staging_bytes=1 << 20, minimum_bytes=1, held=lambda: [weight, buffer])
    with chosen.saving(x):
        out = (x[:, :32] @ weight.t()[:32]) @ (weight * buffer.t())
    assert chosen.statistics().put_bytes == 2 * 64 * 64 * 4  # the first product, and the last's right side
    assert chosen.statistics().stayed["held"][0] == 2
    out.sum().backward()


def test_sparse_tensors_and_subclasses_stay(tier: FileTier) -> None:
    class Labelled(Tensor):
        pass

    dense = torch.randn(64, 64, requires_grad=True)
    sparse, labelled = torch.eye(64).to_sparse(), torch.randn(64, 64).as_subclass(Labelled)
    exact = torch.autograd.grad((torch.sparse.mm(sparse, dense) * labelled).sum(), dense)[0]
    chosen = offload(tier)
    with chosen.saving():
        out = (torch.sparse.mm(sparse, dense) * labelled).sum()
    assert torch.equal(torch.autograd.grad(out, dense)[0], exact)
    assert chosen.statistics().stayed["not plain"][0] == 2


def test_memory_of_numpy_stays(tier: FileTier) -> None:
    x = torch.from_numpy(torch.randn(64, 64).numpy()).requires_grad_()
    chosen = offload(tier)
    with chosen.saving():
        x.exp().sum()
        x.sin().sum().backward()
    assert chosen.statistics().stayed["not torch's memory"] == (1, 64 * 64 * 4)


def test_memory_is_given_up_once_written_and_not_before_o8(tier: FileTier) -> None:
    chosen = offload(tier)
    x = torch.randn(64, 64, requires_grad=True)
    tier.open.clear()
    with chosen.saving():
        hidden = x * 2
        storage = WeakStorage(hidden.untyped_storage())
        out = hidden.sin()
        del hidden
        out = out.sum()
        assert storage.get() is not None
        tier.open.set()
        tier.flush()
        chosen.statistics()
        assert storage.get() is None
    out.backward()
    assert torch.equal(x.grad, (x * 2).cos() * 2)  # type: ignore[arg-type]


# -- exactness of what comes back -------------------------------------------------------------------------------------


def shapes() -> list[Tensor]:
    base = torch.randn(40, 50)
    return [
        base, base.t(), base[3:30, 5:], base[:, ::3], base[7:8].expand(20, 50), base.flatten()[17:1999],
        torch.randn(8, 3, 9, 9).to(memory_format=torch.channels_last), torch.randn(600) > 0,
        torch.randn(700, dtype=torch.complex128), torch.randint(0, 9, (900,), dtype=torch.int16),
        torch.randn(3001, dtype=torch.bfloat16), torch.tensor([float("nan"), -0.0, float("inf")]).repeat(500),
        torch.randn(10_000).as_strided((30, 40), (7, 3), 5), torch.randn(9000)[5:8000:3],
        torch.randn(5000).to(torch.float8_e4m3fn), torch.empty(0, 7),
    ]  # fmt: skip


@pytest.mark.parametrize("keep_bytes", [0, 5000, 1 << 20])
def test_any_order_and_any_shape_o8(tier: FileTier, keep_bytes: int) -> None:
    generator = random.Random(0)
    chosen = offload(tier, staging_bytes=30_000, keep_bytes=keep_bytes, minimum_bytes=512)
    for _ in range(4):
        tensors = shapes()
        wanted = [(one.clone(), one.stride(), one.storage_offset()) for one in tensors]
        whole = [one.nbytes == one.untyped_storage().nbytes() for one in tensors]
        with chosen.saving():
            handles = [chosen._pack(one) for one in tensors]
        del tensors
        tier.flush()
        order = list(range(len(handles))) + generator.choices(range(len(handles)), k=10)
        generator.shuffle(order)
        for place in order:
            found, (value, stride, offset) = handles[place].tensor(), wanted[place]
            assert torch.equal(_bits(found), _bits(value))
            assert (found.shape, found.stride(), found.dtype) == (value.shape, stride, value.dtype)
            assert found.storage_offset() * found.itemsize % 64 == offset * found.itemsize % 64
            assert not whole[place] or found.storage_offset() == offset
        handles.clear()
        del found
    check_balance(tier, chosen)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


# -- edits in place ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("minimum_bytes", [1, 1 << 20])
@pytest.mark.parametrize("part", [slice(None), slice(100, 900)])
def test_an_edit_in_place_raises(tier: FileTier, keep_bytes: int, minimum_bytes: int, part: slice) -> None:
    chosen = offload(tier, keep_bytes=keep_bytes, minimum_bytes=minimum_bytes)
    x = torch.randn(20_000, requires_grad=True)
    with chosen.saving():
        hidden = x * 1.0
        out = hidden[part].exp() * hidden[part]
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("edited", [0, 1])
def test_an_edit_of_a_parameter_or_of_the_batch_raises(tier: FileTier, edited: int) -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64)
    chosen = offload(tier, nn.ParameterList([weight]))
    with chosen.saving(x):
        out = F.linear(F.linear(x, weight), weight)
    with torch.no_grad():
        (weight, x)[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_edit_before_it_is_saved_again_is_seen(tier: FileTier) -> None:
    def loss(x: Tensor) -> Tensor:
        hidden = x * 1.0
        first = hidden.detach().exp() * x
        with torch.no_grad():
            hidden.mul_(2)
        return (first + hidden.detach() * x).sum()

    x = torch.randn(1000, requires_grad=True)
    exact = torch.autograd.grad(loss(x), x)[0]
    chosen = offload(tier)
    with chosen.saving(x):
        value = loss(x)
    assert torch.equal(torch.autograd.grad(value, x)[0], exact)


# -- streamed parameters ----------------------------------------------------------------------------------------------


def test_parameters_whose_memory_is_given_up_meanwhile_o6(tier: FileTier) -> None:
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 64, requires_grad=True)
    exact = torch.autograd.grad(F.linear(x, weight).sum(), x)[0]
    chosen = offload(tier, nn.ParameterList([weight]))
    with chosen.saving(x):
        values = [F.linear(x, weight).sum() for _ in range(3)]
    kept, storage = weight.detach().clone(), weight.untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="its memory has been given up"):
        torch.autograd.grad(values[0], x)
    storage.resize_(kept.nbytes)
    storage.copy_(kept.untyped_storage())
    assert torch.equal(torch.autograd.grad(values[1], x)[0], exact)
    weight.data = torch.cat([torch.zeros(1, 64), kept])[1:]  # elsewhere, and not at the beginning
    assert torch.equal(torch.autograd.grad(values[2], x)[0], exact)
