"""The command line and every shipped configuration (README, "Use")."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

from lightning_efficient.__main__ import main
from lightning_efficient.demos import ByteLanguageModel
from lightning_efficient.demos.compare import main as compare
from lightning_efficient.monitoring.report import RunReport, read_report, write_report
from tests.helpers.scripts import Script

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")
SMALL = [
    "--model.init_args.layers=4",
    "--model.init_args.width=32",
    "--model.init_args.context=32",
    "--data.init_args.context=32",
    "--data.init_args.validation_bytes=2000",
    "--trainer.limit_train_batches=16",
    "--trainer.val_check_interval=8",
    "--trainer.enable_progress_bar=false",
]

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*"),
]

ISSUE = """
trainer:
  max_steps: 800
  callbacks:
    - class_path: lightning_efficient.GrowAndUnshareCallback
      init_args:
        layers: "blocks.*"
        mode: stack
        stages: [{depth: 1, until: 0.125}, {depth: 2, until: 0.30}, {depth: 4}]
        optimizer_state: copy
    - class_path: lightning_efficient.EfficiencyMonitor
"""
CHECKPOINTS = """
trainer:
  callbacks:
    - class_path: lightning_efficient.AsyncCheckpointIO
      init_args: {max_overhead: 0.035, memory_cap: 2GiB, verify: none, in_memory: 1, on_error: raise}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 50, save_top_k: 2, monitor: train/loss, save_last: link}
"""
VARIANTS: list[dict[str, Any]] = [
    {"mode": "share", "unit": 2, "until": {"fraction": 0.1, "loss_below": 2.5, "plateau": 50}},
    {"width": {"factor": 2, "until": 0.2}},
    {"mode": "interleave"},
    {"mode": "middle", "stages": [{"depth": 2, "until": 4}, {"depth": 4}], "rewarm_steps": 2},
]


LOW_BITS = """
trainer:
  plugins:
    - class_path: lightning_efficient.RollbackPrecision
      init_args:
        low: int8
        high: bf16
        pre_learning_steps: 50
        return_after: 20
        retry_rate: 0.05
        spike_guard: {factor: 3.0, window: 50}
"""


def test_low_bits_with_a_guard_are_written_in_yaml(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(LOW_BITS)
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={config}", *SMALL, "--trainer.max_steps=2"])
    assert "RollbackPrecision" in next(tmp_path.rglob("efficiency_report.md")).read_text()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_shipped_configuration_runs(overlay: Path, tmp_path: Path) -> None:
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={overlay}", *SMALL[1:]])
    report = read_report(next(tmp_path.rglob("efficiency_report.json")))
    assert report.totals["batches"] == 16


def test_the_base_configuration_runs_alone(tmp_path: Path) -> None:
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", *SMALL])
    assert list(tmp_path.rglob("efficiency_report.md"))


def test_a_users_callbacks_in_yaml_replace_the_base_ones(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(ISSUE)
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={config}", *SMALL])
    report = read_report(next(tmp_path.rglob("efficiency_report.json")))
    assert [event.step for event in report.events] == [2, 5]


class LogsWithASlash(ByteLanguageModel):
    """Names its loss as many do."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def test_checkpoints_as_the_card_writes_them_run(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(CHECKPOINTS)
    model = f"--model={__name__}.LogsWithASlash"
    more = ["--trainer.max_steps=150", "--trainer.limit_train_batches=null", "--trainer.val_check_interval=null"]
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", model, f"--config={config}", *SMALL, *more])
    files = {path.name.rpartition("step=")[2] for path in tmp_path.rglob("*.ckpt")}
    assert len(files & {"50.ckpt", "100.ckpt", "150.ckpt"}) == 2
    [last] = tmp_path.rglob("last.ckpt")
    assert last.is_symlink()
    assert torch.load(last, weights_only=True)["global_step"] == 150


@pytest.mark.parametrize("arguments", VARIANTS, ids=lambda arguments: "-".join(arguments))
def test_each_mode_is_written_in_yaml(arguments: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    callback = {"class_path": "lightning_efficient.GrowAndUnshareCallback", "init_args": arguments}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    main(["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={config}", *SMALL])
    assert read_report(next(tmp_path.rglob("efficiency_report.json"))).events


def test_a_function_places_from_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, path = tmp_path / "my.yaml", "tests.offload.test_strategy.state_of_blocks"
    place = {"optimizer_state": path, "blocks.*": "host"}
    offload = {
        "class_path": "lightning_efficient.OffloadStrategy",
        "init_args": {"offload_dir": "swap", "place": place},
    }
    config.write_text(yaml.safe_dump({"trainer": {"strategy": offload}}))
    with caplog.at_level("INFO"):
        main(["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={config}", *SMALL, "--trainer.max_steps=1"])
    assert "disk: optimizer_state" in caplog.text
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert saved["trainer"]["strategy"]["init_args"]["place"] == place


@pytest.mark.parametrize("strategy", ["OffloadStrategy", "OffloadDDPStrategy", "OffloadFSDP2Strategy"])
def test_a_function_is_named_in_yaml_for_each_strategy(strategy: str) -> None:
    path = "tests.offload.test_strategy.state_of_blocks"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    for place in (path, {"optimizer_state": path}):
        given = {"class_path": f"lightning_efficient.{strategy}", "init_args": {"place": place}}
        made = parser.instantiate_classes(parser.parse_object({"strategy": given})).strategy
        assert [where.__name__ for where in made.settings.place.values()] == ["state_of_blocks"]


class MyModule(pl.LightningModule):
    """A user's own class."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(features, features) for _ in range(4))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for layer in self.layers:
            batch = batch + layer(batch).tanh()
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MyData(pl.LightningDataModule):
    """A user's own data."""

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        return torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=2)  # type: ignore[arg-type]


