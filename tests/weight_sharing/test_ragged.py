"""Ragged weight sharing: factors of graphs whose numbers of nodes and edges differ (sections 3.3
and 3.4).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import BCE, CE, MSE, assert_equal, assert_factors, covariance, rel_error
from oracles.graph_network import GraphNet, compute, sum_rows
from oracles.graphs import (
    Graphs,
    exact_ragged_block,
    graph_examples,
    ragged_factors,
    random_graphs,
)
from oracles.layers import seen_by
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import Segments, WeightSharingLinear

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
C = 3
SIZES = [(4, 6), (2, 3), (5, 4), (3, 9)]


def check(
    model: nn.Module,
    graphs: Graphs,
    shared_dim: str,
    loss_type: str = BCE,
    truth: Graphs | None = None,
) -> None:
    """Every layer's factors are those of a loop over single graphs."""
    truth = truth or graphs
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = ragged_factors(
                module, graph_examples(model, truth), truth.num_graphs, shared_dim, loss_type
            )
            kron = module.fisher.kron  # type: ignore[union-attr]
            for actual, of in ((kron.A, expected.A), (kron.B, expected.B)):
                if of.norm() == 0:
                    assert not actual.any(), name
                else:
                    assert_equal(actual * truth.num_graphs, of)


@pytest.mark.parametrize("loss_type", [BCE, CE, MSE])
@STRATEGIES
def test_factors_are_those_of_single_graphs(shared_dim: str, loss_type: str):
    model, graphs = GraphNet(), random_graphs(SIZES)
    compute(model, graphs, shared_dim, loss_type=loss_type)
    check(model, graphs, shared_dim, loss_type)


@STRATEGIES
def test_of_the_same_graphs_the_other_approximation_has_other_factors(shared_dim: str):
    """The test above can tell them apart."""
    model, graphs = GraphNet(), random_graphs(SIZES)
    compute(model, graphs, "reduce" if shared_dim == "expand" else "expand")
    for module in (model.edge, model.node):
        expected = ragged_factors(module, graph_examples(model, graphs), 4, shared_dim, BCE)
        assert rel_error(module.fisher.kron.A * 4, expected.A) > 0.1
        assert rel_error(module.fisher.kron.B * 4, expected.B) > 0.1


@STRATEGIES
def test_the_order_of_the_rows_changes_nothing(shared_dim: str):
    model, graphs = GraphNet(), random_graphs(SIZES)
    mixed = graphs.permuted()
    assert (mixed.batch.diff() < 0).any() and (mixed.edge_batch.diff() < 0).any()
    compute(model, mixed, shared_dim)
    check(model, mixed, shared_dim, truth=graphs)


@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 0), (4, 7), (1, 0)],
        [(0, 0), (4, 6), (0, 0), (2, 3), (0, 0)],
        [(2, 0), (3, 0)],
        [(40, 90)],
        [(30, 50), (1, 0), (1, 1)],
    ],
    ids=["edgeless", "empty", "all_edgeless", "one_graph", "one_giant_graph"],
)
@STRATEGIES
def test_graphs_without_rows_and_giant_graphs(shared_dim: str, sizes: list[tuple[int, int]]):
    model, graphs = GraphNet(), random_graphs(sizes)
    compute(model, graphs, shared_dim)
    check(model, graphs, shared_dim)


