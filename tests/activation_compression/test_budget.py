"""A budget of bytes: what each size of batch gets, and that it stays within."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_efficient import ActivationCompressionPlugin, GrowAndUnshareCallback
from lightning_efficient.activation_compression.batches import tensors_in
from lightning_efficient.activation_compression.blocks import Blocks, find_blocks
from lightning_efficient.activation_compression.classify import EXACT, Classifier
from lightning_efficient.activation_compression.host import HostMemory, OnHost
from lightning_efficient.activation_compression.ledger import PassSizes
from lightning_efficient.activation_compression.operations import FLOORS
from lightning_efficient.activation_compression.plan import MemoryPlan, MemoryPlanner, make_plan
from lightning_efficient.activation_compression.store import Unit
from lightning_efficient.core.quantization import dequantize, dequantized_pieces, quantize
from lightning_efficient.demos import ByteLanguageModel
from tests.activation_compression.networks import ConvNet, classifier, compressed, gradients, relative_error

LINEAR, ATTENTION = ("linear", "blocks.0.fc"), ("attention", "blocks.0.attention")


def sizes(scale: float = 1.0, blocks: int = 1) -> PassSizes:
    found = PassSizes()
    for block in range(blocks):
        for kind, layer in ((LINEAR[0], f"blocks.{block}.fc"), (ATTENTION[0], f"blocks.{block}.attention")):
            found.add((kind, layer), int(12_800 * scale), 4)
            found.saved[layer] += 4 * 12_800 * scale
            found.fixed[layer] += 100 * scale
    return found


def plan(budget: float, found: PassSizes | None = None, **arguments: Any) -> MemoryPlan:
    return make_plan(found or sizes(), budget, FLOORS.__getitem__, group_size=128, **arguments)


def test_what_fits_stays_raw_a9() -> None:
    assert set(plan(110_000).levels.values()) == {EXACT}


def test_bits_go_down_until_it_fits_and_errors_that_reach_far_come_last_a9() -> None:
    at = {budget: plan(budget).levels for budget in (80_000, 27_000, 26_000, 15_000, 12_000)}
    assert at[80_000] == {LINEAR: 8, ATTENTION: EXACT}
    assert at[27_000] == {LINEAR: 8, ATTENTION: 8}
    assert at[26_000] == {LINEAR: 7, ATTENTION: 8}
    assert at[15_000] == {LINEAR: 4, ATTENTION: 4}
    assert at[12_000] == {LINEAR: 2, ATTENTION: 4}


@pytest.mark.parametrize("budget", range(11_000, 110_000, 3000))
def test_a_plan_that_fits_is_within_the_budget_and_uses_it_a9(budget: int) -> None:
    found = plan(budget)
    taken = 200.0
    for unit, level in found.levels.items():
        numel, itemsize = sizes().numbers[unit]
        taken += numel * itemsize if level == EXACT else numel * level / 8 + 4 * 100
    assert taken == found.predicted_bytes <= budget
    assert found.fits


def test_what_cannot_fit_is_said_a9() -> None:
    found = plan(5000)
    assert not found.fits
    assert found.levels == {LINEAR: 2, ATTENTION: 4}


def test_a_device_sends_four_bits_to_the_host_before_it_takes_fewer_a9() -> None:
    found = plan(12_000, host=True)
    assert set(found.levels.values()) == {4}
    assert found.offloaded == {LINEAR, ATTENTION}
    assert found.describe() == "2 x 4 bits on the host"


def test_blocks_are_made_again_where_that_is_what_it_takes_a9() -> None:
    """Of twenty; each keeps some 10 kB in the fewest bits, and one that is made again needs 102 kB for the while."""
    many, names = sizes(blocks=20), [f"blocks.{n}" for n in range(20)]
    assert plan(214_000, many, blocks=names).recomputed == ()
    found = plan(180_000, many, blocks=names)
    assert found.fits
    assert 10 < len(found.recomputed) < 20
    assert plan(180_000, sizes(blocks=20)).recomputed == ()  # nobody said that they can be


def test_sizes_that_were_not_seen_are_predicted_a9() -> None:
    """Exactly where a layer's memory is a polynomial of the size, up to squares: that of attention's scores is."""
    planner = MemoryPlanner()
    assert planner.predict("1", 1) is None

    def attention(size: int) -> PassSizes:
        found = PassSizes()
        found.add(("other", "scores"), 7 * size * size + 3 * size, 4)
        found.add(("linear", "fc"), 5 * size, 4)
        found.saved["fc"] = 20.0 * size
        return found

    planner.note("100", 100, attention(100), ())
    assert planner.predict("50", 50).numbers["linear", "fc"][0] == pytest.approx(250)  # type: ignore[union-attr]
    for size in (200, 300):
        planner.note(str(size), size, attention(size), ())
    found = planner.predict("250", 250)
    assert found is not None
    assert found.numbers["other", "scores"][0] == pytest.approx(7 * 250**2 + 750)
    assert found.saved_bytes == pytest.approx(5000)
    again = MemoryPlanner()
    again.load_state_dict(planner.state_dict())
    assert again.predict("250", 250) == found


def test_layers_of_a_block_that_is_made_again_are_not_forgotten_a9() -> None:
    planner, found = MemoryPlanner(), sizes(blocks=2)
    planner.note("a", 10, found, ())
    seen = PassSizes()
    seen.add(("linear", "blocks.1.fc"), 12_800, 4)
    seen.add(("block", "blocks.0"), 500, 4)
    planner.note("a", 10, seen, ["blocks.0"])
    numbers = planner.predict("a", 10).numbers  # type: ignore[union-attr]
    assert numbers["linear", "blocks.0.fc"] == (12_800, 4)
    assert numbers["block", "blocks.0"] == (500, 4)


# -- blocks ------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Many equal blocks with dropout."""

    def __init__(self, depth: int, width: int = 64, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(width), nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_repeated_modules_are_found() -> None:
    model = ByteLanguageModel(layers=3, width=32, heads=2, context=16)
    assert find_blocks(model) == ["model.blocks.0", "model.blocks.1", "model.blocks.2"]
    assert find_blocks(ConvNet()) == []


def test_blocks_that_are_made_again_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, x = Deep(4), torch.randn(64, 64)
    exact = gradients(model, lambda: model(x).square().mean())
    chosen = classifier(EXACT)
    blocks = Blocks(chosen.operation)
    with blocks.wrapping(model):
        blocks.recomputed = frozenset(["blocks.0", "blocks.2"])
        found = gradients(model, lambda: model(x).square().mean(), chosen, x)
        assert {key[1] for key in chosen.ledger.by if key[2] != "recomputed"} >= {"block"}
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_the_input_of_a_block_has_eight_bits() -> None:
    torch.manual_seed(0)
    model, x = Deep(4), torch.randn(64, 64)
    exact = gradients(model, lambda: model(x).square().mean())
    chosen = classifier(8)
    blocks = Blocks(chosen.operation)
    with blocks.wrapping(model):
        blocks.recomputed = frozenset(f"blocks.{n}" for n in range(4))
        found = gradients(model, lambda: model(x).square().mean(), chosen, x)
        ways = {way for (_, kind, way), (saved, _) in chosen.ledger.by.items() if kind == "block" and saved}
        assert ways == {"8 bits"}
    assert relative_error(found, exact) < 0.02


def test_blocks_with_statistics_are_not_called_twice() -> None:
    model, x = Deep(2, norm=nn.BatchNorm1d), torch.randn(64, 64)
    chosen = classifier(EXACT)
    blocks = Blocks(chosen.operation)
    with blocks.wrapping(model):
        model(x)
        assert blocks.impure == {"blocks.0", "blocks.1"}
        blocks.recomputed = frozenset(blocks.names)
        before = int(model.blocks[0][0].num_batches_tracked)  # type: ignore[index]
        gradients(model, lambda: model(x).square().mean(), chosen, x)
        assert int(model.blocks[0][0].num_batches_tracked) == before + 1  # type: ignore[index]


def test_a_wrapped_model_can_be_copied() -> None:
    model, x = Deep(2).eval(), torch.randn(1, 64)
    blocks = Blocks(classifier(EXACT).operation)
    with blocks.wrapping(model):
        other = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0][1].weight.zero_()  # type: ignore[index, union-attr]
    assert not torch.equal(other(x), model(x))


