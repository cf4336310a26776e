"""Rates that follow the gradients: what is measured, what is allowed, and what each layer gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import ActivationCompressionPlugin, GrowAndUnshareCallback
from lightning_efficient.activation_compression.adaptive import AdaptiveRates, Choice
from lightning_efficient.activation_compression.bounds import step_variance
from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.collect import Collector, LayerMeasurement
from lightning_efficient.activation_compression.control import AdaptiveControl
from lightning_efficient.activation_compression.layers import follow_modules
from lightning_efficient.activation_compression.rates import LayerRates
from lightning_efficient.demos.model import ByteTransformer
from tests.activation_compression.networks import classifier, compressed
from tests.helpers.fitting import assert_continues
from tests.helpers.fitting import fit as fit_setting
from tests.technique_settings import TechniqueSetting, demo_data, demo_model

Layer = Callable[[Tensor, nn.Parameter], Tensor]

LAYERS: dict[str, tuple[Layer, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (8, 64, 48), (32, 48)),
    "product": (lambda x, w: x @ w, (8, 64, 48), (48, 32)),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1), (8, 6, 24, 24), (10, 6, 3, 3)),
    "conv, strided": (lambda x, w: F.conv2d(x, w, stride=2), (8, 6, 23, 23), (10, 6, 3, 3)),
    "conv, grouped": (lambda x, w: F.conv2d(x, w, groups=3), (8, 6, 24, 24), (12, 2, 3, 3)),
    "conv, same": (lambda x, w: F.conv2d(x, w, padding="same"), (8, 6, 24, 24), (10, 6, 3, 3)),
    "conv1d": (lambda x, w: F.conv1d(x, w), (8, 6, 120), (10, 6, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, w), (4, 3, 9, 9, 9), (5, 3, 2, 2, 2)),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w), (8, 6, 20, 20), (6, 10, 3, 3)),
    "transposed, strided": (lambda x, w: F.conv_transpose2d(x, w, stride=2), (8, 6, 20, 20), (6, 10, 4, 4)),
}


def measure(
    chosen: Classifier,
    run: Callable[[], Tensor],
    weights: list[nn.Parameter],
    *batch: Tensor,
    signal: Tensor | None = None,
    key: int = 0,
) -> tuple[list[Tensor], dict[str, LayerMeasurement]]:
    """Gradients, and what the collector says of them."""
    collector = Collector(chosen.rates.bound)
    chosen.saved.observer, chosen.after = collector, collector.after
    model = nn.ParameterList(weights)
    with compressed(chosen, model, *batch, key=key):
        loss = run()
    gradients = list(torch.autograd.grad(loss, weights, signal))
    found = collector.measurements()
    collector.close()
    return gradients, found


@pytest.mark.parametrize("bits", [2, 4, EXACT])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_error_is_predicted_from_one_step_a5_a7(name: str, bits: int) -> None:
    layer, shape, weight_shape = LAYERS[name]
    torch.manual_seed(0)
    x, weight = torch.randn(shape), nn.Parameter(torch.randn(weight_shape))
    signal = torch.randn_like(layer(x, weight))

    def run() -> Tensor:
        return layer(x.clone(), weight)  # a clone: the batch itself would be kept exactly

    exact = torch.autograd.grad(run(), weight, signal)[0]
    _, found = measure(classifier(bits), run, [weight], signal=signal)
    (measured,) = found.values()
    assert measured.gradient_squares == pytest.approx(float(exact.square().sum()), rel=0.15)
    assert measured.nonzero == pytest.approx(1.0, abs=0.01)
    used = 4 if bits == EXACT else bits  # nothing is lost now: what 4 bits would lose
    errors = [measure(classifier(used), run, [weight], signal=signal, key=key)[0][0] - exact for key in range(12)]
    truth = float(torch.stack(errors).square().sum(tuple(range(1, exact.dim() + 1))).mean())
    assert math.sqrt(measured.sensitivity * step_variance(used)) == pytest.approx(math.sqrt(truth), rel=0.15)
    if measured.error_squares is not None and bits < EXACT:
        assert math.sqrt(measured.error_squares) == pytest.approx(math.sqrt(truth), rel=0.25)


def test_sparse_inputs_are_seen_a5() -> None:
    torch.manual_seed(0)
    x, weight = F.relu(torch.randn(512, 48)), nn.Parameter(torch.randn(32, 48))
    _, found = measure(classifier(4), lambda: F.linear(x.clone(), weight).square().sum(), [weight])
    assert found[""].nonzero == pytest.approx(0.5, abs=0.05)


def samples(x: Tensor, weight: nn.Parameter) -> dict[str, Tensor]:
    """Of the weight's gradient."""
    chosen, collector = classifier(EXACT), Collector(lambda _: None)
    chosen.saved.observer, chosen.after = collector, collector.after
    with compressed(chosen, nn.ParameterList([weight])):
        loss = F.linear(x * 1, weight).square().sum()
    torch.autograd.grad(loss, weight)
    return collector.gradient_samples()


