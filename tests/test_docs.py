"""What README, cards and pages say is true: snippets run, links lead somewhere, figures were measured."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from tests.technique_settings import demo_data, demo_model

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MIGRATE = ROOT / "docs" / "migrate.md"
PAGES = [README, ROOT / "CHANGELOG.md", *ROOT.glob("lightning_efficient/*/README.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)")
LIMITS = runpy.run_path(str(ROOT / "docs" / "limits.py"))


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def figures(name: str) -> dict[str, float]:
    """What the committed benchmark of this name measured on a CPU."""
    [results] = (ROOT / "benchmarks" / "results").glob(f"{name}_cpu-*.json")
    return json.loads(results.read_text(encoding="utf-8"))["figures"]


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every Trainer makes a few quiet steps on a CPU, in a folder that is removed."""
    trainer = L.Trainer
    quiet = {"max_steps": 8, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    monkeypatch.setattr(L, "Trainer", lambda **given: trainer(**(given | quiet), accelerator="cpu", devices=1))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository_and_headings_in_them(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor[1:] in map(LIMITS["anchor"], headings), f"{page.name} links to {target}{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    folder = ROOT / "docs"
    pages = {page.relative_to(folder).as_posix() for page in folder.rglob("*.md")} - {
        "versions.md"
    }  # a part of another
    assert sorted(listed) == sorted(pages)


@pytest.mark.usefixtures("short_runs")
def test_the_first_lines_of_the_readme_run() -> None:
    names: dict[str, Any] = {"model": demo_model(), "data": demo_data()}
    exec(blocks(README, "python")[0], names)
    assert len(names["model"].model.blocks) == 4
    assert names["trainer"].global_step == 8


@pytest.mark.usefixtures("short_runs")
@pytest.mark.filterwarnings("ignore:The model layers do not match")  # of the example that freezes layers by hand
@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(code, id=code.split("import ")[-1].split("\n")[0] + "-" + code.split()[1].rstrip(","))
        for code in blocks(MIGRATE, "python")
        if not re.match(r"# \w+, with ", code)  # needs what is not here: GPUs, DeepSpeed
    ],
)
def test_the_lines_before_and_after_a_migration_train(snippet: str) -> None:
    names: dict[str, Any] = {}
    exec(snippet, names)
    if "trainer" in names:
        names["trainer"].fit(demo_model(), demo_data())
        assert names["trainer"].global_step == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_yaml_and_python_of_every_page_parse(page: Path) -> None:
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)
    for block in blocks(page, "python"):
        imports = [one for one in ast.walk(ast.parse(block)) if isinstance(one, ast.Import | ast.ImportFrom)]
        for one in imports:  # of ours, each name is there
            if getattr(one, "module", None) and one.module.split(".")[0] == "lightning_efficient":
                exec(compile(ast.Module([one], []), str(page), "exec"), {})


def test_figures_are_those_of_the_committed_benchmarks() -> None:
    """Those in the card of growth, and the one or two of each technique that README and the overview have."""
    growth, card = figures("growth"), (ROOT / "lightning_efficient" / "growth" / "README.md").read_text("utf-8")
    for key in ("time_to_loss_ratio", "time_to_loss_ratio_worst", "share_state_bytes_ratio"):
        assert f"{growth[key]:.2f}" in card, key
    for key in ("share_loss_penalty", "share_loss_penalty_10", "share_loss_penalty_24_layers"):
        assert f"{growth[key]:+.3f}" in card, key
    assert growth["switch_max_abs_diff"] == 0

    checkpoint, activation = figures("checkpoint"), figures("activation")
    shown = [
        f"**{growth['time_to_loss_ratio']:.2f}** (0.51 to {growth['time_to_loss_ratio_worst']:.2f})",
        f"**{checkpoint['blocked_ms']:.1f} ms**",
        f"{checkpoint['blocked_ms'] / checkpoint['blocked_ratio']:.1f}",
        f"**{activation['peak_ratio']:.2f}**",
        f"{activation['time_ratio']:.2f} times",
        f"**{figures('offload')['disk_step_ratio']:.2f}**",
        f"**{figures('precision')['time_vs_fp32']:.2f}**",
        f"{figures('precision')['healthy_loss_gap']:.1f} standard errors",
    ]
    overview = (ROOT / "docs" / "which.md").read_text("utf-8")
    for page in (README.read_text("utf-8"), overview):
        assert not [figure for figure in shown if figure not in page]
    together = figures("together")
    shown = [
        f"{together['model_scale']:.2f}", f"**{together['time_per_token_ratio']:.2f}**",
        f"**{together['time_to_loss_ratio']:.2f}**", f"**{together['resume_exact'].replace('/', ' of ')}**",
    ]  # fmt: skip
    for page in (README.read_text("utf-8"), overview):
        assert not [figure for figure in shown if figure not in page]
    only_there = [
        f"**{growth['share_state_bytes_ratio']:.2f}**",
        f"{growth['share_loss_penalty']:+.3f} nats",
        f"{growth['final_loss_difference']:+.3f} nats",
        f"{checkpoint['run_cpu_ratio']:.3f} times",
        f"{activation['bf16_peak_ratio']:.2f} in bf16-mixed",
    ]
    assert not [figure for figure in only_there if figure not in overview]


def test_the_page_of_limits_has_those_of_the_cards() -> None:
    assert LIMITS["PAGE"].read_text(encoding="utf-8") == LIMITS["written"](), "run: python docs/limits.py"
    assert min(LIMITS["limits"]().count(f"{card}/README.md#limits") for card in LIMITS["CARDS"]) == 1
