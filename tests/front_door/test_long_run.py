"""Hundreds of steps leave no more behind than tens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def long_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import long_run

    yield long_run
    sys.modules.pop("long_run", None)


def test_300_steps_of_a_small_vit_leave_hooks_tensors_and_bytes_as_they_were(long_run: Any) -> None:
    """Counted right after steps of the same kind, from when all there is to find is found."""
    rows = list(long_run.counts(300, every=100, start=100))
    assert [row.step for row in rows] == [100, 200, 300]
    first = rows[0]
    assert first.tensors > 50 and first.megabytes > 0
    for row in rows[1:]:
        assert (row.hooks, row.modes, row.tensors) == (first.hooks, first.modes, first.tensors)
        assert row.megabytes == pytest.approx(first.megabytes, rel=1e-9)
