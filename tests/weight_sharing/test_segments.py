"""Segments: given once for a batch, read from the model's own inputs, alive no longer than the
step.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import BCE, assert_equal, assert_factors
from oracles.graph_network import GraphNet, sum_rows
from oracles.graphs import Graphs, graph_examples, ragged_factors, random_graphs
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import Segments, WeightSharingLinear, attach_segments, segments

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
SIZES = [(4, 6), (2, 3), (5, 5), (3, 9)]


def make_maker(model: nn.Module, shared_dim: str = "reduce", **config: Any) -> Any:
    options = {"fisher_type": "fisher_exact", "loss_type": BCE, "data_size": 1, **config}
    return get_fisher_maker(
        model, FisherConfig(fisher_shapes=["kron"], shared_dim=shared_dim, **options)
    )


def assert_factors_of_graphs(
    model: nn.Module, truth: Graphs, shared_dim: str, net: nn.Module | None = None
) -> None:
    net = net or model
    for _, module in net.named_modules():
        if isinstance(module, nn.Linear):
            expected = ragged_factors(
                module, graph_examples(net, truth), truth.num_graphs, shared_dim, BCE
            )
            assert_factors(module, expected)


# -------------------------------------------------------------------------------------- the context


@STRATEGIES
def test_ptr_and_segments_instead_of_an_index(shared_dim: str):
    model, graphs = GraphNet(), random_graphs(SIZES)
    node_ptr = torch.tensor([0, *(nodes for nodes, _ in SIZES)]).cumsum(0)
    edge_ptr = torch.tensor([0, *(edges for _, edges in SIZES)]).cumsum(0)
    maker = make_maker(model, shared_dim)
    maker.setup_model_call(model, *graphs.arguments)
    with segments(model, node=Segments(ptr=node_ptr), edge=Segments(ptr=edge_ptr)):
        maker.forward_and_backward()
    assert_factors_of_graphs(model, graphs, shared_dim)


@STRATEGIES
def test_the_last_graphs_without_rows_are_seen_from_the_logits(shared_dim: str):
    """Where the number of graphs is not given, the largest index is not the last graph."""
    model, graphs = GraphNet(), random_graphs([(4, 6), (2, 3), (0, 0), (0, 0)])
    maker = make_maker(model, shared_dim)
    maker.setup_model_call(model, *graphs.arguments)
    with segments(model, node=graphs.batch, edge=graphs.edge_batch):
        maker.forward_and_backward()
    assert_factors_of_graphs(model, graphs, shared_dim)


def test_a_context_restores_what_was_there_before():
    model = GraphNet()
    one, two = torch.tensor([0, 1]), torch.tensor([0, 0])
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with segments(model, node=one):
        said = asdl_ws_plugin.weight_sharing.positions.positions_of(model.edge)
        with pytest.raises(KeyboardInterrupt), segments(model, node=two):
            assert asdl_ws_plugin.weight_sharing.positions.positions_of(model.edge) is not said
            raise KeyboardInterrupt
        assert asdl_ws_plugin.weight_sharing.positions.positions_of(model.edge) is said
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == state


def test_a_model_can_be_copied_and_pickled_inside_of_the_context():
    model, index = GraphNet(), torch.tensor([0, 1])
    with segments(model, node=index):
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert model.state_dict().keys() == GraphNet().state_dict().keys()
    assert torch.equal(copied.edge.weight, loaded.edge.weight)


def test_the_index_is_freed_with_the_context():
    model, graphs = GraphNet(), random_graphs(SIZES)
    gm = asdl.KfacGradientMaker(
        model,
        asdl.PreconditioningConfig(data_size=4, damping=0.1, ema_decay=1.0),
        loss_type=BCE,
        shared_dim="reduce",
    )
    gm.setup_loss_call(
        F.binary_cross_entropy_with_logits,
        gm.setup_model_call(model, *graphs.arguments),
        torch.zeros(4, 3),
    )
    index = graphs.edge_batch.clone()
    alive = weakref.ref(index)
    with segments(model, node=graphs.batch, edge=index):
        gm.forward_and_backward()
    del index
    gc.collect()
    assert alive() is None


# --------------------------------------------------------------------------- a layer's own segments


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = WeightSharingLinear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, index: Tensor, num_examples: int) -> Tensor:
        return self.head(sum_rows(torch.tanh(self.layer(x)), index, num_examples))


@STRATEGIES
@pytest.mark.parametrize("by", ["index", "ptr", "mask"])
def test_segments_of_one_layer(shared_dim: str, by: str):
    model, x, index = Rows(), torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    keep = torch.ones(6, dtype=torch.bool)
    maker = make_maker(model, shared_dim)
    maker.setup_model_call(model, x, index, 3)
    if by == "ptr":
        model.layer.set_segments(ptr=torch.tensor([0, 3, 4, 6]))
    elif by == "mask":
        keep[1] = False
        x[1] = 0  # a bias is all that the row contributes
        model.layer.set_segments(index, num_examples=3, mask=keep)
    else:
        model.layer.set_segments(index, num_examples=3)
    maker.forward_and_backward()
    rows = [x[(index == n) & keep] for n in range(3)]
    if shared_dim == "reduce":
        A = sum(part.mean(0).outer(part.mean(0)) for part in rows)
    else:
        A = sum(part.T @ part for part in rows) * 3 / int(keep.sum())
    assert_equal(model.layer.fisher.kron.A, A)


def test_they_are_used_up_by_the_next_step_whatever_it_is_and_however_it_ends():
    """So those of the last batch are never taken for this one's, though it has as many rows."""
    model, x, index = Rows(), torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    config = asdl.PreconditioningConfig(
        data_size=3, damping=0.1, ema_decay=1.0, curvature_upd_interval=2
    )
    gm = asdl.KfacGradientMaker(model, config, loss_type=BCE, shared_dim="reduce")
    target = torch.zeros(3, 3)

    def step() -> None:
        gm.setup_loss_call(
            F.binary_cross_entropy_with_logits, gm.setup_model_call(model, x, index, 3), target
        )
        gm.forward_and_backward()

    model.layer.set_segments(index)
    step()
    model.layer.set_segments(index)
    step()  # without curvature
    with pytest.raises(
        ValueError, match=r"'layer'.*it is not known which example each of its 6 rows belongs to"
    ):
        step()
    model.layer.set_segments(index)
    target = torch.full((3, 3), torch.nan)
    with pytest.raises(FloatingPointError):
        step()
    target = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="'layer'"):
        step()
    model.layer.set_segments(index)
    model.layer.clear_segments()
    with pytest.raises(ValueError, match="'layer'"):
        step()
    model.layer.set_segments(index)
    step()
    assert model.layer.weight.grad.isfinite().all()
    assert model.layer.__dict__.keys() == WeightSharingLinear(3, 4).__dict__.keys() | {"fisher"}


