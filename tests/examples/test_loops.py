"""The loops of the frameworks train, each as their users write it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

LOOPS = Path(__file__).resolve().parents[2] / "examples" / "loops"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the frameworks' own
    pytest.mark.slow,
]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"loop_{name}", LOOPS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("plain", {"steps": 40}, 0.95),
        ("accelerate_loop", {"epochs": 1}, 0.85),
        ("pyg_loop", {"epochs": 3}, 0.97),
        ("lightning_module", {"steps": 30}, 0.97),
        ("lightning_module", {"steps": 15, "accumulate": 2}, 0.99),
        ("transformers_trainer", {"steps": 30}, 0.99),
        ("transformers_trainer", {"steps": 30, "causal": True}, 0.95),
    ],
)
def test_loop_trains(name: str, options: dict[str, Any], factor: float) -> None:
    losses = load(name).main(**options)
    tail = sum(losses[-5:]) / 5
    assert tail < factor * losses[0], (losses[0], tail)


@pytest.mark.parametrize("name", [path.stem for path in sorted(LOOPS.glob("*.py"))])
def test_each_loop_is_at_most_five_lines_longer(name: str) -> None:
    text = (LOOPS / f"{name}.py").read_text(encoding="utf-8")
    marked = [line for line in text.splitlines() if "# +" in line]
    assert 1 <= len(marked) <= 5
    assert all("prec" in line or "asdl_ws_plugin" in line or "def " in line for line in marked)