@STRATEGIES
def test_data_size_divides_both_factors_and_micro_batches_of_equal_mean_size_add_up(
    shared_dim: str,
):
    model = GraphNet()
    parts = random_graphs(SIZES[:2]), random_graphs([(3, 4), (3, 5)])
    joint = random_graphs([*SIZES[:2], (3, 4), (3, 5)])
    joint.x, joint.edge_attr = (
        torch.cat([p.x for p in parts]),
        torch.cat([p.edge_attr for p in parts]),
    )
    joint.edge_index = torch.cat(
        [parts[0].edge_index, parts[1].edge_index + len(parts[0].x)], dim=1
    )
    compute(model, joint, shared_dim, data_size=7)
    expected = [
        (layer.fisher.kron.A, layer.fisher.kron.B) for layer in (model.edge, model.node, model.glob)
    ]
    total: list[Any] = [0, 0, 0]
    for part in parts:
        compute(model, part, shared_dim, data_size=7)
        for i, layer in enumerate((model.edge, model.node, model.glob)):
            total[i] = total[i] + torch.stack(
                [layer.fisher.kron.A.norm(), layer.fisher.kron.B.norm()]
            )
            expected[i] = (
                expected[i][0] - layer.fisher.kron.A,
                expected[i][1] - layer.fisher.kron.B,
            )
    for (A, B), scale in zip(expected, total, strict=True):
        assert A.norm() < 1e-12 * scale[0] and B.norm() < 1e-12 * scale[1]


# ----------------------------------------------------------- the same as the dense path, and shapes


class Rows(nn.Module):
    """Two layers on rows, summed for each example."""

    def __init__(self, num_outputs: int = C, bias: bool = True, linear: bool = False) -> None:
        super().__init__()
        self.first = WeightSharingLinear(3, 4, bias=bias)
        self.second = WeightSharingLinear(4, num_outputs, bias=bias)
        self.activation = nn.Identity() if linear else nn.Tanh()

    def forward(self, x: Tensor, index: Tensor, num_examples: int) -> Tensor:
        return sum_rows(self.second(self.activation(self.first(x))), index, num_examples)


class Dense(Rows):
    """The same on ``(N, R, P)``, with the same arithmetic for the sum."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.second(self.activation(self.first(x)))
        index = torch.arange(len(x)).repeat_interleave(x.shape[1])
        return sum_rows(y.flatten(0, 1), index, len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", ["kron", "layer_wise", "unit_wise", "diag"])
@STRATEGIES
def test_with_equally_many_rows_the_factors_are_those_of_the_dense_path_to_the_last_bit(
    shared_dim: str, shapes: str, dtype: torch.dtype
):
    ragged, x, index = (
        Rows().to(dtype),
        torch.randn(4, 6, 3, dtype=dtype),
        torch.arange(4).repeat_interleave(6),
    )
    dense = Dense().to(dtype)
    dense.load_state_dict(ragged.state_dict())
    config = FisherConfig("fisher_exact", [shapes], BCE, data_size=4, shared_dim=shared_dim)
    maker = get_fisher_maker(dense, config)
    maker.setup_model_call(dense, x)
    maker.forward_and_backward()
    maker = get_fisher_maker(ragged, config)
    maker.setup_model_call(ragged, x.flatten(0, 1), index, 4)
    with asdl_ws_plugin.segments(ragged, node=index):
        maker.forward_and_backward()
    for a, b in ((ragged.first, dense.first), (ragged.second, dense.second)):
        for one, other in zip(matrices(a.fisher), matrices(b.fisher), strict=True):
            assert torch.equal(one, other)


def matrices(fisher: Any) -> list[Tensor]:
    found = [fisher.data]
    for part, names in (("kron", ("A", "B")), ("unit", ("data",)), ("diag", ("weight", "bias"))):
        found += [
            getattr(getattr(fisher, part), name)
            for name in names
            if getattr(fisher, part) is not None
        ]
    found = [matrix for matrix in found if matrix is not None]
    assert found
    return found


@pytest.mark.parametrize("shapes", ["layer_wise", "unit_wise", "diag", "full"])
@STRATEGIES
def test_the_other_shapes_are_made_of_the_graphs_gradients(shared_dim: str, shapes: str):
    """Empirical: ``1/D Σ_n g_n g_nᵀ``, where a graph's gradient is the sum over its rows."""
    model, graphs = GraphNet(norm=True), random_graphs(SIZES).permuted()
    target = torch.rand(4, C)

    def total(logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, y, reduction="sum")

    compute(model, graphs, shared_dim, (total, target), shapes, fisher_type="fisher_emp")
    parameters = dict(model.named_parameters())
    grads = []
    for n in range(4):
        loss = total(graph_examples(model, graphs)(n), target[n : n + 1])
        grads.append(torch.autograd.grad(loss, list(parameters.values())))
    if shapes == "full":
        order = [
            f"{name}.{kind}"
            for name, m in model.named_modules()
            if list(m.parameters(recurse=False))
            for kind in ("weight", "bias")
        ]
        by_name = [dict(zip(parameters, g, strict=True)) for g in grads]
        rows = torch.stack([torch.cat([g[name].flatten() for name in order]) for g in by_name])
        assert_equal(model.fisher.data, rows.T @ rows / 4)  # type: ignore[union-attr]
        return
    for name in ("edge", "node", "norm", "glob", "head"):
        i = list(parameters).index(f"{name}.weight")
        weight, bias = torch.stack([g[i] for g in grads]), torch.stack([g[i + 1] for g in grads])
        fisher: Any = model.get_submodule(name).fisher
        if shapes == "layer_wise":
            flat = torch.cat([weight.flatten(1), bias], dim=1)
            assert_equal(fisher.data, flat.T @ flat / 4)
        elif shapes == "unit_wise":
            weight = weight.unsqueeze(-1) if weight.ndim == 2 else weight
            unit = torch.cat([weight, bias.unsqueeze(-1)], dim=-1)
            assert_equal(fisher.unit.data, torch.einsum("nui,nuj->uij", unit, unit) / 4)
        else:
            assert_equal(fisher.diag.weight, weight.square().sum(0) / 4)
            assert_equal(fisher.diag.bias, bias.square().sum(0) / 4)