# ----------------------------------------------------------------------- from the model's own input


class FromData(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data: Any) -> Tensor:
        batch = data.batch if data.batch is not None else torch.zeros(len(data.x), dtype=torch.long)
        num_graphs = getattr(data, "num_graphs", None) or 1
        return self.net(data.x, data.edge_index, data.edge_attr, batch, num_graphs)


@pytest.mark.parametrize("how", ["batch", "data", "arguments", "keywords"])
@STRATEGIES
def test_segments_are_read_off_the_batches_of_pyg(shared_dim: str, how: str):
    """A ``Batch``, a single ``Data``, or the customary arguments; the last graph has no edges."""
    pyg = pytest.importorskip("torch_geometric.data")
    graphs = random_graphs([(11, 20)] if how == "data" else [(4, 6), (2, 3), (5, 6), (1, 0)])
    singles = [graphs.single(n) for n in range(graphs.num_graphs)]
    items = [pyg.Data(x=g.x, edge_index=g.edge_index, edge_attr=g.edge_attr) for g in singles]
    net = GraphNet()
    model = FromData(net) if how in ("batch", "data") else net
    handle = attach_segments(model, "pyg")
    maker = make_maker(model, shared_dim)
    if how == "batch":
        maker.setup_model_call(model, pyg.Batch.from_data_list(items))
    elif how == "data":
        maker.setup_model_call(model, items[0])
    elif how == "arguments":
        maker.setup_model_call(model, *graphs.arguments)
    else:
        names = ("x", "edge_index", "edge_attr", "batch", "num_graphs")
        maker.setup_model_call(model, **dict(zip(names, graphs.arguments, strict=True)))
    maker.forward_and_backward()
    assert_factors_of_graphs(model, graphs, shared_dim, net)
    handle.remove()
    if graphs.num_graphs > 1:  # any number of rows is that of one graph
        with pytest.raises(ValueError, match="Layer '"):
            maker.forward_and_backward()


