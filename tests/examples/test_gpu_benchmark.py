"""The benchmark for a GPU runs as a small case on a CPU, and its checks see what they should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield gpu
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_one_command_does_all_of_it(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = gpu.main(["--device", "cpu", "--rounds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu.json").read_text()).keys() == report.keys()
    for precision in ("float32", "bfloat16"):
        assert report[precision]["ratios"].keys() == gpu.CONTENDERS.keys()
    for name, kinds in report["float32"]["times"].items():
        expected = {"neither": 1} if name == "NAdamW" else gpu.CONTENDERS[name].kinds
        assert {kind: len(times) for kind, times in kinds.items()} == dict.fromkeys(expected, 1)
    assert max(report["factors"].values()) < 1e-5
    parts = report["parts"]
    assert parts["expand 1/10"]["second backward"] > 0 < parts["expand 1/10"]["inverse"]
    assert "second backward" not in parts["forward-only 1/10"]
    printed = capsys.readouterr().out
    for text in ("2.55", "1.88", "bfloat16", "aten::mm", "values read back"):
        assert text in printed


def test_the_check_sees_a_wrong_factor(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu.Workload.factors

    def factors(self, setting):  # type: ignore[no-untyped-def]
        found = original(self, setting)
        if self.x.dtype == torch.float32:
            A, B = found["blocks.0.mlp.fc1"]
            found["blocks.0.mlp.fc1"] = A * 1.01, B
        return found

    monkeypatch.setattr(gpu.Workload, "factors", factors)
    with pytest.raises(AssertionError, match=r"factors of 'blocks.0.mlp.fc1' differ by 1.0e-02"):
        gpu.check_same(gpu.SMALL, "expand")


def test_says_so_where_there_is_no_gpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch sees no GPU here; --device cpu runs a small model" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_batch_is_the_largest_that_fits(gpu: ModuleType) -> None:
    assert gpu.largest_batch(gpu.Size()) in gpu.FULL_SIZE_BATCHES
