"""What is released works where nothing of the repository is: the wheel, made from the sdist, in a fresh environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from lightning_efficient import __version__

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model": {
        "class_path": "lightning_efficient.demos.ByteLanguageModel",
        "init_args": {"layers": 4, "width": 32, "heads": 4, "context": 32},
    },
    "data": {
        "class_path": "lightning_efficient.demos.StdlibDataModule",
        "init_args": {"context": 32, "batch_size": 4, "train_bytes": 2000, "validation_bytes": 300},
    },
    "trainer": {
        "max_steps": 2,
        "limit_val_batches": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": {"class_path": "lightning_efficient.OffloadStrategy", "init_args": {"offload_dir": "swap"}},
        "plugins": [{"class_path": "lightning_efficient.RollbackPrecision"}],
        "callbacks": [
            {"class_path": f"lightning_efficient.{name}"}
            for name in (
                "GrowAndUnshareCallback", "AsyncCheckpointIO", "ActivationCompressionPlugin", "EfficiencyMonitor"
            )
        ],
    },
}  # fmt: skip


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What it prints; nothing of the tests' environment is found by it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def built(source: Path, target: str, folder: Path) -> Path:
    """The one file that the build makes of a source tree."""
    tool = (sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder)
    call(*tool, cwd=source, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    [file] = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; pip install -e .[dev] brings it")
    return built(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    [source] = unpacked.iterdir()
    return built(source, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"lightning_efficient-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"lightning_efficient-{__version__}.dist-info/METADATA").decode()
    package = ROOT / "lightning_efficient"
    kinds = {".py", ".c", ".typed", ".md"}
    expected = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.suffix in kinds}
    expected.add("lightning_efficient/py.typed")
    info = f"lightning_efficient-{__version__}.dist-info"
    assert names - expected == {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert expected - names == set()
    assert "License-Expression: Apache-2.0" in metadata
    assert "# lightning-efficient" in metadata  # the readme


def test_the_sdist_has_what_a_packager_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("LICENSE", "README.md", "pyproject.toml", "CHANGELOG.md", "configs/base.yaml", "tests/conftest.py"):
        assert needed in names
    unwanted = ("__pycache__", ".git/", ".venv/", "runs/", ".ci/", "_cache/", "site/", ".so")
    assert [name for name in names if any(part in name for part in unwanted)] == []


@pytest.mark.slow
def test_it_trains_from_where_it_was_installed(wheel: Path, tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    call(sys.executable, *install, "--disable-pip-version-check", wheel, cwd=elsewhere)
    [packages] = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path and not (Path(path) / "lightning_efficient").exists()]
    (packages / "dependencies.pth").write_text("\n".join(others))  # those of the tests, which take long to download
    found = "from importlib.util import find_spec; print(find_spec('lightning_efficient').origin)"
    assert str(packages) in call(python, "-c", found, cwd=elsewhere)

    script = home / "bin" / "lightning-efficient"
    assert "usage: lightning-efficient" in call(script, "--help", cwd=elsewhere)
    (elsewhere / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    cache = tmp_path / "cache"
    said = call(script, "fit", "--config", "my.yaml", cwd=elsewhere, XDG_CACHE_HOME=str(cache), OMP_NUM_THREADS="1")
    assert f"lightning-efficient {__version__} | RollbackPrecision" in said
    assert list(elsewhere.rglob("efficiency_report.md"))
    assert list(elsewhere.rglob("*.ckpt"))
    assert {file.name.partition("-")[0] for file in cache.rglob("*.so")} >= {"host"}  # compiled where it is installed
