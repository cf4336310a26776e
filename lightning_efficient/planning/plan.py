"""The whole of a plan: profile, trials, predictions, choice, check; each run is a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_efficient.planning.choose import Candidate, candidates
from lightning_efficient.planning.facts import Profile, Seconds, ShortRun
from lightning_efficient.planning.job import Job
from lightning_efficient.planning.model import Alone, Interplay, Parts, predict
from lightning_efficient.planning.options import Option, merged, options_for

__all__ = ["Plan", "RunFailed", "Shop", "make_plan"]

_GROWN = ((0.25, 0.0), (0.25, 1 / 3))  # parts of the run, and how far their depth is from a quarter to all
_ADDS_WORK = ("activation", "offload")  # whose steps are never faster than plain ones
_TOGETHER = (
    (("activations-4bit", "activations-lossless"), ("int8",)),  # what is kept compressed has to be quantized twice
    (("activations-4bit",), ("offload-all",)),  # whose memory goes back to the system, and has to be made anew
)
"""Options that are more, or less, than their sum; what the first ones are is taken for the others."""
_SIZES = 48  # batches of a check, so that large ones are among them
_PARTS_OF_RUN = 4  # the first phase of growth is a quarter of the run, and must be as long as a trial


class RunFailed(Exception):
    """A short run did not come to its end.

    Args:
        kind: ``memory``, or the error's class.
        message: What it said.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Shop:
    """Where short runs are made.

    Attributes:
        configs: The user's files.
        folder: For what they write; on the disk that the training will use.
        batches: That are timed, at least.
        seconds: How long each is timed, if that is more.
        limit: Bytes that a run may take; 0: what is available.
        say: Told what is being done.
    """

    configs: list[str]
    folder: Path
    batches: int = 12
    seconds: float = 2.0
    limit: int = 0
    say: Callable[[str], None] = print
    _number: int = 0

    def run(self, trainer: dict[str, Any], **job: Any) -> dict[str, Any]:
        """One short run, with ``trainer`` over the user's configuration; returns what it measured.

        Raises:
            RunFailed: If it did not come to its end.
        """
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir(parents=True)
        overlay = folder / "overlay.yaml"
        overlay.write_text(yaml.safe_dump({"trainer": trainer} if trainer else {}), encoding="utf-8")
        configs = [*self.configs, *([str(overlay)] if trainer else [])]
        length = {"batches": self.batches, "seconds": self.seconds, "limit": self.limit}
        asked = Job(configs=configs, folder=str(folder), **(length | job))  # type: ignore[arg-type]
        (folder / "job.json").write_text(asked.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "lightning_efficient.planning.child", str(folder / "job.json")]
        with (folder / "output.txt").open("wb") as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if not asked.result.exists():
            raise RunFailed(*_without_result(status, folder / "output.txt"))
        found = json.loads(asked.result.read_text(encoding="utf-8"))
        if "error" in found:
            raise RunFailed(**found["error"])
        return found


def _without_result(status: int, output: Path) -> tuple[str, str]:
    if status == -signal.SIGKILL:
        return "memory", "the system ended it, as it does with what takes too much memory"
    last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [""]
    return "Exit", f"it ended with status {status}: {last[0]}"


@dataclass
class Plan:
    """What was found.

    Attributes:
        profile: Of plain training.
        parts: Its memory.
        plain: Its time of a batch.
        options: That were tried.
        alone: What each of them did, by key.
        not_tried: Why others were not, or what refused them.
        found: All combinations.
    """

    profile: Profile
    parts: Parts
    plain: Seconds
    options: list[Option]
    alone: dict[str, Alone]
    not_tried: dict[str, str]
    found: list[Candidate] = field(default_factory=list)

    def candidate(self, keys: Sequence[str]) -> Candidate:
        """That of some options."""
        return next(each for each in self.found if {option.key for option in each.options} == set(keys))


