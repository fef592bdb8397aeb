"""benchmarks/defaults.py runs, says what is lost, and resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import defaults

    yield defaults
    sys.modules.pop("defaults", None)


def test_it_trains_counts_losses_and_resumes(
    defaults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    out = tmp_path / "runs.json"
    monkeypatch.setattr(defaults, "RATES", {"AdamW": (1e-3,)})
    task = defaults.TASKS["SAGE"]

    def short() -> Any:
        made = task()
        made.steps = 4
        return made

    monkeypatch.setitem(defaults.TASKS, "SAGE", short)
    arguments = ["--models", "SAGE", "--optimizers", "AdamW", "--seeds", "1", "--out", str(out)]
    defaults.main(arguments)
    runs = json.loads(out.read_text())
    assert set(runs) == {"SAGE|AdamW|0.001|0|plain", "SAGE|AdamW|0.001|0|recommended"}
    assert all(len(run["losses"]) == 4 for run in runs.values())

    runs["SAGE|AdamW|0.001|0|recommended"]["losses"] = [9.0]
    out.write_text(json.dumps(runs))
    monkeypatch.setattr(defaults, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert defaults.main(arguments) == 2  # at its rate, and at the best one
    assert "2 of the comparisons" in capsys.readouterr().out
