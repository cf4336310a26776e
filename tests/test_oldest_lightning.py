"""The oldest Lightning that is supported: a part of the tests runs with it, in a process of its own.

``make test`` installs it beside the environment and names the folder in ``OLDEST_LIGHTNING``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / os.environ.get("OLDEST_LIGHTNING", ".venv/oldest")  # not relative to the folder that a test runs in
TESTS = [
    "tests/test_compat.py",
    "tests/test_compat_replay.py",
    "tests/test_compat_steps.py",
    "tests/test_start_line.py::test_all_of_them_say_one_line_together",
    "tests/test_every_technique.py::test_the_same_objects_resume_from_an_earlier_phase_g8",
]
CALL = """
import sys, lightning, pytest
assert lightning.__version__ == sys.argv[1], (lightning.__version__, lightning.__file__)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def oldest() -> str:
    """The version in ``constraints-oldest.txt``."""
    found = re.search(r"^lightning==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    assert found is not None
    return found[1]


def test_it_is_the_oldest_that_may_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [allowed] = [one for one in project["dependencies"] if one.startswith("lightning")]
    assert oldest() in (allowed.removeprefix("lightning>="), allowed.removeprefix("lightning>=") + ".0")


@pytest.mark.slow
def test_the_oldest_lightning_works() -> None:
    if not (FOLDER / "lightning").is_dir():
        pytest.skip("OLDEST_LIGHTNING names no folder with it; make test does, where pip can reach an index")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (FOLDER, ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CALL, oldest(), *TESTS],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
