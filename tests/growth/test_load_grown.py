"""A checkpoint of any phase, loaded without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_efficient import load_grown
from lightning_efficient.demos.language_model import ByteLanguageModel
from lightning_efficient.demos.model import ByteTransformer
from lightning_efficient.growth.engine import GrowingModule
from lightning_efficient.growth.loading import build_growing
from lightning_efficient.growth.operators import DEPTH_OPERATORS
from lightning_efficient.growth.schedule import Until
from lightning_efficient.growth.settings import WidthSettings
from tests.growth.networks import Layer, Residual, arrangement_of, checkpoint_of, same
from tests.growth.wide_networks import randomised, tokens

FULL = (0, 1, 2, 3)
FORMS = [("stack", (0, 1)), ("interleave", (0, 1, 2)), ("middle", (0, 1)), ("share", (0, 1, 0, 1)), ("share", FULL)]
SMALL: dict[str, Any] = {"vocabulary": 11, "layers": 4, "width": 16, "heads": 4, "context": 5}
NARROW = {"width": 8, "heads": 2}
WIDTH = {"factor": 2, "arguments": None, "readout": None, "sections": None}


def grown(growing: GrowingModule, mode: str) -> nn.Module:
    """As the run would have gone on."""
    depth = len(growing.leaders)
    source = DEPTH_OPERATORS[mode](depth, 4) if mode in DEPTH_OPERATORS else FULL
    growing.grow_layers(FULL, source, state="copy")
    return growing.module


def in_form(mode: str, form: tuple[int, ...]) -> GrowingModule:
    network = Residual(4).double()
    growing = GrowingModule(network, arrangement_of(network))
    growing.restore(form, "wide")
    randomised(network)
    return growing


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "form"), FORMS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_plain_module_takes_the_form_of_the_phase_g3(mode: str, form: tuple[int, ...], prefix: str) -> None:
    source = in_form(mode, form)
    checkpoint = checkpoint_of(source, mode, prefix)
    checkpoint["state_dict"]["other.weight"] = torch.ones(1)
    if not prefix:
        del checkpoint["state_dict"]["other.weight"]
    loaded = load_grown(Residual(4).double(), checkpoint, prefix=prefix)
    assert same(loaded.state_dict(), source.module.state_dict())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in source.module.named_parameters()]


@pytest.mark.parametrize(("mode", "form"), FORMS)
def test_grown_goes_on_to_the_full_model_g3(mode: str, form: tuple[int, ...], batch: torch.Tensor) -> None:
    source = in_form(mode, form)
    checkpoint = checkpoint_of(source, mode)
    before = source.module(batch)
    loaded = load_grown(Residual(4).double(), checkpoint, grown=True)
    if mode == "share":
        assert torch.equal(loaded(batch), before)
    assert same(loaded.state_dict(), grown(source, mode).state_dict())
    assert len({id(p) for p in loaded.layers.parameters()}) == 16


def test_layers_at_the_root_of_the_network_load_by_prefix_g3() -> None:
    """``self.model = nn.Sequential(...)``: the layers' parent is ``model``, which is the whole of the plain module."""
    holder = nn.Module()
    holder.model = nn.Sequential(nn.Linear(3, 4), *(Layer(4) for _ in range(4)), nn.Linear(4, 2))
    growing = GrowingModule(holder, arrangement_of(holder))
    growing.restore((0, 1), "wide")
    plain = nn.Sequential(nn.Linear(3, 4), *(Layer(4) for _ in range(4)), nn.Linear(4, 2))
    loaded = load_grown(plain, checkpoint_of(growing, "stack"), prefix="model.")
    assert same(loaded.state_dict(), holder.model.state_dict())


def test_a_plain_load_of_a_shallow_checkpoint_fails_loudly_g3() -> None:
    checkpoint = checkpoint_of(in_form("stack", (0, 1)), "stack")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layers\.2\.norm\.weight"):
        Residual(4).double().load_state_dict(checkpoint["state_dict"])


def test_a_load_into_a_module_of_other_depth_fails_loudly_g3() -> None:
    checkpoint = checkpoint_of(in_form("stack", (0, 1, 2)), "stack")
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        load_grown(Residual(2).double(), checkpoint)


def test_a_prefix_that_no_name_has_is_told() -> None:
    with pytest.raises(ValueError, match=r"begins with prefix='net\.'; the first is 'embed"):
        load_grown(Residual(4).double(), checkpoint_of(in_form("stack", (0, 1)), "stack"), prefix="net.")


def test_a_checkpoint_without_growth_loads_as_it_is() -> None:
    network = Residual(4).double()
    loaded = load_grown(Residual(4).double(), {"state_dict": network.state_dict()}, grown=True)
    assert same(loaded.state_dict(), network.state_dict())


