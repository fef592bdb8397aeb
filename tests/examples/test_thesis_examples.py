"""The examples on exactness, Laplace approximations, pruning and continual learning run, and what
they compute is right.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles.autograd import MSE, assert_equal, exact_block
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def is_image(path: Path) -> bool:
    magic = {".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix]
    return path.read_bytes().startswith(magic) and path.stat().st_size > 10_000


# ------------------------------------------------------------------------------------- exactness


def test_the_figures_of_exactness(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = load("exactness_figures").main(["--out", str(tmp_path)])
    for setting, other in (("expand", "reduce"), ("reduce", "expand")):
        assert errors[setting][setting] < 1e-14 and errors[setting][other] > 0.1
    names = ("figure_4_1", "figure_4_2", "section_3_2")
    assert all(
        is_image(tmp_path / f"{name}{suffix}") for name in names for suffix in (".png", ".pdf")
    )
    printed = capsys.readouterr().out
    assert f"{errors['reduce']['expand']:.1e}" in printed and "blocks.2.V" in printed
    assert torch.get_default_dtype() == torch.float32  # as before


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_the_exact_block_of_the_figures_is_exact(load: Load, double: None, setting: str) -> None:
    figures = load("exactness_figures")
    x = torch.randn(3, 2, 4)
    for model in (
        figures.DeepLinear(setting, depth=3, width=4),
        figures.LinearAttention(setting, num_blocks=2),
    ):
        for name, _ in model.named_parameters():
            expected = exact_block(model, name, x, MSE) / len(x)
            assert_equal(figures.exact_block(model, name, x), expected, 1e-12)


def test_a_wrong_error_is_noticed(
    load: Load, double: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The assertions of the example fail where the factors are those of the other strategy."""
    figures = load("exactness_figures")
    right = figures.exact_fisher
    swapped = {"expand": "reduce", "reduce": "expand"}

    def wrong(model: nn.Module, x: Tensor, shared_dim: str, **options: Any) -> None:
        right(model, x, shared_dim=swapped[shared_dim], **options)

    monkeypatch.setattr(figures, "exact_fisher", wrong)
    with pytest.raises(AssertionError):
        figures.attention("expand", 1, 1)
