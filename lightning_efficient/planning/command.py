"""``python -m lightning_efficient plan --config my.yaml``: the command line of a plan."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from lightning_efficient.core.units import parse_bytes
from lightning_efficient.planning.choose import Candidate, best, with_room
from lightning_efficient.planning.plan import Plan, RunFailed, Shop, check, make_plan
from lightning_efficient.planning.words import checked, overlay, report

__all__ = ["main"]

_FAILED, _NOTHING_FITS = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Profile, try, predict, choose, write, check.

    Args:
        arguments: Behind ``plan``.

    Returns:
        The exit status: 0 if there is a plan, 1 if the configuration cannot be run, 2 if nothing fits.
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
    folder = Path(tempfile.mkdtemp(prefix=".plan-", dir=Path.cwd()))  # on the disk on which the training will be
    shop = Shop([str(Path(config).resolve()) for config in options.config], folder, batches=options.steps, say=_say)
    try:
        return _plan(shop, budget, options.out, lossy=options.allow_lossy, checks=not options.no_check)
    except RunFailed as error:
        what = "does not fit into memory, not even with all of it on the disk" if error.kind == "memory" else "fails"
        return _stop(f"Training with this configuration {what}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plan(shop: Shop, budget: int | None, out: Path, *, lossy: bool, checks: bool) -> int:
    began = time.monotonic()
    plan = make_plan(shop)
    chosen = best(plan.found, budget, lossy=lossy)
    if chosen is not None:
        parts = plan.parts
        chosen = with_room(chosen, budget, parts.parameters + parts.gradients + parts.optimizer_state)
    text = report(plan, chosen, budget, lossy=lossy)
    print(f"\n{text}", flush=True)
    page = out.with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    if chosen is None:
        page.write_text(text, encoding="utf-8")
        print(f"Written: {page}")
        return _NOTHING_FITS
    out.write_text(overlay(plan, chosen, budget), encoding="utf-8")
    if checks:
        text += f"\n{_checked(shop, plan, chosen)}"
    page.write_text(text, encoding="utf-8")
    print(f"Written: {out}, {page}. It took {time.monotonic() - began:.0f} s.")
    return 0


def _checked(shop: Shop, plan: Plan, chosen: Candidate) -> str:
    shop.say("running what was chosen ...")
    try:
        text = checked(chosen, *check(shop, chosen, plan.profile), data_seconds=plan.profile.data_seconds)
    except RunFailed as error:
        text = f"## Checked by a run\n\n**It failed**: {error}. Choose another line of the table.\n"
    print(f"\n{text}", flush=True)
    return text


def _say(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)


def _stop(text: str) -> int:
    print(f"lightning-efficient plan: {text}", file=sys.stderr)
    return _FAILED
