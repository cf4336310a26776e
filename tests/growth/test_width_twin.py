"""A module that is narrow first: what is swapped, what stays, and what the optimizer sees."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim

from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.loading import build_growing
from lightning_efficient.growth.schedule import Until
from lightning_efficient.growth.settings import WidthSettings
from tests.growth.networks import ClassToken, NormalisedByBatch, bytes_held
from tests.growth.wide_networks import randomised, tokens

ARGUMENTS: dict[str, Any] = {"vocabulary": 11, "layers": 4, "width": 16, "heads": 4, "context": 5}
FULL = (0, 1, 2, 3)


class Holder(nn.Module):
    """As a LightningModule holds its network: with hyperparameters, metrics and a temperature beside it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.hparams = {**ARGUMENTS, **arguments}
        self.model = ByteTransformer(**self.hparams)
        self.width = self.hparams["width"]
        self.temperature = nn.Parameter(torch.ones(()))
        self.metric = nn.Module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) / self.temperature


def narrowed(module: nn.Module, mode: str | None = None, **options: Any) -> GrowingModule:
    settings = WidthSettings(options.pop("factor", 2), Until(fraction=0.5), **options)
    return build_growing(module, None, mode, settings)


def filled(growing: GrowingModule) -> GrowingModule:
    randomised(growing.module)
    return growing


# -- going narrow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
def test_the_narrow_form_is_what_the_constructor_builds_g4(factor: int) -> None:
    module = Holder()
    names = list(module.state_dict())
    narrowed(module, factor=factor)
    plain = Holder(width=16 // factor, heads=4 // factor)
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert list(module.state_dict()) == names
    assert module.width == 16 // factor
    assert module.model.head.weight is module.model.token_embedding.weight


def test_what_has_no_width_stays_the_same_object_g4() -> None:
    module = Holder()
    temperature, metric, identity = module.temperature, module.metric, id(module)
    growing = narrowed(module)
    assert (module.temperature, module.metric) == (temperature, metric)
    growing.grow_width(state="copy")
    assert (module.temperature, module.metric, id(module)) == (temperature, metric, identity)


def test_the_form_that_is_out_takes_no_memory_g4() -> None:
    module = Holder()
    wide = module.model
    growing = narrowed(module)
    narrow = module.model
    count = len(list(wide.parameters()))
    assert bytes_held(wide.parameters()) == 4 * count
    growing.grow_width(state="copy")
    assert module.model is wide
    assert bytes_held(narrow.parameters()) == 4 * count


def test_frozen_parameters_are_frozen_in_both_forms_g4() -> None:
    module = Holder()
    module.model.token_embedding.weight.requires_grad_(False)
    growing = narrowed(module)
    assert not module.model.token_embedding.weight.requires_grad
    growing.grow_width(state="copy")
    assert not module.model.token_embedding.weight.requires_grad
    assert module.model.blocks[0].mlp.up.weight.requires_grad


# -- growing wide ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factor", [2, 4])
def test_growth_preserves_the_function_g4(tied: bool, factor: int) -> None:
    growing = filled(narrowed(Holder(tied=tied), factor=factor))
    before = growing.module(tokens())
    change = growing.grow_width(state="copy")
    torch.testing.assert_close(growing.module(tokens()), before, rtol=1e-11, atol=1e-12)
    assert growing.module.width == 16
    assert "temperature" not in change.replaced
    assert "model.token_embedding.weight" in change.replaced
    assert change.added == change.removed == ()


@pytest.mark.parametrize("first", ["width", "layers"])
@pytest.mark.parametrize(("mode", "form"), [("stack", (0, 1)), ("share", (0, 1, 0, 1)), ("share", (0, 0, 0, 0))])
def test_width_and_layers_grow_in_either_order_g3_g4(first: str, mode: str, form: tuple[int, ...]) -> None:
    growing = narrowed(Holder(), mode)
    growing.restore(form, "narrow")
    filled(growing)
    output = growing.module(tokens())

    def layers() -> None:
        growing.grow_layers(FULL, [i % len(form) for i in range(4)], state="copy")

    if first == "layers":
        layers()
        if mode == "share":
            assert torch.equal(growing.module(tokens()), output)
        output = growing.module(tokens())
    growing.grow_width(state="copy")
    torch.testing.assert_close(growing.module(tokens()), output, rtol=1e-11, atol=1e-12)
    if first == "width":
        output = growing.module(tokens())
        assert len(set(growing.leaders)) == len(set(form))
        layers()
        if mode == "share":
            assert torch.equal(growing.module(tokens()), output)
    assert {n: p.shape for n, p in growing.module.named_parameters()} == {
        n: p.shape for n, p in Holder().named_parameters()
    }
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() >= p.nbytes for p in growing.module.parameters())


