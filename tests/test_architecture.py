"""The house's rules, read from the source: imports run one way, private symbols live in one place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lightning_efficient"
ROLES = {"callback.py", "strategy.py", "common.py", "ddp.py", "precision.py", "checkpoint_io.py", "trainer.py"}
ROLES |= {"fsdp2.py"}
ROLES |= {"autosave.py", "exact_resume.py", "outcomes.py"}  # parts of checkpoint_io.py
ROLES |= {"account.py", "wrapping.py"}  # of precision.py
ROLES |= {"micro_batches.py", "split_step.py", "step_logs.py", "step_metrics.py"}
ROLES |= {"loss_check.py", "recovery.py", "timed_steps.py"}  # of the offload strategy.py
ROLES |= {"guard.py", "judgement.py", "reports.py", "rollback.py"}  # of precision.py
TECHNIQUES = {"growth", "checkpointing", "activation_compression", "offload", "precision"}
FILES = sorted(ROOT.rglob("*.py"))


@cache
def source(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports at its top or inside functions, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(source(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_cores_know_nothing_of_lightning(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    in_core = parts[0] == "core" or (parts[0] in TECHNIQUES and path.name not in ROLES and path.name != "__init__.py")
    if in_core:
        used = {name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}
        used |= {
            n for n in imports(path) if n.startswith(("lightning_efficient.compat", "lightning_efficient.telemetry"))
        }
        assert not used, f"{relative(path)} is a core and must not import {used}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_technique_imports_another(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    others = {
        name
        for name in imports(path)
        for other in TECHNIQUES - {own}
        if name.startswith(f"lightning_efficient.{other}")
    }
    if own in TECHNIQUES | {"core"}:
        assert not others, f"{relative(path)} imports {others}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_core_imports_nothing_of_the_suite_but_core(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "core":
        outside = {n for n in imports(path) if n.startswith("lightning_efficient.") and ".core" not in n}
        assert not outside


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_one_lightning_tree(path: Path) -> None:
    assert not any(name.split(".")[0] == "pytorch_lightning" for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_private_symbols_of_lightning_live_in_compat(path: Path) -> None:
    """No attribute of a trainer or strategy that begins with an underscore, outside ``compat*.py``."""
    if path.name in ("compat.py", "compat_replay.py", "compat_resume.py", "compat_steps.py"):
        return
    tree = source(path)
    private = [
        f"{relative(path)}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and any(word in ast.unparse(node.value) for word in ("trainer", "strategy", "fit_loop"))
    ]
    assert not private, private


def test_what_is_imported_is_a_dependency_or_comes_with_one() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {plain_name(line) for line in project["dependencies"]}
    command_line = {plain_name(line) for line in project["optional-dependencies"]["cli"]}
    brought = {
        plain_name(line) for name in declared for line in metadata.requires(name) or () if "extra ==" not in line
    }
    owners = metadata.packages_distributions()
    for path in FILES:
        known = declared | brought
        if path.name == "__main__.py" or path.parent.name == "planning":
            known = known | command_line
        used = {name.split(".")[0] for name in imports(path)} - {"lightning_efficient", "triton"}
        for package in used - sys.stdlib_module_names:
            names = {plain_name(owner) for owner in owners[package]}
            assert names & known, f"{relative(path)} imports {package}, and nothing installs it"


def plain_name(requirement: str) -> str:
    """Of what it requires, as PyPI writes it."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
