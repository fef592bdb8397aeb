"""The series and the scratch tree it is applied in: what :mod:`check`, :mod:`refresh` and the test
suite share.

The tree holds ``asdl/`` as the stock wheel has it, and one commit for each patch. A patch may add
modules of the plugin to ``asdl/weight_sharing/``; they are the plugin's files, byte for byte, and
:data:`ADDED` says which patch adds which.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLUGIN = HERE.parent / "asdl_ws_plugin" / "weight_sharing"
NATIVE = Path("asdl/weight_sharing")
VERSION = "0.1a5"

# The number of a patch -> the modules of the plugin it needs; what those import comes with them.
ADDED = {
    1: ["__init__", "registry", "rules"],
    2: ["capture"],
    3: ["nvtx"],
    4: ["output_grads", "read_loss"],
    5: ["matrices"],
    6: ["attach", "grad_maker", "_version"],
}

DATE = "2026-01-01T00:00:00Z"
# The author, and a git that does what it does everywhere.
ENVIRONMENT = {
    "GIT_AUTHOR_NAME": "asdl-ws-plugin",
    "GIT_AUTHOR_EMAIL": "asdl-ws-plugin@users.noreply.github.com",
    "GIT_COMMITTER_NAME": "asdl-ws-plugin",
    "GIT_COMMITTER_EMAIL": "asdl-ws-plugin@users.noreply.github.com",
    "GIT_AUTHOR_DATE": DATE,
    "GIT_COMMITTER_DATE": DATE,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "LC_ALL": "C",
}


def patches() -> list[Path]:
    """The patches, in order."""
    return sorted(HERE.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def number(patch: Path) -> int:
    return int(patch.name[:4])


def git(tree: Path, *arguments: str) -> str:
    """Run git in the scratch tree. Raises a RuntimeError that shows what git said if it fails."""
    # git sets some for hooks and aliases of an outer repository, others are the user's: GIT_DIR,
    # GIT_CONFIG_COUNT, ...
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=tree,
        env={**environment, **ENVIRONMENT},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def stock_package() -> Path:
    """The folder ``asdl`` of the installed stock wheel, whatever a PYTHONPATH puts in front of
    it.
    """
    distribution = metadata.distribution("asdfghjkl")
    if distribution.version != VERSION:
        raise RuntimeError(
            f"The patches are for asdfghjkl {VERSION}, installed is {distribution.version}."
        )
    return Path(str(distribution.locate_file("asdl")))


def make_tree(tree: Path) -> None:
    """A scratch git tree with the stock package as its first commit."""
    tree.mkdir(parents=True, exist_ok=True)
    shutil.copytree(stock_package(), tree / "asdl", ignore=shutil.ignore_patterns("__pycache__"))
    git(tree, "init", "--quiet", "--initial-branch=main")
    (tree / ".git" / "info" / "exclude").write_text("__pycache__/\n.pytest_cache/\n")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", f"asdfghjkl {VERSION}")
    git(tree, "tag", "stock")


def apply(tree: Path, patch: Path) -> None:
    """Apply one patch and commit it. git applies without fuzz: context that differs is an error."""
    git(tree, "am", "--quiet", "--keep-cr", "--committer-date-is-author-date", str(patch))


def imports_of(module: str) -> list[str]:
    """The plugin's modules that one of them imports, at the top or inside of a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse((PLUGIN / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return [name for name in dict.fromkeys(names) if (PLUGIN / f"{name}.py").exists()]


def added_by(which: int) -> list[str]:
    """The modules of the plugin that this patch adds, with what they import, less what earlier
    patches added.
    """
    before = {
        name for earlier in ADDED if earlier < which for name in _with_imports(ADDED[earlier])
    }
    return [name for name in _with_imports(ADDED.get(which, [])) if name not in before]


def _with_imports(modules: list[str]) -> list[str]:
    found: list[str] = []
    left = list(modules)
    while left:
        module = left.pop()
        if module not in found:
            found.append(module)
            left += imports_of(module)
    return sorted(found)
