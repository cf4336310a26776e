"""Each private symbol of torch that the cores use still exists and means what we take it for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_efficient.core.torch_internals import (
    BatchNorm,
    WeakStorage,
    bytes_of,
    compiled_entry,
    computes_nothing,
    first_step_post_hook,
    forward_is_compiled,
    global_step_hooks,
    graph_hooks_are_shown_graphs,
    graphs_of_saved,
    has_compatible_type,
    in_backward,
    innermost_pack_hook,
    innermost_saved_tensors_hooks,
    is_of_checkpointing,
    local_part,
    not_compiling,
    rebuild_tensor,
    saved_tensors_hooks_are_allowed,
    shares_version,
    spread_of,
    spread_over_ranks,
    storage_key,
    storage_use_count,
    tensor_version,
    typed_storage_parts,
    unhooked_step,
    within_transform,
    without_mode,
    without_torch_function,
)
from tests.helpers.ranks import run_on_two_ranks


def test_tensors_are_rebuilt_by_the_function_that_files_name() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    function, arguments = tensor.__reduce_ex__(2)
    assert function is rebuild_tensor
    assert torch.equal(rebuild_tensor(*arguments), tensor)


def test_all_that_normalizes_by_its_batch_has_one_base() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d):
        assert issubclass(kind, BatchNorm)
    assert not issubclass(nn.InstanceNorm2d, BatchNorm)
    assert not issubclass(nn.GroupNorm, BatchNorm)


def test_storages_are_told_apart_by_their_memory() -> None:
    one, other = torch.ones(4), torch.ones(4)
    assert storage_key(one.untyped_storage()) == storage_key(one[1:].untyped_storage())
    assert storage_key(one.untyped_storage()) != storage_key(other.untyped_storage())
    empty, too = torch.empty(0), torch.empty(0)
    assert storage_key(empty.untyped_storage()) != storage_key(too.untyped_storage())


def test_the_parts_of_a_typed_storage() -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    storage, dtype, kind, numel = typed_storage_parts(tensor.__reduce_ex__(2)[1][0])
    assert storage.data_ptr() == tensor.data_ptr()
    assert (dtype, kind, numel) == (torch.bfloat16, torch.BFloat16Storage, 3)


def test_bytes_share_memory() -> None:
    tensor = torch.zeros(2, dtype=torch.int32)
    bytes_of(tensor.untyped_storage())[0] = 5
    assert tensor[0] == 5


def test_a_weak_storage_does_not_keep_it_alive() -> None:
    tensor = torch.arange(1000.0)
    number = tensor.untyped_storage()._cdata
    weak = WeakStorage(tensor.untyped_storage())
    again = weak.get()
    assert again is not None
    assert again.data_ptr() == tensor.data_ptr()
    assert again._cdata == number
    del tensor, again
    assert weak.get() is None
    others = [torch.empty(1000) for _ in range(100)]
    assert number not in {other.untyped_storage()._cdata for other in others}


def test_a_mode_does_not_hear_of_what_is_called_without_it() -> None:
    class Mode(TorchFunctionMode):
        heard = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.heard += 1
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        torch.ones(2)
        with without_torch_function():
            torch.ones(2)
    assert mode.heard == 1


def test_a_detached_tensor_without_memory_shares_the_count_of_changes() -> None:
    """On this the check of saved tensors rests: see ``activation_compression/store.py``."""
    tensor = torch.ones(1000)
    witness = tensor.detach()
    witness.data = torch.empty(0)
    weak = WeakStorage(tensor.untyped_storage())
    tensor.view(10, 100)[3].add_(1)
    assert witness._version == tensor._version == 1
    del tensor
    assert weak.get() is None
    assert witness._version == 1


def test_the_innermost_pack_hook() -> None:
    def outer(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert innermost_pack_hook() is None
    with torch.autograd.graph.saved_tensors_hooks(outer, lambda tensor: tensor):
        assert innermost_pack_hook() is outer
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
            assert innermost_pack_hook() is not outer


class Heard(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_mode_among_others_hears_nothing(place: int) -> None:
    modes = [Heard(), Heard(), Heard()]
    x = torch.ones(2)

    def fail() -> None:
        with without_mode(modes[place]):
            torch.add(x, x)
            raise KeyError

    with modes[0], modes[1], modes[2]:
        with pytest.raises(KeyError):
            fail()
        assert [mode.count for mode in modes] == [place != other for other in range(3)]
        with without_mode(Heard()):
            torch.add(x, x)
        assert [mode.count for mode in modes] == [1 + (place != other) for other in range(3)]


def test_compiled_modules_are_known() -> None:
    module = nn.Linear(2, 2)
    assert compiled_entry(module) is None
    assert compiled_entry(torch.compile(module, backend="eager")) == "forward"
    module.compile(backend="eager")
    assert compiled_entry(module) == "_compiled_call_impl"


def test_hooks_that_are_graphs_are_shown_what_they_become_part_of() -> None:
    users: set[str] = set()
    layers: set[str] = set()

    def pack(x: Tensor) -> Tensor:
        graphs = graphs_of_saved()
        assert graphs is not None
        users.update(str(user.meta["original_aten"]) for user in graphs.users())
        layers.add(graphs.layer())
        return x

    def unpack(x: Tensor) -> Tensor:
        return x

    def hook(function: Any) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.call_function(function, (graph.placeholder("x"),)))
        return fx.GraphModule(nn.Module(), graph)

    assert graph_hooks_are_shown_graphs()
    assert graphs_of_saved() is None
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))
    with torch.autograd.graph.saved_tensors_hooks(hook(pack), hook(unpack)):
        loss = torch.compile(model, backend="aot_eager")(torch.ones(3, 4)).sum()
    loss.backward()
    assert "aten.gelu_backward.default" in users
    assert {"0", "1"} <= layers
    torch.compiler.reset()


def test_backward_is_known_to_be_going_on() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda gradient: seen.append(in_backward()))
    assert not in_backward()
    y.sum().backward()
    assert seen == [True]
    assert not in_backward()


def test_who_shares_the_count_of_changes_is_known_and_the_count_stays() -> None:
    x = torch.ones(4, requires_grad=True)
    y = x * 2
    for other, shared in ((y, True), (y.detach(), True), (y.view(2, 2)[1], True), (y.data, False), (x, False)):
        assert shares_version(y, other) == shared
        assert shares_version(other, y) == shared
    assert (x._version, y._version) == (0, 0)
    (y.exp() * y).sum().backward()


def test_the_innermost_saved_tensors_hooks() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    assert innermost_saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        assert innermost_saved_tensors_hooks() == (pack, pack)
        assert saved_tensors_hooks_are_allowed()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not saved_tensors_hooks_are_allowed()


def test_the_version_of_a_tensor_grows_with_changes_in_place() -> None:
    tensor = torch.ones(2)
    before = tensor_version(tensor)
    tensor.add_(1)
    assert tensor_version(tensor) > before
    assert tensor_version(tensor) == tensor_version(tensor[:1])
    with torch.inference_mode():
        assert tensor_version(torch.ones(2)) == -1


def test_the_holders_of_a_storage_are_counted() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    storage = parameter.untyped_storage()
    count = storage_use_count(storage)
    view = parameter.t()
    assert storage_use_count(storage) == count + 1
    saved = nn.functional.linear(torch.ones(1, 4, requires_grad=True), parameter)  # its graph has a view
    assert storage_use_count(storage) == count + 2
    del view, saved
    assert storage_use_count(storage) == count


def test_what_modules_ask_before_they_exchange_parameters() -> None:
    assert has_compatible_type(torch.ones(1), torch.ones(1))
    assert not has_compatible_type(torch.ones(1), torch.ones(1).to_sparse())


def test_hooks_of_activation_checkpointing_are_known() -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        hooks = innermost_saved_tensors_hooks()
        seen.append(hooks is not None and is_of_checkpointing(hooks[0]))
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]  # in forward, and anew in backward
    assert not is_of_checkpointing(lambda tensor: tensor)


def test_hooks_of_all_optimizers_and_a_step_without_any() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("behind")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("own")),
    ]
    try:
        unhooked_step(optimizer)
        assert not calls
        assert torch.equal(optimizer.param_groups[0]["params"][0], torch.zeros(2))
        before, behind = global_step_hooks()
        before[-1](optimizer, (optimizer,), {})
        behind[-1](optimizer, (optimizer,), {})
        assert calls == ["before", "behind"]
    finally:
        for handle in handles:
            handle.remove()


def test_a_step_without_hooks_of_a_class_that_calls_its_base_class() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    optimizer, calls = Own([nn.Parameter(torch.ones(2))], lr=1.0), []
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("behind"))
    unhooked_step(optimizer)
    assert not calls
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.zeros(2))
    optimizer.step()
    assert calls == ["before", "before", "behind", "behind"], "torch calls the hooks of both classes"


def test_a_hook_behind_the_step_comes_before_those_that_were_there() -> None:
    optimizer, seen = torch.optim.SGD([nn.Parameter(torch.ones(1))]), []
    optimizer.register_step_post_hook(lambda *_: seen.append("there"))
    handle = first_step_post_hook(optimizer, lambda *_: seen.append("first"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == ["first", "there", "there"]


def test_a_compiled_forward_is_known() -> None:
    layer = nn.Linear(2, 2)
    assert not forward_is_compiled(layer)
    layer.forward = torch.compile(layer.forward, backend="eager")  # type: ignore[method-assign]
    assert forward_is_compiled(layer)


def test_what_runs_while_a_compiler_looks_can_run_as_ever() -> None:
    seen: list[bool] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(torch.compiler.is_compiling())
        with not_compiling():
            seen.append(torch.compiler.is_compiling())
        seen.append(torch.compiler.is_compiling())
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert seen in ([True, False, True], [False, False, False]), (
        "the latter is torch 2.11, which tells a backend no more"
    )


def spread(rank: int) -> None:
    whole = torch.arange(6.0).view(3, 2)
    tensor = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    mine = whole[:2] if rank == 0 else whole[2:]
    assert torch.equal(local_part(tensor), mine)
    assert local_part(tensor).data_ptr() == tensor.to_local().data_ptr()
    again = spread_over_ranks(mine + 1, spread_of(tensor))
    assert again.placements == tensor.placements
    assert again.shape == tensor.shape
    assert spread_of(again) == spread_of(tensor) == spread_of(torch.zeros_like(tensor))
    assert torch.equal(again.full_tensor(), whole + 1)
    assert not again.requires_grad


def test_a_tensor_that_is_spread_over_ranks_is_taken_apart_and_put_together(tmp_path: Path) -> None:
    run_on_two_ranks(spread, tmp_path)
    whole = torch.ones(2)
    assert local_part(whole) is whole
    assert spread_of(whole) is None
    assert spread_over_ranks(whole, None) is whole


def test_transforms_of_functions_are_known() -> None:
    def function(x: Tensor) -> Tensor:
        assert within_transform()
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    assert not within_transform()


def test_tensors_that_only_stand_for_one_are_known() -> None:
    with FakeTensorMode():
        assert computes_nothing(torch.ones(2))
    assert computes_nothing(torch.ones(2, device="meta"))
    assert not computes_nothing(torch.ones(2))
