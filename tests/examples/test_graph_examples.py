"""The examples with graphs run, and what they say of their data and of their network is so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.autograd import BCE, assert_equal, assert_factors
from oracles.graph_network import compute
from oracles.graphs import graph_examples, ragged_factors, random_graphs
from torch import nn

from asdl_ws_plugin import WeightSharingLinear

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the examples or benchmarks."""

    def load(folder: str, name: str) -> Any:
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if str(ROOT / "examples") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# ------------------------------------------------------------------------------------ graph network


@pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
def test_the_factors_of_the_graph_network_are_right(load: Any, double: None, shared_dim: str):
    """Ragged K-FAC for the edge and node functions, regular K-FAC for the global one (eq.
    3.32-3.34).
    """
    network = load("examples", "graph_network").GraphNetwork(3, 2, 4, width=5, num_blocks=2)
    graphs = random_graphs([(4, 6), (2, 3), (5, 4), (3, 0)]).permuted()
    compute(network, graphs, shared_dim, shapes=["kron", (nn.LayerNorm, "unit_wise")])
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, WeightSharingLinear)
    }
    assert {module.role for module in layers.values()} == {"node", "edge", "graph"} and len(
        layers
    ) == 10
    other = "reduce" if shared_dim == "expand" else "expand"
    for module in layers.values():
        strategy = (
            other if module.role == "graph" else shared_dim
        )  # either is regular K-FAC where R = 1
        expected = ragged_factors(module, graph_examples(network, graphs), 4, strategy, BCE)
        assert_factors(module, expected, 4)


def test_the_order_of_nodes_and_edges_does_not_matter_to_the_graph_network(load: Any, double: None):
    network = load("examples", "graph_network").GraphNetwork(3, 2, 4, width=5, dropout=0.5).eval()
    graphs = random_graphs([(4, 6), (2, 3), (5, 4)])
    assert_equal(network(*graphs.permuted().arguments), network(*graphs.arguments))
    alone = torch.cat([graph_examples(network, graphs)(n) for n in range(3)])
    assert_equal(network(*graphs.arguments), alone)


# ---------------------------------------------------------------------------------------- molecules


@pytest.mark.slow
def test_the_molecules_are_split_and_have_unknown_labels(load: Any):
    pytest.importorskip("rdkit")
    module = load("examples", "molecule_data")
    data = module.Molecules.load(limit=300, min_positive=2, unknown=0.2)
    parts = [set(part.tolist()) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, parts)) == len(data.graphs) == 300 and set.union(*parts) == set(range(300))
    assert abs(data.y.isnan().float().mean() - 0.2) < 0.03
    assert torch.equal(data.y.nan_to_num(), module.Molecules.load(300, 0.2, 2).y.nan_to_num())
    batch = data.collate(torch.tensor([5, 0]))
    first, second = data.graphs[5], data.graphs[0]
    assert torch.equal(batch.x, torch.cat([first.x, second.x]))
    assert torch.equal(batch.y.nan_to_num(9), data.y[[5, 0]].nan_to_num(9))
    assert torch.equal(
        batch.edge_index, torch.cat([first.edge_index, second.edge_index + len(first.x)], dim=1)
    )
    assert batch.batch.tolist() == [0] * len(first.x) + [1] * len(second.x)
    for graph in data.graphs[:20]:  # every bond both ways, with the same features
        ends, features = graph.edge_index.T.tolist(), graph.edge_attr.tolist()
        forth = {(a, b): tuple(f) for (a, b), f in zip(ends, features, strict=True)}
        assert all(forth[b, a] == of_bond for (a, b), of_bond in forth.items())
        assert len(forth) == len(graph.edge_attr)
    seen = [
        i
        for part in data.batches(data.train, 32, torch.Generator().manual_seed(0))
        for i in part.y.shape[:1]
    ]
    assert seen == [32] * (len(data.train) // 32)


def test_no_scaffold_is_in_two_parts(load: Any):
    split = load("examples", "molecule_data").scaffold_split
    scaffolds = ["a"] * 5 + ["b"] * 3 + ["c", "d", "e", "c", "f"]
    parts = split(scaffolds, (0.6, 0.2))
    assert sorted(i for part in parts for i in part) == list(range(len(scaffolds)))
    names = [{scaffolds[i] for i in part} for part in parts]
    assert (
        "a" in names[0]
        and all(names)
        and not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    )


def test_mean_average_precision_is_the_textbooks(load: Any):
    """Unknown labels, and tasks of which only one class is known, do not count."""
    nan = torch.nan
    y = torch.tensor([[1.0, 1, 0], [0, 1, nan], [nan, 1, 1], [1, nan, 0]])
    scores = torch.tensor([[3.0, 0, 1], [2, 0, 9], [9, 0, 2], [1, 0, 0]])
    value = load("examples", "molecule_data").mean_average_precision(scores, y)
    assert value == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["molecules", "pyg_gin"])
def test_the_molecule_examples_run(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    pytest.importorskip("rdkit")
    if name == "pyg_gin":
        pytest.importorskip("torch_geometric")
    runs = load("examples", name).main(["--quick", "--out", str(tmp_path)])
    assert [run.name for run in runs] == ["NAdamW", "K-FAC-expand", "K-FAC-reduce"]
    assert all(run.steps[-1] == len(run.laps) > 0 and 0 < run.values[-1] <= 1 for run in runs)
    assert len({run.values[0] for run in runs}) == 1 and len({run.values[-1] for run in runs}) == 3
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "K-FAC-reduce" in capsys.readouterr().out


@pytest.mark.slow
def test_the_karate_club_example_runs(load: Any):
    pytest.importorskip("torch_geometric")
    accuracies = load("examples", "karate_club").main(["--seeds", "1", "--steps", "30"])
    assert accuracies["K-FAC (eq. 3.31) and SGD"] > 0.7


@pytest.mark.slow
def test_the_benchmark_of_the_reduction_runs(load: Any):
    before = torch.get_num_threads()
    try:
        ratios = load("benchmarks", "segments").main(
            ["--rows", "1000", "--repeats", "2", "--threads", "1"]
        )
    finally:
        torch.set_num_threads(before)
    assert ratios["one pass"] == 1 and ("torch", "shuffled", "mean") in ratios