@STRATEGIES
def test_layer_norm_and_batch_norm_on_rows(shared_dim: str):
    """A layer norm's block is exact; a batch norm's statistics are those of all rows."""

    class Normed(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor, index: Tensor, num_examples: int) -> Tensor:
            y = torch.tanh(self.norm(self.first(x)))
            return sum_rows(self.second(y), index, num_examples)

    model, x, index = Normed(), torch.randn(9, 3), torch.tensor([0, 0, 2, 1, 1, 1, 0, 2, 1])
    model(x, index, 3)  # running averages
    model.eval()
    maker = get_fisher_maker(
        model, FisherConfig("fisher_exact", ["unit_wise"], BCE, data_size=3, shared_dim=shared_dim)
    )
    maker.setup_model_call(model, x, index, 3)
    with asdl_ws_plugin.segments(model, node=index):
        maker.forward_and_backward()
    blocks = exact_ragged_block(
        model,
        "norm.weight",
        lambda n: model(x[index == n], torch.zeros(int((index == n).sum()), dtype=int), 1),
        3,
        BCE,
    )
    assert_equal(model.norm.fisher.unit.data[:, 0, 0], blocks.diagonal() / 3)


@STRATEGIES
def test_further_weight_sharing_dimensions_of_each_row(shared_dim: str):
    """Rows ``(ΣR_n, K, P)``: K positions in each row."""

    class Deep(Rows):
        def forward(self, x: Tensor, index: Tensor, num_examples: int) -> Tensor:
            y = self.second(torch.tanh(self.first(x))).sum(1)
            return sum_rows(y, index, num_examples)

    model, x, index = Deep(), torch.randn(7, 2, 3), torch.tensor([1, 0, 0, 1, 2, 1, 1])
    graphs = Graphs(x, torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 1), index, 3)
    config = FisherConfig("fisher_exact", ["kron"], CE, data_size=3, shared_dim=shared_dim)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, x, index, 3)
    with asdl_ws_plugin.segments(model, node=graphs.batch):
        maker.forward_and_backward()
    for layer in (model.first, model.second):
        expected = ragged_factors(
            layer,
            lambda n: model(x[index == n], torch.zeros(int((index == n).sum()), dtype=int), 1),
            3,
            shared_dim,
            CE,
        )
        assert_factors(layer, expected, 3)