def make_plan(shop: Shop, only: Collection[str] | None = None) -> Plan:
    """Profile plain training, try each technique alone and some pairs, and predict all combinations.

    Args:
        shop: Where the runs are made.
        only: Keys of the options to try; None: all that are worth it.

    Raises:
        RunFailed: If plain training fails, or does not fit and cannot be offloaded either.
    """
    shop.say("profiling your training as it is ...")
    try:
        profile = Profile.from_json(shop.run({}, profile=True, saves=True))
    except RunFailed as error:
        if error.kind != "memory":
            raise
        profile = _without_fitting(shop)
    parts = _parts(profile)
    plain = profile.run.seconds(profile.sizes)
    options, not_tried = options_for(profile)
    alone: dict[str, Alone] = {}
    tried = []
    for option in options:
        if only is not None and option.key not in only:
            continue
        if why := _not_worth(option, profile, shop):
            not_tried[option.key] = why
            continue
        shop.say(f"trying {option.key}: {option.says} ...")
        try:
            run, trainer = _try(shop, option)
        except RunFailed as error:
            not_tried[option.key] = ("it did not fit" if error.kind == "memory" else str(error)).splitlines()[0]
            continue
        option = replace(option, trainer=trainer)
        tried.append(option)
        alone[option.key] = _alone(option, run, profile, parts, plain)
    plan = Plan(profile, parts, plain, tried, alone, not_tried)
    pairs, failed = list[Interplay](), dict[frozenset[str], str]()
    for keys in _TOGETHER:
        both = [option for side in keys for option in tried if option.key == side[0]]
        if len(both) < len(keys):
            continue
        try:
            pairs.append(_together(shop, plan, keys, both))
        except RunFailed as error:
            failed[frozenset(option.key for option in both)] = error.kind
            why = "they did not fit" if error.kind == "memory" else str(error).splitlines()[0]
            not_tried[" + ".join(option.key for option in both)] = why
    plan.found = [
        candidate
        for candidate in candidates(profile, parts, plain, tried, alone, pairs)
        if not any(_has_failed(candidate, pair, kind) for pair, kind in failed.items())
    ]
    return plan


def _has_failed(candidate: Candidate, pair: frozenset[str], kind: str) -> bool:
    """Whether a pair that was tried in vain is all of it; what is refused is so in more company, too."""
    keys = {option.key for option in candidate.options}
    return pair == keys if kind == "memory" else pair <= keys


def _without_fitting(shop: Shop) -> Profile:
    shop.say("it does not fit into memory: profiling it with parameters and optimizer state on the disk ...")
    place = {"optimizer_state": "disk", "gradient": "disk", "parameter": "disk"}
    strategy = {"class_path": "lightning_efficient.OffloadStrategy", "init_args": {"place": place}}
    found = Profile.from_json(shop.run({"strategy": strategy}, profile=True, saves=True))
    return replace(found, offloaded=True, taken={k: v for k, v in found.taken.items() if k != "offload"})


def _parts(profile: Profile) -> Parts:
    kinds = profile.parameters, profile.gradients, profile.optimizer_state
    base, peak, update = profile.run.base_bytes, profile.run.peak_bytes, profile.update_peak
    saves = profile.checkpoint_peak if profile.save_interval else 0
    if profile.offloaded:  # what was elsewhere comes on top of what was seen
        peak = base + sum(kinds) + profile.largest_saved + max(0, peak - base - profile.largest_saved)
        update, saves = min(peak, update + sum(kinds)), 0
    return Parts(base, *kinds, profile.largest_saved, peak, update, saves)


def _not_worth(option: Option, profile: Profile, shop: Shop) -> str:
    if option.slot == "growth" and 0 < profile.batches < _PARTS_OF_RUN * (3 + shop.batches):
        return f"a run of {profile.batches} batches is too short for phases"
    if option.slot == "checkpoint" and profile.offloaded:
        return "plain training does not fit, so what it would gain cannot be measured"
    return ""


def _try(shop: Shop, option: Option) -> tuple[ShortRun, Mapping[str, Any]]:
    """Its run, and which of its ways was not refused."""
    if option.trial is not None:
        return _run(shop, option, option.trial), option.trainer
    *others, last = option.trainer, *option.instead
    for trainer in others:
        with contextlib.suppress(RunFailed):
            return _run(shop, option, trainer), trainer
    return _run(shop, option, last), last


