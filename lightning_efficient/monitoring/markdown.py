"""The text of ``efficiency_report.md``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_efficient.monitoring.balance import batch_ms, is_balance, trades
from lightning_efficient.monitoring.metrics import last_in_words, value_in_words
from lightning_efficient.monitoring.report import RunReport
from lightning_efficient.monitoring.series import Point
from lightning_efficient.monitoring.units import human, label_of, technique_of, unit_of

__all__ = ["balance_section", "render", "summary", "table"]

_MOST_TOLD = 4  # metrics
_TOTALS = {
    "batches": "Batches",
    "optimizer_steps": "Optimizer steps",
    "train_seconds": "Training time, without validation",
    "validation_seconds": "Validation time",
    "train_cpu_seconds": "CPU time of the process while training",
    "step_ms_median": "Time of a batch, median",
    "step_ms_p10": "Time of a batch, 10th percentile",
    "step_ms_p90": "Time of a batch, 90th percentile",
    "step_cpu_ms_median": "CPU time of a batch, median",
    "data_wait_ms_median": "Time between two batches, median",
    "data_wait_seconds": "Time between batches, sum",
    "tokens": "Tokens",
    "samples": "Samples",
    "tokens_per_s": "Tokens per second of training",
    "samples_per_s": "Samples per second of training",
    "peak_memory_bytes": "Peak memory",
    "peak_memory_growth_bytes": "Peak memory above that at the start of the fit",
    "peak_host_memory_bytes": "Peak memory of the host process",
    "peak_host_memory_growth_bytes": "Peak memory of the host process above that at the start of the fit",
    "parameters": "Parameters",
    "trainable_parameters": "Parameters that train",
    "parameter_bytes": "Memory of the parameters",
    "gradient_bytes": "Memory of the gradients, largest",
    "optimizer_state_bytes": "Memory of the optimizer state, largest",
}


def render(report: RunReport, plots: Mapping[str, str]) -> str:
    """The whole report.

    Args:
        report: What was measured.
        plots: Section (``loss``, ``memory``, ``step_time`` or a technique) to the file name of its plot.
    """
    parts = [f"# {report.title}", summary(report)]
    parts += [_image(plots, name, caption) for name, caption in _OWN_PLOTS if name in plots]
    parts += ["## Totals", table(("", "Value"), _total_rows(report.totals))]
    parts += balance_section(report)
    for technique in report.techniques:
        parts += [f"## {technique.replace('_', ' ').capitalize()}", *_technique(report, technique, plots)]
    if report.events:
        rows = [
            (str(number), str(event.step), event.technique, event.text)
            for number, event in enumerate(report.events, start=1)
        ]
        parts += ["## Events", "The plots mark them by number.", table(("No.", "Step", "From", "What"), rows)]
    parts += ["## The run", table(("", ""), report.facts.items())]
    if report.notes:
        parts += ["## How it was measured", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


_OWN_PLOTS = (
    ("loss", "Training loss and validation metrics, against the step and against the training time."),
    ("memory", "Memory while training."),
    ("step_time", "Time of each batch, and the throughput."),
)


def summary(report: RunReport) -> str:
    """One paragraph for someone who reads nothing else."""
    totals = report.totals
    sentences: list[str] = []
    if report.interrupted:
        sentences.append(f"**The run was interrupted ({report.interrupted}); these are the numbers up to there.**")
    if totals.get("batches"):
        sentences.append(
            f"{_value(totals, 'batches')} batches ({_value(totals, 'optimizer_steps')} optimizer steps) of a model "
            f"with {_value(totals, 'parameters')} parameters took {_value(totals, 'train_seconds')} of training"
            f"{_validation(totals)}."
        )
        sentences.append(
            f"A batch took {_value(totals, 'step_ms_median')} at the median (10th to 90th percentile: "
            f"{_value(totals, 'step_ms_p10')} to {_value(totals, 'step_ms_p90')}), with "
            f"{_value(totals, 'data_wait_ms_median')} between two batches; that makes "
            f"{human(totals.get(f'{report.batch_unit}_per_s', float('nan')))} {report.batch_unit} per second."
        )
        sentences.append(
            f"Memory peaked at {_value(totals, 'peak_memory_bytes')}, {_value(totals, 'peak_memory_growth_bytes')} "
            "above the start of the fit."
        )
    sentences += _progress(report.metrics)
    if report.resumed:
        sentences.append(f"The run was resumed {_times(report.resumed)}; the numbers cover all its parts.")
    return " ".join(sentences) or "No training batch was finished."


def _progress(metrics: Mapping[str, Sequence[Point]]) -> list[str]:
    sentences = []
    for name, points in metrics.items():
        if len(points) > 1:
            sentences.append(f"`{name}` went from {value_in_words(points[0].value)} to {last_in_words(points)}.")
        elif points:
            sentences.append(f"`{name}` was {last_in_words(points)}.")
    others = ", ".join(f"`{name}`" for name in list(metrics)[_MOST_TOLD:])
    return sentences[:_MOST_TOLD] + ([f"Other metrics: {others}."] if others else [])


def _technique(report: RunReport, technique: str, plots: Mapping[str, str]) -> Iterable[str]:
    rows = []
    for tag, points in report.series.items():
        if technique_of(tag) == technique and points and not is_balance(tag):
            unit, values = unit_of(tag), [point.value for point in points]
            largest = max((value for value in values if not math.isnan(value)), default=math.nan)
            cells = (values[0], values[-1], largest)
            rows.append((label_of(tag), *(human(value, unit) for value in cells), f"`{tag}`"))
    if rows:
        yield table(("", "First", "Last", "Largest", "Tag"), rows)
    if technique in plots:
        yield _image(plots, technique, f"Measurements of {technique.replace('_', ' ')}.")


def balance_section(report: RunReport) -> list[str]:
    """What each technique cost and saved: a heading, a table, and how it was measured; empty without techniques."""
    found = trades(report)
    if not found:
        return []
    head = ("", "Time it took", "Time it saved", "A batch against one without it", "Memory saved", "Memory it holds")
    per_batch = f"Times are means per batch, of {human(batch_ms(report), 'ms')}; memory is the largest of the run."
    notes = [
        f"- **{trade.technique}**: " + " ".join(part for part in (words.verdict, words.time, words.memory) if part)
        for trade in found
        if any((words := trade.words)[1:])
    ]
    rows = [(trade.technique, *trade.cells()) for trade in found]
    return ["## What each technique cost and saved", per_batch, table(head, rows), "\n".join(notes)]


def _total_rows(totals: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    for name, label in _TOTALS.items():
        if name == "gradient_bytes" and totals.get(name) == 0:
            yield label, "not seen: each is used and freed in backward"
        elif name in totals:
            yield label, _value(totals, name)
    for name in totals:
        if name not in _TOTALS:
            yield label_of(name), _value(totals, name)


def _value(totals: Mapping[str, float], name: str) -> str:
    unit_name = name.removesuffix("_median").removesuffix("_p10").removesuffix("_p90")
    return human(totals.get(name, float("nan")), unit_of(unit_name))


def _validation(totals: Mapping[str, float]) -> str:
    seconds = totals.get("validation_seconds", 0.0)
    return f", and {human(seconds, 's')} of validation" if seconds else ""


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _image(plots: Mapping[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({plots[name]})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown."""
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
