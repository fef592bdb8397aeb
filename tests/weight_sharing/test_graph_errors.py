"""Bad segments: an error that names the layer, a model that is as it was, and training that goes
on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from oracles.autograd import BCE
from oracles.graph_network import GraphNet, sum_rows
from oracles.graphs import Graphs, random_graphs
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import Segments, WeightSharingLinear, segments

SIZES = [(4, 6), (2, 3), (5, 5), (3, 9)]


class Net(GraphNet):
    """A graph network whose layers have roles."""

    def __init__(self, roles: bool = True) -> None:
        super().__init__(norm=True)
        self.edge, self.node = WeightSharingLinear(8, 4), WeightSharingLinear(7, 4)
        if roles:
            self.edge.role, self.node.role = "edge", "node"


class Training:
    """A model in training, whose state can be compared."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        config = asdl.PreconditioningConfig(
            data_size=4, damping=1e-2, ema_decay=0.5, ignore_modules=[nn.LayerNorm], **options
        )
        self.gm = asdl.KfacGradientMaker(model, config, loss_type=BCE, shared_dim="reduce")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(self, graphs: Graphs) -> None:
        logits = self.gm.setup_model_call(self.model, *graphs.arguments)
        target = torch.ones(graphs.num_graphs, 3)
        self.gm.setup_loss_call(F.binary_cross_entropy_with_logits, logits, target)
        self.gm.forward_and_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def good_step(self, graphs: Graphs | None = None) -> None:
        graphs = graphs or random_graphs(SIZES)
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with segments(self.model, node=graphs.batch, edge=graphs.edge_batch):
            self.step(graphs)
        for name, p in self.model.named_parameters():
            assert not torch.equal(before[name], p) and p.isfinite().all(), name

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            fisher = getattr(module, "fisher", None)
            if fisher is not None and fisher.kron is not None:
                kron = fisher.kron
                state[name] = [kron.A.clone(), kron.B.clone(), kron.A_inv, kron.B_inv]
            state[f"hooks {name}"] = len(module._forward_hooks)
        for name, p in self.model.named_parameters():
            state[f"parameter {name}"] = [p.detach().clone(), p.grad]
        state["positions"] = [
            m for m in self.model.modules() if any("position" in key for key in m.__dict__)
        ]
        state["settled"] = dict(self.gm.plan.layouts.roles), dict(self.gm.plan.layouts.settled)
        return state

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        before = self.state()
        yield
        after = self.state()
        assert before.keys() == after.keys()
        for key, value in before.items():
            others = after[key]
            if isinstance(value, list):
                for one, other in zip(value, others, strict=True):
                    assert one is other or torch.equal(one, other), key
            else:
                assert value == others, key


def wrong(graphs: Graphs, what: str) -> dict[str, Any]:
    node, edge = graphs.batch, graphs.edge_batch
    arguments: dict[str, dict[str, Any]] = {
        "stale": {"node": node[:-1], "edge": edge},
        "other_role": {"node": node, "bond": edge},
        "too_many_examples": {"node": node, "edge": edge, "num_examples": 9},
        "too_long": {"node": node, "edge": torch.cat([edge, edge])},
    }
    return arguments[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "stale",
            "Layer 'node': its input has 14 rows, but its role 'node' has 13. Are the segments "
            "those of",
        ),
        ("too_long", "Layer 'edge': its input has 23 rows, but its role 'edge' has 46"),
        (
            "other_role",
            "Layer 'edge' has the role 'edge', which was not given; there are 'node' with 14 "
            "rows, 'bond'",
        ),
        (
            "too_many_examples",
            "Layer 'glob': its input has 4 rows, but (.* 'graph' with 9|its role 'graph' has 9)",
        ),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["in_the_first_step", "later"])
def test_segments_that_do_not_fit(what: str, message: str, first: bool):
    training, graphs = Training(Net()), random_graphs(SIZES)
    if not first:
        training.good_step()
    with (
        training.unchanged(),
        pytest.raises(ValueError, match=message),
        segments(training.model, **wrong(graphs, what)),
    ):
        training.step(graphs)
    training.good_step()
    training.good_step(random_graphs([(3, 2), (4, 8), (2, 1), (5, 9)]))


