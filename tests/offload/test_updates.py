"""Every schedule with every optimizer against the optimizer alone, bit for bit (O1-O5)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_efficient.core.buffers import round_up
from lightning_efficient.core.torch_internals import without_torch_function
from lightning_efficient.offload.site import host_step_nanoseconds
from lightning_efficient.offload.tiers.carriers import Carrier, HostCarrier
from lightning_efficient.offload.updates import engine
from lightning_efficient.offload.updates.clipping import clip_norm_
from lightning_efficient.offload.updates.delayed import Delayed
from lightning_efficient.offload.updates.device_staging import DeviceStaging
from lightning_efficient.offload.updates.engine import UpdateEngine
from lightning_efficient.offload.updates.gradients import GradientStore
from lightning_efficient.offload.updates.layout import MASTER
from lightning_efficient.offload.updates.schedule import (
    AfterBackward,
    InBackward,
    Updates,
)
from lightning_efficient.offload.updates.staging import Staging
from lightning_efficient.offload.updates.subset_step import (
    SubsetStepError,
    check_parameter_by_parameter,
    state_bytes,
    state_bytes_per_element,
    updates_by_element,
)
from lightning_efficient.offload.updates.under_forward import UnderForward
from tests.offload.dict_tier import DictTier

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon(p[:1], lr=2e-2),  # of matrices only
}
SCHEDULES = ["after_backward", "in_backward", "under_forward"]


class Network(nn.Module):
    """Tied weights, a layer that is used twice, one that is never used, an odd number of elements, a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.narrow = nn.Linear(16, 7)
        self.back = nn.Linear(7, 16)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        for layer in (*self.layers, self.layers[0]):
            hidden = hidden + torch.tanh(layer(hidden))
        hidden = self.frozen(self.back(torch.tanh(self.narrow(hidden))))
        return hidden @ self.embedding.weight.T


def groups(network: nn.Module) -> list[dict[str, Any]]:
    """Weights and the rest, as people do."""
    parameters = list(network.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def batch(step: int) -> Tensor:
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step))


class Job:
    """A network, its optimizer, a schedule of learning rates, and what takes over the updates, if anything."""

    def __init__(self, make: Callable[[Any], Optimizer], *, dtype: torch.dtype = torch.float32) -> None:
        self.network = Network(dtype)
        self.optimizer = make(groups(self.network))
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.tier = DictTier()
        self.gradient_tier = DictTier()
        self.carrier: Carrier = HostCarrier()
        self.store: GradientStore | None = None
        self.updates: Updates | None = None
        self.accumulating = False
        self.delays = True
        self.norms: list[float] = []

    def offload(
        self,
        schedule: str,
        *,
        staging_bytes: int = 1 << 20,
        placed: str = "",
        gradients: bool = False,
        on_device: bool = False,
        **arguments: Any,
    ) -> None:
        def complete() -> bool:
            return not self.accumulating

        self.store = None
        if gradients:
            tiers = {p: self.gradient_tier for p in self.network.parameters() if p.requires_grad}
            keep = schedule == "in_backward"
            two = schedule == "delayed"
            self.store = GradientStore(
                tiers, [self.optimizer], complete, self.carrier, 2000, keep_complete=keep, two_steps=two
            )
        names = {id(p): name for name, p in self.network.named_parameters()}
        self.staging = DeviceStaging(staging_bytes, torch.device("cpu")) if on_device else Staging(staging_bytes)
        self.engine = UpdateEngine(
            [self.optimizer],
            names,
            lambda name: self.tier if placed in name else None,
            self.staging,
            **({"together_bytes": 600} | arguments),
        )
        if schedule == "after_backward":
            self.updates = AfterBackward(self.engine, [self.optimizer], self.store)
        elif schedule == "in_backward":
            self.updates = InBackward(self.engine, [self.optimizer], complete, self.store)
        elif schedule == "delayed":
            self.updates = Delayed(
                self.engine, [self.optimizer], self.network, complete, self.store, delays=lambda: self.delays
            )
        else:
            self.updates = UnderForward(self.engine, [self.optimizer], self.network, self.store)

    def forward(self, step: int) -> Tensor:
        if self.updates is not None:
            self.updates.before_forward()
        tokens = batch(step)
        loss = nn.functional.cross_entropy(self.network(tokens).flatten(0, 1), tokens.flatten())
        if self.updates is not None:
            self.updates.after_forward([loss])
        return loss

    def train(self, steps: int, *, start: int = 0, clip: float | None = None, accumulate: int = 1) -> list[float]:
        losses = []
        for step in range(start, start + steps):

            def closure(step: int = step) -> Tensor:
                for part in range(accumulate):
                    self.accumulating = part < accumulate - 1
                    loss = self.forward(accumulate * step + part)
                    if part == 0:
                        self.optimizer.zero_grad()
                    loss.backward()
                if clip is not None and self.store is not None:
                    self.norms.append(float(clip_norm_(self.network.parameters(), clip, self.store)))
                elif clip is not None:
                    self.norms.append(float(nn.utils.clip_grad_norm_(self.network.parameters(), clip)))
                losses.append(float(loss.detach()))
                return loss

            self.optimizer.step(closure)
            self.scheduler.step()
        return losses

    def weights(self) -> dict[str, Tensor]:
        if self.updates is not None:
            self.updates.finish()
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def close(self) -> None:
        if self.updates is not None:
            self.updates.detach()
            self.staging.close()


