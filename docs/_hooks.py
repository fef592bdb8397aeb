"""What MkDocs does besides: the page of refusals, pages that are there or not, Sphinx' roles."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _refusals

DOCS = Path(__file__).resolve().parent
GENERATED = {"refusals.md": _refusals.page}
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>~?\.?([^<]*)</code>")


def _existing(nav: list[Any]) -> list[Any]:
    """The entries of a menu whose pages are written in this checkout."""
    found: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            found.append({title: _existing(target)})
        elif target in GENERATED or (DOCS / target).exists():
            found.append(entry)
    return found


def on_config(config: Any) -> Any:
    config.nav = _existing(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """``:class:`~a.b.C``` of the docstrings is ``C`` in the site."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rsplit('.', 1)[-1]}</code>", html)