def test_the_sample_of_a_gradient_is_of_all_its_columns() -> None:
    """The first input is always zero: at equal distances, of 16 columns and 16,384 elements, it would be that alone."""
    x, weight = torch.randn(64, 16), nn.Parameter(torch.randn(1024, 16))
    x[:, 0] = 0
    (sample,), (again,) = (samples(x, weight).values() for _ in range(2))
    assert sample.shape == (1024,)
    assert (sample != 0).float().mean() > 0.9
    assert torch.equal(sample, again)


def test_two_weights_of_a_module_are_two_measurements() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(128, 32), [nn.Parameter(torch.randn(size, 32)) for size in (16, 48)]

    def run() -> Tensor:
        return F.linear(x * 1, weights[0]).square().sum() + 100 * F.linear(x * 2, weights[1]).square().sum()

    exact, found = measure(classifier(4), run, weights)
    assert [one.weight_numel for one in found.values()] == [16 * 32, 48 * 32]
    for one, gradient in zip(found.values(), exact, strict=True):
        assert one.gradient_squares == pytest.approx(float(gradient.square().sum()), rel=0.1)


def test_a_weight_that_two_units_feed_is_shared_by_them() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 64, requires_grad=True), nn.Parameter(torch.randn(64, 64))

    def run() -> Tensor:
        return F.linear(F.layer_norm(x * 1, (64,)), weight).square().sum() + F.linear(F.gelu(x * 1), weight).sum()

    (exact,), found = measure(classifier(4), run, [weight])
    assert {one.unit for one in found.values()} == {("normalization", ""), ("activation", "")}
    squares = sum(one.gradient_squares for one in found.values())
    assert squares == pytest.approx(float(exact.square().sum()), rel=0.1)
    assert sum(one.weight_numel for one in found.values()) == 64 * 64