def test_a_users_own_classes_by_class_path(tmp_path: Path) -> None:
    module = f"{MyModule.__module__}"
    main([
        "fit",
        f"--model={module}.MyModule",
        f"--data={module}.MyData",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=lightning_efficient.GrowAndUnshareCallback",
    ])  # fmt: skip


def test_without_jsonargparse_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"pip install 'jsonargparse\[signatures\]"):
        main(["fit"])


def test_help_names_what_is_beside_lightnings_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "lightning-efficient plan" in printed
    assert "lightning-efficient report" in printed
    main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-efficient 0.")


def test_report_is_a_command_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)  # which it does not need
    write_report(tmp_path / "a", RunReport("x", totals={"parameters": 7.0}))
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "a"), str(tmp_path / "a"), "--out", str(tmp_path)])
    assert stopped.value.code == 0
    assert "parameters at the end" in capsys.readouterr().out
    assert "a (2)" in (tmp_path / "comparison.html").read_text()
    with pytest.raises(SystemExit) as stopped:  # as a shell gives ``runs/*``, with the pages of the time before
        main(["report", *map(str, sorted(tmp_path.iterdir())), "--out", str(tmp_path)])
    assert stopped.value.code == 0


def test_a_console_script_sees_packages_of_the_current_folder(tmp_path: Path) -> None:
    """Unlike ``python -m``, a console script does not have the folder on its path by itself."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("from lightning_efficient.demos import ByteLanguageModel as MyModel\n")
    call = "import sys; sys.path = [p for p in sys.path if p]; from lightning_efficient.__main__ import main; main()"
    arguments = ["fit", "--model", "mine.MyModel", "--print_config"]
    shown = subprocess.run(
        [sys.executable, "-P", "-c", call, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "class_path: lightning_efficient.demos.ByteLanguageModel" in shown.stdout or "mine.MyModel" in shown.stdout


def ended(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``; each interpreter would import Lightning."""
    assert all(map(os.path.isabs, env["PYTHONPATH"].split(os.pathsep)))  # for it is another folder
    script = Script(command, cwd=cwd)
    output, _ = script.communicate()
    return subprocess.CompletedProcess(command, script.poll() or 0, output)


@pytest.mark.slow
def test_the_demo_compares_two_runs_and_fails_where_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "configs"
    small.mkdir()
    base = yaml.safe_load((CONFIGS / "base.yaml").read_text())
    base["model"]["init_args"] |= {"layers": 4, "width": 32, "context": 32}
    base["data"]["init_args"] |= {"context": 32, "validation_bytes": 2000}
    (small / "base.yaml").write_text(yaml.safe_dump(base))
    (small / "growth.yaml").write_text(
        (CONFIGS / "growth.yaml").read_text().replace("8}", "4}").replace("4, u", "3, u")
    )
    (small / "checkpoint.yaml").write_text((CONFIGS / "checkpoint.yaml").read_text().replace("50", "4"))
    (small / "activation.yaml").write_text((CONFIGS / "activation.yaml").read_text().replace("100", "5"))
    (small / "offload.yaml").write_text((CONFIGS / "offload.yaml").read_text())
    (small / "precision.yaml").write_text((CONFIGS / "precision.yaml").read_text().replace("50", "2"))
    monkeypatch.setattr(subprocess, "run", ended)
    overlays = ["growth", "checkpoint", "activation", "offload", "precision"]
    arguments = ["--configs", str(small), "--steps", "16", "--out", str(tmp_path / "out"), "--overlays", *overlays]
    assert compare(arguments) == 0
    printed = capsys.readouterr().out
    assert "final val_bits_per_byte" in printed
    assert "growth: 2 layers -> 3 layers" in printed
    assert "offload: host: parameter" in printed
    assert "operations train in int8" in printed
    assert "precision: All 24 operations were left in high bits" in printed or "operations train in int8" in printed
    assert "for backward, instead of" in printed
    assert max(map(len, printed[printed.index("A = plain") :].split("\nReport")[0].splitlines())) <= 120
    assert len(list(tmp_path.rglob("comparison.png"))) == len(list(tmp_path.rglob("comparison.html"))) == 1
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1
    assert "checkpoint/written" in next(tmp_path.rglob("growth+*+precision/efficiency_report.md")).read_text()
    page = next(tmp_path.rglob("comparison.md")).read_text()
    assert "| peak memory |" in page
    for technique in ("growth", "checkpoint", "activations", "offload", "precision"):
        assert f"\n| {technique} | " in page
    (small / "base.yaml").write_text("trainer: {callbacks: [{class_path: lightning_efficient.NoSuchThing}]}")
    assert compare(arguments) == 1
