"""A Python script as a process of its own, which need not import what all of them do."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.processes import context

__all__ = ["Script"]


class Script:
    """``subprocess.Popen`` of ``python -W ignore SCRIPT ...`` or ``-m MODULE ...``, as a fork of one that has begun.

    Its pid, output and end are those of a process; but its interpreter does not start anew, which takes seconds.

    Args:
        command: As of ``Popen``.
        cwd: The folder to start in; None: that of this process.
        stdout: None: that of this process; else it is read as text.
        stderr: A file; else nobody sees it.
        text: As here always.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path | None = None, stdout: int | None = None, stderr: Any = None,
        text: bool = True,
    ) -> None:  # fmt: skip
        python, *flags = command[:3]
        assert (python, flags) == (sys.executable, ["-W", "ignore"]), f"{command} is another kind of program"
        reads, writes = context().Pipe(duplex=False)
        errors = getattr(stderr, "name", os.devnull)
        self._end, end = context().Pipe()
        arguments = (list(command[3:]), str(cwd or Path.cwd()), writes, errors, end)
        self._process = context().Process(target=_run, args=arguments)
        self._process.start()
        writes.close()
        end.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(reads.fileno()), "r")
        reads.close()
        self._shown = stdout is None

    def poll(self) -> int | None:
        """How it ended; None: it has not, and is there until it is asked again, as any child is."""
        if not self._end.closed and self._end.poll():
            self._wait()
        return self._process.exitcode

    def communicate(self) -> tuple[str, None]:
        """Wait for its end.

        Returns:
            What it has printed.
        """
        with self.stdout:
            text = self.stdout.read()
        self._wait()
        if self._shown:
            print(text)
        return text, None

    def _wait(self) -> None:
        self._end.close()
        self._process.join()


def _run(command: list[str], folder: str, stdout: Any, errors: str, end: Any) -> None:
    try:
        _run_in(command, folder, stdout, errors)
    finally:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever reads it has all of it
        with contextlib.suppress(OSError, EOFError):
            end.send(None)
            end.recv()  # which ends when the other side is closed


def _run_in(command: list[str], folder: str, stdout: Any, errors: str) -> None:
    os.chdir(folder)
    os.dup2(stdout.fileno(), sys.stdout.fileno())
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    stdout.close()
    warnings.simplefilter("ignore")
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
