"""Saved tensors on another tier: whenever graphs live and die, within bounds, and nothing is left (O3, O8)."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_efficient.offload.saved.activations import SavedTensorOffload
from lightning_efficient.offload.saved.use_order import UseOrder
from lightning_efficient.offload.tiers.disk import DiskTier
from lightning_efficient.offload.tiers.host import HostTier
from lightning_efficient.offload.tiers.tier import TierError
from tests.helpers.processes import context
from tests.helpers.ranks import run_on_two_ranks
from tests.offload.file_tier import FileTier
from tests.offload.saving import CASES, check_balance, convolutions, gradients, language, mlp, offload


@pytest.fixture
def tier() -> Iterator[FileTier]:
    tier = FileTier()
    yield tier
    tier.open.set()
    tier.close()


# -- graphs that live long, die early, or fail ------------------------------------------------------------------------


def test_a_graph_that_is_kept_and_gradients_of_gradients(tier: FileTier) -> None:
    model, loss, batch = mlp()
    parameters = list(model.parameters())

    def penalty(value: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(value, parameters, retain_graph=True)
        second = torch.autograd.grad(value, parameters, create_graph=True)
        third = torch.autograd.grad(sum(one.square().sum() for one in second), parameters)  # type: ignore[arg-type]
        return [*first, *(one.detach() for one in second), *third]

    exact = penalty(loss())
    for within in (False, True):
        chosen = offload(tier, model)
        with chosen.saving(*batch):
            value = loss()
            if within:
                found = penalty(value)
        if not within:
            found = penalty(value)
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
        del value
        check_balance(tier, chosen)


def test_several_graphs_at_a_time(tier: FileTier) -> None:
    model, loss, batch = language()
    exact = gradients(model, loss, None)
    chosen = offload(tier, model)
    values = []
    for _ in range(3):
        with chosen.saving(*batch):
            values.append(loss())
    for place in (1, 2, 0):
        model.zero_grad()
        values[place].backward()
        found = [values[place].detach(), *(one.grad for one in model.parameters() if one.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    values.clear()
    check_balance(tier, chosen)


def test_a_graph_that_nobody_goes_through(tier: FileTier) -> None:
    model, loss, batch = language()
    chosen = offload(tier, model)
    for _ in range(2):
        with chosen.saving(*batch):
            value = loss()
        assert chosen.statistics().stash.tier_bytes > 0
        del value
    check_balance(tier, chosen)


def test_exceptions_in_forward_and_backward(tier: FileTier) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise KeyError("backward")

    model, loss, batch = mlp()
    exact = gradients(model, loss, None)
    chosen = offload(tier, model)

    def forward_fails() -> None:
        with chosen.saving(*batch):
            loss()
            raise KeyError("forward")

    def backward_fails() -> None:
        with chosen.saving(*batch):
            value = model[2:](Fails.apply(model[:2](batch[0]))).sum()  # type: ignore[index]
        value.backward()

    for fails in (forward_fails, backward_fails):
        with pytest.raises(KeyError):
            fails()
        found = gradients(model, loss, chosen, *batch)
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    check_balance(tier, chosen)


def test_backward_in_other_threads(tier: FileTier) -> None:
    cases = [language(), mlp(), convolutions()]
    exact = [gradients(model, loss, None) for model, loss, _ in cases]
    chosen = offload(tier, staging_bytes=50_000)
    values = []
    for model, loss, batch in cases:
        torch.manual_seed(0)
        model.zero_grad()
        with chosen.saving(*batch, *model.parameters(), *model.buffers()):
            values.append(loss())
    threads = [threading.Thread(target=value.backward) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, _, _), value, wanted in zip(cases, values, exact, strict=True):
        found = [value.detach(), *(one.grad for one in model.parameters() if one.grad is not None)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    del value
    values.clear()
    threads.clear()
    thread = None  # type: ignore[assignment]
    check_balance(tier, chosen)


def test_the_innermost_hooks_win_and_contexts_nest(tier: FileTier) -> None:
    outer, inner = offload(tier), offload(tier)
    x = torch.randn(1000, requires_grad=True)
    with outer.saving():
        a = x.exp()
        with inner.saving():
            b = a.sin()
            with outer.saving():
                c = b.exp()
        d = c.cos()
    assert (outer.statistics().put, inner.statistics().put) == (3, 1)  # each context looks for what it has put itself
    d.sum().backward()
    again = x.detach().clone().requires_grad_()
    again.exp().sin().exp().cos().sum().backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_modules(tier: FileTier, backend: str) -> None:
    torch.compiler.reset()
    model, _, (x, y) = mlp()
    compiled = torch.compile(model, backend=backend)
    exact = gradients(model, lambda: F.cross_entropy(compiled(x), y), None)
    chosen = offload(tier, model)
    for _ in range(3):
        found = gradients(model, lambda: F.cross_entropy(compiled(x), y), chosen, x, y)
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert chosen.statistics().put > 0
    torch.compiler.reset()
    check_balance(tier, chosen)


# -- bounds -----------------------------------------------------------------------------------------------------------


def chain(x: Tensor, depth: int = 12) -> Tensor:
    for _ in range(depth):
        x = x.sin()  # which saves its input
    return x.sum()


def test_the_oldest_go_and_the_newest_stay_o8(tier: FileTier) -> None:
    x = torch.randn(1000, requires_grad=True)
    chosen = offload(tier, keep_bytes=5 * 4000)
    with chosen.saving(x):
        value = chain(x)
        tier.flush()
        statistics = chosen.statistics()
    assert statistics.put == 11
    assert len(tier.writes) == 6
    assert statistics.stash.resident_bytes == 5 * 4000
    value.backward()
    assert sorted(map(id, tier.reads)) == sorted(map(id, tier.writes))
    assert [tier.writes.index(record) for record in tier.reads] == [5, 4, 3, 2, 1, 0]
    assert chosen.statistics().stash.misses == 0


def test_what_is_still_on_its_way_when_it_is_needed_is_not_read(tier: FileTier) -> None:
    x = torch.randn(1000, requires_grad=True)
    exact = torch.autograd.grad(chain(x), x)[0]
    chosen = offload(tier)
    tier.open.clear()
    with chosen.saving(x):
        value = chain(x)
    tier.open.set()
    tier.flush()
    assert chosen.statistics().stash.resident_bytes == 11 * 4000
    first = torch.autograd.grad(value, x, retain_graph=True)[0]
    assert len(tier.writes) == 11
    assert not tier.reads
    assert chosen.statistics().stash.resident_bytes == 0
    second = torch.autograd.grad(value, x)[0]
    assert len(tier.reads) == 11
    assert torch.equal(first, exact)
    assert torch.equal(second, exact)
    del value
    check_balance(tier, chosen)


def test_saving_waits_when_too_much_is_on_its_way_o8(tier: FileTier) -> None:
    x = torch.randn(1000, requires_grad=True)
    chosen = offload(tier, staging_bytes=3 * 4000, keep_bytes=2 * 4000)
    tier.open.clear()
    values: list[Tensor] = []

    def forward() -> None:
        with chosen.saving(x):
            values.append(chain(x))

    thread = threading.Thread(target=forward)
    thread.start()
    while len(tier.writes) < 3:
        assert thread.is_alive()
    thread.join(0.05)
    assert thread.is_alive()
    assert len(tier.writes) == 3
    tier.open.set()
    thread.join()
    values.pop().backward()
    stash = chosen.statistics().stash
    assert stash.peak_resident_bytes <= (3 + 2 + 1) * 4000
    assert stash.back_pressure_seconds > 0


def test_nothing_is_reserved_anew_in_steps_that_are_alike(tier: FileTier) -> None:
    model, loss, batch = language()
    chosen = offload(tier, model)
    reserved = []
    for _ in range(5):
        gradients(model, loss, chosen, *batch)
        reserved.append(chosen.statistics().stash.reserved)
    assert reserved[0] == reserved[-1]


def test_sizes_that_vary_take_no_more_room_than_the_largest_step(tier: FileTier) -> None:
    chosen = offload(tier)
    most = 0
    for size in (3000, 2999, 1700, 3001, 1200, 2500):
        x = torch.randn(size, requires_grad=True)
        with chosen.saving(x):
            value = chain(x)
        most = max(most, chosen.statistics().stash.tier_bytes)
        value.backward()
        del value
        assert sum(record.nbytes for record in tier.reserved) <= most
    check_balance(tier, chosen)


def test_a_tier_without_room_leaves_tensors_in_memory() -> None:
    tier = FileTier(capacity_bytes=20_000)
    x = torch.randn(1000, requires_grad=True)
    chosen = offload(tier)
    for _ in range(2):
        with pytest.warns(UserWarning, match="the tier 'file' has no room"), chosen.saving(x):
            value = chain(x)
        assert chosen.statistics().stash.stuck_bytes == 6 * 4000
        expected = torch.autograd.grad(chain(x), x)[0]
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)
        del value
    check_balance(tier, chosen)
    tier.close()


def test_a_failing_tier_is_heard_of(tier: FileTier) -> None:
    x = torch.randn(1000, requires_grad=True)
    tier.fail = True
    chosen = offload(tier)
    with chosen.saving(x):
        value = x.sin().sin()
        tier.flush()
        with pytest.raises(TierError, match="the disk is dying"):
            value.sin()
    with pytest.raises(TierError, match="the disk is dying"):
        chosen.close()
    assert not tier.reserved

    tier.fail = False
    chosen = offload(tier)
    with chosen.saving(x):
        value = chain(x)
        tier.flush()
        chosen.statistics()
        tier.fail = True
    with pytest.raises(TierError, match="the disk is dying"):
        value.backward()
    del value
    tier.fail = False
    check_balance(tier, chosen)


def test_what_was_closed_says_so(tier: FileTier) -> None:
    x = torch.randn(1000, requires_grad=True)
    chosen = offload(tier)
    with chosen.saving():
        value = x.sin().sin()
        tier.flush()
        chosen.statistics()
    chosen.close()
    assert not tier.reserved
    with pytest.raises(RuntimeError, match="closed"):
        torch.autograd.grad(value.sum(), x)
    with chosen.saving(), pytest.raises(RuntimeError, match="closed"):
        x.sin()


@pytest.mark.parametrize("settings", [{"staging_bytes": 0}, {"minimum_bytes": 0}, {"keep_bytes": -1}])
def test_amounts_that_cannot_be_are_named(tier: FileTier, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* must be at least"):
        offload(tier, **settings)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("This system does not tell.")


def _measure(folder: str, found: Connection) -> None:
    """Bytes of memory beside those at the beginning, at most, and whether the gradient is right."""
    torch.set_num_threads(1)
    size, depth = (4 << 20) // 4, 48
    place = DiskTier(folder, buffer_bytes="4MiB")
    chosen = SavedTensorOffload(place, staging_bytes=16 << 20, keep_bytes=8 << 20)
    x = torch.linspace(-3, 3, size).requires_grad_()
    exact = torch.ones(size)
    with torch.no_grad():
        y = x.detach().clone()
        for _ in range(depth):
            exact, y = exact * y.cos(), y.sin()
    del y
    begin = most = _anonymous_bytes()

    def look(_: Any) -> None:
        nonlocal most
        most = max(most, _anonymous_bytes())

    with chosen.saving(x):
        y = x
        for _ in range(depth):
            y = y.sin()
            look(None)
            y.grad_fn.register_hook(lambda inputs, outputs: look(None))  # type: ignore[union-attr]
        value = y.sum()
        del y
    forward = most - begin
    value.backward()
    close = torch.allclose(x.grad, exact, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]
    statistics = chosen.statistics()
    chosen.close()
    place.close()
    found.send((forward, most - begin, close, statistics.put_bytes, statistics.stash.peak_resident_bytes))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its memory")
def test_memory_is_bounded_where_activations_are_not_o3_o8(tmp_path: Path) -> None:
    here, there = context().Pipe(duplex=False)
    process = context().Process(target=_measure, args=(str(tmp_path / "swap"), there))
    process.start()
    there.close()
    forward, most, close, put_bytes, resident = here.recv()
    process.join()
    assert close
    assert put_bytes == 47 * (4 << 20)
    assert resident <= (16 + 8 + 4) << 20
    # On the way, kept, freed and not yet returned, the tier's; and of operations, and other things.
    assert forward <= (16 + 8 + 16 + 4 + 24) << 20
    assert most <= (16 + 8 + 16 + 4 + 32) << 20


def test_the_order_of_the_last_step_is_expected_again() -> None:
    order = UseOrder()

    def step(uses: list[int]) -> list[list[int]]:
        order.open()
        first = order.put()
        for _ in range(3):
            order.put()
        expected = [[number - first for number in order.coming()][:4]]
        for use in uses:
            order.use(first + use)
            expected.append([number - first for number in order.after(first + use) if number >= first])
        return expected

    assert step([3, 1, 2, 0]) == [[3, 2, 1, 0], [2, 1, 0], [0], [1, 0], []]
    assert step([3, 1, 2, 0]) == [[3, 1, 2, 0], [1, 2, 0], [2, 0], [0], []]
    assert step([3, 2, 1, 0]) == [[3, 1, 2, 0], [1, 2, 0], [1, 0], [0], []]


class Sharded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 128), nn.LayerNorm(128)
        self.inner = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(self.first(x)))


def sharded(rank: int) -> dict[str, tuple[bool, int]]:
    """Whether the gradients are the same, and bytes that went."""
    results = {}
    for way in ("ddp", "fsdp2", "fsdp2, bfloat16"):
        runs: list[list[Tensor]] = []
        for moved in (False, True):
            torch.manual_seed(0)
            model: nn.Module = Sharded()
            if way == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bfloat16" in way else None)
                for part in (*model.children(), model):
                    fully_shard(part, reshard_after_forward=True, mp_policy=policy)
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank))
            tier = FileTier()
            chosen = offload(tier, model, keep_bytes=1000)
            runs.append([])
            for _ in range(2):
                model.zero_grad()
                with chosen.saving(x) if moved else contextlib.nullcontext():
                    loss = model(x).float().square().mean()
                loss.backward()
                for parameter in model.parameters():
                    gradient: Any = parameter.grad
                    runs[-1].append(gradient.clone() if way == "ddp" else gradient.full_tensor())
            del loss
            put = chosen.statistics().put_bytes
            check_balance(tier, chosen)
            tier.close()
        results[way] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), put
    return results


def test_shards_and_copies_of_the_model_on_two_ranks(tmp_path: Path) -> None:
    for results in run_on_two_ranks(sharded, tmp_path):
        assert len(results) == 3
        for way, (same, put_bytes) in results.items():
            assert same, way
            # The results of each layer, of both steps; with bfloat16 the copies of the input and the results too. No
            # weight, of which there are 160 KiB.
            assert 0 < put_bytes <= 2 * 32 * (4 * 128 + 64 + 64 + 64) * 4, way


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["disk", "host"])
@pytest.mark.parametrize("name", ["mlp", "gpt with dropout", "convolutions", "checkpoint", "nn.TransformerEncoder"])
def test_gradients_on_a_gpu_are_those_of_plain_training_o2(name: str, kind: str, tmp_path: Path) -> None:
    with torch.device("cuda"):
        model, loss, batch = CASES[name]()
    states = {key: value.clone() for key, value in model.state_dict().items()}
    exact = [gradients(model, loss, None) for _ in range(3)]
    again = [gradients(model, loss, None) for _ in range(3)]
    model.load_state_dict(states)
    place = DiskTier(tmp_path / "swap") if kind == "disk" else HostTier("64MiB", pinned=True)
    held = [*model.parameters(), *model.buffers()]
    chosen = SavedTensorOffload(place, staging_bytes=100_000, minimum_bytes=1024, held=lambda: held)
    for step in range(3):
        found = gradients(model, loss, chosen, *batch)
        for one, wanted, other in zip(found, exact[step], again[step], strict=True):
            assert torch.equal(one, wanted) or not torch.equal(wanted, other), "as far as it is deterministic itself"
    assert chosen.statistics().stash.written_bytes > 0
    gc.collect()
    assert chosen.statistics().stash.tier_bytes == 0
    chosen.close()
    place.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["disk", "host"])
def test_memory_of_a_gpu_is_bounded_o3_o8(kind: str, tmp_path: Path) -> None:
    size, depth = (16 << 20) // 4, 48
    place = DiskTier(tmp_path / "swap") if kind == "disk" else HostTier("1GiB", pinned=True)
    chosen = SavedTensorOffload(place, staging_bytes=64 << 20, keep_bytes=32 << 20)
    x = torch.linspace(-3, 3, size, device="cuda").requires_grad_()
    exact = torch.autograd.grad(chain(x, depth), x)[0]
    begin = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with chosen.saving(x):
        value = chain(x, depth)
    found = torch.autograd.grad(value, x)[0]
    assert torch.equal(found, exact)
    assert torch.cuda.max_memory_allocated() - begin <= (64 + 32 + 6 * 16) << 20
    chosen.close()
    place.close()
