"""``python -m lightning_efficient plan --config my.yaml``: the command line of a plan."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from lightning_efficient.core.units import parse_bytes
from lightning_efficient.planning.choose import Candidate, best, with_room
from lightning_efficient.planning.plan import Plan, RunFailed, Shop, check, make_plan
from lightning_efficient.planning.words import PLAN, REPORT, checked, overlay, report

__all__ = ["main"]

_FAILED, _NOTHING_FITS = 1, 3  # 2 is what a parser exits with
_CHECKS = 3  # of what was chosen, one after the other where a run shows that it is not as predicted


def main(arguments: list[str] | None = None) -> int:
    """Profile, try, predict, choose, write, check.

    Args:
        arguments: Behind ``plan``.

    Returns:
        The exit status: 0 if there is a plan, 1 if the configuration cannot be run, 3 if nothing fits, or what was to
        fit did not when it was run.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lightning-efficient plan", description="Where memory and time go, and what to do.")
    parser.add_argument("--config", action="append", type=str, required=True, help="as for fit; may be repeated")
    parser.add_argument("--memory", type=str, default=None, help="what the process (or the GPU) may take, as 8GiB")
    parser.add_argument("--steps", type=int, default=12, help="batches that each short run times, at least")
    parser.add_argument("--out", type=Path, default=Path("plan.yaml"), help="the overlay; a report .md is beside it")
    parser.add_argument("--allow_lossy", "--allow-lossy", action="store_true", help="also what changes results")
    parser.add_argument("--no_check", "--no-check", action="store_true", help="do not run what was chosen")
    options = parser.parse_args(arguments)
    try:
        budget = None if options.memory is None else parse_bytes(options.memory, "--memory")
    except ValueError as error:
        return _stop(str(error))
    if options.steps < 2:
        return _stop(f"--steps {options.steps} is too few. Give 2 or more.")
    for config in options.config:
        if not Path(config).is_file():
            return _stop(f"--config {config} is no file. Give a configuration as for `lightning-efficient fit`.")
    try:
        if unfit := _unfit(options.out, options.config):
            return _stop(f"--out {options.out} {unfit}")
        folder = Path(tempfile.mkdtemp(prefix=".plan-", dir=Path.cwd()))  # on the disk on which the training will be
    except OSError as error:
        return _stop(f"Cannot write: {error}. Short runs write into this folder, the plan to --out {options.out}.")
    shop = Shop([str(Path(config).resolve()) for config in options.config], folder, batches=options.steps, say=_say)
    try:
        return _plan(shop, budget, options.out, lossy=options.allow_lossy, checks=not options.no_check)
    except RunFailed as error:
        what = "does not fit into memory, not even with all of it on the disk" if error.kind == "memory" else "fails"
        return _stop(f"Training with this configuration {what}: {error}")
    except OSError as error:
        return _stop(f"Cannot write: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unfit(out: Path, configs: list[str]) -> str:
    """Why the plan cannot be written there; makes the folder.

    Raises:
        OSError: If that cannot be made.
    """
    if out.suffix not in (".yaml", ".yml"):
        return "does not end in .yaml. Give the name of a YAML file; the report will be beside it, as .md."
    if out.resolve() in [Path(config).resolve() for config in configs]:  # an earlier plan, planned on
        return "is one of the configurations. Give another name."
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        return "is in a folder that cannot be written to. Give another one."
    for path, begins in ((out, f"# {PLAN}"), (out.with_suffix(".md"), REPORT)):
        if path.is_dir():
            return f"cannot be written: '{path}' is a folder. Give another name."
        if path.exists() and path.stat().st_size and not path.read_bytes().startswith(begins.encode()):
            return f"would replace '{path}', which is no plan. Give another name, or move that file away."
    return ""


def _plan(shop: Shop, budget: int | None, out: Path, *, lossy: bool, checks: bool) -> int:
    began = time.monotonic()
    plan = make_plan(shop)
    page, left, refuted = out.with_suffix(".md"), list(plan.found), list[str]()
    while True:
        candidate = best(left, budget, lossy=lossy) if len(refuted) < _CHECKS else None
        chosen = candidate
        if candidate is not None and plan.profile.device == "cpu":  # a GPU's budget says nothing of the host
            parts = plan.parts
            chosen = with_room(candidate, budget, parts.parameters + parts.gradients + parts.optimizer_state)
        text = report(plan, chosen, budget, lossy=lossy, refuted=len(refuted))
        print(f"\n{text}", flush=True)
        if candidate is None or chosen is None:
            page.write_text("\n".join([text, *refuted]), encoding="utf-8")
            print(f"Written: {page}")
            return _NOTHING_FITS
        if not checks:
            break
        verdict, holds = _checked(shop, plan, chosen, budget)
        print(f"\n{verdict}", flush=True)
        if holds:
            text += f"\n{verdict}"
            break
        refuted.append(verdict)
        left.remove(candidate)
    out.write_text(overlay(plan, chosen, budget, held=checks), encoding="utf-8")
    page.write_text("\n".join([text, *refuted]), encoding="utf-8")
    print(f"Written: {out}, {page}. It took {time.monotonic() - began:.0f} s.")
    return 0


def _checked(shop: Shop, plan: Plan, chosen: Candidate, budget: int | None) -> tuple[str, bool]:
    """What a run of it came to, in words, and whether it is as good as its word."""
    shop.say(f"running {chosen.name} ...")
    try:
        peak, seconds = check(shop, chosen, plan.profile)
    except RunFailed as error:
        return f"## Checked by a run: {chosen.name}\n\n**It failed**, and is not used: {error}.\n", False
    return checked(chosen, peak, seconds, plan.profile, budget), budget is None or peak <= budget


def _say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)


def _stop(text: str) -> int:
    print(f"lightning-efficient plan: {text}", file=sys.stderr)
    return _FAILED
