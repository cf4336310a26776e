"""Killed with -9 at any moment, there is an intact checkpoint, no older than it may be, and nothing else (C10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_killed_at_random_moments_c10(tmp_path: Path) -> None:
    """``python -m benchmarks checkpoint`` does it 200 times."""
    elsewhere = Path("/dev/shm")  # a temporary directory on another file system must not matter
    environment = os.environ | ({"TMPDIR": str(elsewhere)} if elsewhere.is_dir() else {})
    command = [sys.executable, "-m", "benchmarks.kills", str(tmp_path), "--kills", "20", "--seed", "1"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    outcome = json.loads(run.stdout)
    assert outcome["problems"] == []
    assert outcome["survived"] == outcome["kills"] == 20
    assert outcome["steps"] > 10
