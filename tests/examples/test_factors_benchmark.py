"""The benchmark of one layer's factors: every contender computes the same, and the law that is
fitted is the law that was there.
"""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import factors

    return factors


@pytest.mark.parametrize("strategy", ["expand", "reduce"])
def test_all_contenders_compute_the_same_factors(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    for series in bench.QUICK:
        assert bench.check_same(series, strategy) < 1e-5
    other = {"expand": "reduce", "reduce": "expand"}[strategy]
    for name in ("curvlinops", "singd"):
        with monkeypatch.context() as patch:
            right = bench.CONTENDERS[name]
            patch.setitem(bench.CONTENDERS, name, lambda *args, f=right: f(*args[:3], other))
            with pytest.raises(AssertionError, match=rf"{name}'s factors differ .* {strategy}"):
                bench.check_same(bench.QUICK[0], strategy)


def test_the_factors_are_those_of_the_thesis(bench: ModuleType) -> None:
    layer, a, b = bench.QUICK[0].tensors(1)
    A, B = bench.by_plugin(layer, a, b, "expand")()
    torch.testing.assert_close(A, torch.einsum("nri,nrj->ij", a, a) / a.shape[1])
    torch.testing.assert_close(B, torch.einsum("nri,nrj->ij", b, b))
    A, B = bench.by_plugin(layer, a, b, "reduce")()
    torch.testing.assert_close(A, torch.einsum("nri,nsj->ij", a, a) / a.shape[1] ** 2)
    torch.testing.assert_close(B, torch.einsum("nri,nsj->ij", b, b))


def test_exponent_is_that_of_the_larger_half(bench: ModuleType) -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    assert bench.exponent(
        sizes, [9.0, 9.0, 9.0, *(3 * s**1.5 for s in sizes[3:])]
    ) == pytest.approx(1.5)


def test_each_series_covers_what_it_should(bench: ModuleType) -> None:
    over_positions, over_widths = bench.SERIES
    assert over_positions.varying[0] == 1 and over_positions.varying[-1] == 4096
    assert over_widths.varying[0] == 64 and over_widths.varying[-1] == 1024
    for series in bench.SERIES:  # a later peak of memory has to be the higher one
        sizes = [r * p for r, p in zip(series.positions, series.widths, strict=True)]
        assert all(2 * small <= large for small, large in itertools.pairwise(sizes))


def test_prints_times_exponents_and_the_distance_to_the_floors(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    bench.main(["--quick", "--no-memory", "--threads", "1"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for text in ("here", "curvlinops", "singd", "stock ASDL", "exponent", "/ read", "/ product"):
        assert text in printed


def test_peak_memory_is_that_of_the_copies_a_contender_makes(bench: ModuleType) -> None:
    from _timing import in_fresh_process  # type: ignore[import-not-found]

    here, singd = in_fresh_process(_peaks)
    assert here < 4  # MiB: nothing of the size of the tensors, which are of 8
    assert singd > 6  # its scaled copy of one


def _peaks() -> list[float]:
    """Of expand at R = 4096, of the contender with the lower one first."""
    import factors  # type: ignore[import-not-found]

    series = factors.over_positions(8, 64, [64, 1024, 4096])
    return [factors.memory(series, "expand", name, 1)[-1] for name in ("here", "singd")]


def test_processor_time_leaves_out_what_others_take(bench: ModuleType) -> None:
    from _timing import seconds  # type: ignore[import-not-found]

    waiting = functools.partial(time.sleep, 0.2)
    assert seconds(waiting, bench.CLOCKS["processor"]) < 0.1
    assert seconds(waiting, bench.CLOCKS["wall"]) >= 0.2
    assert seconds(waiting) >= 0.2
