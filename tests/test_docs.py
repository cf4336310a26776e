"""What README and cards say is true: their snippets run, their links lead somewhere, their figures were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L
import pytest
import yaml

from tests.technique_settings import demo_data, demo_model

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("lightning_efficient/*/README.md"),
    *ROOT.glob("docs/*.md"),
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)\)")


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_first_lines_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer
    quiet = {"max_steps": 8, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    monkeypatch.setattr(L, "Trainer", lambda **given: trainer(**(given | quiet), accelerator="cpu", devices=1))
    names = {"model": demo_model(), "data": demo_data()}
    exec(blocks(ROOT / "README.md", "python")[0], names)
    assert len(names["model"].model.blocks) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_and_python_of_every_page_parse(page: Path) -> None:
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_readmes_figures_are_those_of_the_committed_benchmark() -> None:
    results = next((ROOT / "benchmarks" / "results").glob("growth_cpu-*.json"))
    figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "lightning_efficient" / "growth" / "README.md").read_text(encoding="utf-8")
    for page in (readme, card):
        for key in ("time_to_loss_ratio", "time_to_loss_ratio_worst", "share_state_bytes_ratio"):
            assert f"{figures[key]:.2f}" in page, key
        for key in ("share_loss_penalty", "share_loss_penalty_10", "share_loss_penalty_24_layers"):
            assert f"{figures[key]:+.3f}" in page, key
    assert figures["switch_max_abs_diff"] == 0
