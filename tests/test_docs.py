"""The documentation's site: it builds without a warning, and lists what the package refuses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("_refusals")


def test_refusals_are_read_off_the_code(refusals: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "HINT = 'Use another one instead of it.'\n"
        "def f(name, size):\n"
        "    if size < 0:\n"
        "        raise ValueError(\n"
        "            f'The size of {name} has to be positive, got {size!r}. '\n"
        "            'Give another.'\n"
        "        )\n"
        "    error = LayerTypeError(name, f'its input has {size} rows', HINT)\n"
        "    if name:\n"
        "        raise error\n"
        "    try:\n"
        "        f(name, 1)\n"
        "    except ValueError:\n"
        "        raise\n"
        "    raise RuntimeError('there is no layer left; call convert(model)')\n"
        "    raise KeyError('an internal matter of mappings')\n"
    )
    found = [(r.error, r.reason, r.remedy) for r in refusals.refusals(tmp_path)]
    assert sorted(found) == [
        ("RuntimeError", "there is no layer left.", "Call convert(model)"),
        ("TypeError", "Layer '…': its input has … rows.", "Use another one instead of it."),
        ("ValueError", "The size of … has to be positive, got ….", "Give another."),
    ]


def test_the_page_has_what_the_package_says(refusals: ModuleType) -> None:
    page = refusals.page().replace("\\_", "_")
    for text in (
        "Use checkpoint(..., use_reentrant=False).",
        "There are no Kronecker factors in",
    ):
        assert text in page
    assert page.count("|---|---|---|") == 4
    for row in re.findall(r"^\|.*", page, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row  # three cells


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("KfacGradientMaker", "segments", "convert", "inverse_root"):
        assert f">{name}</span>" in reference or f">{name}<" in reference, name
    assert ":class:" not in reference and ":func:" not in reference
    assert "three lines:</p>" in reference and not re.search(r"::\s*</p>", reference)
    figures = (tmp_path / "figures" / "index.html").read_text(encoding="utf-8")
    assert '<a href="pruning.png"><img' in figures  # opens in full size
    assert "Refusals" in (tmp_path / "refusals" / "index.html").read_text(encoding="utf-8")
