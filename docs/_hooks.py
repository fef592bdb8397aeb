"""What MkDocs does besides: the page of refusals, a menu of the pages that are there, and figures
that open in full size, since wide ones are small on a phone.
"""

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


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*/?>', r'<a href="\1">\g<0></a>', html)