@pytest.mark.parametrize("first", [True, False], ids=["in_the_first_step", "later"])
def test_a_step_without_segments_is_refused(first: bool):
    training, graphs = Training(Net()), random_graphs(SIZES)
    if not first:
        training.good_step()
    with (
        training.unchanged(),
        pytest.raises(
            ValueError,
            match=r"Layer '(edge|node)': it is not known which example each of its \d+ rows "
            "belongs to",
        ),
    ):
        training.step(graphs)
    training.good_step()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0, -2]), ValueError, "role 'node': index has the negative entry -2"),
        (
            torch.tensor([0, 4]),
            ValueError,
            "role 'node': index has the entry 4, but there are 4 examples",
        ),
        (torch.tensor([0.0, 1.0]), TypeError, "role 'node': index has to be a tensor of integers"),
        (
            torch.zeros(2, dtype=torch.long, device="meta"),
            ValueError,
            "role 'node': index is on the meta device",
        ),
        ([0, 1], TypeError, "role 'node'"),
    ],
)
def test_an_index_that_is_none_is_refused_where_it_enters(
    index: Any, error: type[Exception], message: str
):
    training = Training(Net())
    with (
        training.unchanged(),
        pytest.raises(error, match=message),
        segments(training.model, num_examples=4, node=index),
    ):
        pass
    training.good_step()


def test_segments_without_a_role_are_refused():
    with pytest.raises(TypeError, match="at least one role"), segments(Net()):
        pass


def test_roles_of_different_numbers_of_examples():
    index = torch.tensor([0, 1])
    with (
        pytest.raises(ValueError, match="'edge' has 5 examples, but there are 3"),
        segments(Net(), num_examples=3, node=index, edge=Segments(index, num_examples=5)),
    ):
        pass


class OnAnotherDevice(Segments):
    """On the CPU, though it says that it is not: no second device is needed to see what happens."""

    device = torch.device("meta")  # type: ignore[assignment]

    def with_num_examples(self, num_examples: int) -> Segments:
        return self


def test_an_index_on_another_device():
    training, graphs = Training(Net()), random_graphs(SIZES)
    elsewhere = OnAnotherDevice(graphs.batch, num_examples=4)
    with (
        pytest.raises(ValueError, match=r"several devices: cpu, meta"),
        segments(training.model, node=elsewhere, edge=graphs.edge_batch),
    ):
        pass
    for layer in (training.model.edge, training.model.node):
        layer.role = None
    positions = asdl_ws_plugin.weight_sharing.positions.Positions(
        4, {"node": elsewhere, "edge": elsewhere}
    )
    handle = asdl_ws_plugin.attach_segments(training.model, lambda *_: positions)
    with (
        training.unchanged(),
        pytest.raises(
            ValueError,
            match=r"Layer .edge.: its input is on cpu, but the index of its rows on meta\. Move "
            "the index",
        ),
    ):
        training.step(graphs)
    handle.remove()
    training.good_step()


# ----------------------------------------------------------------------- roles found from the sizes


def test_as_many_nodes_as_edges():
    """Refused until the layer has its role, or an earlier batch has shown it."""
    ambiguous, clear = (
        random_graphs([(4, 6), (5, 4), (3, 2)]),
        random_graphs([(4, 6), (5, 7), (3, 2)]),
    )
    assert len(ambiguous.batch) == len(ambiguous.edge_batch)

    def step(training: Training, graphs: Graphs) -> None:
        with segments(training.model, node=graphs.batch, edge=graphs.edge_batch):
            training.step(graphs)

    training = Training(Net(roles=False))
    with (
        training.unchanged(),
        pytest.raises(
            ValueError,
            match=r"Layer 'edge': its 12 rows fit the roles 'node', 'edge'.*"
            r"roles=\[\('edge', 'node'\)\]",
        ),
    ):
        step(training, ambiguous)
    step(training, clear)
    step(training, ambiguous)
    assert training.gm.plan.layouts.roles[training.model.edge, 0] == "edge"

    step(Training(Net(roles=True)), ambiguous)
    rows = torch.arange(3)
    same = random_graphs([(1, 1)] * 3)
    assert torch.equal(same.batch, rows) and torch.equal(same.edge_batch, rows)
    step(Training(Net(roles=False)), same)  # it makes no difference


