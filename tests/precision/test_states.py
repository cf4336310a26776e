"""What is known of a network, over spikes, checkpoints, other settings and other engines."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_efficient import RollbackPrecision
from lightning_efficient.coordination import ParameterChange
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.precision import kinds
from lightning_efficient.precision.account import Account
from lightning_efficient.precision.device import eager
from lightning_efficient.precision.integers import can_multiply
from lightning_efficient.precision.learning import Learning
from lightning_efficient.precision.nodes import Node
from lightning_efficient.precision.status import ReturnPolicy
from tests.helpers.fitting import assert_same_tree, fit
from tests.helpers.models import ShardedModel
from tests.helpers.ranks import run_on_two_ranks
from tests.precision.device_network import Run
from tests.technique_settings import SHARDS, demo_model


def plugin(**more: Any) -> RollbackPrecision:
    return RollbackPrecision(**({"high": "fp32", "only_if_faster": False} | more))


def trained() -> dict[str, Any]:
    before = plugin()
    node = before._registry.make("layer", "linear")
    node.learning.batches, node.products["forward"].status.low = 70, 20
    node.tensors["input"].limits.underflow = 0.5
    return before.state_dict()


def test_the_first_batch_behind_a_checkpoint_is_done_again_with_what_is_in_it() -> None:
    resumed, state = plugin(), trained()
    resumed.load_state_dict(state)
    back = resumed.kept()
    node = resumed._registry.make("layer", "linear")  # nodes come when they are computed
    assert node.learning.done
    node.products["forward"].status.low += 1
    back()
    assert node.state_dict() == state["nodes"]["layer"]
    other = resumed._registry.make("other", "linear")
    other.learning.batches = 3
    back()
    assert other.learning.batches == 0


def test_what_changes_before_it_is_computed_learns_anew_too() -> None:
    resumed = plugin()
    resumed.load_state_dict(trained())
    resumed.on_parameters_changed(None, ParameterChange(replaced=("layer.weight",)))  # type: ignore[arg-type]
    assert not resumed._registry.make("layer", "linear").learning.done


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"low": "bfp16"}, "low='int8'"),
        ({"high": "bf16"}, "high='fp32'"),
        ({"thresholds": {"underflow": 0.2}}, "thresholds=None"),
        ({"only_if_faster": True}, "only_if_faster=False"),
    ],
)
def test_with_other_settings_all_learns_anew(
    other: dict[str, Any], said: str, recwarn: pytest.WarningsRecorder
) -> None:
    resumed, same = plugin(**other), plugin()
    same.load_state_dict(trained())
    assert not recwarn
    with pytest.warns(UserWarning, match=said):
        resumed.load_state_dict(trained())
    assert same._registry.make("layer", "linear").learning.done
    node = resumed._registry.make("layer", "linear")
    assert not node.learning.done
    assert node.tensors["input"].limits.underflow == other.get("thresholds", {}).get("underflow", 0.01)


def test_on_other_hardware_it_is_measured_anew_whether_low_bits_pay(recwarn: pytest.WarningsRecorder) -> None:
    before = plugin(only_if_faster=True)
    node = before._registry.make("layer", "linear")
    node.learning.batches, node.products["forward"].status.low = 70, 20
    node.learning.low_pays = node.products["grad_input"].low_pays = False
    node.tensors["input"].limits.underflow = 0.5
    state, here, old, other = (before.state_dict(), *(plugin(only_if_faster=True) for _ in range(3)))
    here.load_state_dict(state)
    old.load_state_dict({name: value for name, value in state.items() if name != "measured_on"})
    assert (
        here._registry.make("layer", "linear").state_dict()
        == old._registry.make("layer", "linear").state_dict()
        == node.state_dict()
    )
    torch.set_num_threads(2)
    unasked, not_timed = plugin(), plugin()
    not_timed.load_state_dict(unasked.state_dict() | {"measured_on": "another machine", "nodes": state["nodes"]})
    assert not recwarn
    with pytest.warns(UserWarning, match=r"other hardware \(.*1 torch threads; here: .*2 torch threads\).*anew"):
        other.load_state_dict(state)
    found = other._registry.make("layer", "linear")
    assert not found.learning.done
    assert found.learning.low_pays is found.products["grad_input"].low_pays is None
    assert found.products["forward"].status.low == 20
    assert found.tensors["input"].limits.underflow == 0.5


def test_a_checkpoint_is_for_devices_too() -> None:
    resumed = plugin()
    run = Run(eager)
    resumed._engine.on_devices = dict(run.engine.on_devices)
    resumed.load_state_dict(trained())
    assert not resumed._engine.on_devices


@pytest.mark.parametrize("timed", [False, True])
def test_a_device_times_products_only_if_asked_to(timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_efficient.precision import engine

    monkeypatch.setattr(engine, "kernels_on", lambda device, low: eager)
    made = plugin(only_if_faster=timed)._engine._on(torch.device("cpu"))
    assert made is not None
    assert (made._gate is not None) is timed


def test_what_a_device_computed_again_is_among_the_measurements() -> None:
    run = Run(eager)
    for fault in ("", "", "", "", "", "nan", "", ""):
        run.step(fault, wait=False)
    account = Account(run.engine, run.nodes)
    values = account.measurements()
    assert values["precision/retries_not_finite"] >= 1
    assert values["precision/retries"] == sum(count for name, count in values.items() if "retries_" in name)
    assert "precision/exponent/one.input" in account._by_operation()


def test_limits_that_still_grow_on_a_device_are_learnt_on() -> None:
    found = []
    for operations in (None, eager):
        run = Run(operations)
        policy = ReturnPolicy()
        nodes: dict[str, Node] = {}

        def make(name: str, kind: str, nodes: dict[str, Node] = nodes) -> Node:
            return nodes.setdefault(name, Node(name, kind, policy, learning=Learning(None)))  # noqa: B023

        run.operations._make = make
        for number in range(40):
            run.engine.begin(number, number)
            run.operations.begin(run.net)
            x = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
            x[:, 0] *= 1.3 ** min(number, 18)
            with run.operations:
                run.net(x).square().mean().backward()
        found.append(nodes["one"].learning.batches)
    assert found[0] > 25
    assert abs(found[1] - found[0]) <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "head"}, r"exclude='head' is one text: give a list of patterns, as in exclude=\['head'\]"),
        ({"inner": "bf16-mixed"}, "inner='bf16-mixed' is no precision plugin"),
        ({"low": "fp8", "stochastic_rounding": True}, "low='fp8' rounds to nearest only; these can do both: int8, "),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin(**arguments)


def test_gradients_of_gradients_are_refused_with_what_to_do() -> None:
    precision, module = plugin(), pl.LightningModule()
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    with precision.train_step_context():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gradient penalty.*exclude="):
        precision.backward(gradient.square().sum(), module, None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        precision.backward(torch.zeros(()), module, None)


def with_a_fault_on_one(rank: int, root: Path, *, sharded: bool) -> dict[str, Any]:
    precision = plugin(pre_learning_steps=4, return_after=3)
    true, spoilt = kinds.MatMul.in_integers, []

    def in_integers(self: Any, role: str, *arguments: Any) -> Tensor | None:
        found = true(self, role, *arguments)
        if rank == 1 and precision._account.all_learnt and found is not None and role == "forward" and not spoilt:
            spoilt.append(found.mul_(2.0**12))
        return found

    kinds.MatMul.in_integers = in_integers  # type: ignore[method-assign]
    run = fit(
        None, module=demo_model(ShardedModel) if sharded else None, plugins=[precision], root=root, devices=2,
        strategy=ModelParallelStrategy(**SHARDS) if sharded else "ddp",
        use_distributed_sampler=False, max_steps=8,
    )  # fmt: skip
    nodes = precision.state_dict()["nodes"]
    for node in nodes.values():
        del node["learning"]["limits"]  # what each rank saw last, when it learnt
        for product in node["products"].values():
            del product["status"]["reason"]
    if sharded:  # each rank has its part
        first = run.module.model.token_embedding.weight
        assert len(first.to_local()) < len(first)
    weights = {} if sharded else run.weights
    return {
        "weights": weights, "nodes": nodes, "retries": precision.measurements()["precision/retries"],
        "spoilt": len(spoilt), "losses": run.losses,
    }  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_product_that_fails_on_one_rank_hangs_none_and_all_know(sharded: bool, tmp_path: Path) -> None:
    fault = functools.partial(with_a_fault_on_one, sharded=sharded)
    one, other = run_on_two_ranks(fault, tmp_path, tmp_path / "run")
    assert (one["spoilt"], other["spoilt"]) == (0, 1)
    assert one["retries"] == other["retries"] >= 1
    assert_same_tree(one["weights"], other["weights"], "weights")
    assert_same_tree(one["nodes"], other["nodes"], "nodes")
    assert max(one["losses"] + other["losses"]) < 7


@pytest.mark.parametrize(("limit", "low"), [(0.0, 0), (1.0, 4)])
def test_limits_that_are_given_are_those_that_count(limit: float, low: int, tmp_path: Path) -> None:
    precision = plugin(pre_learning_steps=4, thresholds={"underflow": limit, "error": 10.0, "exponent_range": 100.0})
    fit(None, plugins=[precision], root=tmp_path, max_steps=8)
    counts = {node.products["grad_weight"].status.low for name, node in precision.nodes.items() if ".mlp." in name}
    assert counts == {low}


def test_where_autocast_is_off_the_bits_are_those_of_the_tensors(tmp_path: Path) -> None:
    class Careful(ByteLanguageModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                one = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
                found = one @ one
                assert torch.equal(found.detach(), one.detach() @ one.detach())
            return super().training_step(batch, batch_idx) + 0 * found.sum()

    made = RollbackPrecision(high="bf16", pre_learning_steps=1, only_if_faster=False)
    fit(None, module=demo_model(Careful), plugins=[made], root=tmp_path, max_steps=3)
    rows = {row["operation"]: row for row in made.precision_map()}
    assert rows["matmul"]["last reason"] == "autocast is off around it"
    assert rows["model.blocks.0.mlp.up"]["bits"] == "int8"


def test_numbered_operations_learn_anew_when_the_network_changes() -> None:
    made = plugin()
    for name in ("layer", "other", "matmul#2"):
        made._registry.make(name, "matmul")
    made.on_parameters_changed(None, ParameterChange(added=("layer.weight",)))  # type: ignore[arg-type]
    assert list(made.nodes) == ["other"]


def test_patterns_that_meet_nothing_are_said(tmp_path: Path) -> None:
    made = plugin(exclude=["*.mlp.up", "haed"], pre_learning_steps=1)
    with pytest.warns(UserWarning, match=r"no operation is called as exclude=\['haed'\] says"):
        fit(None, plugins=[made], root=tmp_path, max_steps=3)


@pytest.mark.parametrize(("shape", "there"), [((32, 16, 8), True), ((16, 16, 8), False), ((32, 12, 8), False)])
def test_a_gpu_without_the_kernels_is_not_asked_for_them(shape: tuple[int, int, int], there: bool) -> None:
    class Elsewhere:
        def __init__(self, *shape: int) -> None:
            self.shape, self.device = shape, torch.device("cuda")

    rows, terms, columns = shape
    assert can_multiply(Elsewhere(rows, terms), Elsewhere(terms, columns)) is there  # type: ignore[arg-type]
    assert can_multiply(torch.empty(2, 3), torch.empty(3, 5))