def test_a_preview_leaves_everything_as_it_was_g4() -> None:
    growing = narrowed(Holder(), "stack")
    growing.restore((0, 1), "narrow")
    filled(growing)
    before, output = dict(growing.module.named_parameters()), growing.module(tokens())
    with growing.preview_width():
        assert growing.width == "wide"
        torch.testing.assert_close(growing.module(tokens()), output, rtol=1e-11, atol=1e-12)
    after = dict(growing.module.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert growing.width == "narrow"
    growing.grow_layers(FULL, (0, 1, 0, 1), state="copy")
    output = growing.module(tokens())
    growing.grow_width(state="copy")
    torch.testing.assert_close(growing.module(tokens()), output, rtol=1e-11, atol=1e-12)


def test_running_statistics_grow_with_the_channels_g4() -> None:
    module = NormalisedByBatch(8)
    growing = narrowed(module)
    module.train()
    module(torch.randn(20, 3))
    module.eval()
    mean, scratch = module.net[1].running_mean.clone(), torch.full((4,), 7.0)
    module.net.scratch.copy_(scratch)
    x = torch.randn(5, 3)
    output = module(x)
    growing.grow_width(state="copy")
    assert torch.equal(module.net[1].running_mean, torch.cat([mean, mean]))
    assert module.net[1].num_batches_tracked == 1
    assert not module.net[1].training
    assert torch.equal(module.net.scratch, torch.zeros(8))
    torch.testing.assert_close(module(x), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", ["copy", "reset"])
def test_groups_and_state_fit_the_parameters_after_each_growth_g4_g8(state: Any) -> None:
    growing = narrowed(Holder(), "stack")
    growing.restore((0, 1), "narrow")
    with growing.expanded() as names:
        named = list(growing.module.named_parameters())
        optimizer = optim.AdamW(
            [{"params": [p for _, p in named if p.ndim < 2]}, {"params": [p for _, p in named if p.ndim > 1]}]
        )
    growing.plan_optimizers([optimizer], names)
    for grow in (growing.grow_width, partial(growing.grow_layers, FULL, (0, 1, 0, 1))):
        growing.module(tokens()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        grow(state=state)
        kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert kept == {id(p) for p in growing.module.parameters()}
        assert {id(p) for p in optimizer.state} <= kept
        assert all(values["exp_avg"].shape == p.shape for p, values in optimizer.state.items())
        assert len(optimizer.state) == len(kept) or state == "reset"


@pytest.mark.parametrize("width", ["narrow", "wide"])
@pytest.mark.parametrize("form", [(0, 1), FULL])
def test_any_form_can_be_taken_to_be_loaded_over_g8(width: str, form: tuple[int, ...]) -> None:
    source = narrowed(Holder(), "stack")
    source.restore((0, 1), "narrow")
    if width == "wide":
        source.grow_width(state="copy")
    if form == FULL:
        source.grow_layers(FULL, (0, 1, 0, 1), state="copy")
    randomised(source.module)
    resumed = narrowed(Holder(), "stack")
    resumed.restore((0, 1), "narrow")
    resumed.restore(form, width)
    resumed.module.load_state_dict(source.module.state_dict())
    assert (resumed.width, resumed.leaders) == (width, form)
    torch.testing.assert_close(resumed.module.double()(tokens()), source.module(tokens()), rtol=1e-4, atol=1e-4)
    assert all(p.untyped_storage().nbytes() >= p.nbytes for p in resumed.module.parameters())


def test_parameters_of_the_module_itself_grow_too_g4_g7() -> None:
    """A vision transformer's class token and positions."""
    growing = filled(narrowed(ClassToken(16)))
    held = growing.module.token
    before = growing.module(tokens())
    growing.grow_width(state="copy")
    assert growing.module.token.shape == (1, 1, 16)
    torch.testing.assert_close(growing.module(tokens()), before, rtol=1e-11, atol=1e-12)
    assert isinstance(growing.module.token, nn.Parameter)
    assert held is not growing.module.token
