"""The house keeps its walls: who may import whom, private names stay at home, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asdl_ws_plugin

ROOT = Path(asdl_ws_plugin.__file__).parent
CORE = sorted((ROOT / "weight_sharing").glob("*.py"))
ALL = sorted(ROOT.rglob("*.py"))

# The core's floors, the lowest first: a file imports files of lower floors only.
FLOORS = [
    {
        "_version",
        "_warn",
        "agreement",
        "blocks",
        "capped",
        "copying",
        "errors",
        "inverses",
        "logits",
        "names",
        "nests",
        "nvtx",
        "schedule",
        "shapes",
        "shares",
        "torch_private",
        "training_config",
        "trust",
        "wrappers",
    },
    {
        "chosen",
        "factors",
        "lineage",
        "matrices",
        "registry",
        "rounding",
        "second_moments",
        "step_length",
    },
    {"capture", "layer_gradients", "packing"},
    {
        "likelihoods",
        "live",
        "own_hessian",
        "ragged",
        "ranks",
        "rules",
        "send_back",
        "subclasses",
        "training",
        "transaction",
    },
    {"layout", "micro_batches", "observe_loss", "operations", "positions", "sharded"},
    {
        "arrangement",
        "attach",
        "count",
        "evidence",
        "loss_graph",
        "read_loss",
        "selection",
        "state_dict",
    },
    {"output_grads", "owners", "padded", "plan", "shared_terms", "state_check"},
    {"arrange", "joint", "reading", "unseen"},
    {"batch", "model_calls", "no_labels", "place", "probe", "step"},
    {"commit", "forgotten", "operate"},
    {"joint_batches"},
    {"fisher_maker"},
    {"inversion", "resuming", "steps"},
    {"grad_maker"},
]
# ASDL's own private names, which its gradient makers and ours share.
OF_ASDL = {
    "_model_fn",
    "_loss_fn",
    "_dummy_loss",
    "_dummy_logits",
    "_operators",
    "_model_output",
    "_loss",
    "_logits",
    "_get_module_fisher",
    "_set_module_fisher",
    "_fisher_attr",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative_imports(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Level, module and names of each import from within the package."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_imports_nothing_from_the_other_wings(path: Path):
    for level, module, _ in relative_imports(path):
        assert level == 1, f"{path.name} imports {'.' * level}{module}"
    for node in ast.walk(parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.startswith("asdl_ws_plugin") for name in names), path.name


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_file_of_the_core_imports_lower_floors_only(path: Path):
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    if path.stem == "__init__":
        return
    assert path.stem in floor, f"{path.name} is on no floor"
    for _, module, names in relative_imports(path):
        for name in [module] if module else names:
            assert floor[name] < floor[path.stem], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_uses_a_private_name_of_another(path: Path):
    if path.stem == "torch_private":  # which is there for that
        return
    tree = parsed(path)
    own = {node.name for node in ast.walk(tree) if hasattr(node, "name")}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            assert node.attr in OF_ASDL or ast.unparse(node.value) in ("super()", "sys"), (
                f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            )
    for _, module, names in relative_imports(path):
        assert not any(map(is_private, names)) or module.endswith(("_warn", "_torchvision")), (
            f"{path.name}: {module}: {names}"
        )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_messages_about_a_layer_are_made_in_one_place(path: Path):
    """Warnings and errors of a single layer; lists of layers are their own sentences."""
    if path.stem in ("errors", "inversion", "state_dict"):
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Raise):
            text = ast.unparse(node)
            assert "f\"Layer '" not in text and "f\"Layer '" not in text, (
                f"{path.name}:{node.lineno}"
            )


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_and_functions_can_be_read_on_a_page_or_two(path: Path):
    """Docstrings do not count. What is longer is listed here, and nowhere else."""
    too_long = {name: lines for name, lines, limit in sizes(parsed(path)) if lines > limit}
    assert not set(too_long) - LARGE, too_long


LARGE = {
    # what PyTorch's own class has in one, with its options
    "MultiheadAttention",
    "forward",
    "_mask",
}


def sizes(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Name, lines without docstring, and the most there may be, of each class and function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                first = node.body[0]
                lines -= (first.end_lineno or 0) - first.lineno + 1
            yield node.name, lines, 200 if isinstance(node, ast.ClassDef) else 40