class Jraph(nn.Module):
    """Called as jraph batches graphs: sizes, senders and receivers, and padding at the end."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, graph: Any) -> Tensor:
        batch = torch.arange(len(graph.n_node)).repeat_interleave(graph.n_node)
        edge_index = torch.stack([graph.senders, graph.receivers])
        return self.net(graph.nodes, edge_index, graph.edges, batch, len(graph.n_node))


def padded_with(
    graphs: Graphs, sizes: list[tuple[int, int]], num_padding: int, fill: float = 1e3
) -> Any:
    """As ``jraph.pad_with_graphs``: the first padding graph owns all padding nodes and edges, the
    others are empty.
    """
    nodes, edges = 3, 4
    n_node = torch.tensor([n for n, _ in sizes] + [nodes] + [0] * (num_padding - 1))
    n_edge = torch.tensor([m for _, m in sizes] + [edges] + [0] * (num_padding - 1))
    first = len(graphs.x)
    return SimpleNamespace(
        n_node=n_node,
        n_edge=n_edge,
        nodes=torch.cat([graphs.x, torch.full((nodes, 3), fill)]),
        edges=torch.cat([graphs.edge_attr, torch.full((edges, 2), fill)]),
        senders=torch.cat([graphs.edge_index[0], torch.full((edges,), first)]),
        receivers=torch.cat([graphs.edge_index[1], torch.full((edges,), first)]),
    )


@pytest.mark.parametrize("loss", ["where", "weight", "no_loss"])
@pytest.mark.parametrize("num_padding", [1, 3])
@STRATEGIES
def test_from_jraph_with_padding_graphs(shared_dim: str, num_padding: int, loss: str):
    """Nothing of the padding is in A or B, N counts the real graphs, and the padding's logits do
    not mislead 'auto'.
    """
    sizes = [(4, 6), (0, 0), (2, 3), (5, 7)]
    net, graphs = GraphNet(), random_graphs(sizes)
    model = Jraph(net)
    attach_segments(model, "jraph")
    maker = make_maker(model, shared_dim)
    logits = maker.setup_model_call(model, padded_with(graphs, sizes, num_padding))
    real, target = torch.arange(4 + num_padding) < 4, torch.rand(4 + num_padding, 3)
    if loss == "where":

        def summed(y: Tensor) -> Tensor:
            terms = F.binary_cross_entropy_with_logits(y, target, reduction="none")
            return torch.where(real[:, None], terms, 0).sum()

        maker.setup_loss_call(summed, logits)
    elif loss == "weight":
        maker.setup_loss_call(
            lambda y: F.binary_cross_entropy_with_logits(
                y, target, weight=real[:, None].double().expand_as(y), reduction="sum"
            ),
            logits,
        )
    maker.forward_and_backward()
    if loss == "no_loss":  # all logits count, then; but the padding's rows do not
        expected = ragged_factors(net.edge, graph_examples(net, graphs), 4, shared_dim, BCE)
        assert_factors(net.edge, expected)
        return
    assert_factors_of_graphs(model, graphs, shared_dim, net)
    auto = make_maker(model, "auto")
    auto.setup_loss_call(
        lambda y: F.binary_cross_entropy_with_logits(y, target),
        auto.setup_model_call(model, padded_with(graphs, sizes, num_padding)),
    )
    auto.forward_and_backward()
    assert auto.plan.setting == "reduce"


def test_without_a_data_size_padding_graphs_are_not_counted():
    sizes = [(4, 6), (2, 3), (5, 7)]
    net, graphs = GraphNet(), random_graphs(sizes)
    model = Jraph(net)
    attach_segments(model, "jraph")
    maker = make_maker(model, data_size=-1)
    real, target = (torch.arange(5) < 3).double()[:, None], torch.rand(5, 3)

    def mean_of_real(y: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(y, target, reduction="none") * real
        return terms.sum() / (real.sum() * 3)

    maker.setup_loss_call(
        mean_of_real, maker.setup_model_call(model, padded_with(graphs, sizes, 2))
    )
    maker.forward_and_backward()
    expected = ragged_factors(net.edge, graph_examples(net, graphs), 3, "reduce", BCE)
    # The loss is a mean over the three elements of each graph.
    assert_factors(net.edge, (expected.A, expected.B / 3), 3)


@STRATEGIES
def test_from_a_function_of_the_models_arguments(shared_dim: str):
    model, graphs = GraphNet(), random_graphs(SIZES)
    alive: list[Any] = []

    def source(
        x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int
    ) -> dict[str, Any]:
        said = {"node": batch.clone(), "edge": batch[edge_index[0]]}
        alive.extend(weakref.ref(index) for index in said.values())
        return {"num_examples": num_graphs, **said}

    attach_segments(model, source)
    maker = make_maker(model, shared_dim)
    model(*graphs.arguments)
    assert not alive, "nobody computes curvature"
    maker.setup_model_call(model, *graphs.arguments)
    maker.forward_and_backward()
    assert_factors_of_graphs(model, graphs, shared_dim)
    gc.collect()
    assert len(alive) == 2 and not any(index() is not None for index in alive)


def test_a_model_that_is_called_for_two_batches_of_graphs_in_one_step():
    """A pair of graphs: each call's rows are a role of their own, or the segments contradict each
    other.
    """

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Rows(), nn.Linear(6, 3)

        def forward(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
            return self.head(torch.cat([self.encoder(*a, 3), self.encoder(*b, 3)], dim=1))

    model = Pair()
    a = torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 2, 2])
    b = torch.randn(4, 3), torch.tensor([2, 0, 0, 1])
    maker = make_maker(model)
    maker.setup_model_call(model, a, b)
    inner = attach_segments(
        model.encoder, lambda x, index, num: {"node": index, "num_examples": num}
    )
    with pytest.raises(
        ValueError, match=r"Rows were given twice|WeightSharingLinear were given twice"
    ):
        maker.forward_and_backward()
    inner.remove()
    attach_segments(model, lambda a, b: {"first": a[1], "second": b[1]})
    maker.forward_and_backward()
    rows = [torch.cat([a[0][a[1] == n], b[0][b[1] == n]]).mean(0) for n in range(3)]
    assert_equal(model.encoder.layer.fisher.kron.A, sum(row.outer(row) for row in rows))


def test_sources_that_do_not_fit():
    model, graphs = GraphNet(), random_graphs(SIZES)
    with pytest.raises(ValueError, match="one of pyg, jraph"):
        attach_segments(model, "dgl")
    handle = attach_segments(model, "jraph")
    maker = make_maker(model)
    maker.setup_model_call(model, *graphs.arguments)
    with pytest.raises(
        ValueError, match=r"attach_segments\('jraph'\).*without 'n_node'.*x, edge_index"
    ):
        maker.forward_and_backward()
    handle.remove()
    attach_segments(model, "pyg")
    maker.forward_and_backward()
    assert_factors_of_graphs(model, graphs, "reduce")
