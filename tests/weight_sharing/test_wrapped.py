"""A model in a wrapper is the model: in gradient makers, in conversion, in the report, and where
positions are read off its arguments.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import assert_factors, empirical_factors, fisher, kfac, step
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import attach_padding, attach_segments
from asdl_ws_plugin.weight_sharing.torch_private import unwrapped

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._dynamo.*:UserWarning"),
]
N, R, D, C = 4, 5, 6, 3
LENGTHS = [5, 2, 3, 4]


class Encoder(nn.Module):
    """Pools over what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, 7), nn.Linear(7, C)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.layer(x))
        if attention_mask is None:
            return self.head(x.mean(1))
        kept = attention_mask.unsqueeze(-1)
        return self.head((x * kept).sum(1) / kept.sum(1))


class Nodes(nn.Module):
    """Graphs as PyG's or as jraph's arguments have them."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.head = nn.Linear(D, 7), nn.Linear(7, C)

    def forward(self, graph: Any) -> Tensor:
        x = torch.tanh(self.node(graph.x))
        return self.head(x.new_zeros(graph.num_graphs, 7).index_add(0, graph.batch, x))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


WRAPPERS = pytest.mark.parametrize(
    "wrap",
    [compiled, parallel, lambda model: compiled(parallel(model))],
    ids=["compiled", "parallel", "both"],
)


@WRAPPERS
def test_a_wrapped_model_is_found(wrap: Any, process_group: None):
    model = Encoder()
    assert unwrapped(wrap(model)) is model
    assert unwrapped(model) is model


@WRAPPERS
def test_a_gradient_maker_takes_a_wrapped_model(wrap: Any, process_group: None):
    model, x, y = Encoder(), torch.randn(N, R, D), torch.randint(C, (N,))
    wrapped = wrap(model)
    maker = kfac(wrapped, "reduce", ema_decay=1.0, data_size=N, fisher_type="fisher_emp")
    assert maker.model is model
    assert list(maker.shared_dim_for) == ["layer", "head"]

    def example(n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])

    expected = empirical_factors(model.layer, example, N, "reduce")
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(wrapped, x), y)
    maker.forward_and_backward()
    assert_factors(model.layer, expected)


@WRAPPERS
def test_steps_of_a_wrapped_model_are_those_of_the_model(wrap: Any, process_group: None):
    torch.manual_seed(1)
    models = [Encoder(), Encoder()]
    models[1].load_state_dict(models[0].state_dict())
    calls = [models[0], wrap(models[1])]
    makers = [kfac(call, "reduce", ema_decay=0.5, curvature_upd_interval=2) for call in calls]
    for k in range(4):
        x, y = torch.randn(N, R, D), torch.randint(C, (N,))
        for call, maker in zip(calls, makers, strict=True):
            torch.manual_seed(k)
            call.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(call, x), y)
            maker.forward_and_backward()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(q.grad, p.grad)


@WRAPPERS
def test_a_wrapped_model_is_converted_and_reported(wrap: Any, process_group: None):
    model = nn.Sequential(nn.MultiheadAttention(D, 2, batch_first=True))
    plain = asdl_ws_plugin.inspect(Encoder(), torch.randn(N, R, D))
    wrapped = wrap(model)
    assert asdl_ws_plugin.convert(wrapped) is wrapped
    assert isinstance(model[0].q_proj, nn.Linear)
    assert asdl_ws_plugin.revert(wrapped) is wrapped
    assert not hasattr(model[0], "q_proj")
    report = asdl_ws_plugin.inspect(wrap(Encoder()), torch.randn(N, R, D))
    assert [row.name for row in report.rows] == [row.name for row in plain.rows]


@WRAPPERS
def test_padding_is_read_off_the_arguments_of_a_wrapped_model(wrap: Any, process_group: None):
    model, x, y = Encoder(), torch.randn(N, R, D), torch.randint(C, (N,))
    mask = torch.arange(R) < torch.tensor(LENGTHS).unsqueeze(1)
    wrapped = wrap(model)
    attach_padding(wrapped, "attention_mask")
    maker = kfac(wrapped, "reduce", ema_decay=1.0, data_size=N, fisher_type="fisher_emp")
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(wrapped, x, mask), y)
    maker.forward_and_backward()
    found = model.layer.fisher.kron.A

    real = torch.stack([row[:length].mean(0) for row, length in zip(x, LENGTHS, strict=True)])
    torch.testing.assert_close(found, real.mT @ real / N)


# ------------------------------------------------------------------------ segments that are found


def graphs(kind: str) -> SimpleNamespace:
    """Three graphs of 2, 3 and 1 nodes; jraph's have padding of 2 more nodes, in one graph of
    two.
    """
    n_node = torch.tensor([2, 3, 1, 2, 0] if kind == "jraph" else [2, 3, 1])
    batch = torch.arange(len(n_node)).repeat_interleave(n_node)
    named = {"x": torch.randn(int(n_node.sum()), D), "batch": batch, "num_graphs": len(n_node)}
    if kind == "jraph":
        return SimpleNamespace(**named, n_node=n_node, n_edge=torch.zeros_like(n_node))
    return SimpleNamespace(**named, edge_index=torch.tensor([[0, 2], [1, 3]]))


@pytest.mark.parametrize("kind", ["pyg", "jraph"])
def test_auto_finds_whatever_graphs_the_arguments_are(kind: str):
    model, graph = Nodes(), graphs(kind)
    attach_segments(model, "auto")
    y = torch.randint(C, (graph.num_graphs,))
    weight = (torch.arange(graph.num_graphs) < 3).double()

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(logits, y, reduction="none") * weight).sum() / 3

    maker = fisher(model, "reduce", loss, y, graph, data_size=3)
    means = torch.stack([graph.x[graph.batch == n].mean(0) for n in range(3)])
    torch.testing.assert_close(model.node.fisher.kron.A, means.mT @ means / 3)
    assert maker.plan.strategy_of(maker.plan.layers[0]) == "reduce"


def test_auto_does_nothing_where_there_is_no_graph():
    torch.manual_seed(0)
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Encoder()
        if attached:
            attach_segments(model, "auto")
        maker = kfac(model, "expand", ema_decay=1.0)
        step(maker, F.cross_entropy, torch.randint(C, (N,)), torch.randn(N, R, D))
        found.append(model.layer.fisher.kron.A)
    assert torch.equal(*found)


def test_a_source_that_is_none_is_refused():
    with pytest.raises(ValueError, match="one of pyg, jraph, auto"):
        attach_segments(Nodes(), "dgl")


@pytest.mark.parametrize("source", ["auto", "pyg"])
def test_attaching_twice_says_the_same(source: str):
    model, graph = Nodes(), graphs("pyg")
    for _ in range(2):
        attach_segments(model, source)
    fisher(model, "reduce", F.cross_entropy, torch.randint(C, (3,)), graph, data_size=3)
    means = torch.stack([graph.x[graph.batch == n].mean(0) for n in range(3)])
    torch.testing.assert_close(model.node.fisher.kron.A, means.mT @ means / 3)


def test_a_model_with_attached_positions_can_be_pickled():
    model, graph = Nodes(), graphs("pyg")
    attach_segments(model, "auto")
    copy = pickle.loads(pickle.dumps(model))
    fisher(copy, "reduce", F.cross_entropy, torch.randint(C, (3,)), graph, data_size=3)
    means = torch.stack([graph.x[graph.batch == n].mean(0) for n in range(3)])
    torch.testing.assert_close(copy.node.fisher.kron.A, means.mT @ means / 3)
    padded = Encoder()
    attach_padding(padded, "attention_mask")
    pickle.loads(pickle.dumps(padded))