@STRATEGIES
def test_a_layer_that_sees_nodes_and_edges(shared_dim: str):
    """Its calls are further positions of a graph."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(3, 4), nn.Linear(4, C)

        def forward(
            self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
        ) -> Tensor:
            nodes, edges = torch.tanh(self.shared(x)), torch.tanh(self.shared(edge_attr))
            return self.head(
                sum_rows(nodes, batch, num_graphs)
                + sum_rows(edges, batch[edge_index[0]], num_graphs)
            )

    model, graphs = Shared(), random_graphs(SIZES, edge_features=3)
    compute(model, graphs, shared_dim)
    check(model, graphs, shared_dim)


@STRATEGIES
def test_a_loss_term_for_every_node(shared_dim: str):
    """Node classification of several graphs, the expand setting: products of different terms do not
    count.
    """

    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(3, 4), nn.Linear(4, C)

        def forward(
            self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
        ) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.out(torch.tanh(h + sum_rows(h[edge_index[0]], edge_index[1], len(x))))

    model, graphs = Nodes(), random_graphs(SIZES).permuted()
    compute(model, graphs, shared_dim, loss_type=MSE)
    for layer in (model.first, model.out):
        _, jacobians = seen_by(layer, lambda n: model(*graphs.single(n).arguments), 4)
        b = [j.sum(1, keepdim=True) if shared_dim == "reduce" else j for j in jacobians]
        B = sum(torch.einsum("crp,crq->pq", j, j) for j in b)
        assert_equal(layer.fisher.kron.B * 4, B)
    assert maker_setting(model, graphs) == "expand"


@pytest.mark.parametrize(
    "sizes", [[(1, 3), (3, 1)], [(3, 1), (1, 3)], [(0, 0), (4, 2), (0, 0), (1, 3), (0, 0)]]
)
@STRATEGIES
def test_a_loss_term_for_every_node_of_graphs_with_as_many_edges_or_graphs(
    shared_dim: str, sizes: list[Any]
):
    """Logits whose number of rows fits several roles are those of the role that they depend on."""

    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge, self.node = (
                WeightSharingLinear(2, 4, role="edge"),
                WeightSharingLinear(3, 4, role="node"),
            )
            self.out = WeightSharingLinear(4, C, role="node")

        def forward(
            self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
        ) -> Tensor:
            received = sum_rows(torch.tanh(self.edge(edge_attr)), edge_index[1], len(x))
            h = torch.tanh(self.node(x) + received)
            return self.out(h + sum_rows(h, batch, num_graphs)[batch])

    model, graphs = Nodes(), random_graphs(sizes).permuted()
    roles = {"edge": graphs.edge_batch, "node": graphs.batch}
    compute(model, graphs, shared_dim, roles=roles, loss_type=MSE)
    filled = [n for n, (nodes, _) in enumerate(sizes) if nodes]
    for layer in (model.edge, model.node, model.out):
        _, jacobians = seen_by(
            layer, lambda i: model(*graphs.single(filled[i]).arguments), len(filled)
        )
        b = [j.sum(1, keepdim=True) if shared_dim == "reduce" else j for j in jacobians]
        B = sum(torch.einsum("crp,crq->pq", j, j) for j in b)
        assert_equal(layer.fisher.kron.B * len(sizes), B)


@pytest.mark.parametrize("ragged", [False, True])
def test_several_terms_in_one_row_of_the_logits_are_refused_by_fisher_exact(ragged: bool):
    """They are one example's, and back-propagating them at once would keep products of them."""
    model, x, target = (
        nn.Sequential(nn.Linear(4, 2 * C)),
        torch.randn(5, 4),
        torch.randint(C, (5, 2)),
    )
    maker = get_fisher_maker(
        model, FisherConfig("fisher_exact", ["kron"], loss_type=CE, shared_dim="reduce")
    )
    logits = maker.setup_model_call(model, x)
    maker.setup_loss_call(lambda y: F.cross_entropy(y.view(-1, C), target.flatten()), logits)
    rows = (
        asdl_ws_plugin.segments(model, node=torch.arange(5)) if ragged else contextlib.nullcontext()
    )
    with (
        rows,
        pytest.raises(ValueError, match=r"rows of the model's logits, \(5, 6\); .* \(10, 3\)"),
    ):
        maker.forward_and_backward()


