"""Steps in micro-batches: the same step for everybody, whatever the parts, and again after a failure as if it were the
first time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric
from torchmetrics.wrappers import Running

from lightning_efficient.core import watched_tensors
from lightning_efficient.core.torch_internals import BatchNorm
from lightning_efficient.offload.batches.batch_control import BatchController
from lightning_efficient.offload.batches.feedback import BatchFeedback
from tests.offload.stepping import Model, Record, Split, SplitsAt, data, fit, out_of_memory_at

ON: dict[str, Any] = {}
pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")  # there are texts in the batches


def assert_close(one: Record, other: Record, tolerance: float = 1e-12) -> None:
    """Gradients, outputs and logged values agree."""
    assert one.hooks == other.hooks
    torch.testing.assert_close(one.gradients, other.gradients, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(one.outputs, other.outputs, strict=True):
        assert mine.pop("texts", None) == theirs.pop("texts", None)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(one.logged, other.logged, strict=True):
        assert set(mine) == set(theirs)
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=max(tolerance, 1e-6)), name


def assert_same(one: tuple[Model, Record], other: tuple[Model, Record]) -> None:
    """All of it bit for bit."""
    (model, record), (twin, reference) = one, other
    assert record.hooks == reference.hooks
    for mine, theirs in zip(record.gradients, reference.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert record.logged == reference.logged
    assert [float(o["loss"]) for o in record.outputs] == [float(o["loss"]) for o in reference.outputs]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("output", ["tensor", "dictionary"])
def test_o7_a_split_step_is_the_step(tmp_path: Path, parts: int, output: str) -> None:
    whole, split = Model(output=output), Model(output=output)
    _, plain = fit(tmp_path, whole, Split())
    trainer, parted = fit(tmp_path, split, Split(parts, ON))
    if parts == 1:
        assert_same((split, parted), (whole, plain))
    assert_close(parted, plain)
    torch.testing.assert_close(list(split.net.parameters()), list(whole.net.parameters()), rtol=1e-12, atol=1e-12)
    assert "output_result_cls" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert "log" not in vars(trainer.fit_loop.epoch_loop._results)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},  # of three batches, the last of which is short
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_o7_accumulation_and_clipping_see_whole_batches(tmp_path: Path, parts: int, arguments: dict[str, Any]) -> None:
    _, plain = fit(tmp_path, Model(), Split(), **arguments)
    _, parted = fit(tmp_path, Model(), Split(parts, ON), **arguments)
    assert_close(parted, plain)


def test_o7_sums_over_samples_are_added(tmp_path: Path) -> None:
    _, plain = fit(tmp_path, Model(reduction="sum", metrics=False), Split())
    _, parted = fit(tmp_path, Model(reduction="sum", metrics=False), Split(3, {"loss_reduction": "sum"}))
    assert_close(parted, plain)


def test_o7_with_lower_precision_it_is_the_step_up_to_that_precision(tmp_path: Path) -> None:
    single = torch.float32
    arguments: dict[str, Any] = {"precision": "bf16-mixed", "max_epochs": 1}
    _, plain = fit(tmp_path, Model(dtype=single), Split(), data(dtype=single), **arguments)
    _, parted = fit(tmp_path, Model(dtype=single), Split(2, ON), data(dtype=single), **arguments)
    assert_close(parted, plain, tolerance=3e-2)


def test_o7_a_loss_scaler_is_applied_once(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    def plugin() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    gradients = []
    for strategy in (Split(), Split(2, ON)):
        model = Model(dtype=torch.float32, metrics=False)
        _, record = fit(tmp_path, model, strategy, data(dtype=torch.float32), plugins=[plugin()], max_epochs=1)
        gradients.append(record.gradients)
        assert record.hooks[:4] == ["zero_grad", "before", "after", "step"]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=3e-2, atol=1.0)
    assert float(gradients[0][0][0].abs().max()) > 10  # scaled in on_after_backward


@pytest.mark.parametrize("where", ["hook", "backward_hook"])
@pytest.mark.parametrize("call", [1, 2])
def test_o7_after_a_failure_the_step_is_that_of_smaller_parts(tmp_path: Path, where: str, call: int) -> None:
    off: dict[str, Any] = {"check_loss": False}  # whose forwards would be counted
    parts = {1: 2, 2: 4}[call]  # the first micro-batch of one or two fails, and there are twice as many
    failing = Model(dropout=0.5, **{where: out_of_memory_at(*range(1, call + 1))})
    _, record = fit(tmp_path, failing, Split(1, off))
    reference = Model(dropout=0.5)
    _, expected = fit(tmp_path, reference, Split(parts, off))
    assert_same((failing, record), (reference, expected))
    assert failing.seen[-3:] == reference.seen[-3:]  # Python's generator too


@pytest.mark.parametrize("where", ["hook", "backward_hook"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_o7_any_micro_batch_may_fail(tmp_path: Path, where: str, k: int) -> None:
    off: dict[str, Any] = {"check_loss": False}
    failing = Model(dropout=0.5, **{where: out_of_memory_at(3 + k)})  # of the second batch, in three parts
    _, record = fit(tmp_path, failing, Split(3, off))
    reference = Model(dropout=0.5)
    _, expected = fit(tmp_path, reference, Split(3, off), callbacks=[SplitsAt(1, 6)])
    assert_same((failing, record), (reference, expected))


@pytest.mark.parametrize("where", ["hook", "backward_hook"])
def test_o7_gradients_of_earlier_batches_survive_a_failure(tmp_path: Path, where: str) -> None:
    off: dict[str, Any] = {"check_loss": False}
    failing = Model(dropout=0.5, **{where: out_of_memory_at(2)})
    _, record = fit(tmp_path, failing, Split(1, off), accumulate_grad_batches=3)
    reference = Model(dropout=0.5)
    _, expected = fit(tmp_path, reference, Split(1, off), callbacks=[SplitsAt(1, 2)], accumulate_grad_batches=3)
    assert_same((failing, record), (reference, expected))


def test_o7_without_room_for_copies_of_gradients_a_backward_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_efficient.offload.batches import rewind

    monkeypatch.setattr(rewind, "free_bytes", lambda device: 100)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tmp_path, Model(backward_hook=out_of_memory_at(2)), Split(1, ON), accumulate_grad_batches=3)
    assert "gradients of earlier batches cannot be put back" in caught.value.__notes__[0]
    fit(tmp_path, Model(hook=out_of_memory_at(2)), Split(1, {"check_loss": False}), accumulate_grad_batches=3)


def test_o7_after_weights_have_changed_nothing_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tmp_path, Model(backward_hook=out_of_memory_at(1)), Split(1, {"may_retry": lambda: False}))
    assert "updated already" in caught.value.__notes__[0]
    assert "8 samples, tried in 1 part(s)" in caught.value.__notes__[0]
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, Model(hook=out_of_memory_at(1)), Split(1, {"recover": False}))


def test_o7_who_took_part_in_an_attempt_is_told_that_it_is_given_up(tmp_path: Path) -> None:
    seen: list[float] = []
    model = Model(backward_hook=out_of_memory_at(1))

    def abandoned() -> None:
        seen.append(float(model.net[-1].weight.grad.abs().sum()))  # what the later layers have got is still there

    fit(tmp_path, model, Split(1, {"check_loss": False, "abandoned": abandoned}), max_steps=1)
    assert len(seen) == 1
    assert seen[0] > 0
    with pytest.raises(ValueError, match="loss_reduction='max'"):
        BatchFeedback(BatchController(), loss_reduction="max")  # type: ignore[arg-type]


def test_o7_parts_are_merged_again_when_there_is_room(tmp_path: Path) -> None:
    class Limits(pl.Callback):
        seen: list[int | None] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append(trainer.strategy.control.limit)

    _, plain = fit(tmp_path, Model(), Split(), data(8 * 12), max_epochs=1)
    strategy, limits = Split(1, {"check_loss": False}), Limits()
    strategy.settings = {"margin": 0.01, "reserve": 0.0, "patience": 2, "pressure_percent": 101.0}
    model = Model(hook=out_of_memory_at(3))
    _, record = fit(tmp_path, model, strategy, data(8 * 12), max_epochs=1, callbacks=[limits])
    assert limits.seen[:4] == [None, None, 4, 4]
    assert None in limits.seen[4:9]
    assert_close(record, plain)


class Compilable(pl.LightningModule):
    """Can be compiled as a whole; torch 2.13 compiles no step that logs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(6, 4)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["pair"][0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def test_o7_compiled_modules_take_part(tmp_path: Path) -> None:
    single = torch.float32
    _, plain = fit(tmp_path, Compilable(), Split(), data(dtype=single))
    model = torch.compile(Compilable(), backend="eager", dynamic=True)
    _, parted = fit(tmp_path, model, Split(3, ON), data(dtype=single))
    assert_close(parted, plain, tolerance=1e-5)


def test_o7_when_one_sample_does_not_fit_the_error_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 MiB") as caught:
        fit(tmp_path, Model(hook=out_of_memory_at(*range(1, 99))), Split(1, {"check_loss": False}))
    assert "tried in 1, 2, 4, 8 part(s). Not tried again: the parts were of one sample" in caught.value.__notes__[0]


def test_other_errors_go_through(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        fit(tmp_path, Model(backward_hook=fail), Split(1, ON))


class Changed(Model):
    """Its loss is changed by a function of the logits and labels."""

    def __init__(self, change: Any) -> None:
        super().__init__(metrics=False)
        self.change = change

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return self.change(self, loss, batch)


def test_o7_a_loss_that_is_no_mean_over_samples_is_refused(tmp_path: Path) -> None:
    def counted(model: Model, loss: Tensor, batch: dict[str, Any]) -> Tensor:
        labels = batch["pair"][0]
        return nn.functional.cross_entropy(model.net(batch["x"]), labels, ignore_index=0)

    fit(tmp_path, Changed(counted), Split(1, ON), max_epochs=1)
    with pytest.raises(ValueError, match="it is no mean over samples"):
        fit(tmp_path, Changed(counted), Split(3, ON), max_epochs=1)
    fit(tmp_path, Changed(counted), Split(3, {"check_loss": False}), max_epochs=1)
    with pytest.raises(ValueError, match="it is no sum over samples"):
        fit(tmp_path, Model(), Split(2, {"loss_reduction": "sum"}))


def test_o7_a_loss_by_chance_is_not_compared_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Changed(lambda model, loss, batch: loss * (1 + torch.rand(())))
    fit(tmp_path, model, Split(2, ON), max_epochs=1)
    assert sum("depends on chance" in record.message for record in caplog.records) == 1


def test_o7_the_comparison_leaves_no_trace(tmp_path: Path) -> None:
    runs = []
    for check in (True, False):
        model = Model(dropout=0.5)
        _, record = fit(tmp_path, model, Split(2, {"check_loss": check}))
        runs.append((model, record))
    assert_same(*runs)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_o7_steps_without_a_loss_are_skipped_as_a_whole(tmp_path: Path) -> None:
    for strategy in (Split(), Split(2, {"check_loss": False})):
        model = Changed(lambda model, loss, batch: None)
        _, record = fit(tmp_path, model, strategy, max_epochs=1)
        assert record.hooks == ["zero_grad", "step"] * 3
        assert record.outputs == [{}] * 3
    bad = Changed(lambda model, loss, batch: None if int(batch["pair"][1][0].split()[1]) == 2 else loss)
    with pytest.raises(RuntimeError, match="None for some of the 4 micro-batches"):
        fit(tmp_path, bad, Split(4, {"check_loss": False}), max_epochs=1)


def with_module(module: nn.Module) -> Model:
    model = Model()
    model.extra = nn.Sequential(module)
    return model


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_o7_statistics_of_batches_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra\.0 \(BatchNorm1d\)"):
        fit(tmp_path, with_module(nn.BatchNorm1d(3)), Split(1, ON))
    frozen = with_module(nn.Identity())
    frozen.extra = nn.BatchNorm1d(3).eval().requires_grad_(False)
    record = Record()
    record.on_after_backward = lambda *_: None  # type: ignore[method-assign]
    pl.Trainer(
        max_steps=1, strategy=Split(1, ON), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(frozen, data())  # fmt: skip


class OfAnotherLibrary(BatchNorm):
    """Not one of torch's."""


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
def test_o7_statistics_of_batches_that_come_later_are_refused_too(tmp_path: Path) -> None:
    def use(model: Model, loss: Tensor, batch: Any) -> Tensor:
        model.extra.train(model.global_step >= 1)
        return loss

    model = Changed(use)
    model.extra = OfAnotherLibrary(3, affine=False).eval()
    fit(tmp_path, model, Split(1, ON), max_steps=1)
    with pytest.raises(ValueError, match=r"extra \(OfAnotherLibrary\) would compute"):
        fit(tmp_path, model, Split(2, ON))


def test_o7_a_loss_that_shows_in_a_later_batch_that_it_is_no_mean_is_refused(tmp_path: Path) -> None:
    def use(model: Model, loss: Tensor, batch: Any) -> Tensor:
        return loss * len(batch["pair"][1][0]) if model.global_step >= 1 else loss

    with pytest.raises(ValueError, match="it is no mean over samples"):
        fit(tmp_path, Changed(use), Split(2, ON))


def test_o7_manual_optimization_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(tmp_path, model, Split(1, ON))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (CatMetric(), "would collect a number of each micro-batch"),
        (Running(MeanMetric(), window=2), "window would be of micro-batches"),
        (MaxMetric(), "cannot be had from those of the parts"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_o7_metrics_that_cannot_be_right_are_refused_by_path(tmp_path: Path, metric: Any, message: str) -> None:
    def use(model: Model, loss: Tensor, batch: Any) -> Tensor:
        model.used(loss.detach())
        if isinstance(metric, MaxMetric):
            model.log("used", model.used, on_step=True, on_epoch=False)
        return loss

    model = Changed(use)
    model.used = metric
    with pytest.raises(ValueError, match=f"used is a {type(metric).__name__}.*{message}"):
        fit(tmp_path, model, Split(2, {"check_loss": False}))


def test_o7_values_with_graphs_are_refused_by_name(tmp_path: Path) -> None:
    def use(model: Model, loss: Tensor, batch: Any) -> Tensor:
        model.log("with_graph", loss, enable_graph=True)
        return loss

    with pytest.raises(ValueError, match="'with_graph', enable_graph=True"):
        fit(tmp_path, Changed(use), Split(2, {"check_loss": False}))


def test_o7_a_batch_that_cannot_be_split_is_refused_in_the_first_step(tmp_path: Path) -> None:
    model = Changed(lambda model, loss, batch: loss)
    model.on_before_batch_transfer = lambda batch, dataloader_idx: {**batch, "image": object()}  # type: ignore
    with pytest.raises(ValueError, match=r"batch\['image'\] is a object"):
        fit(tmp_path, model, Split(1, ON))


def test_o7_a_buffer_that_changes_for_the_first_time_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_tensors, "_SMALL", 0)
    fail = out_of_memory_at(1)

    def change(model: Model, loss: Tensor, batch: Any) -> Tensor:
        if model.calls == 3:
            model.constant += 1
            fail()
        return loss

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(tmp_path, Changed(change), Split(1, ON))
    assert "changed constant for the first time" in caught.value.__notes__[0]
