"""What ARCHITECTURE.md says of the folders is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import asdl_ws_plugin

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "asdl_ws_plugin"
# What the parts beside the core may import of the package; test_walls.py has the core.
MAY_IMPORT = {
    "conversion": {"weight_sharing", "conversion"},
    "makers": {"weight_sharing", "upstream"},
    "diagnostics": {"weight_sharing", "conversion", "diagnostics", "makers"},
    "upstream": {"weight_sharing", "makers", "upstream"},
    "operations": {"weight_sharing"},
    "kronecker": {"weight_sharing"},
    "laplace": {"weight_sharing"},
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(file: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file it does."""
    inside = ["asdl_ws_plugin", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {
        name.split(".")[1] for name in names if name.startswith("asdl_ws_plugin.") and "." in name
    }


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_no_part_imports_what_stands_above_it(part: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if part_of(file) == part]
    assert files
    for file in files:
        above = imported_parts(file) - MAY_IMPORT[part]
        assert not above, f"{file.relative_to(ROOT)} imports {sorted(above)}"


def test_imports_are_seen_at_all() -> None:
    """The test above would fail if something were wrong."""
    assert imported_parts(PACKAGE / "diagnostics" / "exactness.py") >= {"makers", "diagnostics"}
    assert "weight_sharing" in imported_parts(PACKAGE / "weight_sharing" / "grad_maker.py")


def test_the_files_that_are_named_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    known = {file.name for folder in (PACKAGE, ROOT / "patches") for file in folder.rglob("*.py")}
    named = {name.rpartition("/")[2] for name in re.findall(r"[\w/]+\.py\b", text)}
    assert named - known - {file.name for file in (ROOT / "tests").rglob("*.py")} == set()


def test_every_file_has_its_place_in_the_page() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = {file.name for file in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(file for file in files if not re.search(rf"\b{file}\b", text)) == []


def test_the_version_of_the_citation_is_the_packages() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {asdl_ws_plugin.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{asdl_ws_plugin.__version__}] - 2026-11-25\n" in changes