def maker_setting(model: nn.Module, graphs: Graphs) -> str:
    rows = len(model(*graphs.arguments))
    maker = compute(model, graphs, "auto", (F.mse_loss, torch.zeros(rows, C)), loss_type=MSE)
    return maker.plan.setting


def test_auto_decides_on_reduce_for_graph_classification():
    assert maker_setting(GraphNet(), random_graphs(SIZES)) == "reduce"


# --------------------------------------------------------------------------- exactness, ragged sums


class DeepLinear(nn.Module):
    """Linear layers on rows and a sum, or a mean, over those of each example."""

    def __init__(self, depth: int, bias: bool, mean: bool = False) -> None:
        super().__init__()
        sizes = [*[3, 4, 5][:depth], C]
        self.layers = nn.Sequential(*(nn.Linear(a, b, bias) for a, b in itertools.pairwise(sizes)))
        self.mean = mean

    def forward(self, x: Tensor, index: Tensor, num_examples: int) -> Tensor:
        y = sum_rows(self.layers(x), index, num_examples)
        return y / torch.bincount(index, minlength=num_examples).unsqueeze(1) if self.mean else y

    def example(self, x: Tensor, index: Tensor, n: int) -> Tensor:
        return self(x[index == n], torch.zeros(int((index == n).sum()), dtype=torch.long), 1)

    def kfac(
        self, x: Tensor, index: Tensor, num_examples: int, shared_dim: str, var: Tensor
    ) -> list[Tensor]:
        """``kron(B, A)`` of every layer, of the sum over the examples."""
        config = FisherConfig(
            "fisher_exact", ["kron"], MSE, data_size=num_examples, var=var, shared_dim=shared_dim
        )
        maker = get_fisher_maker(self, config)
        maker.setup_model_call(self, x, index, num_examples)
        with asdl_ws_plugin.segments(self, node=index):
            maker.forward_and_backward()
        return [
            torch.kron(layer.fisher.kron.B, layer.fisher.kron.A) * num_examples
            for layer in self.layers
        ]


EXACTNESS = pytest.mark.parametrize(
    ("depth", "bias"), [(1, True), (1, False), (3, True), (3, False)]
)
RAGGED_INDEX = [0, 0, 1, 1, 1, 0, 2, 2, 1, 2, 1, 1, 1]
EQUAL_INDEX = [0, 2, 1, 1, 2, 0, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("index", "mean"),
    [(RAGGED_INDEX, True), (EQUAL_INDEX, False), ([0] * 9, False)],
    ids=["ragged_mean", "sum_of_equally_many", "sum_of_one_example"],
)
@EXACTNESS
def test_propositions_3_5_and_3_6_under_scatter(
    depth: int, bias: bool, index: list[int], mean: bool
):
    """K-FAC-reduce is the exact block of every layer, K-FAC-expand is not."""
    model, x, var, rows = (
        DeepLinear(depth, bias, mean),
        torch.randn(len(index), 3),
        covariance(C),
        torch.tensor(index),
    )
    n = max(index) + 1
    for i, (reduce, expand) in enumerate(
        zip(
            model.kfac(x, rows, n, "reduce", var),
            model.kfac(x, rows, n, "expand", var),
            strict=True,
        )
    ):
        block = exact_ragged_block(
            model, f"layers.{i}.weight", lambda k: model.example(x, rows, k), n, MSE, var
        )
        assert rel_error(reduce, block) < 1e-10
        assert rel_error(expand, block) > 1e-2