def test_from_a_file_in_safe_mode_g3(tmp_path: Path) -> None:
    source = in_form("stack", (0, 1))
    torch.save(checkpoint_of(source, "stack"), tmp_path / "last.ckpt")
    loaded = load_grown(Residual(4).double(), tmp_path / "last.ckpt")
    assert same(loaded.state_dict(), source.module.state_dict())


# -- a class -----------------------------------------------------------------------------------------------------------


def language_model_checkpoint() -> tuple[ByteLanguageModel, dict[str, Any]]:
    model = ByteLanguageModel(**SMALL)
    growing = build_growing(model, None, "stack", None)
    growing.restore((0, 1), "wide")
    randomised(model)
    return model, {**checkpoint_of(growing, "stack"), "hyper_parameters": dict(model.hparams)}


def test_a_class_is_built_from_the_checkpoints_hyperparameters_g3() -> None:
    model, checkpoint = language_model_checkpoint()
    loaded = load_grown(ByteLanguageModel, checkpoint, learning_rate=0.5)
    assert len(loaded.model.blocks) == 2
    assert loaded.learning_rate == 0.5
    torch.testing.assert_close(loaded.double()(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
    assert len(load_grown(ByteLanguageModel, checkpoint, grown=True).model.blocks) == 4


def test_the_network_inside_a_lightning_module_loads_by_prefix_g3() -> None:
    model, checkpoint = language_model_checkpoint()
    loaded = load_grown(ByteTransformer(**SMALL).double(), checkpoint, prefix="model.")
    assert torch.equal(loaded(tokens()), model(tokens()))


# -- width -------------------------------------------------------------------------------------------------------------


def narrow_growing(mode: str | None, form: tuple[int, ...], readout: str | None = None) -> GrowingModule:
    settings = WidthSettings(2, Until(), readout=readout)
    growing = build_growing(ByteLanguageModel(**SMALL), None, mode, settings)
    growing.restore(form, "narrow")
    randomised(growing.module)
    return growing


@pytest.mark.parametrize(("mode", "form"), [(None, ()), ("stack", (0, 1)), ("share", (0, 0, 0, 0))])
@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_narrow_phase_loads_from_its_class_g4(mode: str | None, form: tuple[int, ...], to_the_end: bool) -> None:
    source = narrow_growing(mode, form)
    checkpoint = checkpoint_of(source, mode, width_settings=WIDTH)
    checkpoint["hyper_parameters"] = SMALL
    loaded = load_grown(ByteLanguageModel, checkpoint, grown=to_the_end)
    width = 16 if to_the_end else 8
    assert loaded.model.token_embedding.weight.shape == (11, width)
    assert len(loaded.model.blocks) == (4 if to_the_end or mode != "stack" else 2)
    if mode != "stack" or not to_the_end:
        torch.testing.assert_close(loaded.double()(tokens()), source.module(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readout", [None, "model.final_norm"])
def test_a_narrow_phase_loads_into_the_network_alone_g4(readout: str | None) -> None:
    """All paths in the checkpoint begin with the prefix, the one of ``readout`` too."""
    source = narrow_growing("stack", (0, 1), readout)
    checkpoint = checkpoint_of(source, "stack", width_settings={**WIDTH, "readout": readout})
    loaded = load_grown(
        ByteTransformer(**SMALL).double(),
        checkpoint,
        prefix="model.",
        build_narrow=lambda: ByteTransformer(**{**SMALL, **NARROW}).double(),
    )
    assert torch.equal(loaded(tokens()), source.module(tokens()))


def test_a_narrow_phase_without_a_way_to_build_it_says_what_is_missing_g4() -> None:
    checkpoint = checkpoint_of(narrow_growing("stack", (0, 1)), "stack", width_settings=WIDTH)
    with pytest.raises(ValueError, match="build_narrow"):
        load_grown(ByteTransformer(**SMALL), checkpoint, prefix="model.")


def test_a_model_without_the_layers_is_told_so_g3() -> None:
    checkpoint = checkpoint_of(in_form("stack", (0, 1)), "stack", "model.")
    with pytest.raises(ValueError, match=r"Residual has no 'model.*prefix='model.' \(given: ''\)"):
        load_grown(Residual(4).double(), checkpoint)
    with pytest.raises(ValueError, match=r"Residual has no 'layers.2'"):
        load_grown(Residual(2).double(), checkpoint, prefix="model.")


def test_swapped_arguments_are_named_g3(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes the module .* first, then the checkpoint"):
        load_grown(tmp_path / "last.ckpt", Residual)  # type: ignore[type-var]