def _run(shop: Shop, option: Option, trainer: Mapping[str, Any]) -> ShortRun:
    job: dict[str, Any] = {"warm_up": option.warm_up, "saves": option.saves}
    if option.slot == "growth":
        job["seconds"] = 0.0  # not longer than the phase that is looked at
    return ShortRun.from_json(shop.run(dict(trainer), **job))


def _together(
    shop: Shop, plan: Plan, keys: tuple[tuple[str, ...], tuple[str, ...]], options: Sequence[Option]
) -> Interplay:
    shop.say(f"trying {' and '.join(option.key for option in options)} ...")
    found = shop.run(merged(options, trial=True), warm_up=max(option.warm_up for option in options))
    run, profile, plain = ShortRun.from_json(found), plan.profile, plan.plain
    seconds, slots = run.seconds(profile.sizes, profile.run.yardstick), {option.slot for option in options}
    if "offload" not in slots:
        seconds = _on_one_thread(seconds, profile, plain)
    if slots <= set(_ADDS_WORK):
        seconds = Seconds(max(seconds.wall, plain.wall), seconds.cpu)
    without_saves = replace(plan.parts, checkpoint_peak=0)  # as the pair was run
    expected = predict(without_saves, plain, [plan.alone[option.key] for option in options])
    return Interplay(keys, seconds - expected.step, run.peak_bytes - expected.peak)


def _alone(option: Option, run: ShortRun, profile: Profile, parts: Parts, plain: Seconds) -> Alone:
    seconds = _trusted(run.seconds(profile.sizes, profile.run.yardstick), option, profile, plain)
    keeps = dict.fromkeys(option.frees, 0.0)
    saved, kept = (run.values.get(f"activations/{name}_bytes", 0.0) for name in ("saved", "kept"))
    if "saved" in keeps and saved:
        keeps["saved"] = kept / saved
    made = Alone(option.key, option.slot, seconds, run.peak_bytes, keeps)
    if option.slot == "offload":
        busy, waited = (run.values.get(f"offload/{name}_ms", 0.0) / 1e3 for name in ("disk_busy", "waited"))
        waited = min(waited, seconds.wall - plain.wall)
        return replace(made, busy=busy, waited=waited, writes_checkpoints=True)
    if option.slot == "checkpoint":
        return replace(made, seconds=plain, save_seconds=run.save_seconds, writes_checkpoints=True)
    if option.slot == "growth":
        ratio = min(1.0, seconds.wall / plain.wall) if plain.wall else 1.0
        return replace(made, peak=parts.peak, shares=tuple((part, ratio + way * (1 - ratio)) for part, way in _GROWN))
    return made


def _trusted(seconds: Seconds, option: Option, profile: Profile, plain: Seconds) -> Seconds:
    """What was measured, less what only chance can have done on a machine that has other work."""
    if option.slot != "offload":
        seconds = _on_one_thread(seconds, profile, plain)
    return Seconds(max(seconds.wall, plain.wall), seconds.cpu) if option.slot in _ADDS_WORK else seconds


def _on_one_thread(seconds: Seconds, profile: Profile, plain: Seconds) -> Seconds:
    """Of what does not wait: there the processor's time does not see others."""
    if profile.device != "cpu" or profile.threads > 1 or plain.cpu <= 0:
        return seconds
    return Seconds(plain.wall * seconds.cpu / plain.cpu, seconds.cpu)


def check(shop: Shop, candidate: Candidate, profile: Profile) -> tuple[int, Seconds]:
    """Run what was chosen on the user's own loader, as it will be with the whole model.

    Returns:
        The peak, and the time of a batch when the machine is as fast as in the profile.

    Raises:
        RunFailed: If it did not come to its end.
    """
    options = [option for option in candidate.options if option.slot != "growth"]
    job: dict[str, Any] = {"warm_up": max([3, *(option.warm_up for option in options)])}
    if min(profile.sizes) < max(profile.sizes):
        job["batches"] = max(shop.batches, min(len(profile.sizes), _SIZES))
    found = shop.run(merged(options, trial=True), chosen=False, saves=profile.save_interval > 0, **job)
    run = ShortRun.from_json(found)
    return run.peak_bytes, run.seconds(profile.sizes, profile.run.yardstick)
