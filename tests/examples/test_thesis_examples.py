"""The examples on exactness, Laplace approximations, pruning and continual learning and the tour
run, and what they compute is right.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from asdl.symmatrix import Kron
from oracles.autograd import CE, MSE, assert_equal, exact_block, oracle_factors
from torch import Tensor, nn

from asdl_ws_plugin import kronecker

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def need(*packages: str) -> None:
    """Skip the test without them. laplace-torch is not imported here: the examples first see to
    it that torchvision, which it needs, can be.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


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


# --------------------------------------------------------------------------- Laplace approximations


@pytest.mark.parametrize("name", ["laplace_vit", "laplace_gnn"])
def test_the_laplace_examples(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    need("laplace", "rdkit", "torch_geometric")
    scores = load(name).main(["--quick", "--out", str(tmp_path)])
    assert [score.name for score in scores] == ["MAP", "K-FAC-expand", "K-FAC-reduce"]
    plain, expand, reduce = scores
    assert plain.evidence != plain.evidence  # there is none
    assert expand.evidence < 0 and reduce.evidence < 0 and expand.evidence != reduce.evidence
    assert all(0 <= score.ece <= 1 and score.nll > 0 for score in scores)
    assert is_image(tmp_path / f"{name}.png") and is_image(tmp_path / f"{name}.pdf")
    printed = capsys.readouterr().out
    assert f"{reduce.evidence:.1f}" in printed
    assert name == "laplace_gnn" or printed.count("factors as curvlinops'") == 2


def test_scores_of_predictions(load: Load) -> None:
    need("laplace")
    shared = load("_laplace")
    probs = torch.tensor([[0.75, 0.25]] * 4)
    score = shared.evaluate("name", probs, torch.tensor([0, 0, 0, 1]), -1.0)
    assert score.accuracy == 0.75 and score.ece == pytest.approx(0, abs=1e-6)
    assert score.nll == pytest.approx(-float(probs.log().flatten()[[0, 0, 0, 1]].mean()))
    score = shared.evaluate("name", probs, torch.tensor([1, 1, 1, 1]), -1.0)
    assert score.ece == pytest.approx(0.75)
    unsure, sure = torch.tensor([[0.5, 0.5]] * 3), torch.tensor([[0.9, 0.1]] * 3)
    assert shared.out_of_distribution(sure, unsure) == 1
    assert shared.out_of_distribution(unsure, sure) == 0


def test_images_are_rotated(load: Load) -> None:
    need("laplace")
    x = torch.randn(3, 1, 8, 8)
    rotated = load("laplace_vit").rotated
    torch.testing.assert_close(rotated(x, 0), x)
    torch.testing.assert_close(rotated(x, 90), x.rot90(1, (2, 3)))
    torch.testing.assert_close(rotated(x, 180), x.rot90(2, (2, 3)))


def test_rewired_molecules_keep_atoms_and_bonds(load: Load) -> None:
    need("laplace", "rdkit", "torch_geometric")
    example = load("laplace_gnn")
    data = example.load(20)
    for graph in data:
        other = example.rewired(graph, torch.Generator().manual_seed(0))
        assert torch.equal(other.x, graph.x) and torch.equal(other.edge_attr, graph.edge_attr)
        for ends, before in zip(other.edge_index, graph.edge_index, strict=True):
            assert torch.equal(ends.sort().values, before.sort().values)
    assert {graph.label for graph in data} <= set(range(example.CLASSES))


# ----------------------------------------------------------------- pruning and continual learning


def test_pruning(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = load("pruning")
    results = pruning.main(["--quick", "--out", str(tmp_path)])
    magnitude, surgeon = results.values()
    assert len(magnitude) == len(surgeon) == len(pruning.SPARSITIES) + 1
    assert magnitude[0] == surgeon[0] > 0.5
    assert is_image(tmp_path / "pruning.png")
    assert f"{surgeon[-1]:.2%}" in capsys.readouterr().out


def test_the_surgeon_minimizes_the_quadratic(load: Load, double: None) -> None:
    """Against the dense solution: δ_T = F_TT⁻¹ F_TS w_S."""
    pruning = load("pruning")
    a, b = torch.randn(9, 4), torch.randn(9, 3)
    kron, damping, weight = Kron(a.mT @ a / 9, b.mT @ b / 9), 0.1, torch.randn(3, 4)
    matrix = torch.kron(kron.B.contiguous(), kron.A.contiguous()) + damping * torch.eye(12)
    basis = kronecker.decompose(kron)
    diagonal = torch.linalg.inv(matrix).diagonal().view(3, 4)
    torch.testing.assert_close(pruning.inverse_diagonal(basis, damping), diagonal)
    removed = torch.zeros(12, dtype=torch.bool)
    removed[[0, 3, 7, 11]] = True
    expected, flat = torch.zeros(12), weight.flatten()
    moved = torch.linalg.solve(matrix[~removed][:, ~removed], matrix[~removed][:, removed])
    expected[~removed] = flat[~removed] + moved @ flat[removed]
    found = pruning.surgery(weight, removed.view(3, 4), basis, damping)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_as_many_weights_are_removed_as_asked_for(load: Load, sparsity: float) -> None:
    pruning = load("pruning")
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    pruning.by_magnitude(model, torch.empty(0), 0.25)
    small = model[0].weight == 0
    pruning.by_magnitude(model, torch.empty(0), sparsity)
    zeros = sum(int((layer.weight == 0).sum()) for layer in model)
    assert zeros == round(sparsity * (48 + 32)) and bool((model[0].weight[small] == 0).all())


def test_continual_learning(load: Load, tmp_path: Path) -> None:
    options = ["--quick", "--epochs", "4", "--out", str(tmp_path)]
    results = load("continual_learning").main(options)
    none, diagonal, kron = results.values()
    assert none[0] == diagonal[0] == kron[0] > 0.5  # the first task is learned by all alike
    assert kron[1] > none[1]  # and less forgotten
    assert is_image(tmp_path / "continual_learning.png")


@pytest.mark.parametrize("kind", ["kronecker", "diagonal"])
def test_the_penalty_is_the_quadratic_of_the_fisher_matrix(
    load: Load, double: None, kind: str
) -> None:
    example = load("continual_learning")
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)
    penalty = getattr(example, f"{kind}_penalty")(model, x)
    assert float(penalty(model).detach()) == 0
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    moved = {name: (p - start[name]).flatten().detach() for name, p in model.named_parameters()}
    original = copy.deepcopy(model)
    original.load_state_dict(start)
    expected = torch.zeros(())
    for layer in (0, 2):
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        if kind == "diagonal":
            blocks = {n: exact_block(original, n, x, CE).diagonal().diag() for n in (weight, bias)}
        else:
            factors = oracle_factors(original, original[layer], x.unsqueeze(1), "reduce")
            blocks = {weight: factors.block / len(x), bias: factors.B}
        for name, block in blocks.items():
            expected = expected + moved[name] @ block @ moved[name] / len(x) / 2
    assert_equal(penalty(model).detach(), expected)


# ----------------------------------------------------------------------------------- the notebook


def test_the_tour_runs_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    shown: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.get_fignums())))
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "<tour.ipynb>", "exec"), scope)
    pyplot.close("all")
    assert len(shown) == 2
    printed = capsys.readouterr().out
    assert "the setting is reduce" in printed and "K-FAC against the exact block" in printed