def test_a_role_that_a_failed_step_found_is_forgotten():
    """With nodes and edges mixed up, the edge function's rows were taken for nodes before the error
    came.
    """
    training, graphs = Training(Net(roles=False)), random_graphs(SIZES)
    with (
        training.unchanged(),
        pytest.raises(ValueError, match="Layer 'node'"),
        segments(training.model, node=graphs.edge_batch, edge=graphs.edge_batch[:-1]),
    ):
        training.step(graphs)
    training.good_step()
    assert training.gm.plan.layouts.roles[training.model.edge, 0] == "edge"


def test_segments_of_different_batches_at_two_parts_of_a_model():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = WeightSharingLinear(3, 3), WeightSharingLinear(3, 3)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return sum_rows(self.b(torch.tanh(self.a(x))), index, 2)

    model, x, index = Two(), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    gm = asdl.KfacGradientMaker(
        model,
        asdl.PreconditioningConfig(data_size=2, damping=0.1),
        loss_type=BCE,
        shared_dim="reduce",
    )
    gm.setup_loss_call(
        F.binary_cross_entropy_with_logits, gm.setup_model_call(model, x, index), torch.zeros(2, 3)
    )
    with pytest.raises(ValueError, match="different numbers of examples: 2 at 'a', 3 at 'b'"):
        model.a.set_segments(index)
        model.b.set_segments(torch.tensor([0, 1, 2, 1, 1]))
        gm.forward_and_backward()
    with segments(model, node=index):
        gm.forward_and_backward()


# ----------------------------------------------------------------------------- steps that are empty


@pytest.mark.parametrize("ema_decay", [-1.0, 0.5])
def test_batches_without_any_edge(ema_decay: float):
    """The edge function's gradient is zero, the moving average of its factors decays; the others
    train on.
    """
    model = Net()
    config = asdl.PreconditioningConfig(
        data_size=3, damping=1e-2, ema_decay=ema_decay, ignore_modules=[nn.LayerNorm]
    )
    gm = asdl.KfacGradientMaker(model, config, loss_type=BCE, shared_dim="reduce")

    def step(graphs: Graphs) -> None:
        model.zero_grad()
        logits = gm.setup_model_call(model, *graphs.arguments)
        gm.setup_loss_call(F.binary_cross_entropy_with_logits, logits, torch.ones(3, 3))
        with segments(model, num_examples=3, node=graphs.batch, edge=graphs.edge_batch):
            gm.forward_and_backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    step(random_graphs([(4, 5), (2, 3), (3, 5)]))
    before = model.edge.fisher.kron.A  # type: ignore[union-attr]
    before = None if before is None else before.clone()
    # Without a moving average there is nothing to invert, and that is said.
    nothing = pytest.warns(UserWarning, match="first is 'edge'.*exactly zero")
    with nothing if before is None else contextlib.nullcontext():
        step(random_graphs([(4, 0), (2, 0), (3, 0)]))
    assert not model.edge.weight.grad.any() and model.node.weight.grad.any()
    if before is not None:
        torch.testing.assert_close(model.edge.fisher.kron.A, before * (1 - ema_decay))  # type: ignore[union-attr]
    step(random_graphs([(4, 5), (2, 3), (3, 5)]))


def test_every_way_out_of_a_step_takes_the_hooks_along(monkeypatch: pytest.MonkeyPatch):
    """Also an error inside of the sum over the rows, in the middle of the backward pass."""
    training, graphs = Training(Net()), random_graphs(SIZES)
    training.good_step()
    original: Callable[..., Tensor] = Segments.sum
    calls = []

    def failing(self: Segments, x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 3:
            raise MemoryError
        return original(self, x)

    monkeypatch.setattr(Segments, "sum", failing)
    with (
        training.unchanged(),
        pytest.raises(MemoryError),
        segments(training.model, node=graphs.batch, edge=graphs.edge_batch),
    ):
        training.step(graphs)
    monkeypatch.undo()
    training.good_step()
