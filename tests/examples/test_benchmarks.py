"""The yardstick of the speed benchmark does the plugin's arithmetic: same factors, same
preconditioned gradient.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def step_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_time

    return step_time


@pytest.mark.parametrize(
    "name", ["reduce, MC", "expand, MC", "reduce, empirical", "reduce, MC, 10/100"]
)
def test_plugin_and_hand_written_loop_agree(step_time: ModuleType, name: str) -> None:
    size = step_time.Size(depth=1, width=12, image=8, batch=6, classes=5)
    assert step_time.check_same(size, step_time.CONTENDERS[name]) < 1e-4


def test_the_check_sees_a_difference(
    step_time: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = step_time.Size(depth=1, width=12, image=8, batch=6, classes=5)
    original = step_time.BareKfac._add_A

    def reduce_for_expand(self, module, x):  # type: ignore[no-untyped-def]
        self.reduce = not self.reduce
        original(self, module, x)
        self.reduce = not self.reduce

    monkeypatch.setattr(step_time.BareKfac, "_add_A", reduce_for_expand)
    with pytest.raises(AssertionError):
        step_time.check_same(size, step_time.CONTENDERS["expand, MC"])


def test_kinds_of_steps_and_their_weights(step_time: ModuleType) -> None:
    assert step_time.CONTENDERS["reduce, MC"].kinds == {"inverse": 1, "curvature": 9}
    assert step_time.CONTENDERS["reduce, MC, 10/100"].kinds == {
        "inverse": 1,
        "curvature": 9,
        "neither": 90,
    }
    times = {"inverse": [5.0, 6.0, 60.0], "curvature": [2.0, 2.0, 9.0]}
    assert step_time.weighted(times, {"inverse": 1, "curvature": 9}) == pytest.approx(
        (6 + 9 * 2) / 10
    )


def test_the_time_of_a_part_leaves_out_the_parts_inside(
    step_time: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(sys.modules["_timing"].time, "perf_counter", lambda: float(next(clock)))
    part = step_time.Parts()
    with part("outer"):  # not recording: no sample
        pass
    with part.recording(), part("outer"), part("inner"):
        pass
    # ticks at 1 (outer begins), 2 (inner begins), 3 (inner ends), 4 (outer ends), 5 (the step ends)
    assert part.medians() == {"other": 2.0, "outer": 2.0, "inner": 1.0}


def test_times_each_kind_once_a_round_in_alternating_order(step_time: ModuleType) -> None:
    made: list[str] = []
    contenders = {
        "one": {"a": lambda: made.append("one a"), "b": lambda: made.append("one b")},
        "two": {"a": lambda: made.append("two a")},
    }
    times = step_time.alternate(contenders, 2)
    assert made == ["one a", "one b", "two a", "two a", "one a", "one b"]
    assert {name: {kind: len(t) for kind, t in kinds.items()} for name, kinds in times.items()} == {
        "one": {"a": 2, "b": 2},
        "two": {"a": 2},
    }


def test_peak_memory_counts_what_a_step_needs(step_time: ModuleType) -> None:
    peak = step_time.in_fresh_process(_peak_of_a_known_step)
    assert (
        200 < peak < 400
    )  # MiB; the step below holds 256 at once, and the process had none of it before


def _peak_of_a_known_step() -> float:
    from _timing import peak_memory_mib  # type: ignore[import-not-found]

    return peak_memory_mib(lambda: lambda: torch.ones(64, 2**20), steps=2)


@pytest.mark.parametrize("shared_dim", ["reduce", "expand"])
def test_the_peers_compute_the_same_factors(
    step_time: ModuleType, monkeypatch: pytest.MonkeyPatch, shared_dim: str
) -> None:
    import peers

    size = step_time.Size(depth=1, width=12, image=8, batch=6, classes=5)
    assert peers.check_same(size, shared_dim) < 1e-5
    by_curvlinops, other = peers.by_curvlinops, {"reduce": "expand", "expand": "reduce"}[shared_dim]
    monkeypatch.setattr(
        peers, "by_curvlinops", lambda workload, kind, _: by_curvlinops(workload, kind, other)
    )
    with pytest.raises(AssertionError, match=r"factors of 'patch_embed.proj' differ"):
        peers.check_same(size, shared_dim)


def test_what_the_preset_costs_on_a_convolutional_network(step_time: ModuleType) -> None:
    """A step of a schedule is a mean of the kinds of steps, by how often it has them."""
    import convolutions  # type: ignore[import-not-found]

    options = argparse.Namespace(clock="processor")
    plain, *ratios = map(float, convolutions.measure(2, 24, 1, options))
    inverse, curvature, neither, by_5_20, _ = ratios
    assert plain > 1 and inverse > 1
    assert by_5_20 == pytest.approx((inverse + 3 * curvature + 16 * neither) / 20, abs=0.02)
