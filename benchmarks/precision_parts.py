"""What a training step in few bits is made of: CPU time by part, measured from outside."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_efficient.precision import engine, formats, guarded_call, integers, kinds, nodes

__all__ = ["PARTS", "Watch", "parts_of"]


class Watch:
    """CPU time by part: what runs within a part that runs within another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        now = time.process_time()
        if self._within:
            self.seconds[self._within[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._within.append(name)
        try:
            yield
        finally:
            self._turn()
            self._within.pop()

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


PARTS: tuple[tuple[Any, str, str], ...] = (
    (formats.SharedExponent, "encode", "quantize"),
    (integers, "multiply_in_tiles", "products in int8"),
    (torch, "_int_mm", "products in int8"),
    (integers, "_converted", "results from int32"),
    (engine, "measured_result", "signs"),
    (kinds.MatMul, "probe", "signs"),
    (nodes.Node, "sign_of_operands", "signs"),
    (nodes.Node, "sign_of_result", "signs"),
    (guarded_call.Call, "forward", "the rest of guarded products"),
    (guarded_call.Call, "backward", "the rest of guarded products"),
    (nn.utils, "clip_grad_norm_", "clipping"),
)


def parts_of(step: Callable[[], object], optimizer: Optimizer, rounds: int) -> dict[str, float]:
    """Seconds of each part of a step, the median over the rounds."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        watch = Watch()
        with contextlib.ExitStack() as stack:
            for owner, name, part in (*PARTS, (optimizer, "step", "optimizer")):
                around = watch.around(getattr(owner, name), part)
                stack.enter_context(mock.patch.object(owner, name, around))
            with watch.part("all else"):
                step()
        found.append(watch.seconds)
    return {name: statistics.median(one[name] for one in found) for name in found[0]}
