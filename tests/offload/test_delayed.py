"""Updates that are one step behind, against a loop that does the same in plain torch, bit for bit (O10)."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_efficient.offload.updates.delayed import Delayed
from lightning_efficient.offload.updates.layout import MASTER
from tests.offload.test_updates import OPTIMIZERS, Job, assert_same, batch, full_state, groups, plain_state

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # before the first late update

Made = Callable[..., Job]


@pytest.fixture
def jobs() -> Iterator[Made]:
    made: list[Job] = []

    def make(*arguments: Any, **named: Any) -> Job:
        made.append(Job(*arguments, **named))
        return made[-1]

    yield make
    for job in made:
        job.close()


class Late:
    """A loop with late updates, by hand: gradients and hyperparameters are kept, and used in the next step."""

    def __init__(self, job: Job, *, after: int = 0) -> None:
        self.job, self.after = job, after
        self.held: tuple[list[Tensor | None], list[dict[str, Any]]] | None = None
        self.norms: list[float] = []

    def train(self, steps: int, *, start: int = 0, clip: float | None = None, accumulate: int = 1) -> list[float]:
        job, losses = self.job, []
        for step in range(start, start + steps):
            job.optimizer.zero_grad()
            for part in range(accumulate):
                loss = job.forward(accumulate * step + part)
                loss.backward()
            if clip is not None:
                self.norms.append(float(nn.utils.clip_grad_norm_(job.network.parameters(), clip)))
            losses.append(float(loss.detach()))
            new = [p.grad for p in job.network.parameters()], [_copied(group) for group in job.optimizer.param_groups]
            self.apply()
            self.held = new
            if step < self.after:
                self.apply()
            job.scheduler.step()
        return losses

    def apply(self) -> None:
        """The update that is held, on the weights as they are."""
        if self.held is None:
            return
        (gradients, then), self.held = self.held, None
        now = [_copied(group) for group in self.job.optimizer.param_groups]
        _set(self.job.optimizer, then)
        for parameter, gradient in zip(self.job.network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.job.optimizer.step()
        _set(self.job.optimizer, now)

    def weights(self) -> dict[str, Tensor]:
        self.apply()
        return self.job.weights()


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}


def _set(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


def both(jobs: Made, make: str = "adamw", *, after: int = 0, **arguments: Any) -> tuple[Job, Late]:
    """A job whose updates are late from step ``after`` on, and what it is compared with."""
    job = jobs(OPTIMIZERS[make])
    job.offload("delayed", **arguments)
    return job, Late(jobs(OPTIMIZERS[make]), after=after)


def assert_alike(job: Job, late: Late) -> None:
    assert_same(job.weights(), late.weights())
    assert_same(full_state(job), plain_state(late.job, job.engine))


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_update_has_the_gradients_of_the_step_before_o10(optimizer: str, jobs: Made) -> None:
    job, late = both(jobs, optimizer)
    assert job.train(6) == late.train(6)
    assert_alike(job, late)
    plain = jobs(OPTIMIZERS[optimizer])
    plain.train(6)
    assert not torch.equal(plain.network.narrow.weight, job.network.narrow.weight)


def test_first_steps_are_exact_o10(jobs: Made) -> None:
    (job, late), plain = both(jobs, after=4), jobs(OPTIMIZERS["adamw"])
    job.delays = False
    assert job.train(4) == plain.train(4) == late.train(4)
    assert not job.updates.behind
    assert_same(dict(job.network.named_parameters()), dict(plain.network.named_parameters()))
    job.delays = True
    assert job.train(4, start=4) == late.train(4, start=4)
    assert_alike(job, late)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("gradients", [False, True])
def test_clipped_accumulated_and_with_gradients_elsewhere_o10(gradients: bool, accumulate: int, jobs: Made) -> None:
    job, late = both(jobs, gradients=gradients)
    assert job.train(6, clip=0.5, accumulate=accumulate) == late.train(6, clip=0.5, accumulate=accumulate)
    assert job.norms == late.norms
    assert any(norm > 0.5 for norm in job.norms)
    assert_alike(job, late)
    if gradients:
        assert all(parameter.grad is None for parameter in job.network.parameters())
        job.updates.detach()
        job.store.detach()
        assert not job.gradient_tier.reserved


@pytest.mark.parametrize("arguments", [{"staging_bytes": 8192}, {"on_device": True}, {"together_bytes": 1}])
def test_little_room_a_devices_staging_and_small_units_o10(arguments: dict[str, Any], jobs: Made) -> None:
    job, late = both(jobs, **arguments)
    assert job.train(6, clip=0.5) == late.train(6, clip=0.5)
    assert_alike(job, late)
    assert job.staging.hits > job.staging.misses


@pytest.mark.parametrize("placed", ["", "layers", "nothing"])
def test_where_the_state_is_does_not_matter_o10(placed: str, jobs: Made) -> None:
    job, late = both(jobs, placed=placed)
    assert job.train(5) == late.train(5)
    assert_alike(job, late)


def test_weights_are_updated_within_the_next_backward_o10(jobs: Made) -> None:
    job, _ = both(jobs, together_bytes=1)
    job.train(2)
    before, writes = job.network.narrow.weight.detach().clone(), len(job.tier.writes)
    assert job.updates.behind
    job.accumulating = True
    job.optimizer.zero_grad()
    job.forward(2).backward()
    assert torch.equal(before, job.network.narrow.weight)
    job.accumulating = False
    loss = job.forward(3)
    assert torch.equal(before, job.network.narrow.weight)
    assert len(job.tier.writes) == writes
    loss.backward()
    assert not torch.equal(before, job.network.narrow.weight)
    assert not job.updates.behind
    assert not job.updates.repeatable


def test_gradients_are_freed_as_the_next_ones_come_o10(jobs: Made) -> None:
    job, _ = both(jobs)
    job.train(2)
    held = [weakref.ref(parameter.grad) for parameter in job.network.parameters() if parameter.grad is not None]
    loss = job.forward(2)
    job.optimizer.zero_grad()
    assert all(gradient() is not None for gradient in held)
    alive: list[int] = []
    for parameter in job.network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: alive.append(sum(g() is not None for g in held)))
    loss.backward()
    assert alive == sorted(alive, reverse=True)
    assert alive[len(alive) // 2] < len(held)
    assert alive[-1] == 0


def test_parameters_that_only_some_steps_use_o10(jobs: Made) -> None:
    job, late = both(jobs)
    for one in (job, late.job):
        forward, extra = one.network.forward, one.network.unused

        def sometimes(tokens: Tensor, forward: Any = forward, extra: Any = extra) -> Tensor:
            used = extra(torch.ones(3)).sum() if int(tokens.sum()) % 3 else 0
            return forward(tokens) + torch.tanh(forward(tokens) * used)

        one.network.forward = sometimes
    assert job.train(9, accumulate=2) == late.train(9, accumulate=2)
    assert_alike(job, late)


def test_steps_without_gradients_o10(jobs: Made) -> None:
    job, late = both(jobs)
    for one in (job, late):
        one.train(3)
    late.apply()
    job.optimizer.zero_grad()
    job.optimizer.step(lambda: None)
    assert not job.updates.behind
    assert_same(dict(job.network.named_parameters()), dict(late.job.network.named_parameters()))
    assert job.train(3, start=3) == late.train(3, start=3)
    assert_alike(job, late)


def test_full_precision_masters_o10(jobs: Made) -> None:
    make = OPTIMIZERS["adamw"]
    job, network = jobs(make, dtype=torch.bfloat16), jobs(make, dtype=torch.bfloat16).network
    job.offload("delayed", master_weights=True)
    masters = {name: p.detach().float().requires_grad_(p.requires_grad) for name, p in network.named_parameters()}
    names = {id(p): name for name, p in network.named_parameters()}
    optimizer = make([{**g, "params": [masters[names[id(p)]] for p in g["params"]]} for g in groups(network)])
    held: dict[str, Tensor | None] = {}

    def apply(step: int) -> None:
        """The update of this step, in full precision."""
        for name, master in masters.items():
            gradient = held.get(name)
            master.grad = None if gradient is None else gradient.float()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.9**step
        optimizer.step()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(masters[name])

    for step in range(6):
        job.train(1, start=step)
        tokens = batch(step)
        loss = nn.functional.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten())
        network.zero_grad()
        loss.backward()
        apply(step - 1)
        held = {name: parameter.grad for name, parameter in network.named_parameters()}
    apply(5)
    assert_same(job.weights(), dict(network.state_dict()))
    state = dict(zip([n for u in job.engine.units for n in u.names], full_state(job), strict=True))
    assert state["norm.weight"][MASTER].dtype == torch.float32


# -- who asks for weights, and changes them ----------------------------------------------------------------------------


ASKING: dict[str, Callable[[Job], Any]] = {
    "finish": lambda job: job.updates.finish(),
    "state_dict": lambda job: job.network.state_dict(),
    "state_dict of a part": lambda job: job.network.layers[1].state_dict(),
}


@pytest.mark.parametrize("ask", ASKING)
def test_who_asks_gets_weights_that_are_not_behind_o10(ask: str, jobs: Made) -> None:
    job, late = both(jobs)
    for start in (0, 3, 5):
        steps = 2 if start == 3 else 3
        assert job.train(steps, start=start) == late.train(steps, start=start)
        ASKING[ask](job)
        late.apply()
        assert not job.updates.behind
        assert_same(dict(job.network.named_parameters()), dict(late.job.network.named_parameters()))
    assert_alike(job, late)


def test_weights_that_are_loaded_stay_as_they_are_o10(jobs: Made) -> None:
    job, late = both(jobs)
    for one in (job, late):
        one.train(2)
    saved = job.weights()
    assert_same(saved, late.weights())
    for one in (job, late):
        one.train(2, start=2)
    late.apply()
    for one in (job, late.job):
        one.network.load_state_dict(saved)
    assert not job.updates.behind
    assert_same(dict(job.network.named_parameters()), dict(late.job.network.named_parameters()))
    assert job.train(2, start=4) == late.train(2, start=4)
    assert_alike(job, late)


def test_weights_that_somebody_has_changed_are_updated_as_they_are_o10(jobs: Made) -> None:
    job, late = both(jobs)
    for step in range(6):
        assert job.train(1, start=step) == late.train(1, start=step)
        for one in (job, late.job):
            with torch.no_grad():
                for parameter in one.network.parameters():
                    parameter.clamp_(-0.2, 0.2)
    assert_alike(job, late)


def test_an_update_has_the_state_that_there_was_at_its_step_o10(jobs: Made) -> None:
    job, late = both(jobs)
    for one in (job, late):
        one.train(3)
    job.optimizer.state.clear()
    job.train(1, start=3)
    late.train(1, start=3)  # within which the update of the step before took place, and nothing else
    late.job.optimizer.state.clear()
    assert job.train(2, start=4) == late.train(2, start=4)
    assert_same(job.weights(), late.weights())


def test_engaged_after_some_steps_and_brought_back_again_o10(jobs: Made) -> None:
    job, late = jobs(OPTIMIZERS["adamw"]), Late(jobs(OPTIMIZERS["adamw"]), after=2)
    job.train(2), late.train(2)
    job.offload("delayed")
    job.train(3, start=2), late.train(3, start=2)
    job.updates.detach()
    late.apply()
    job.engine.bring_back()
    assert not job.tier.reserved
    late.after = 100
    job.train(2, start=5), late.train(2, start=5)
    assert_same(job.weights(), late.weights())
    assert_same(job.optimizer.state_dict(), late.job.optimizer.state_dict())


def test_copies_of_the_module_are_ordinary_and_nothing_is_left_on_it(jobs: Made) -> None:
    job, _ = both(jobs)
    job.train(2)
    copies = [copy.deepcopy(job.network), pickle.load(io.BytesIO(pickle.dumps(job.network)))]
    for one in copies:
        one.state_dict()
        one.load_state_dict(copies[0].state_dict())
        assert job.updates.behind
    job.updates.detach()
    for part in job.network.modules():
        assert not part._state_dict_pre_hooks
        assert not part._load_state_dict_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in job.network.parameters())


def test_hooks_of_the_optimizer_are_called_once_a_step(jobs: Made) -> None:
    job, _ = both(jobs)
    calls: list[int] = []
    job.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    job.train(4)
    assert len(calls) == 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_weights_that_are_asked_for_between_forward_and_backward_are_noticed(jobs: Made) -> None:
    job, _ = both(jobs)
    job.train(2)
    loss = job.forward(2).sum() * job.network.unused.weight.sum()
    job.network.state_dict()
    with pytest.raises(RuntimeError, match=r"between the forward and the backward|modified by an inplace operation"):
        loss.backward()


def test_weights_that_autograd_does_not_keep_are_noticed_too(jobs: Made) -> None:
    job, _ = both(jobs)
    job.train(2)
    bias = job.network.norm.bias  # of whose value backward needs nothing
    job.updates.before_forward()
    loss = bias.sum()
    job.network.state_dict()
    with pytest.raises(RuntimeError, match=r"asked for between .* schedule='under_forward'"):
        loss.backward()


def test_a_gradient_that_comes_twice_is_refused(jobs: Made) -> None:
    job, _ = both(jobs, "sgd", together_bytes=1)
    twice = job.network.layers[0]

    def forward(tokens: Tensor) -> Tensor:
        hidden = checkpoint(twice, job.network.embedding(tokens), use_reentrant=True)
        return torch.tanh(twice(hidden)) @ job.network.embedding.weight.T

    job.network.forward = forward
    with pytest.raises(RuntimeError, match=r"a second time in one backward.*use_reentrant=False"):
        job.train(2)


def test_checkpointed_layers_that_are_used_twice_o10(jobs: Made) -> None:
    job, late = both(jobs, together_bytes=1)
    for one in (job, late.job):
        network = one.network

        def forward(tokens: Tensor, network: Any = network) -> Tensor:
            hidden = network.embedding(tokens)
            for layer in (*network.layers, network.layers[0]):
                hidden = hidden + checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), hidden, use_reentrant=False)
            return hidden @ network.embedding.weight.T

        network.forward = forward
    assert job.train(5) == late.train(5)
    assert_alike(job, late)


def test_a_gradient_that_is_changed_while_it_waits_is_noticed(jobs: Made) -> None:
    job, _ = both(jobs)
    job.train(2)
    job.optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"A gradient was changed in place .* schedule='after_backward'"):
        job.forward(2).backward()
    assert job.updates.begun
    with pytest.raises(RuntimeError, match="A gradient was changed in place"):
        job.updates.detach()
    assert not job.updates.behind


def test_it_says_that_it_is_behind(jobs: Made) -> None:
    job, _ = both(jobs)
    assert isinstance(job.updates, Delayed)
    assert not job.updates.behind
    job.train(1)
    assert job.updates.behind
    assert job.updates.repeatable
    job.updates.finish()
    assert not job.updates.behind
