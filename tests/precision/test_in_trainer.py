"""A Trainer that trains in low bits (P1-P4, P10, X2), and what a user sees of it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_efficient import RollbackPrecision
from lightning_efficient.coordination import ParameterChange, announce
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.precision import kinds
from lightning_efficient.precision.retry import Retry
from tests.helpers.fitting import fit
from tests.helpers.models import CheckpointedModel
from tests.technique_settings import demo_model

LOW = {"low": "int8", "high": "fp32", "pre_learning_steps": 4, "return_after": 3, "only_if_faster": False}


def plugin(**arguments: Any) -> RollbackPrecision:
    return RollbackPrecision(**(LOW | arguments))


def run(precision: RollbackPrecision, root: Path, **arguments: Any) -> Any:
    return fit(None, plugins=[precision], root=root, **arguments)


def test_learns_in_high_bits_then_trains_in_low_ones_p1(tmp_path: Path) -> None:
    precision = plugin()
    ours, plain = run(precision, tmp_path / "low"), fit(None, root=tmp_path / "plain")
    assert ours.losses[:4] == pytest.approx(plain.losses[:4], rel=1e-6)
    assert ours.losses[4:] != plain.losses[4:]
    # Adam makes of a first gradient, however small, a whole step, and of one that became zero none.
    assert ours.losses == pytest.approx(plain.losses, rel=5e-2)
    rows = precision.precision_map()
    healthy = [row for row in rows if row["product"] != "all" and not row["retries"]]
    assert len(healthy) > 60
    assert {(row["bits"], row["high"], row["low"]) for row in healthy} == {("int8", 4, 12)}
    assert "scaled_dot_product_attention" in {row["operation"] for row in rows if row["product"] == "all"}
    assert "blocks.0" in str(rows)


def slowly(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Let a method take time."""
    true = getattr(owner, name)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.003)
        return true(*arguments)

    monkeypatch.setattr(owner, name, slow)


def test_operations_for_which_low_bits_take_longer_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, kinds.MatMul, "in_integers")
    precision = plugin(only_if_faster=True)
    ours, plain = run(precision, tmp_path / "low"), fit(None, root=tmp_path / "plain")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
    assert {row["bits"] for row in precision.precision_map()} == {"high, low would take longer", "high, not covered"}
    assert {row["high"] for row in precision.precision_map() if row["product"] != "all"} == {4}
    assert "0 of " in precision.events()[0].text
    monkeypatch.undo()
    for name in ("forward", "grad_input", "grad_weight"):
        slowly(monkeypatch, kinds.Linear, name)
    precision = plugin(only_if_faster=True)
    run(precision, tmp_path / "paying")
    healthy = [row for row in precision.precision_map() if row["product"] != "all" and not row["retries"]]
    assert {row["bits"] for row in healthy} == {"int8"}


def test_an_operation_that_is_left_alone_from_a_checkpointed_pass_on_is_so_in_its_backward_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, kinds.MatMul, "in_integers")
    precision = plugin(high="bf16", only_if_faster=True)  # left alone, it saves the copies that autocast makes
    run(precision, tmp_path, module=demo_model(CheckpointedModel), max_steps=6)
    assert "high, low would take longer" in {row["bits"] for row in precision.precision_map()}


def test_a_fault_is_seen_said_and_healed_p2_p3_p4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = {"forward": 0}
    true = kinds.MatMul.in_integers

    def spoilt(self: kinds.MatMul, role: str, *arguments: Any) -> Tensor | None:
        found = true(self, role, *arguments)
        if role == "forward":
            calls["forward"] += 1
            if found is not None and calls["forward"] % 50 == 0:
                found.mul_(2.0**12)
        return found

    plain = fit(None, root=tmp_path / "plain")
    monkeypatch.setattr(kinds.MatMul, "in_integers", spoilt)
    precision = plugin(retry_rate=0.5)
    with caplog.at_level("INFO"):
        ours = run(precision, tmp_path / "low")
    assert ours.losses == pytest.approx(plain.losses, rel=5e-2)
    said = [record.getMessage() for record in caplog.records if "in high bits again" in record.getMessage()]
    assert len(said) == min(20, precision.measurements()["precision/retries"])  # and every hundredth
    assert said
    assert {record.name for record in caplog.records if "in high bits again" in record.getMessage()} == {
        "lightning.pytorch.utilities.rank_zero"
    }, "whose lines of this level are shown"
    assert any("result" in row["last reason"] for row in precision.precision_map())
    logged = ours.logged_values()
    by_operation = {tag: value for (step, tag), value in logged.items() if tag.startswith("precision/retries/")}
    assert sum(by_operation.values()) == precision.measurements()["precision/retries"]
    assert {tag.removeprefix("precision/retries/") for tag in by_operation} <= set(precision.nodes)