@EXACTNESS
def test_with_ragged_sums_the_reduction_is_exact_for_each_example(depth: int, bias: bool):
    """Eq. 3.20 needs the same Jacobian at each row, and a sum has it: an example's own K-FAC-reduce
    is its exact block.

    Eq. 3.21 needs ``b̂ Λ b̂ᵀ`` of all examples to be the same. It grows with R_n² for a sum, so
    K-FAC's average of A over the examples is not exact unless they have equally many rows.
    """
    model, x, var, rows = (
        DeepLinear(depth, bias),
        torch.randn(13, 3),
        covariance(C),
        torch.tensor(RAGGED_INDEX),
    )
    own = [x[rows == n] for n in range(3)]
    blocks = [
        model.kfac(part, torch.zeros(len(part), dtype=torch.long), 1, "reduce", var) for part in own
    ]
    separately = [sum(of_layer) for of_layer in zip(*blocks, strict=True)]
    jointly = model.kfac(x, rows, 3, "reduce", var)
    for i, (each, joint) in enumerate(zip(separately, jointly, strict=True)):
        block = exact_ragged_block(
            model, f"layers.{i}.weight", lambda n: model.example(x, rows, n), 3, MSE, var
        )
        assert rel_error(each, block) < 1e-10
        assert rel_error(joint, block) > 1e-2


# ----------------------------------------------------------------------------------------- backends


NEEDS_SCATTER = pytest.mark.skipif(
    importlib.util.find_spec("torch_scatter") is None,
    reason="torch_scatter (extra 'scatter') is not installed",
)


@NEEDS_SCATTER
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@STRATEGIES
def test_both_backends_give_the_same_factors(shared_dim: str, order: str):
    model, graphs = GraphNet(), random_graphs([(4, 6), (0, 0), (5, 4), (3, 0)])
    graphs = graphs if order == "sorted" else graphs.permuted()
    assert asdl_ws_plugin.set_backend("torch_scatter") == "torch"
    try:
        compute(model, graphs, shared_dim)
    finally:
        assert asdl_ws_plugin.set_backend("torch") == "torch_scatter"
    check(model, graphs, shared_dim)


def test_a_backend_that_is_unknown_or_not_installed(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="'torch', 'torch_scatter'"):
        asdl_ws_plugin.set_backend("numpy")
    monkeypatch.setitem(__import__("sys").modules, "torch_scatter", None)
    with pytest.raises(ImportError, match=r"asdl-ws-plugin\[scatter\]"):
        asdl_ws_plugin.set_backend("torch_scatter")
    assert asdl_ws_plugin.set_backend("torch") == "torch"


# ------------------------------------------------------------------------------------ the data type


def test_index_and_ptr_are_the_same():
    ptr = torch.tensor([0, 2, 2, 5])
    by_ptr, by_index = Segments(ptr=ptr), Segments(torch.tensor([0, 0, 2, 2, 2]), num_examples=3)
    assert by_ptr.equals(by_index) and by_ptr.counts().tolist() == [2, 0, 3]


