"""Triton's interpreter, which is asked once, when Triton is imported, whether it is wanted: so in another process."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "ended", "look_once", "say_what_went_wrong"]

ROOT = Path(__file__).parent.parent.parent


def ended(program: str, *arguments: str, interpret: bool = True) -> dict[str, str]:
    """The line of JSON that a program ends with: what went wrong, by check."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": path}
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def say_what_went_wrong(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run all of them, and print that line."""
    torch.set_num_threads(1)
    wrong = {}
    for name, check in checks.items():
        try:
            check()
        except Exception:
            wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))


def look_once() -> None:
    """Let the interpreter remember what is in Triton's language, which it else looks for in each call of a function."""
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr")):
        return  # another version: it works, and takes longer

    @functools.cache
    def members(place: Any) -> list[tuple[str, Any]]:
        return [named for named in inspect.getmembers(place) if interpreter.tl.core.is_builtin(named[1])]

    def patch(place: Any, builder: Any, scope: Any) -> None:
        for name, member in members(place):
            if getattr(place, name) is member:
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch
