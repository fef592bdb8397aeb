"""The wheel that is built has everything, and works where the source is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="69")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asdl_ws_plugin"


def run(*command: str | Path, **options: str) -> str:
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=options["cwd"],
        env={**os.environ, "PYTHONPATH": options.get("path", "")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else; the source is left as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(
        *("-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", folder, source),
        cwd=str(folder),
    )
    (wheel,) = folder.glob("*.whl")
    run("-m", "pip", "install", *offline, "--target", site, wheel, cwd=str(folder))
    shutil.rmtree(source)
    return site


def test_the_wheel_has_every_file_of_the_package(site: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return {str(p) for p in found if "__pycache__" not in p.parts}

    assert files(site / PACKAGE.name) == files(PACKAGE)
    assert "py.typed" in files(site / PACKAGE.name)
    (licence,) = site.glob("*.dist-info/**/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


def test_the_installed_wheel_is_imported_and_trains(site: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
import asdl, torch, asdl_ws_plugin
assert asdl_ws_plugin.__file__.startswith(sys.argv[1]), asdl_ws_plugin.__file__
for module in pkgutil.walk_packages(asdl_ws_plugin.__path__, "asdl_ws_plugin."):
    if module.name.rpartition(".")[2] not in ("__main__", "laplace"):
        importlib.import_module(module.name)
model = torch.nn.Sequential(torch.nn.Linear(3, 2))
gm = asdl.KfacGradientMaker(model, asdl.PreconditioningConfig(damping=1.0), shared_dim="reduce")
logits = gm.setup_model_call(model, torch.randn(4, 5, 3))
gm.setup_loss_call(lambda z: z.mean(1).logsumexp(-1).sum(), logits)
print(sorted(gm.shared_dim_for))
"""
    assert run("-c", code, site, cwd=str(tmp_path), path=str(site)) == "['0']\n"
    shown = run("-m", "asdl_ws_plugin", "--help", cwd=str(tmp_path), path=str(site))
    assert "inspect" in shown