@pytest.mark.parametrize("mask", [False, True])
def test_sums_means_and_padded_rows_against_a_loop(mask: bool):
    index, x = torch.randint(5, (20,)), torch.randn(20, 3)
    index[index == 2] = 3  # an example without rows
    kept = torch.rand(20) < 0.6 if mask else torch.ones(20, dtype=torch.bool)
    rows = Segments(index, num_examples=6, mask=kept if mask else None)
    if mask:
        x[~kept] = torch.nan  # what is left out may be anything
    parts = [x[(index == n) & kept] for n in range(6)]
    assert_equal(rows.sum(x), torch.stack([part.sum(0) for part in parts]))
    means = [part.mean(0) if len(part) else torch.zeros(3) for part in parts]
    assert_equal(rows.mean(x), torch.stack(means))
    padded = rows.pad(x)
    assert padded.shape == (6, max(map(len, parts)), 3)
    for n, part in enumerate(parts):
        assert torch.equal(padded[n, : len(part)], part) and not padded[n, len(part) :].any()
    assert rows.counts().tolist() == [len(part) for part in parts] and rows.num_positions == sum(
        map(len, parts)
    )
    assert torch.equal(rows.rows(x), x[kept])


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("mask", [False, True])
def test_in_single_precision_on_a_cpu(order: str, mask: bool):
    """Which is summed by another function, in the order of the examples."""
    index, x = torch.randint(50, (2000,)), torch.randn(2000, 16)
    index = index.sort().values if order == "sorted" else index
    kept = torch.rand(2000) < 0.8
    expected = torch.stack([x[(index == n) & (kept | (not mask))].sum(0) for n in range(52)])
    if mask:
        x[~kept] = torch.nan
    rows = Segments(
        index, num_examples=52, mask=kept if mask else None
    )  # the last two have no rows
    total = rows.sum(x.float())
    assert total.dtype == torch.float32 and not total[50:].any()
    assert_equal(total.double(), expected, 1e-6)


def test_half_precision_is_summed_in_single():
    rows, x = (
        Segments(torch.zeros(4096, dtype=torch.long)),
        torch.ones(4096, 1, dtype=torch.bfloat16),
    )
    assert rows.sum(x).item() == 4096 and rows.mean(x).item() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "either index or ptr"),
        (
            {"index": torch.zeros(2, dtype=torch.long), "ptr": torch.tensor([0, 2])},
            TypeError,
            "either index or ptr",
        ),
        ({"index": torch.zeros(3)}, TypeError, "integers"),
        ({"index": [0, 1]}, TypeError, "integers, got list"),
        ({"index": torch.zeros(3, dtype=torch.bool)}, TypeError, "integers"),
        ({"index": torch.zeros(3, 1, dtype=torch.long)}, ValueError, "one dimension"),
        ({"index": torch.tensor([0, -1])}, ValueError, "negative entry -1"),
        (
            {"index": torch.tensor([0, 3]), "num_examples": 3},
            ValueError,
            "entry 3, but there are 3",
        ),
        (
            {"index": torch.tensor([0, 1]), "mask": torch.tensor([True])},
            ValueError,
            "mask has sizes",
        ),
        ({"index": torch.tensor([0, 1]), "mask": torch.tensor([1, 0])}, TypeError, "booleans"),
        ({"index": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "meta"),
        ({"ptr": torch.tensor([0.0, 1.0])}, TypeError, "integers"),
        ({"ptr": torch.tensor([1, 2])}, ValueError, "begin with 0"),
        ({"ptr": torch.tensor([0, 2, 1])}, ValueError, "must not decrease"),
        ({"ptr": torch.tensor([0])}, ValueError, "num_examples"),
        (
            {"ptr": torch.tensor([0, 1]), "num_examples": 2},
            ValueError,
            "for 1 examples, but num_examples is 2",
        ),
    ],
)
def test_segments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        Segments(**arguments)


def test_a_weight_sharing_linear_is_a_linear_layer():
    layer, linear = (
        WeightSharingLinear(3, 4, bias=False, dtype=torch.float32, role="edge"),
        nn.Linear(3, 4, bias=False),
    )
    assert (
        layer.state_dict().keys() == linear.state_dict().keys()
        and layer.weight.dtype == torch.float32
    )
    layer = WeightSharingLinear(3, 4)
    linear = nn.Linear(3, 4)
    linear.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), linear(x))
    assert "role" not in repr(layer) and "role='edge'" in repr(
        WeightSharingLinear(3, 4, role="edge")
    )
