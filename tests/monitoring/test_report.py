"""The report as text, as data and as pictures, from plain data and without a Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys

import matplotlib
import pytest

from lightning_efficient.monitoring import EventRow, RunReport, read_report, write_report
from lightning_efficient.monitoring.layout import chart_groups, tensorboard_layout
from lightning_efficient.monitoring.markdown import render, summary
from lightning_efficient.monitoring.plots import save_plots
from lightning_efficient.monitoring.report import own_folder
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import human, label_of, unit_of

_PNG = b"\x89PNG\r\n\x1a\n"


def _points(*values: float) -> tuple[Point, ...]:
    return tuple(Point(10 * i, float(i), i / 2, value) for i, value in enumerate(values))


@pytest.fixture
def report() -> RunReport:
    return RunReport(
        title="Efficiency report: Tiny",
        facts={"Model": "Tiny", "Seed": "7"},
        totals={
            "batches": 30.0,
            "optimizer_steps": 15.0,
            "parameters": 12_345.0,
            "train_seconds": 130.0,
            "tokens": 3e6,
        },
        metrics={
            "train_loss": _points(5.0, 3.0, math.nan, 2.0),
            "val_loss": _points(4.0, 3.5),
            "val/acc": _points(0.5),
        },
        series={
            "efficiency/step_ms": _points(10.0, 11.0, 12.0, 900.0),
            "efficiency/data_wait_ms": _points(1.0, 1.0, 2.0, 1.0),
            "efficiency/tokens_per_s": _points(1e5, 2e5),
            "efficiency/used_memory_growth_bytes": _points(1e6, 3e6),
            "efficiency/parameter_bytes": _points(5e4, 5e4),
            "growth/parameters": _points(1e4, 3e4),
            "growth/saved_bytes": _points(2.0**20, 2.0**21, 2.0**19),
            "precision/retries": _points(0.0, math.inf, 1.0),
        },
        events=(
            EventRow(10, "growth", "unshared | 4 layers"),
            EventRow(11, "growth", "grew"),
            EventRow(20, "spike", "x"),
        ),
        notes=("By a clock.",),
        batch_unit="tokens",
        resumed=2,
    )


def test_every_file_is_written_and_named_in_the_markdown(report: RunReport, tmp_path) -> None:
    path = write_report(tmp_path / "new" / "folder", report)
    assert path.name == "efficiency_report.md"
    text = path.read_text()
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures == [
        f"efficiency_{name}.png" for name in ("loss", "memory", "step_time", "growth", "precision")
    ]  # "spike" has events only
    written = {entry.name for entry in path.parent.iterdir()}
    assert written == {*pictures, "efficiency_report.md", "efficiency_report.json"}
    for name in pictures:
        assert (path.parent / name).read_bytes().startswith(_PNG)


def test_the_text_says_what_was_measured(report: RunReport) -> None:
    text = render(report, {})
    assert "| Training time, without validation | 2 min 10 s |" in text
    assert "| saved | 1 MiB | 512 KiB | 2 MiB | `growth/saved_bytes` |" in text
    assert "| 1 | 10 | growth | unshared \\| 4 layers |" in text
    assert "`train_loss` went from 5 to 2." in text
    assert "resumed twice" in text
    assert "| Seed | 7 |" in text
    assert "- By a clock." in text


def test_an_interrupted_and_an_empty_run_say_so(report: RunReport, tmp_path) -> None:
    assert "interrupted (ValueError)" in summary(dataclasses.replace(report, interrupted="ValueError"))
    assert summary(RunReport("nothing")) == "No training batch was finished."
    text = write_report(tmp_path, RunReport("nothing")).read_text()
    assert "![" not in text


def test_plain_data_goes_there_and_back(report: RunReport, tmp_path) -> None:
    write_report(tmp_path, report)
    restored = read_report(tmp_path)
    json.loads((tmp_path / "efficiency_report.json").read_text(), parse_constant=pytest.fail)  # no NaN in the JSON
    assert restored.to_dict() == report.to_dict()
    assert restored.events == report.events
    assert restored.series["growth/saved_bytes"] == report.series["growth/saved_bytes"]
    assert math.isnan(restored.metrics["train_loss"][2].value)
    assert restored.techniques == ("growth", "precision", "spike")


def test_what_is_not_finite_goes_there_and_back(report: RunReport, tmp_path) -> None:
    values = (1.0, math.nan, math.inf, -math.inf)
    write_report(tmp_path, dataclasses.replace(report, metrics={"val_loss": _points(*values)}))
    file = tmp_path / "efficiency_report.json"
    state = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert state["metrics"]["val_loss"]["value"] == [1.0, "NaN", "Infinity", "-Infinity"]
    restored = [point.value for point in read_report(tmp_path).metrics["val_loss"]]
    assert restored == pytest.approx(values, nan_ok=True)

    state["metrics"]["val_loss"]["value"] = [1.0, None, None, 2.0]  # as older releases wrote it
    file.write_text(json.dumps(state))
    restored = [point.value for point in read_report(tmp_path).metrics["val_loss"]]
    assert restored == pytest.approx([1.0, math.nan, math.nan, 2.0], nan_ok=True)


def test_the_summary_tells_of_a_run_that_diverged_and_names_all_metrics(report: RunReport) -> None:
    metrics = {"train_loss": _points(5.0, math.nan), "val_loss": _points(math.nan), "a": _points(0.5)}
    text = summary(dataclasses.replace(report, metrics=metrics | {name: _points(1.0) for name in "bcd"}))
    assert "`train_loss` went from 5 to NaN (diverged). `val_loss` was NaN. `a` was 0.5." in text
    assert "Other metrics: `c`, `d`." in text


def test_the_largest_of_a_series_with_a_gap(report: RunReport) -> None:
    text = render(dataclasses.replace(report, series={"growth/parameters": _points(math.nan, 3e4, 2e4)}), {})
    assert "| parameters | not measured | 20 k | 30 k | `growth/parameters` |" in text


def test_a_report_takes_no_other_runs_place(report: RunReport, tmp_path) -> None:
    other = dataclasses.replace(report, series={"efficiency/step_ms": _points(7.0)}, resumed=0)
    later = dataclasses.replace(report, series={"efficiency/step_ms": _points(7.0, 8.0)}, resumed=1)
    assert own_folder(tmp_path / "new", other) == tmp_path / "new"
    write_report(tmp_path, report)
    (tmp_path / "version_1").mkdir()  # of something else
    assert own_folder(tmp_path, other) == own_folder(tmp_path, later) == tmp_path / "version_2"
    write_report(tmp_path / "version_2", other)
    assert own_folder(tmp_path, later) == tmp_path / "version_2"
    assert own_folder(tmp_path, other) == tmp_path / "version_3"  # it is no resumed one
    assert own_folder(tmp_path, RunReport("before its first batch", resumed=1)) == tmp_path / "version_3"
    (tmp_path / "version_2" / "efficiency_report.json").write_text("{")
    assert own_folder(tmp_path, later) == tmp_path / "version_3"


def test_a_report_of_another_format_is_refused(report: RunReport) -> None:
    with pytest.raises(ValueError, match="format 99"):
        RunReport.from_dict(report.to_dict() | {"format": 99})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 B"),
        (1536, "bytes", "1.5 KiB"),
        (3 * 1024**3, "bytes", "3 GiB"),
        (12.345, "ms", "12.3 ms"),
        (90_000, "ms", "90 s"),
        (3700, "s", "1 h 01 min"),
        (119.9, "s", "120 s"),
        (1234, "", "1,234"),
        (120_500, "", "120 k"),
        (7_000_000_000, "", "7 G"),
        (0.25, "", "0.25"),
        (1e-7, "", "1.00e-07"),
        (45_100, "per_s", "45.1 k/s"),
        (12.5, "%", "12.5 %"),
        (1.234, "GB/s", "1.23 GB/s"),
        (math.nan, "ms", "not measured"),
        (math.inf, "", "+inf"),
        (-2048, "bytes", "-2 KiB"),
    ],
)
def test_numbers_for_people(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_tags_in_words() -> None:
    assert label_of("offload/peak_host_bytes") == "peak host"
    assert label_of("efficiency/tokens_per_s") == "tokens per second"
    assert label_of("growth/parameters") == "parameters"
    assert label_of("offload/states_elsewhere") == "states elsewhere"
    assert label_of("offload/disk_read_gigabytes_per_second") == "disk read"
    assert unit_of("offload/disk_read_gigabytes_per_second") == "GB/s"
    assert [unit_of(tag) for tag in ("a/b_bytes", "a/b_ms", "a/b_per_s", "a/b_s", "a/b")] == [
        "bytes", "ms", "per_s", "s", ""
    ]  # fmt: skip


def test_charts_hold_what_shares_a_scale() -> None:
    many = [f"offload/tier{i}_bytes" for i in range(7)]
    rates = ["a/read_gigabytes_per_second", "a/write_gigabytes_per_second"]
    groups = chart_groups(
        ["a/x_ms", "a/y_ms", "a/count", "a/z_bytes", "a/peak_bytes", "a/total_read_bytes", *rates, *many]
    )
    assert groups["a"] == {
        "time (ms)": ["a/x_ms", "a/y_ms"],
        "count": ["a/count"],
        "memory (bytes)": ["a/z_bytes"],
        "peak memory (bytes)": ["a/peak_bytes"],
        "total (bytes)": ["a/total_read_bytes"],
        "bandwidth (GB/s)": rates,
    }
    assert [len(tags) for tags in groups["offload"].values()] == [5, 2]


def test_one_quantity_of_all_layers_is_one_chart() -> None:
    tags = ["a/bits", *(f"a/bits/blocks.{i}/linear" for i in range(7)), "a/retries/head"]
    charts = {title: len(tags) for title, tags in chart_groups(tags)["a"].items()}
    assert charts == {"bits": 1, "bits by layer": 5, "bits by layer, 2": 2, "retries by layer": 1}
    layout = tensorboard_layout(tags)["a"]
    assert list(layout) == ["bits", "bits by layer", "retries by layer"]
    (_, (pattern,)) = layout["bits by layer"]
    assert re.match(pattern, "a/bits/blocks.99/attention")
    assert not re.match(pattern, "a/bits")


def test_tensorboards_patterns_match_their_own_tag_only() -> None:
    layout = tensorboard_layout(["precision/retries", "precision/retries_total", "a.b/c+d"])
    (kind, (pattern,)) = layout["precision"]["retries"]
    assert kind == "Multiline"
    assert re.match(pattern, "precision/retries")
    assert not re.match(pattern, "precision/retries_total")
    ((_, (pattern,)),) = layout["a.b"].values()
    assert re.match(pattern, "a.b/c+d")


def test_plotting_leaves_pyplot_and_its_settings_alone(report: RunReport, tmp_path) -> None:
    settings = dict(matplotlib.rcParams)
    save_plots(report, tmp_path)
    assert dict(matplotlib.rcParams) == settings
    pyplot = sys.modules.get("matplotlib.pyplot")  # torchmetrics imports it
    assert pyplot is None or pyplot.get_fignums() == []


def test_gradients_that_nobody_saw_are_not_said_to_take_nothing(report: RunReport) -> None:
    unseen = dataclasses.replace(report, totals={**report.totals, "gradient_bytes": 0.0})
    assert "| Memory of the gradients, largest | not seen: each is used and freed in backward |" in render(unseen, {})
