"""A plan in words and tables, for a terminal or a page (Markdown), and as the YAML overlay."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from lightning_efficient.core.units import digits, human_bytes
from lightning_efficient.planning.choose import MARGIN, Candidate, frontier, least
from lightning_efficient.planning.facts import Profile, Seconds
from lightning_efficient.planning.options import merged
from lightning_efficient.planning.plan import Plan

__all__ = ["PLAN", "REPORT", "checked", "dominating", "overlay", "report"]

PLAN, REPORT = "A plan for", "# Plan for"
"""How an overlay (behind ``# ``) and a report begin."""
_LAYERS = 8


def report(plan: Plan, chosen: Candidate | None, budget: int | None, *, lossy: bool, refuted: int = 0) -> str:
    """Where memory and time go, and what the techniques would do about it.

    Args:
        plan: That was made.
        chosen: Of its combinations; None: nothing fits.
        budget: Bytes; None: any.
        lossy: Whether it may change results.
        refuted: Others that were chosen before, and were not as predicted when they were run.
    """
    profile = plan.profile
    parts = [
        f"{REPORT} {profile.module}",
        f"On {profile.hardware}. Memory is the {profile.memory}. {_batches(profile)}",
    ]
    if profile.offloaded:
        parts.append(
            "**Plain training does not fit here.** All was measured with parameters, gradients and optimizer state on "
            "the disk, and what plain training would take is the sum of its parts."
        )
    parts += ["## Where memory goes", _memory(plan), _layers(profile)]
    parts += ["## Where time goes", _time(plan)]
    parts += ["## What the techniques would do", _candidates(plan, chosen, lossy=lossy)]
    if plan.not_tried:
        parts.append("Not tried:\n\n" + "\n".join(f"- {key}: {why}" for key, why in plan.not_tried.items()))
    parts += ["## What to do", _advice(plan, chosen, budget, lossy=lossy, refuted=refuted)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _batches(profile: Profile) -> str:
    sizes, looked = profile.sizes, "all batches of an epoch" if profile.all_batches else "the first batches"
    if min(sizes) == max(sizes):
        return f"{len(sizes)} of {looked} were looked at; all have {sizes[0]:,} elements."
    rest = "" if profile.all_batches else "; a larger one further on would take more"
    return (
        f"{len(sizes)} of {looked} were looked at: {min(sizes):,} to {max(sizes):,} elements. Memory is that of the "
        f"largest{rest}, time the mean."
    )


def _memory(plan: Plan) -> str:
    parts, profile = plan.parts, plan.profile
    rows = {
        "the process before the model is made": parts.base,
        "parameters and buffers": parts.parameters,
        "gradients": parts.gradients,
        "optimizer state": parts.optimizer_state,
        "saved for backward, by the largest batch": parts.saved,
        "temporary tensors and libraries": max(0, parts.step_rest),
    }
    peak = plan.found[0].prediction.peak
    lines = [(name, human_bytes(nbytes), f"{nbytes / peak:.0%}") for name, nbytes in rows.items() if nbytes]
    lines.append(("**peak of a step**", f"**{human_bytes(parts.peak)}**", ""))
    if profile.save_interval and parts.checkpoint_peak:
        text = f"a checkpoint has {human_bytes(profile.checkpoint)}; while it is written"
        lines.append((text, human_bytes(parts.checkpoint_peak), ""))
    return _table(("", "bytes", "of the peak"), lines)


def _layers(profile: Profile) -> str:
    rows = [
        (
            f"`{layer.name}`" + (f" ({layer.count} of them)" if layer.count > 1 else ""),
            layer.kind,
            human_bytes(layer.saved_bytes),
            _ms(layer.forward_seconds),
        )
        for layer in profile.layers[:_LAYERS]
    ]
    return _table(("layers that save most", "", "saved", "their own part of forward"), rows) if rows else ""


def _time(plan: Plan) -> str:
    profile, plain = plan.profile, plan.plain
    run, sizes = profile.run, profile.sizes
    rows = [("waiting for data", profile.waits(plain.wall))]
    parts = {name: run.part(name, sizes) for name in ("forward", "backward")}
    rows += parts.items()
    rows.append(("update, and all else behind backward", max(0.0, plain.wall - sum(parts.values()))))
    if profile.save_interval:
        each = run.save_seconds / profile.save_interval
        rows.append((f"checkpoints, one in {profile.save_interval} batches", each))
    total = sum(seconds for _, seconds in rows)
    lines = [(name, _ms(seconds), f"{seconds / total:.0%}") for name, seconds in rows]
    lines.append(("**a batch**", f"**{_ms(total)}**", f"{_ms(plain.cpu)} of the processors"))
    return _table(("", "time", ""), lines)


def _candidates(plan: Plan, chosen: Candidate | None, *, lossy: bool) -> str:
    plain = plan.found[0]
    alone = [candidate for candidate in plan.found if len(candidate.options) == 1]
    wanted = [plain, *alone, *frontier(plan.found, lossy=lossy), min(plan.found, key=_wall)]
    if chosen is not None:
        wanted.append(chosen)
    shown = {candidate.name: candidate for candidate in wanted}
    rows = [_row(candidate, plain, chosen) for candidate in shown.values()]
    note = (
        "Each technique was tried alone for some batches, and some pairs; combinations are predicted from that. How "
        "good that is, the check of what was chosen shows."
    )
    return (
        _table(("techniques", "peak", "a batch", "of the processors", "against now", "results"), rows) + f"\n\n{note}"
    )


def _row(candidate: Candidate, plain: Candidate, chosen: Candidate | None) -> tuple[str, ...]:
    name = f"**{candidate.name}**" if chosen is not None and candidate.name == chosen.name else candidate.name
    peak, seconds = candidate.prediction.peak, candidate.prediction.seconds
    ratio = seconds.wall / plain.prediction.seconds.wall
    against = "" if candidate is plain else f"{_signed_bytes(peak - plain.prediction.peak)}, {ratio:.2f} of the time"
    results = "change" if candidate.lossy else "the same" if candidate.options else ""
    return name, human_bytes(peak), _ms(seconds.wall), _ms(seconds.cpu), against, results


def _signed_bytes(nbytes: int) -> str:
    return f"{'+' if nbytes >= 0 else '-'}{human_bytes(abs(nbytes))}"


def _advice(plan: Plan, chosen: Candidate | None, budget: int | None, *, lossy: bool, refuted: int) -> str:
    plain = plan.found[0]
    if chosen is None and refuted:
        return (
            f"What was to do did not when it was run, {refuted} of {refuted} times; the runs are below. What was "
            "predicted does not hold for this training. Try a larger --memory, or a technique by itself."
        )
    if chosen is None:
        lowest, changing = least(plan.found, lossy=lossy), least(plan.found, lossy=True)
        text = (
            f"Nothing fits into {human_bytes(budget or 0)} with a margin of {MARGIN:.0%}. The least is {lowest.name}: "
            f"{human_bytes(lowest.prediction.peak)}, for which --memory "
            f"{_whole_mebibytes(lowest.prediction.peak / (1 - MARGIN))} would do. {dominating(plan, lowest)}"
        )
        if not lossy and changing.prediction.peak < lowest.prediction.peak:
            text += (
                f"\n\nWith --allow-lossy, {changing.name} has {human_bytes(changing.prediction.peak)}, and changes "
                "results."
            )
        return text
    lines = [f"{_reason(chosen, plain, budget)} {_trade(chosen, plain)}"]
    if refuted:
        lines.append(f"What looked better did not do when it was run: {refuted} of them, below.")
    if not lossy:
        fastest = min(plan.found, key=_wall)
        if fastest.lossy and fastest.prediction.seconds.wall < chosen.prediction.seconds.wall * 0.95:
            ratio = fastest.prediction.seconds.wall / plain.prediction.seconds.wall
            lines.append(
                f"With --allow-lossy it could be {fastest.name}: {ratio:.2f} of the time now, with "
                f"{human_bytes(fastest.prediction.peak)}. That changes results; compare losses first (see the cards)."
            )
    return "\n\n".join(lines)


def _wall(candidate: Candidate) -> float:
    return candidate.prediction.seconds.wall


def _reason(chosen: Candidate, plain: Candidate, budget: int | None) -> str:
    if budget is None:
        if not chosen.options:
            return "Nothing that keeps to the rules makes it faster: the configuration is good as it is."
        return f"The least time: {chosen.name}."
    if not chosen.options:
        return f"It fits into {human_bytes(budget)} as it is."
    return f"What fits into {human_bytes(budget)}, with a margin of {MARGIN:.0%}, in the least time: {chosen.name}."


def _trade(chosen: Candidate, plain: Candidate) -> str:
    peak, seconds = chosen.prediction.peak, chosen.prediction.seconds
    text = f"Expected: a peak of {human_bytes(peak)}, {_ms(seconds.wall)} a batch"
    if not chosen.options:
        return f"{text}."
    ratio = seconds.wall / plain.prediction.seconds.wall
    less = plain.prediction.peak - peak
    memory = f"{human_bytes(abs(less))} {'less' if less >= 0 else 'more'}"
    return f"{text}; that is {memory} memory and {ratio:.2f} of the time now."


def dominating(plan: Plan, candidate: Candidate) -> str:
    """What takes most of the memory that is left, in a sentence."""
    freed = {kind for option in candidate.options for kind in option.frees}
    parts = plan.parts
    kinds = {
        "the process with its libraries, before there is a model": parts.base,
        "temporary tensors of single operations, and libraries": parts.step_rest,
        "parameters": 0 if "parameters" in freed else parts.parameters,
        "gradients": 0 if "gradients" in freed else parts.gradients,
        "optimizer state": 0 if "optimizer_state" in freed else parts.optimizer_state,
        "what backward needs": 0 if "saved" in freed else parts.saved,
    }
    name = max(kinds, key=lambda kind: kinds[kind])
    return f"Most of that is {name}: {human_bytes(kinds[name])}."


def checked(candidate: Candidate, peak: int, seconds: Seconds, profile: Profile, budget: int | None) -> str:
    """What was predicted, and what a run on the user's own batches took.

    Args:
        candidate: That was run.
        peak: Its bytes.
        seconds: Its time of a batch.
        profile: Of plain training.
        budget: Bytes; None: any.
    """
    expected, step = candidate.prediction.peak, candidate.prediction.step.wall
    wall = step + profile.waits(step)
    rows = [
        ("peak", human_bytes(expected), human_bytes(peak), f"{expected / peak - 1:+.1%}"),
        ("time of a batch", _ms(wall), _ms(seconds.wall), f"{wall / seconds.wall - 1:+.1%}"),
    ]
    growing = any(option.slot == "growth" for option in candidate.options)
    note = "\n\nThis was with the whole model: a growing one comes to it in the second half of the run." * growing
    over = budget is not None and peak > budget
    verdict = f"**It took more than {human_bytes(budget or 0)}**, and is not used.\n\n" * over
    table = _table((candidate.name, "predicted", "measured", "difference"), rows)
    return f"## Checked by a run\n\n{verdict}{table}{note}\n"


def _ms(seconds: float) -> str:
    return f"{digits(seconds * 1e3)} ms"


def overlay(plan: Plan, chosen: Candidate, budget: int | None, *, held: bool) -> str:
    """The YAML that goes behind the user's configuration; ``held``: whether a run has shown it."""
    plain = plan.found[0]
    comments = [
        f"{PLAN} {plan.profile.module}, made by `lightning-efficient plan`. Use it behind the configuration:",
        "  lightning-efficient fit --config my.yaml --config plan.yaml",
        f"{_reason(chosen, plain, budget)}",
        f"{_trade(chosen, plain)}",
    ]
    for option in chosen.options:
        comments.append(f"{option.key}: {option.says}. Results: {option.lossy or 'the same, bit for bit'}.")
    if not held:
        comments.append("No run has checked it.")
    body = {"trainer": merged(chosen.options)} if chosen.options else {}
    text = yaml.safe_dump(body, sort_keys=False, width=110)
    return "\n".join(f"# {line}" for comment in comments for line in _wrapped(comment)) + f"\n{text}"


def _wrapped(text: str, width: int = 116) -> list[str]:
    lines, line = [], ""
    if text.startswith(" "):
        return [text]
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _whole_mebibytes(nbytes: float) -> str:
    return f"{-(-round(nbytes) // 2**20)}MiB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns also stand below each other in a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
