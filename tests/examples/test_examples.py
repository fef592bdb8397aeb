"""The examples run, and what they report is true."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def vit_digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    import vit_digits

    return vit_digits


@pytest.fixture
def report(vit_digits: ModuleType) -> ModuleType:
    return sys.modules["_report"]


def test_the_digits_example_runs_and_reports_what_it_did(
    vit_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, kfac = vit_digits.main(["--quick", "--out", str(tmp_path)])
    steps = vit_digits.QUICK_EPOCHS * (
        len(vit_digits.Digits.load().train[1]) // vit_digits.BATCH_SIZE
    )
    for run in (baseline, kfac):
        assert run.steps[0] == 0 and run.steps[-1] == steps == len(run.laps)
        assert run.seconds[-1] == pytest.approx(sum(run.laps))
        assert run.values[0] < 0.25 < 0.3 < run.values[-1]  # ten classes; it learns
    assert baseline.values != kfac.values
    assert (tmp_path / "vit_digits.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("NAdamW", "K-FAC-reduce", f"{kfac.values[-1]:.2%}", kfac.final["test accuracy"]):
        assert text in printed


def test_same_seed_same_run(vit_digits: ModuleType) -> None:
    data = vit_digits.Digits.load()
    first, second = (
        vit_digits.train(vit_digits.KFAC, data, epochs=1, seed=3, depth=1) for _ in range(2)
    )
    assert first.values == second.values


def test_digits_do_not_overlap(vit_digits: ModuleType) -> None:
    data = vit_digits.Digits.load()
    parts = (data.train, data.validation, data.test)
    assert [len(y) for _, y in parts] == [1257, 270, 270]
    images = torch.cat([x for x, _ in parts]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 1797
    for _, y in parts:  # every class in every part
        assert y.bincount(minlength=10).min() > 0.08 * len(y)
    assert abs(float(data.train[0].mean())) < 1e-5 and float(data.train[0].std()) == pytest.approx(
        1, abs=1e-5
    )


def test_images_are_shifted_by_whole_pixels(vit_digits: ModuleType) -> None:
    x = torch.randn(40, 1, 8, 8)
    moved = vit_digits.shifted(x, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(x[:, 0], moved[:, 0], strict=True):
        offsets = [
            (i, j)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if torch.equal(
                after,
                before[(torch.arange(8) + i).clamp(0, 7)][:, (torch.arange(8) + j).clamp(0, 7)],
            )
        ]
        assert len(offsets) == 1
        found.add(offsets[0])
    assert len(found) == 9  # every direction occurs, and they are independent of each other


def test_the_report_has_what_was_recorded(report: ModuleType) -> None:
    run = report.Run("ours")
    for step, value in ((0, 0.1), (5, 0.98), (10, 0.96)):
        run.record(step, step / 10, value)
    assert run.reached(0.97) == (5, 0.5)
    assert run.reached(0.99) is None
    console = report.console()
    with console.capture() as capture:
        console.print(report.table([run], "title", "accuracy", 0.99))
    assert "not reached" in capture.get() and "96.00%" in capture.get()