# -- the host's memory -------------------------------------------------------------------------------------------------


def test_what_waits_on_the_host_comes_back_as_it_was_a9() -> None:
    memory, records, all_encoded = HostMemory(), [], []
    for seed in range(4):
        encoded = quantize(torch.randn(5000, generator=torch.Generator().manual_seed(seed)), 4, key=seed)
        assert encoded is not None
        all_encoded.append(encoded)
        records.append(memory.keep(encoded))
    for record, encoded in reversed(list(zip(records, all_encoded, strict=True))):
        assert record.way == "4 bits on the host"
        assert record.nbytes == encoded.scale.nbytes + encoded.minimum.nbytes
        assert torch.equal(record.decode(), dequantize(encoded))
        pieces = torch.cat([piece.clone() for _, piece in record.pieces()])
        assert torch.equal(pieces, torch.cat([piece.clone() for _, piece in dequantized_pieces(encoded)]))


def test_a_plan_sends_its_units_there_a9() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(64, 64)
    chosen = classifier(4)
    here = [gradient.clone() for gradient in gradients(model, lambda: model(x).square().mean(), chosen, x)]
    unit: Unit = ("activation", "")
    chosen.offloaded = frozenset([unit])
    with compressed(chosen, model, x):
        loss = model(x).square().mean()
    assert ("", "activation", "4 bits on the host") in chosen.ledger.by
    loss.backward()
    assert chosen.ledger.live_bytes == 0
    there = gradients(model, lambda: model(x).square().mean(), chosen, x)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_the_host_are_ordered_with_the_computation() -> None:
    memory = HostMemory()
    records: list[tuple[OnHost, Tensor]] = []
    for seed in range(20):
        values = torch.randn(1 << 20, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
        encoded = quantize(values, 4, key=seed)
        assert encoded is not None
        records.append((memory.keep(encoded), dequantize(encoded)))
        del encoded
    for record, expected in reversed(records):
        assert torch.equal(record.decode(), expected)


# -- in a Trainer ------------------------------------------------------------------------------------------------------


class Lengths(torch.utils.data.Dataset[Tensor]):
    """Batches of byte sequences of different lengths."""

    lengths = (64, 32, 64, 16, 48, 24, 56, 64)

    def __init__(self, lengths: tuple[int, ...] = lengths) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (8, self.lengths[index] + 1), generator=generator)


