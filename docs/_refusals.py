"""The page *Refusals*, made from the code: every error that the package raises, with its remedy.

Messages are read off the syntax tree of the package's modules; what a message fills in at run time
is an ellipsis here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Refusal", "page", "refusals"]

PACKAGE = Path(__file__).resolve().parent.parent / "asdl_ws_plugin"
# The errors of asdl_ws_plugin.weight_sharing.errors: a layer's name, the reason, the remedy.
LAYER_ERRORS = {"LayerError": "ValueError", "LayerTypeError": "TypeError"}
LAYER_ERRORS |= {"LayerRuntimeError": "RuntimeError", "LayerFault": "ValueError"}
# Raised for Python's own protocols, and caught inside of the package: no refusals.
INTERNAL = {"AttributeError", "KeyError", "NothingSeen", "StopIteration", "SystemExit"}


@dataclass(frozen=True)
class Refusal:
    """One message: ``where`` is the module, relative to the package."""

    where: str
    line: int
    error: str
    reason: str
    remedy: str


def refusals(package: Path = PACKAGE) -> list[Refusal]:
    """All errors of the package's modules, in the order of files and lines."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _constants(tree)
        found += [
            Refusal(where, call.lineno, *parts)
            for call in _raised(tree)
            if (parts := _parts(call, names)) is not None
        ]
    return found


def _raised(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of exceptions: those that are raised, and those of layers that are made to be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if _name(node.exc) not in LAYER_ERRORS:
                yield node.exc
        elif isinstance(node, ast.Call) and _name(node) in LAYER_ERRORS:
            yield node


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _parts(call: ast.Call, names: dict[str, str]) -> tuple[str, str, str] | None:
    """The error's class, the reason and the remedy."""
    error = _name(call)
    texts = [_text(argument, names) for argument in call.args]
    if error in LAYER_ERRORS:
        keywords = {k.arg: _text(k.value, names) for k in call.keywords}
        reason = texts[1] if len(texts) > 1 else keywords.get("reason", "")
        remedy = texts[2] if len(texts) > 2 else keywords.get("remedy", "")
        if not reason.strip("…. "):
            return None
        return LAYER_ERRORS[error], f"Layer '…': {reason.rstrip('.')}.", remedy
    if error in INTERNAL or not error.endswith("Error") or not texts:
        return None
    message = texts[0]
    if not message.strip("…. ") or len(message) < 20:
        return None
    reason, _, remedy = message.partition(". ")
    if not remedy and "; " in reason:  # "...; use that"
        reason, _, remedy = reason.rpartition("; ")
        remedy = remedy[:1].upper() + remedy[1:]
    return error, reason.rstrip(".") + ".", remedy


def _text(node: ast.expr, names: dict[str, str]) -> str:
    """A string as it is written, with an ellipsis for every expression in it."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else "…"
    if isinstance(node, ast.Name):
        return names.get(node.id, "…")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names) if isinstance(node.value, ast.Name) else "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    if isinstance(node, ast.IfExp):
        return _text(node.body, names)
    return "…"


def _constants(tree: ast.Module) -> dict[str, str]:
    """Strings that are assigned to a name at the top of a module, or once in a function."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name) and isinstance(
                node.value, (ast.Constant, ast.JoinedStr)
            ):
                text = _text(node.value, {})
                if len(text) > 20:
                    found.setdefault(target.id, text)
    return found


# ------------------------------------------------------------------------------------ as Markdown

_TITLES = {
    "conversion": "Conversion",
    "diagnostics": "Reports and comparisons",
    "weight_sharing": "Curvature and gradients",
    "": "Everything else",
}


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip().replace("|", "\\|")
    outside = [part.replace("<", "&lt;") for part in text.split("`")[::2]]
    inside = text.split("`")[1::2]
    escaped = [re.sub(r"([*_])", r"\\\1", part) for part in outside]
    return "".join(
        part + (f"`{inside[i]}`" if i < len(inside) else "") for i, part in enumerate(escaped)
    )


def page() -> str:
    """The page in Markdown: a table for each wing of the package."""
    lines = [
        "# Refusals",
        "",
        "Whatever cannot be right is refused where it enters, and a step that fails leaves nothing",
        "behind. This page is made from the code when the site is built: every error of the",
        "package and what it advises. An ellipsis is filled in when it happens, with a layer's",
        "name, sizes, or what was found.",
    ]
    found = refusals()
    for wing, title in _TITLES.items():
        rows = {
            (r.reason, r.error, r.remedy): r
            for r in found
            if (r.where.split("/")[0] if "/" in r.where else "") == wing
        }
        lines += [
            "",
            f"## {title}",
            "",
            "| what is said | what to do | raised as |",
            "|---|---|---|",
        ]
        for r in rows.values():
            lines.append(f"| {_cell(r.reason)} | {_cell(r.remedy)} | `{r.error}` |")
    return "\n".join(lines) + "\n"
