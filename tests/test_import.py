"""Importing the package is quick: a technique is imported when it is asked for, and what it may need when it does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

import lightning_efficient
from lightning_efficient.offload import OffloadStrategy

CALL = """
import json, sys, threading
import lightning
before = set(sys.modules)
import torch
import lightning_efficient
at_once = set(sys.modules) - before
missing = [name for name in lightning_efficient.__all__ if not hasattr(lightning_efficient, name)]
print(json.dumps({
    "at_once": sorted(at_once),
    "with_all_names": sorted(set(sys.modules) - before),
    "missing": missing,
    "cuda": torch.cuda.is_initialized(),
    "threads": threading.active_count(),
}))
"""
USED_LATER = (
    "triton", "tensorboard", "psutil", "isal", "jsonargparse", "sympy", "matplotlib", "multiprocessing",
    "torch._dynamo", "torch._inductor", "torch._functorch", "torch.utils.tensorboard", "torch.distributed.tensor",
    "torch.distributed.fsdp", "lightning_efficient.monitoring.panels", "lightning_efficient.core.kernels.quantization",
    "lightning_efficient.demos",
)  # fmt: skip
"""Imported where it is needed; what of it Lightning has imported already costs nothing."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own."""
    shown = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout))


def test_the_package_alone_brings_nothing_along(found: dict[str, Any]) -> None:
    assert found["at_once"] == ["lightning_efficient"]


def test_no_public_name_brings_along_what_is_used_later(found: dict[str, Any]) -> None:
    assert found["missing"] == []
    later = tuple(f"{name}." for name in USED_LATER)
    assert [name for name in found["with_all_names"] if f"{name}.".startswith(later)] == []
    assert "lightning_efficient.offload" in found["with_all_names"]


def test_nothing_is_started(found: dict[str, Any]) -> None:
    assert not found["cuda"]
    assert found["threads"] == 1


def test_names_are_those_that_checkers_see() -> None:
    assert set(lightning_efficient.__all__) <= set(dir(lightning_efficient))
    assert lightning_efficient.OffloadStrategy is OffloadStrategy
    with pytest.raises(AttributeError, match="no attribute 'OfloadStrategy'"):
        _ = lightning_efficient.OfloadStrategy


@pytest.mark.parametrize("name", ["offload", "offload_ddp", "offload_fsdp2"])
def test_strategies_have_their_strings(name: str) -> None:
    assert name in StrategyRegistry.available_strategies()
    assert StrategyRegistry.get(name).strategy_name == name