class Watch(pl.Callback):
    def __init__(self, plugin: ActivationCompressionPlugin) -> None:
        self.plugin = plugin
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        (tokens,) = tensors_in(batch)
        self.seen.append((tokens.shape[1] - 1, dict(self.plugin.measurements())))

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self.weights = [parameter.detach().clone() for parameter in pl_module.parameters()]


class Hidden:
    """Nothing says that there are tensors in it."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


class Unwrapping(ByteLanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch if isinstance(batch, Tensor) else batch["tokens"], batch_idx)


def fit(
    plugin: ActivationCompressionPlugin,
    steps: int = 8,
    layers: int = 2,
    wrap: Callable[[Tensor], Any] = lambda tokens: tokens,
    lengths: tuple[int, ...] = Lengths.lengths,
    callbacks: tuple[pl.Callback, ...] = (),
    **arguments: Any,
) -> Watch:
    watch = Watch(plugin)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[*callbacks, plugin, watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, **arguments,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Unwrapping(layers=layers, width=64, heads=2, context=64, learning_rate=3e-3, warmup_steps=2)
    data = torch.utils.data.DataLoader(Lengths(lengths), batch_size=None, collate_fn=wrap)
    trainer.fit(model, data, data)
    return watch


class Encoding(UserDict[str, Any]):
    """As tokenizers make them: pytree does not look into it."""


@dataclass(frozen=True)
class Example:
    tokens: Tensor
    name: str = ""


class Custom:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.all = tokens, self

    def to(self, *_: Any, **__: Any) -> Custom:
        return self


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "mapping": lambda tokens: Encoding(tokens=tokens),
    "frozen dataclass": Example,
    "with a method to": Custom,
    "nested": lambda tokens: [{"text": "a", "examples": (Example(tokens),)}],
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_tensors_of_a_batch_are_seen_a9(name: str) -> None:
    tokens = torch.zeros(3)
    assert [found is tokens for found in tensors_in(BATCHES[name](tokens))] == [True]


def test_batches_that_pytree_does_not_know_get_plans_of_their_own_a9() -> None:
    plugin = ActivationCompressionPlugin(memory_budget="1MiB")
    watch = fit(plugin, wrap=BATCHES["mapping"])
    assert "| 8x17 | " in plugin.summary()
    assert "| 8x65 | " in plugin.summary()
    for length, values in watch.seen[1:]:
        assert values["activations/kept_bytes"] <= 1.01 * 2**20, length


def test_a_batch_without_tensors_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=r"memory_budget plans by .* a batch of Hidden has none"):
        fit(ActivationCompressionPlugin(memory_budget="1MiB"), wrap=Hidden)


def test_empty_batches_break_no_prediction_a9() -> None:
    planner = MemoryPlanner()
    planner.note("0", 0, PassSizes(), ())
    assert planner.predict("5", 5) is not None


def test_every_size_stays_within_the_budget_and_as_predicted_a9() -> None:
    plugin = ActivationCompressionPlugin(memory_budget="1MiB")
    watch = fit(plugin, steps=16)
    for length, values in watch.seen[1:]:
        assert values["activations/kept_bytes"] <= 1.01 * 2**20, length
        assert values["activations/kept_bytes"] == pytest.approx(values["activations/planned_bytes"], rel=0.03), length
    by_length = {length: values["activations/ratio"] for length, values in watch.seen[1:]}
    assert by_length[16] < by_length[32] < by_length[64]  # the less there is, the less of it is lost
    assert "| 8x17 | " in plugin.summary()
    texts = [event.text for event in plugin.events()]
    assert len(texts) == len(set(Lengths.lengths))
    assert "Plan for saved tensors: a batch of 8x33 keeps " in texts[0]


def test_what_fits_as_it_is_is_left_to_autograd_and_looked_at_now_and_then_a9(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, looked = ActivationCompressionPlugin(memory_budget="2MiB"), []
    begin = Classifier.begin
    monkeypatch.setattr(Classifier, "begin", lambda *arguments: looked.append(plugin._step) or begin(*arguments))
    watch = fit(plugin, steps=60)
    fits = {length for length, values in watch.seen if values["activations/saved_bytes"] <= 2**21}
    assert fits == {16, 24}
    for step, (length, values) in enumerate(watch.seen):
        assert (step in looked) == (length not in fits or step < len(Lengths.lengths) or step == 50), step
        if step not in looked:
            assert values["activations/kept_bytes"] == values["activations/saved_bytes"] <= 2**21


def test_a_run_that_fits_as_it_is_has_the_weights_of_one_without_a_budget() -> None:
    plugin = ActivationCompressionPlugin(memory_budget="1GiB", overrides={"*": "raw"})  # the first batch too
    plain = fit(ActivationCompressionPlugin(bits="lossless"), steps=20)
    found = fit(plugin, steps=20)
    assert found.seen[-1][1]["activations/ratio"] == 1
    assert all(torch.equal(a, b) for a, b in zip(found.weights, plain.weights, strict=True))


def test_after_growth_nothing_is_known_of_what_batches_save_a9() -> None:
    plugin = ActivationCompressionPlugin(memory_budget="4MiB")
    fit(plugin, steps=16)
    assert plugin._budget is not None
    plugin._budget.begin(1, [torch.zeros(8, 17)], plugin._classifier)
    assert plugin._budget.plan is not None
    assert plugin._budget.plan.describe() == "everything uncompressed"
    plugin._budget.again()
    plugin._budget.begin(1, [torch.zeros(8, 17)], plugin._classifier)
    assert plugin._budget.plan is None


def test_after_growth_the_new_plan_is_told_though_shapes_are_the_same_a9() -> None:
    grows = GrowAndUnshareCallback(layers="blocks.*", stages=[{"depth": 2, "until": 4}, {"depth": 8}])
    plugin = ActivationCompressionPlugin(memory_budget="256KiB")
    with pytest.warns(UserWarning, match="It does not fit: give memory_budget more"):
        watch = fit(plugin, steps=8, layers=8, lengths=(16,), callbacks=(grows,))
    texts = [event.text for event in plugin.events()]
    assert len(texts) == 2
    assert not texts[0].endswith("or the batch less.")
    assert texts[1].endswith("or the batch less.")
    assert len(watch.seen) == 8


def test_a_budget_that_falls_below_what_a_batch_needs_is_warned_of_a9() -> None:
    schedule = {"initial_memory_budget": "2MiB", "final_memory_budget": "64KiB", "begin": 2, "end": 6}
    plugin = ActivationCompressionPlugin(schedule=schedule)
    with pytest.warns(UserWarning, match="It does not fit: give memory_budget more"):
        fit(plugin, steps=8, lengths=(16,))
    assert [event.text.endswith("or the batch less.") for event in plugin.events()] == [False, True]


def test_rates_that_follow_the_gradients_stay_within_the_budget_of_each_batch_a8_a9() -> None:
    plugin = ActivationCompressionPlugin(memory_budget="768KiB", adaptive={"every": 3, "target": 1e-3, "guard": 1e9})
    watch = fit(plugin, steps=16)
    for length, values in watch.seen[1:]:
        assert values["activations/kept_bytes"] <= 1.01 * 768 * 1024, length
    assert watch.seen[-1][1]["activations/guarded"] == 0


def test_a_part_is_of_what_the_batch_takes_without_compression_a9() -> None:
    watch = fit(ActivationCompressionPlugin(memory_budget=0.2))
    for _, values in watch.seen[2:]:
        part = values["activations/kept_bytes"] / values["activations/saved_bytes"]
        assert 0.17 < part <= 0.205


def test_the_budget_follows_a_schedule_a2_a3() -> None:
    schedule = {"initial_memory_budget": "1MiB", "final_memory_budget": 512 * 1024, "begin": 2, "end": 8}
    watch = fit(ActivationCompressionPlugin(schedule=schedule), steps=16)
    kept = [values["activations/kept_bytes"] for length, values in watch.seen if length == 64]
    assert kept[1] > 0.9 * 2**20
    assert kept[-1] <= 1.01 * 2**19


def test_what_does_not_fit_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"It does not fit: give memory_budget more, or the batch less"):
        fit(ActivationCompressionPlugin(memory_budget="100KiB"), steps=2)


def test_deep_models_have_blocks_made_again_a9() -> None:
    plugin = ActivationCompressionPlugin(memory_budget=0.075)
    watch = fit(plugin, steps=4, layers=24)
    assert "recomputed" in plugin.summary().split("\n\n")[1]
    assert watch.seen[2][1]["activations/kept_bytes"] < watch.seen[2][1]["activations/planned_bytes"]
    assert "block | 8 bits" in plugin.summary()