def test_after_twenty_retries_every_hundredth_is_said(caplog: pytest.LogCaptureFixture) -> None:
    precision = plugin()
    with caplog.at_level("INFO"):
        for number in range(250):
            precision._engine.retries.append(Retry("block", "forward", f"reason {number}"))
            precision._account.note_retries(None)
    said = [record.getMessage() for record in caplog.records if "in high bits again" in record.getMessage()]
    assert [text.partition("(retry ")[2].partition(")")[0] for text in said] == [
        *map(str, range(1, 21)), "100", "200",
    ]  # fmt: skip
    assert said[-1].endswith("reason 199")


def test_it_is_logged(tmp_path: Path) -> None:
    precision = plugin()
    ours = run(precision, tmp_path)
    logged = ours.logged_values()
    shares = [logged[step, "precision/low_share"] for step in range(16)]
    assert shares[:4] == [0.0] * 4
    assert min(shares[4:]) > 0.7
    assert (15, "precision/exponent/model.blocks.0.mlp.up.weight") in logged
    of_weights = [
        value for (step, tag), value in logged.items()
        if step == 15 and tag.startswith("precision/exponent/") and tag.endswith(".weight")
    ]  # fmt: skip
    ends = [logged[15, f"precision/exponent_weight{end}"] for end in ("_lowest", "", "_highest")]
    assert ends == [min(of_weights), statistics.median_low(of_weights), max(of_weights)]
    assert precision.measurements()["precision/low_share"] == shares[-1], "also behind the log, where a monitor asks"


def test_what_changes_learns_anew(tmp_path: Path) -> None:
    precision = plugin()
    ours = run(precision, tmp_path)
    name = next(name for name in precision.nodes if "blocks.1" in name)
    announce(ours.trainer, ParameterChange(replaced=(f"{name}.weight",), reason="made up"))
    assert name not in precision.nodes
    assert any("blocks.0" in other for other in precision.nodes)


def test_around_bf16_mixed(tmp_path: Path) -> None:
    precision = plugin(high="bf16", low="bfp16")
    ours = run(precision, tmp_path / "low")
    plain = fit(None, root=tmp_path / "plain", precision="bf16-mixed")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-2)
    assert ours.trainer.precision == "bf16-mixed"
    assert type(precision.inner) is MixedPrecision


@pytest.mark.parametrize("low", ["int8-row", "int8-block", "fp8", "fp16", "bf16"])
def test_each_format_trains_p5(tmp_path: Path, low: str) -> None:
    precision = plugin(low=low)
    ours, plain = run(precision, tmp_path / "low", max_steps=8), fit(None, root=tmp_path / "plain", max_steps=8)
    assert ours.losses == pytest.approx(plain.losses, rel=2e-2)
    healthy = [row for row in precision.precision_map() if row["product"] != "all" and not row["retries"]]
    assert len(healthy) > 60
    assert {row["bits"] for row in healthy} == {low}


def test_rounding_at_random_is_the_same_in_each_run(tmp_path: Path) -> None:
    runs = [run(plugin(stochastic_rounding=True, seed=seed), tmp_path / str(n)) for n, seed in enumerate((1, 1, 2))]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_old_checkpoint_without_it_loads(tmp_path: Path) -> None:
    plain = fit(None, root=tmp_path, checkpoints={})
    precision = plugin()
    ours = run(precision, tmp_path / "low", ckpt_path=plain.checkpoints[8], checkpoints={})
    assert len(ours.losses) == 8
    healthy = [row for row in precision.precision_map() if row["product"] != "all" and not row["retries"]]
    assert {(row["high"], row["low"]) for row in healthy} == {(4, 4)}


def test_parts_of_a_network_can_be_left_out(tmp_path: Path) -> None:
    precision = plugin(exclude=["*.blocks.0.*"])
    run(precision, tmp_path, max_steps=6)
    names = set(precision.nodes)
    assert names
    assert not any("blocks.0" in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": "int4"}, "low='int4' is no format; there are int8"),
        ({"high": "fp16"}, "high='fp16': it can be 'bf16' or 'fp32'"),
        ({"pre_learning_steps": -1}, "pre_learning_steps=-1 must be a whole number, 0 or more or 'auto'"),
        ({"pre_learning_steps": "soon"}, "pre_learning_steps='soon' must be"),
        ({"return_after": 0}, "return_after=0 must be a whole number, 1 or more"),
        ({"retry_rate": 1.5}, "retry_rate=1.5 is a part"),
        ({"thresholds": {"overflows": 1}}, "thresholds has 'overflows'; there are overflow"),
        ({"thresholds": {"error": -1}}, r"thresholds\['error'\]=-1 must be 0 or more"),
    ],
)
def test_wrong_arguments_are_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin(**arguments)


def test_one_is_not_put_around_another() -> None:
    with pytest.raises(ValueError, match="another RollbackPrecision"):
        plugin(inner=plugin())


def test_the_model_is_untouched(tmp_path: Path) -> None:
    module = demo_model()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    run(plugin(), tmp_path, module=module, max_steps=6)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    assert type(module) is ByteLanguageModel
    assert torch.overrides._get_current_function_mode() is None
    assert isinstance(module, pl.LightningModule)
