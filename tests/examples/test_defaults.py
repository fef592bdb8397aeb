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


@pytest.fixture
def short(defaults: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAGE in four steps."""
    task = defaults.TASKS["SAGE"]

    def made_short() -> Any:
        made = task()
        made.steps = 4
        return made

    monkeypatch.setitem(defaults.TASKS, "SAGE", made_short)


def test_it_trains_counts_losses_and_resumes(
    defaults: Any, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    out = tmp_path / "runs.json"
    monkeypatch.setattr(defaults, "RATES", {"AdamW": (1e-3,)})
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


def test_peers_train_at_the_same_rates_and_the_best_one_counts(
    defaults: Any, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    out = tmp_path / "runs.json"
    monkeypatch.setattr(defaults, "PEERS_RATES", (1e-3, 1e-2))
    arguments = ["--peers", "--models", "SAGE", "ResNet-18", "--seeds", "1", "--out", str(out)]
    defaults.main(arguments)
    runs = json.loads(out.read_text())
    assert len(runs) == len(defaults.PEERS) * 2
    for n, key in enumerate(runs):
        runs[key]["losses"] = [2.0 + n]
    runs["SAGE|SOAP|0.01|0|plain"]["losses"] = [0.125]
    out.write_text(json.dumps(runs))
    capsys.readouterr()
    defaults.main(arguments)
    row = next(line for line in capsys.readouterr().out.splitlines() if "SAGE" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["2", "0.125", "4", "5", "6"]