def language(bits: int) -> tuple[ByteTransformer, Classifier, Callable[[], Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = ByteTransformer(layers=2, width=64, heads=2, context=32)
    tokens, targets = torch.randint(0, 256, (2, 8, 32))
    return model, classifier(bits), lambda: F.cross_entropy(model(tokens).mT, targets), (tokens, targets)


def test_the_rate_that_matters_is_that_of_the_source_a7() -> None:
    """A linear layer's input that is made again of what a normalization keeps has the errors of that."""
    model, chosen, loss, batch = language(4)
    with follow_modules(model, chosen.layers):
        _, found = measure(chosen, loss, list(model.parameters()), *batch)
    assert found["blocks.0.attention.query"].unit == ("normalization", "blocks.0.attention_norm")
    assert found["blocks.0.mlp.down"].unit == ("activation", "blocks.0.mlp")
    assert found["blocks.0.attention.output"].unit == ("attention", "blocks.0.attention")
    assert found["head"].unit == ("normalization", "final_norm")


def one(layer: str, sensitivity: float, **other: Any) -> LayerMeasurement:
    return LayerMeasurement(**({
        "unit": ("linear", layer), "numel": 1000, "sensitivity": sensitivity, "gradient_squares": 1.0,
        "weight_numel": 100, "nonzero": 1.0,
    } | other))  # fmt: skip


def choose(average: float | None = None, rates: LayerRates | None = None, **measured: LayerMeasurement) -> Any:
    rules = AdaptiveRates(every=10, target=0.1)
    rules.measured = measured
    return rules.choose(rates or LayerRates(4), average)


def deviation(measured: LayerMeasurement, bits: int) -> float:
    return math.sqrt(measured.sensitivity * step_variance(bits))


@pytest.mark.parametrize("sensitivity", [0.01, 1.0, 30.0, 1000.0])
def test_a_layer_gets_the_fewest_bits_that_reach_the_target_a6_a8(sensitivity: float) -> None:
    measured = one("a", sensitivity)
    bits = choose(a=measured).bits["linear", "a"]
    assert deviation(measured, bits) <= 0.1
    assert bits == 1 or deviation(measured, bits - 1) > 0.1


def test_where_there_is_momentum_the_target_is_a_part_of_it_a6() -> None:
    """Its mean magnitude is that of an element, so times the number of elements."""
    relative = choose(a=one("a", 30.0, gradient_squares=1.0)).bits
    assert choose(a=one("a", 30.0, gradient_squares=99.0, momentum=0.1)).bits == relative
    assert choose(a=one("a", 30.0, momentum=1e-3)).bits["linear", "a"] == 8


def test_a_source_serves_its_most_sensitive_layer_a7() -> None:
    together = choose(a=one("s", 1.0), b=one("s", 300.0)).bits
    assert together == choose(b=one("s", 300.0)).bits


def test_a_budget_goes_where_errors_do_most_harm_a8() -> None:
    sensitive, other = one("a", 1000.0), one("b", 200.0)
    bits = choose(3.5, a=sensitive, b=other).bits
    assert bits == {("linear", "a"): 4, ("linear", "b"): 3}
    assert sum(bits.values()) <= 3.5 * 2


def test_a_bit_costs_as_much_as_a_unit_keeps_in_this_batch_a8() -> None:
    """The first is more sensitive, but keeps four times as many numbers."""
    measured = {"a": one("a", 300.0), "b": one("b", 200.0)}
    rules = AdaptiveRates(every=10, target=0.1)
    rules.measured = measured
    assert rules.choose(LayerRates(4), 3.5).bits == {("linear", "a"): 4, ("linear", "b"): 3}
    sizes = {("linear", "a"): 4000, ("linear", "b"): 1000}
    assert rules.choose(LayerRates(4), 3.5, sizes).bits == {("linear", "a"): 3, ("linear", "b"): 5}


def test_a_choice_comes_back_from_a_checkpoint() -> None:
    noisy = one("a", 100.0, noise_squares=1e-2)
    for choice in (choose(2.0, a=noisy), choose(None, LayerRates(4, error_bound=1e-3), a=noisy)):
        assert Choice.from_state(choice.state_dict()) == choice


def test_nobody_gets_more_than_the_target_needs_a8() -> None:
    assert choose(8.0, a=one("a", 1e-3)).bits == {("linear", "a"): 1}


def test_floors_and_overrides_hold_a8() -> None:
    rates = LayerRates(4, {"a": 6})
    found = choose(None, rates, a=one("a", 1.0), n=one("n", 1e-6, unit=("normalization", "n")))
    assert found.bits == {("normalization", "n"): 2}


def test_an_error_bound_is_the_sources_formula_and_never_above_the_users_a7() -> None:
    """The exact form of it: eb = sigma sqrt(3 / (R S))."""
    measured = one("a", 30.0, nonzero=0.5)
    rates = LayerRates(4, error_bound=10.0)
    bound = choose(None, rates, a=measured).bounds["linear", "a"]
    sigma = 0.1 * math.sqrt(measured.gradient_squares / measured.weight_numel)
    assert bound == pytest.approx(sigma * math.sqrt(3 / (measured.sensitivity / measured.weight_numel)))
    assert choose(None, LayerRates(4, error_bound=1e-3), a=measured).bounds["linear", "a"] == 1e-3


def test_the_guard_goes_above_the_budget() -> None:
    quiet = one("a", 100.0, noise_squares=1e-2)
    choice = choose(2.0, a=quiet)
    assert choice.guarded == (("linear", "a"),)
    assert quiet.sensitivity * step_variance(choice.bits["linear", "a"]) <= 0.1 * 1e-2
    assert choice.noise is not None
    assert choice.noise <= 0.1
    loud = choose(2.0, a=one("a", 100.0, noise_squares=1e4))
    assert (loud.bits, loud.guarded) == ({("linear", "a"): 2}, ())


def test_noise_is_what_differs_between_batches() -> None:
    rules = AdaptiveRates(every=10, target=0.1)
    rules.measured = {"a": one("a", 1.0, weight_numel=5000)}
    torch.manual_seed(0)
    mean = torch.randn(2000)
    rules.take_noise({"a": mean + 3 * torch.randn(2000)}, {"a": mean + 3 * torch.randn(2000)})
    assert rules.measured["a"].noise_squares == pytest.approx(9 * 5000, rel=0.1)


def test_noise_that_is_not_seen_is_not_known_and_a_gradient_of_zero_gives_no_bound() -> None:
    rules = AdaptiveRates(every=10, target=0.1)
    rules.measured = {"a": one("a", 1.0)}
    rules.take_noise({"a": torch.ones(100)}, {"a": torch.ones(100)})
    assert rules.measured["a"].noise_squares is None
    nothing = choose(None, LayerRates(4, error_bound=1e-3), a=one("a", 30.0, gradient_squares=0.0))
    assert nothing.bounds == {("linear", "a"): 1e-3}


def test_a_gradient_that_is_not_finite_gives_no_rate() -> None:
    assert choose(a=one("a", math.nan), b=one("b", 1.0, gradient_squares=math.inf)).bits == {}


# -- in a Trainer ------------------------------------------------------------------------------------------------------


def fit(*callbacks: pl.Callback, steps: int = 8, model: Any = None, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip
    trainer.fit(model or demo_model(), demo_data())
    return trainer


@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_the_target_is_reached_and_what_was_predicted_is_measured(arguments: dict[str, Any]) -> None:
    plugin = ActivationCompressionPlugin(adaptive={"every": 8, "target": 0.05})
    fit(plugin, steps=25, **arguments)
    values = plugin.measurements()
    assert 0.005 < values["activations/gradient_error"] < 0.08  # the target, and what changes in eight steps
    predicted = values["activations/gradient_error_predicted"] / values["activations/gradient_error"]
    assert 0.5 < predicted < 2  # eight steps before, of other gradients
    assert 0 < values["activations/noise_ratio"] < 0.1
    assert {values[tag] for tag in values if tag.startswith("activations/bits/")} <= {3.0, 4.0, 5.0, 6.0}
    assert "| model.blocks.0.mlp.up | " in plugin.summary()


def test_the_same_bytes_are_given_to_other_layers_a8() -> None:
    """Attention keeps four tensors and the signal of one: each bit costs as much as all of them."""
    kept = {}
    for name, rules in (("even", None), ("adaptive", {"every": 2, "target": 1e-3, "guard": 1e9})):
        plugin = ActivationCompressionPlugin(bits=5, adaptive=rules)
        fit(plugin, steps=5)
        kept[name] = plugin.measurements()["activations/kept_bytes"]
    bits = {value for tag, value in plugin.measurements().items() if tag.startswith("activations/bits/")}
    assert len(bits) > 1
    assert plugin.measurements()["activations/guarded"] == 0
    assert kept["adaptive"] <= 1.01 * kept["even"]
    sizes = plugin._adaptive.adaptive.sizes()  # type: ignore[union-attr]
    block = "model.blocks.1.attention"
    assert sizes["attention", block] == 4 * sizes["normalization", f"{block}_norm"]  # queries, keys, values, result


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_a_run_with_a_bound_that_changes_is_resumed_bit_for_bit_a7(tmp_path: Path) -> None:
    """The bounds in use were chosen under the bound of a step that is past."""
    arguments = {
        "schedule": {"initial_error_bound": 1e-3, "final_error_bound": 0.1, "begin": 2, "end": 0.75},
        "adaptive": {"every": 5, "target": 0.1},
    }
    setting = TechniqueSetting(
        name="bound",
        yaml={"callbacks": [{"class_path": "lightning_efficient.ActivationCompressionPlugin", "init_args": arguments}]},
        lossy=True,
        volatile=("activations/encode_ms", "activations/decode_ms"),
    )
    whole = fit_setting(setting, root=tmp_path, checkpoints={})
    assert "activations/error_bound/model.blocks.0.attention/attention" in whole.callbacks[0].measurements()
    resumed = fit_setting(setting, root=tmp_path / "resumed", ckpt_path=whole.checkpoints[9])
    assert_continues(resumed, whole)


def test_measured_steps_train_like_others() -> None:
    """Bit for bit, where nothing is lost."""

    def weights(*callbacks: pl.Callback) -> list[Tensor]:
        model = demo_model()
        fit(*callbacks, model=model)
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain = weights()
    found = weights(ActivationCompressionPlugin(overrides={"*": "raw"}, adaptive={"every": 2, "target": 0.1}))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_momentum_is_read_from_the_optimizer_a6() -> None:
    class WithMomentum(type(demo_model())):  # type: ignore[misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    plugin = ActivationCompressionPlugin(adaptive={"every": 3, "target": 0.1})
    model = demo_model(WithMomentum)
    trainer = fit(plugin, steps=7, model=model)
    measured = plugin._adaptive.adaptive.measured["model.blocks.0.mlp.up"]  # type: ignore[union-attr]
    weight = model.get_parameter("model.blocks.0.mlp.up.weight")
    now = float(trainer.optimizers[0].state[weight]["momentum_buffer"].abs().mean())
    assert measured.momentum == pytest.approx(now, rel=0.5)  # of the step before


def test_nothing_is_left_behind() -> None:
    plugin = ActivationCompressionPlugin(adaptive={"every": 2, "target": 0.1})
    model = demo_model()
    fit(plugin, steps=3, model=model)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert plugin._classifier.saved.observer is None
    assert plugin._classifier.ledger.live_bytes == 0


def test_where_nothing_can_be_measured_it_is_not_tried_at_every_step() -> None:
    class Nothing:
        calls = 0

        def agree(self, found: Any) -> Any:
            self.calls += 1
            return found

    control, nothing = AdaptiveControl(LayerRates(4), AdaptiveRates(every=10, target=0.1)), Nothing()
    for step in range(20):
        control.begin(step, classifier(4), lambda: lambda _: None)
        control.end(step, classifier(4), nothing.agree)
    assert nothing.calls == 2


def test_layers_that_come_while_it_trains_are_measured() -> None:
    plugin = ActivationCompressionPlugin(adaptive={"every": 100, "target": 0.1})
    fit(GrowAndUnshareCallback(stages=[{"depth": 2, "until": 3}, {"depth": 4}]), plugin, steps=6)
    assert "| model.blocks.3.mlp.up | normalization of model.blocks.3.mlp_norm |" in plugin.summary()


def test_compiled_modules_are_refused_by_name() -> None:
    model = demo_model()
    model.model.head = torch.compile(model.model.head, backend="eager")
    with pytest.raises(MisconfigurationException, match=r"adaptive needs to know which layer.*\(model\.head\)"):
        fit(ActivationCompressionPlugin(adaptive={"every": 100, "target": 0.1}), model=model)
