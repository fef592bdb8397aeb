"""What a newcomer copies from the README runs as printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from asdl_ws_plugin.upstream import is_native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_of_the_documentation_runs_as_printed(code: str) -> None:
    if "from laplace " in code and importlib.util.find_spec("laplace") is None:
        pytest.skip("laplace-torch is not installed")
    if "# by stock ASDL" in code and is_native():
        pytest.skip("a patched ASDL is not the stock one")
    exec(compile(code, "<documentation>", "exec"), {"__name__": "__main__"})