@pytest.fixture
def jobs() -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(*arguments: Any, **named: Any) -> Job:
        made.append(Job(*arguments, **named))
        return made[-1]

    yield make
    for job in made:
        job.close()


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def full_state(job: Job) -> list[dict[str, Any]]:
    return [state for unit in job.engine.units for state in job.engine.states(unit)]


def plain_state(job: Job, engine: UpdateEngine) -> list[dict[str, Any]]:
    """In the order of the units of the other job's engine."""
    by_name = dict(job.network.named_parameters())
    return [job.optimizer.state.get(by_name[name], {}) for unit in engine.units for name in unit.names]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_state_are_those_of_the_optimizer_alone_o3(
    optimizer: str, schedule: str, jobs: Callable[..., Job]
) -> None:
    plain, job = jobs(OPTIMIZERS[optimizer]), jobs(OPTIMIZERS[optimizer])
    job.offload(schedule)
    assert job.train(6) == plain.train(6)
    assert_same(job.weights(), plain.weights())
    assert_same(full_state(job), plain_state(plain, job.engine))
    assert [g["lr"] for g in job.optimizer.param_groups] == [g["lr"] for g in plain.optimizer.param_groups]
    if any(isinstance(v, Tensor) and v.numel() > 1 for state in full_state(job) for v in state.values()):
        assert job.tier.writes
        held = [v for state in job.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        assert all(value.numel() == 1 for value in held)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", ["after_backward", "under_forward"])
def test_clipped_and_accumulated(schedule: str, accumulate: int, jobs: Callable[..., Job]) -> None:
    make = OPTIMIZERS["adamw"]
    plain, job = jobs(make), jobs(make)
    job.offload(schedule)
    assert job.train(6, clip=0.5, accumulate=accumulate) == plain.train(6, clip=0.5, accumulate=accumulate)
    assert_same(job.weights(), plain.weights())


def test_accumulated_in_backward(jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload("in_backward")
    assert job.train(5, accumulate=3) == plain.train(5, accumulate=3)
    assert_same(job.weights(), plain.weights())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_elsewhere_o3_o4(schedule: str, accumulate: int, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload(schedule, gradients=True)
    clip = None if schedule == "in_backward" else 0.5
    assert job.train(5, clip=clip, accumulate=accumulate) == plain.train(5, clip=clip, accumulate=accumulate)
    assert_same(job.weights(), plain.weights())
    assert job.norms == plain.norms
    assert all(parameter.grad is None for parameter in job.network.parameters())
    assert bool(job.gradient_tier.writes) == (schedule != "in_backward" or accumulate > 1)


@pytest.mark.parametrize("schedule", ["after_backward", "under_forward"])
def test_gradients_elsewhere_are_cleared_with_the_others(schedule: str, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["sgd"]), jobs(OPTIMIZERS["sgd"])
    job.offload(schedule, gradients=True)
    for one in (plain, job):
        one.forward(0).backward()
        one.optimizer.zero_grad()
        one.train(3, start=1)
        one.optimizer.zero_grad()
    assert_same(job.weights(), plain.weights())
    job.forward(9).backward()
    plain.forward(9).backward()
    job.updates.detach()
    job.store.detach()
    assert not job.gradient_tier.reserved
    for one, other in zip(job.network.parameters(), plain.network.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_part_of_the_parameters_elsewhere_o2(schedule: str, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload(schedule, placed="layers")
    job.train(4), plain.train(4)
    assert_same(job.weights(), plain.weights())
    away = {name for unit in job.engine.units if unit.placed is not None for name in unit.names}
    assert away == {name for name, _ in job.network.named_parameters() if "layers" in name}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("staging_bytes", [8192, 1 << 20])
def test_with_the_staging_of_devices_o4(schedule: str, staging_bytes: int, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload(schedule, on_device=True, staging_bytes=staging_bytes)
    assert job.train(6) == plain.train(6)
    assert_same(job.weights(), plain.weights())
    assert_same(full_state(job), plain_state(plain, job.engine))
    assert job.staging.held_bytes <= staging_bytes
    assert job.staging.hits > job.staging.misses


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_little_room_and_much_room_give_the_same(schedule: str, jobs: Callable[..., Job]) -> None:
    one, other = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    one.offload(schedule, staging_bytes=8192)
    other.offload(schedule, staging_bytes=1 << 20)
    assert one.train(5) == other.train(5)
    assert_same(one.weights(), other.weights())
    assert one.staging.held_bytes <= 8192


def test_a_record_larger_than_the_room_says_so(jobs: Callable[..., Job]) -> None:
    job = jobs(OPTIMIZERS["adamw"])
    job.offload("after_backward", staging_bytes=1024)
    with pytest.raises(MemoryError, match="does not fit into the 1,024 bytes"):
        job.train(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_engaged_after_some_steps_and_brought_back_again_g6(schedule: str, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.train(2)
    job.offload(schedule)
    job.train(3, start=2)
    job.updates.detach()
    job.engine.bring_back()
    assert not job.tier.reserved
    job.train(2, start=5)
    plain.train(7)
    assert_same(job.weights(), plain.weights())
    assert_same(job.optimizer.state_dict(), plain.optimizer.state_dict())
    assert type(job.network.norm._parameters) is dict


def test_full_precision_masters_o3(jobs: Callable[..., Job]) -> None:
    """Against float32 training whose weights are rounded for the forward; what somebody writes to them counts."""
    make = OPTIMIZERS["adamw"]
    job = jobs(make, dtype=torch.bfloat16)
    job.offload("in_backward", master_weights=True)
    masters = [p.detach().float().requires_grad_(p.requires_grad) for p in job.network.parameters()]
    reference = jobs(make, dtype=torch.bfloat16)
    optimizer = make(
        [
            {**g, "params": [masters[i] for i in w]}
            for g, w in zip(groups(reference.network), _where(reference), strict=True)
        ]
    )
    for step in range(6):
        job.train(1, start=step)
        loss = reference.forward(step)
        reference.network.zero_grad()
        loss.backward()
        for master, parameter in zip(masters, reference.network.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * 0.9**step
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, reference.network.parameters(), strict=True):
                parameter.copy_(master)
                if step in (2, 4):
                    parameter.data.clamp_(-0.1, 0.1)
                    master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))
            for parameter in job.network.parameters() if step in (2, 4) else ():
                parameter.data.clamp_(-0.1, 0.1)
    assert_same(job.weights(), reference.weights())
    state = dict(zip([n for u in job.engine.units for n in u.names], full_state(job), strict=True))
    assert state["norm.weight"][MASTER].dtype == torch.float32
    assert state["norm.weight"]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize("placed", ["", "layers"])
def test_full_precision_after_steps_without_it_g6(optimizer: str, placed: str, jobs: Callable[..., Job]) -> None:
    """State of 16 bits becomes one of 32, and masters that are of earlier steps do not count."""
    job = jobs(OPTIMIZERS[optimizer], dtype=torch.bfloat16)
    job.train(2)
    before = job.weights()
    for parameter, state in job.optimizer.state.items():
        state[MASTER] = torch.full_like(parameter, 7.0)  # as a run without masters carries them along
    job.offload("after_backward", placed=placed, master_weights=True)
    job.train(2, start=2)
    for name, value in job.weights().items():
        torch.testing.assert_close(value.float(), before[name].float(), atol=0.5, rtol=0)
    states = [state for state in full_state(job) if state]
    assert all(MASTER in state for state in states)
    floats = [v for state in states for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}


def _where(job: Job) -> list[list[int]]:
    place = {id(p): i for i, p in enumerate(job.network.parameters())}
    return [[place[id(p)] for p in group["params"]] for group in groups(job.network)]


def test_a_gradient_that_comes_twice_is_refused(jobs: Callable[..., Job]) -> None:
    job = jobs(OPTIMIZERS["sgd"])
    job.offload("in_backward", together_bytes=1)
    twice = job.network.layers[0]

    def forward(tokens: Tensor) -> Tensor:
        hidden = checkpoint(twice, job.network.embedding(tokens), use_reentrant=True)
        return torch.tanh(twice(hidden)) @ job.network.embedding.weight.T

    job.network.forward = forward
    with pytest.raises(RuntimeError, match=r"a second time in one backward.*use_reentrant=False"):
        job.train(1)


def test_a_hidden_reference_finds_weights_updated(jobs: Callable[..., Job]) -> None:
    job, plain = (jobs(OPTIMIZERS["adamw"]) for _ in range(2))
    job.offload("under_forward", together_bytes=1)
    for one in (job, plain):
        forward, hidden = one.network.forward, one.network.unused.weight
        one.network.forward = lambda tokens, forward=forward, hidden=hidden: forward(tokens) + hidden.sum()
        one.train(5)
    assert job.updates is not None
    job.updates.finish()
    assert all(map(torch.equal, job.network.parameters(), plain.network.parameters()))


def test_weights_that_an_extension_reads_are_updated(jobs: Callable[..., Job]) -> None:
    """Code in another language gets them from their module, and calls no operation of torch with them."""
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload("under_forward", together_bytes=1)
    for one in (job, plain):

        def forward(hidden: Tensor, layer: nn.Linear = one.network.layers[1]) -> Tensor:
            weight, bias = layer.weight, layer.bias
            with without_torch_function():
                return nn.functional.linear(hidden, weight, bias)

        one.network.layers[1].forward = forward
    assert job.train(5) == plain.train(5)
    assert_same(job.weights(), plain.weights())


def test_weights_read_through_the_modules_are_updated(jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload("under_forward")
    for step in range(5):
        job.train(1, start=step), plain.train(1, start=step)
        assert torch.equal(job.network.layers[1].weight, plain.network.layers[1].weight)
        if step % 2:
            assert_same(dict(job.network.named_parameters()), dict(plain.network.named_parameters()))
    assert_same(dict(job.network.named_parameters()), dict(plain.network.named_parameters()))


def test_clearing_gradients_before_the_update_loses_nothing(jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS["adamw"]), jobs(OPTIMIZERS["adamw"])
    job.offload("under_forward")
    for step in range(3):
        job.train(1, start=step), plain.train(1, start=step)
        job.optimizer.zero_grad()
    assert_same(job.weights(), plain.weights())


def test_hooks_of_the_optimizer_are_called_once_a_step(jobs: Callable[..., Job]) -> None:
    for schedule in SCHEDULES:
        job, calls = jobs(OPTIMIZERS["adamw"]), []
        job.offload(schedule)
        job.optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        job.train(4)
        assert len(calls) == 4


class Decaying(torch.optim.AdamW):
    """Calls the step of its base class, and changes weights around it."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(0.99)
        return loss


class EvaluatingFirst(torch.optim.AdamW):
    """Calls the closure itself."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        super().step()
        return loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", [Decaying, EvaluatingFirst])
def test_a_step_that_calls_that_of_its_base_class_o3(
    optimizer: type[Optimizer], schedule: str, jobs: Callable[..., Job]
) -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch adds hooks to a class when it is first used itself
    assert torch.optim.AdamW.step.hooked
    plain, job = (jobs(lambda p: optimizer(p, lr=1e-2)) for _ in range(2))
    check_parameter_by_parameter(job.optimizer)
    job.offload(schedule)
    calls: list[str] = []
    job.optimizer.register_step_post_hook(lambda *_: calls.append("ours"))
    plain.optimizer.register_step_post_hook(lambda *_: calls.append("plain"))
    assert job.train(4) == plain.train(4)
    assert_same(job.weights(), plain.weights())
    assert_same(full_state(job), plain_state(plain, job.engine))
    assert calls.count("ours") == calls.count("plain") == 8


def test_a_step_that_a_closure_has_ended_can_be_taken_again(jobs: Callable[..., Job]) -> None:
    def fails() -> Any:
        raise ZeroDivisionError

    plain, job = (jobs(lambda p: Decaying(p, lr=1e-2)) for _ in range(2))
    job.offload("after_backward")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            job.optimizer.step(fails)
    assert job.train(2) == plain.train(2)
    assert_same(job.weights(), plain.weights())


class Coupled(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient /= norm
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Keeps a counter in its groups."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_needs_all_parameters_together_is_refused_by_name() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    with pytest.raises(SubsetStepError, match="LBFGS cannot be stepped without a closure"):
        check_parameter_by_parameter(torch.optim.LBFGS(parameters))
    with pytest.raises(SubsetStepError, match="Coupled does not update parameter by parameter"):
        check_parameter_by_parameter(Coupled(parameters, lr=0.1))
    with pytest.raises(SubsetStepError, match=r"Counting changes \['k'\] of its parameter groups"):
        check_parameter_by_parameter(Counting(parameters, lr=0.1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torchs_optimizers_are_admitted_and_not_touched(optimizer: str, jobs: Callable[..., Job]) -> None:
    plain, job = jobs(OPTIMIZERS[optimizer]), jobs(OPTIMIZERS[optimizer])
    check_parameter_by_parameter(job.optimizer)
    job.train(2), plain.train(2)
    assert_same(job.weights(), plain.weights())


class Made(Optimizer):
    """Has its state from the start, and never looks whether it is there: torch 2.11's Adagrad does so."""

    def __init__(self, parameters: Any, lr: float = 0.1, start: float = 0.5) -> None:
        super().__init__(parameters, {"lr": lr, "start": start})
        for parameter in itertools.chain(*(group["params"] for group in self.param_groups)):
            self.state[parameter]["sum"] = torch.full_like(parameter, start)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                total = self.state[parameter]["sum"].addcmul_(parameter.grad, parameter.grad)
                parameter.addcdiv_(parameter.grad, total.sqrt(), value=-group["lr"])


def test_an_optimizer_that_makes_its_state_when_it_is_made(jobs: Callable[..., Job]) -> None:
    plain, job = jobs(Made), jobs(Made)
    check_parameter_by_parameter(job.optimizer)
    [group, *_] = job.optimizer.param_groups
    [parameter, *_] = group["params"]
    assert state_bytes(job.optimizer, group, parameter) == parameter.nbytes
    assert host_step_nanoseconds(job.optimizer, group, parameter) > 0
    assert updates_by_element(job.optimizer, group)
    job.offload("in_backward")
    job.train(2), plain.train(2)
    assert_same(job.weights(), plain.weights())


@pytest.mark.parametrize("arguments", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_an_optimizer_for_graphs_of_a_gpu_is_tried_on_the_host(rate: Any, arguments: dict[str, Any]) -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))]
    plain = torch.optim.AdamW(parameters, lr=0.1)
    optimizer = torch.optim.AdamW(parameters, lr=rate, capturable=True, **arguments)
    given = dict(optimizer.param_groups[0])
    check_parameter_by_parameter(optimizer)
    group = optimizer.param_groups[0]
    assert updates_by_element(optimizer, group)
    for estimate in (state_bytes, state_bytes_per_element):
        assert estimate(optimizer, group, parameters[0]) == estimate(plain, plain.param_groups[0], parameters[0])
    assert group == given
    assert not optimizer.state
    assert host_step_nanoseconds(optimizer, group, parameters[0]) > 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_update_that_fails_gives_its_memory_back(
    error: type[BaseException], jobs: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those that follow, if only on the way out, would wait for it for ever."""
    job = jobs(OPTIMIZERS["adamw"])
    largest = 2 * 4 * max(parameter.numel() for parameter in job.network.parameters())
    job.offload("under_forward", staging_bytes=round_up(largest), together_bytes=1)
    job.train(2)
    real, calls = engine.step_subset, itertools.count()

    def fail(*arguments: Any) -> None:
        if next(calls) == 1:
            raise error("made for this test")
        real(*arguments)

    monkeypatch.setattr(engine, "step_subset", fail)
    with pytest.raises(error):
        job.train(2)
    job.updates.detach()
    assert job.updates.begun, "what was updated on the way out makes no whole step of it"
