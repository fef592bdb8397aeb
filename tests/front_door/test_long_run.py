"""Hundreds of steps leave no more behind than tens."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def long_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import _timing
    import long_run

    # A process of its own: what other tests have left goes when the collector finds it.
    yield partial(_timing.in_fresh_process, long_run.rows)
    for name in ("long_run", "_timing"):
        sys.modules.pop(name, None)


def test_300_steps_of_a_small_vit_leave_hooks_tensors_and_bytes_as_they_were(long_run: Any) -> None:
    """Counted right after steps of the same kind, from when all there is to find is found."""
    rows = long_run(300, 100, 100)
    assert [row.step for row in rows] == [100, 200, 300]
    first = rows[0]
    assert first.tensors > 50 and first.megabytes > 0
    for row in rows[1:]:
        assert (row.hooks, row.modes, row.tensors) == (first.hooks, first.modes, first.tensors)
        assert row.megabytes == pytest.approx(first.megabytes, rel=1e-9)
