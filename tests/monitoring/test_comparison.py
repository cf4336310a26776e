"""Runs side by side: rows, words, the table of the terminal, Markdown, and a page that stands alone."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_efficient.monitoring import EventRow, RunReport, write_report
from lightning_efficient.monitoring.command import main, write_comparison
from lightning_efficient.monitoring.comparison import Comparison, time_to
from lightning_efficient.monitoring.page import page
from lightning_efficient.monitoring.report import BalanceWords
from lightning_efficient.monitoring.runs import Run, RunError, read_run
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.sheet import markdown, terminal
from lightning_efficient.monitoring.words import run_words, unaccounted_words

MIB = 2.0**20
LONG = "growth+checkpoint+activation+offload+precision"
WORDS = BalanceWords("activations", "On a clock.", "By counting.", "It kept little.")


def _points(*values: float, pace: float = 1.0) -> tuple[Point, ...]:
    return tuple(Point(10 * i, pace * i, 2 * pace * i, value) for i, value in enumerate(values))


@pytest.fixture
def plain() -> RunReport:
    return RunReport(
        title="plain",
        facts={"Model": "Tiny", "Strategy": "one", "Date": "today"},
        totals={
            "batches": 50.0, "train_seconds": 5.0, "train_cpu_seconds": 9.0, "step_ms_median": 90.0,
            "peak_memory_bytes": 600 * MIB, "peak_memory_growth_bytes": 100 * MIB, "parameters": 46.0,
        },
        metrics={
            "train_loss": _points(5.0, 3.0, 2.5), "val_loss": _points(4.0, 3.0, 2.0), "val_acc": _points(0.1, 0.4),
        },
        series={
            "efficiency/step_ms": _points(90.0, 91.0, 92.0), "efficiency/used_memory_bytes": _points(5e8, 6e8, 6e8),
        },
        notes=("By a clock.",),
    )  # fmt: skip


@pytest.fixture
def suite(plain: RunReport) -> RunReport:
    totals = {
        "batches": 50.0, "train_seconds": 10.0, "step_ms_median": 180.0,
        "peak_memory_bytes": 560 * MIB, "peak_memory_growth_bytes": 60 * MIB,
    }  # fmt: skip
    return dataclasses.replace(
        plain,
        facts={"Model": "Tiny", "Strategy": "another", "Date": "tomorrow"},
        totals=plain.totals | totals,
        metrics={"train_loss": _points(5.0, 2.0, 1.5, pace=2), "val_loss": _points(4.0, 1.5, 1.0, pace=2)},
        series={
            "efficiency/step_ms": _points(180.0, 170.0),
            "activations/cost_total_ms": _points(2000.0),
            "activations/spared_bytes": _points(40 * MIB),
        },
        events=(EventRow(3, "growth", "2 layers -> <4> layers, and so on and so on: " + 20 * "as planned "),),
        balances=(WORDS,),
    )


@pytest.fixture
def both(plain: RunReport, suite: RunReport) -> Comparison:
    return Comparison([Run("plain", Path("plain"), plain), Run(LONG, Path(LONG), suite)])


def test_rows_hold_the_others_against_the_first_run(both: Comparison) -> None:
    rows = {row.label: row for row in both.rows()}
    assert both.metric == "val_loss"
    assert rows["final val_loss"].cells == ("2", "1")
    assert rows["final val_loss"].changes == ("", "-1")
    assert rows["final val_acc"].cells == ("0.4", "not measured")
    reached = rows["training time to plain's final val_loss"]
    assert reached.cells == ("2 s", "1.6 s")  # 4 to 1.5 in 2 s: at 2 after four fifths
    assert reached.changes == ("", "x 0.80")
    assert rows["CPU time to plain's final val_loss"].cells == ("4 s", "3.2 s")
    assert rows["peak memory"].changes == ("", "x 0.93")
    assert "samples per second" not in rows  # nobody has it


def test_time_to_a_value_is_interpolated_whichever_way_is_better() -> None:
    falling = _points(4.0, 2.0, 2.0)
    assert time_to(falling, 3.0, lambda p: p.seconds) == 0.5
    assert time_to(falling, 2.0, lambda p: p.seconds) == 1.0
    assert time_to(falling, 1.0, lambda p: p.seconds) is None
    assert time_to(falling, 5.0, lambda p: p.seconds) == 0.0
    rising = _points(0.0, 1.0)
    assert time_to(rising, 0.25, lambda p: p.seconds, falling=False) == 0.25


def test_time_to_a_value_is_not_interpolated_from_what_is_not_finite() -> None:
    for lost in (math.inf, math.nan, -math.inf):
        assert time_to(_points(lost, 2.0, 1.0), 3.0, lambda p: p.seconds) == 1.0
        assert time_to(_points(lost, 2.0), 1.0, lambda p: p.seconds) is None
    assert time_to(_points(0.5, math.inf, 2.0), 1.0, lambda p: p.seconds, falling=False) == 2.0


def _pair(first: RunReport, second: RunReport, *, source: str = "") -> Comparison:
    return Comparison([Run("a", Path("a"), first, source), Run("b", Path("b"), second, source)])


def _cells(comparison: Comparison) -> dict[str, tuple[str, ...]]:
    return {row.label: row.cells for row in comparison.rows()}


@pytest.mark.parametrize(("last", "words"), [(math.nan, "NaN"), (math.inf, "inf")])
def test_a_run_that_diverged_says_so(last: float, words: str, plain: RunReport, tmp_path: Path) -> None:
    write_report(tmp_path, dataclasses.replace(plain, metrics={"val_loss": _points(4.0, 3.0, last)}))
    diverged = read_run(tmp_path).report
    assert _cells(Comparison([Run("b", tmp_path, diverged)]))["final val_loss"] == (f"{words} (diverged)",)

    second = _pair(plain, diverged)
    assert _cells(second)["final val_loss"] == ("2", f"{words} (diverged)")
    assert _cells(second)["training time to a's final val_loss"] == ("2 s", "not reached")

    first = _pair(diverged, plain)
    assert _cells(first)["final val_loss"] == (f"{words} (diverged)", "2")
    assert _cells(first)["training time to a's best val_loss"] == ("1 s", "1 s")
    assert f"b came to a's best val_loss of 3 (its final one is {words}) in 1 s" in " ".join(
        run_words(first, 1, first.names)
    )


def test_a_baseline_without_a_finite_value_is_no_target(plain: RunReport) -> None:
    comparison = _pair(dataclasses.replace(plain, metrics={"val_loss": _points(math.nan, math.nan)}), plain)
    assert comparison.times() == pytest.approx([math.nan, math.nan], nan_ok=True)
    assert _cells(comparison)["final val_loss"] == ("NaN", "2")
    assert not any("time to" in label for label in _cells(comparison))
    assert run_words(comparison, 1, comparison.names)[0] == "a has no finite val_loss for b to come to."


def test_a_baseline_that_overfits_is_held_to_its_best(plain: RunReport) -> None:
    over = dataclasses.replace(plain, metrics={"val_loss": _points(2.0, 1.0, 2.5)})
    better = dataclasses.replace(plain, metrics={"val_loss": _points(2.1, 1.0, 0.9)})
    comparison = _pair(over, better)
    assert comparison.falling
    assert _cells(comparison)["training time to a's best val_loss"] == ("1 s", "1 s")
    assert (
        "b came to a's best val_loss of 1 (its final one is 2.5) in 1 s, a in 1 s: 1.00 times the time."
        in run_words(comparison, 1, comparison.names)
    )
    assert "training time to a's best val_loss" in terminal(comparison)
    assert "training time to A&#x27;s best val_<wbr>loss" in page(comparison)


def test_without_a_clock_no_time_was_measured(plain: RunReport) -> None:
    def clockless(*values: float) -> RunReport:
        points = tuple(Point(step, math.nan, math.nan, value) for step, value in enumerate(values))
        return dataclasses.replace(plain, metrics={"val_loss": points})

    assert not any("time to" in label for label in _cells(_pair(clockless(2.0, 1.0), clockless(2.0, 1.5))))
    half = _pair(plain, clockless(4.0, 3.0))
    assert _cells(half)["training time to a's final val_loss"] == ("2 s", "not measured")
    assert "b did not come to a's final val_loss of 2." in run_words(half, 1, half.names)


def test_metrics_that_the_table_leaves_out_are_named(plain: RunReport) -> None:
    names = ["lr-AdamW", "train_acc", "train_loss", "foo", "grad_norm", "epoch_time", "val_acc", "val_loss"]
    report = dataclasses.replace(plain, metrics={name: _points(0.5, 0.25) for name in names})
    comparison = _pair(report, report, source="metrics.csv")
    assert comparison.metric == "val_acc"
    shown = [label for label in _cells(comparison) if label.startswith("final")]
    assert shown == [
        f"final {name}" for name in ("val_acc", "val_loss", "train_loss", "train_acc", "foo", "epoch_time")
    ]
    for text in (terminal(comparison), markdown(comparison), page(comparison)):
        assert "Metrics that the table leaves out: lr-AdamW, grad_norm. --metric puts one first." in text
    many = dataclasses.replace(plain, metrics={f"m{number}": _points(1.0) for number in range(30)})
    assert "m16, m17 and 12 more." in _pair(many, many).left_out()
    assert _pair(plain, plain).left_out() == ""


def test_no_time_is_told_by_the_learning_rate(plain: RunReport) -> None:
    report = dataclasses.replace(plain, metrics={"lr-AdamW": _points(0.5, 0.25)})
    comparison = _pair(report, report, source="metrics.csv")
    assert comparison.metric == ""
    assert not any("time to" in label for label in _cells(comparison))
    assert _cells(comparison)["final lr-AdamW"] == ("0.25", "0.25")


def test_a_metric_that_rises_is_known_by_the_baseline(plain: RunReport) -> None:
    slow = dataclasses.replace(plain, metrics={"val_acc": _points(0.0, 0.2, 0.4, pace=3)})
    comparison = Comparison([Run("a", Path("a"), plain), Run("b", Path("b"), slow)], "val_acc")
    assert not comparison.falling
    assert comparison.times() == [1.0, 6.0]
    with pytest.raises(RunError, match=r"a has no metric 'no'\. It has: train_loss, val_acc, val_loss"):
        Comparison([Run("a", Path("a"), plain)], "no")


def test_words_say_why(both: Comparison, plain: RunReport, suite: RunReport) -> None:
    words = " ".join(run_words(both, 1, both.names))
    assert "val_loss of 2 in 1.6 s, plain in 2 s: 0.80 times the time." in words
    assert "Memory peaked at 560 MiB, 0.93 times that of plain. 500 MiB of that were taken before" in words
    assert "training itself took 60 MiB against 100 MiB, 0.60 times" in words
    rest = unaccounted_words(plain, suite, "plain")
    assert rest.startswith(
        "A batch took 200 ms, 100 ms more than a mean one of plain: 40 ms are in the techniques' clocks"
    )
    assert ", 60 ms in none of them" in rest


def test_a_run_that_never_came_there_says_so(plain: RunReport, suite: RunReport) -> None:
    comparison = Comparison([Run("suite", Path("s"), suite), Run("plain", Path("p"), plain)])
    (row,) = [row for row in comparison.rows() if row.label.startswith("training time to")]
    assert row.cells[1] == "not reached"
    assert "plain did not come to suite's final val_loss of 1." in run_words(comparison, 1, comparison.names)
    blind = dataclasses.replace(plain, metrics={})
    comparison = Comparison([Run("suite", Path("s"), suite), Run("blind", Path("b"), blind)])
    (row,) = [row for row in comparison.rows() if row.label.startswith("training time to")]
    assert row.cells[1] == "not measured"
    assert "did not come" not in " ".join(run_words(comparison, 1, comparison.names))


def test_names_of_one_letter_and_what_was_interrupted(plain: RunReport, suite: RunReport) -> None:
    broken = dataclasses.replace(suite, interrupted="KeyboardInterrupt")
    comparison = Comparison([Run("a", Path("a"), plain), Run("e", Path("e"), broken)])
    for text in (terminal(comparison), page(comparison), markdown(comparison)):
        assert "e was interrupted (KeyboardInterrupt); its figures go up to there." in text
    assert "B came to A&#x27;s final val_loss of 2 in 1.6 s, A in 2 s" in page(comparison)
    assert "e came to a's final val_loss of 2 in 1.6 s, a in 2 s" in " ".join(terminal(comparison).split())


def test_the_terminals_table_stays_within_its_width(both: Comparison, plain: RunReport) -> None:
    text = terminal(both, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert f"B = {LONG}" in text
    assert "1 (-1)" in text
    assert "activations: It kept little. Per batch it took 40 ms, +25.0 % of the batch without it." in " ".join(
        text.split()
    )
    assert "more than a mean one of A: 40 ms are in the techniques' clocks, 60 ms in none" in " ".join(text.split())
    many = Comparison([Run(f"run {i}", Path("x"), plain) for i in range(9)])
    lines = terminal(many, 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("run 0" in line and "run" in line.split("run 0")[1] for line in lines if line.startswith("  ")) >= 2


def test_the_markdown_has_all_of_it(both: Comparison) -> None:
    text = markdown(both, "a.png", "a.html")
    assert f"|  | plain | {LONG} |" in text
    assert "| peak memory | 600 MiB | 560 MiB (x 0.93) |" in text
    assert f"## What each technique cost and saved: {LONG}" in text
    assert "| Strategy | one | another |" in text
    assert "| Model | Tiny |" in text
    assert "- By a clock." in text
    assert "![" in text
    assert "(a.html)" in text


def test_a_name_with_a_bar_keeps_the_columns(plain: RunReport) -> None:
    comparison = Comparison([Run("a|b", Path("a"), plain), Run("c", Path("c"), plain)])
    assert "|  | a\\|b | c |\n| --- | --- | --- |" in markdown(comparison)


class _Elements(HTMLParser):
    """Opens and closes, and which attributes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_well_formed(both: Comparison) -> None:
    text = page(both)
    elements = _Elements()
    elements.feed(text)
    assert elements.open == []
    tags = {tag for tag, _ in elements.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(src|href)=", text)
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text
    assert "&lt;4&gt; layers" in text  # what a run says is text
    assert sum(tag == "svg" for tag, _ in elements.seen) == len(both.panels()) == 6
    titles = re.findall(r"<title>([^<]+)</title>", text)
    assert "plain, step 20: 2" in titles
    assert f"{LONG}, 4 s: 1" in titles
    assert "nan" not in "".join(re.findall(r'points="([^"]+)"', text))


def test_the_command_writes_the_pages_and_names_what_is_wrong(
    plain: RunReport, suite: RunReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, report in (("one", plain), ("two", suite)):
        write_report(tmp_path / "runs" / name, report)
    runs = [str(tmp_path / "runs" / name) for name in ("one", "two")]
    assert main(runs) == 0
    printed = capsys.readouterr().out
    assert "x 0.80" in printed
    assert str(tmp_path / "runs" / "comparison.html") in printed
    assert {"comparison.html", "comparison.md", "comparison.png"} <= {f.name for f in (tmp_path / "runs").iterdir()}
    assert main([runs[1], "--out", str(tmp_path / "alone"), "--metric", "train_loss"]) == 0
    assert "took 40 ms" in capsys.readouterr().out
    assert (tmp_path / "alone" / "comparison.html").exists()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "gone")])
    assert stopped.value.code == 2
    assert "gone does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit):
        main([*runs, "--out", str(tmp_path / "file")])
    assert "Give another folder with --out" in capsys.readouterr().err


def test_runs_without_curves_or_numbers_still_make_a_page(tmp_path: Path) -> None:
    comparison = Comparison([Run("a", Path("a"), RunReport("a")), Run("b", Path("b"), RunReport("b"))])
    text = write_comparison(tmp_path, comparison).read_text()
    assert "<svg" not in text
    assert not (tmp_path / "comparison.png").exists()
    assert "A = " not in terminal(comparison)
