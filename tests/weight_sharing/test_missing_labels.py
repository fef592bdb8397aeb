"""Binary cross-entropy over many tasks of which some labels are NaN, in all the ways in which
people leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import BCE, MSE, assert_equal, assert_factors
from oracles.graph_network import GraphNet
from oracles.graphs import Graphs, graph_examples, ragged_factors, random_graphs
from torch import Tensor, nn

from asdl_ws_plugin import attach_segments

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
Loss = Callable[[Tensor, Tensor], Tensor]
N, C = 4, 5
bce = F.binary_cross_entropy_with_logits


def known(t: Tensor) -> Tensor:
    return ~t.isnan()


def zeros_for_nan(t: Tensor) -> Tensor:
    return t.nan_to_num(0.0)


def flat_index(y: Tensor, t: Tensor) -> Tensor:
    index = torch.nonzero(known(t).flatten()).flatten().flip(0)
    return bce(y.flatten()[index], t.flatten()[index])


# All of these are the same number: the mean over the labels that there are.
MEANS: dict[str, Loss] = {
    "index": lambda y, t: bce(y[known(t)], t[known(t)]),
    "index_in_other_precision": lambda y, t: bce(y.float()[known(t)], t.float()[known(t)]),
    "masked_select": lambda y, t: bce(y.masked_select(known(t)), t.masked_select(known(t))),
    "flat_index_in_another_order": flat_index,
    "index_of_terms": lambda y, t: bce(y, zeros_for_nan(t), reduction="none")[known(t)].mean(),
    "terms_of_index": lambda y, t: bce(y[known(t)], t[known(t)], reduction="none").mean(),
    "product": lambda y, t: (
        (bce(y, zeros_for_nan(t), reduction="none") * known(t)).sum() / known(t).sum()
    ),
    "where": lambda y, t: (
        torch.where(known(t), bce(y, zeros_for_nan(t), reduction="none"), 0).sum() / known(t).sum()
    ),
    "where_before": lambda y, t: bce(
        torch.where(known(t), y, 0), zeros_for_nan(t), reduction="none"
    )[known(t)].mean(),
    "weight_and_sum": lambda y, t: (
        bce(y, zeros_for_nan(t), weight=known(t).to(y.dtype), reduction="sum") / known(t).sum()
    ),
    "double_weight_and_sum": lambda y, t: (
        bce(y, zeros_for_nan(t), weight=2 * known(t).to(y.dtype), reduction="sum")
        / (2 * known(t).sum())
    ),
}
# And all of these: its sum over the tasks, averaged over all examples and tasks.
ALL: dict[str, Loss] = {
    "weight": lambda y, t: bce(y, zeros_for_nan(t), weight=known(t).to(y.dtype)),
    "product": lambda y, t: (bce(y, zeros_for_nan(t), reduction="none") * known(t)).mean(),
    "where": lambda y, t: torch.where(
        known(t), bce(y, zeros_for_nan(t), reduction="none"), 0
    ).mean(),
}


def labels(num_rows: int = N) -> Tensor:
    """Some are NaN; the last row's all are."""
    t = torch.randint(2, (num_rows, C)).double()
    t[torch.rand(num_rows, C) < 0.4] = torch.nan
    t[0, :2] = torch.tensor([1.0, torch.nan])
    t[-1] = torch.nan
    return t


@pytest.fixture
def model(double: None) -> nn.Module:
    torch.manual_seed(1)
    net = GraphNet(C)
    attach_segments(net, "pyg")
    return net


@pytest.fixture
def graphs(double: None) -> Graphs:
    return random_graphs([(4, 6), (2, 3), (5, 4), (3, 9)])


def compute(
    model: nn.Module, graphs: Graphs, loss: Loss, t: Tensor, shared_dim: Any, **config: Any
) -> Any:
    options = {"fisher_type": "fisher_exact", "loss_type": BCE, "data_size": 1, **config}
    maker = get_fisher_maker(
        model, FisherConfig(fisher_shapes=["kron"], shared_dim=shared_dim, **options)
    )
    maker.setup_loss_call(loss, maker.setup_model_call(model, *graphs.arguments), t)
    maker.forward_and_backward()
    return maker


@pytest.mark.parametrize("how", MEANS)
@STRATEGIES
def test_exact_factors_leave_missing_labels_out(
    model: Any, graphs: Graphs, shared_dim: str, how: str
):
    t = labels()
    tol = 1e-5 if "precision" in how else 1e-10
    compute(model, graphs, MEANS[how], t, shared_dim)
    for module in (model.edge, model.node, model.glob, model.head):
        expected = ragged_factors(
            module, graph_examples(model, graphs), N, shared_dim, BCE, weight=known(t).double()
        )
        assert_factors(module, expected, rtol=tol)


@pytest.mark.parametrize("how", MEANS)
def test_the_setting_and_the_number_of_terms_do_not_depend_on_how(
    model: Any, graphs: Graphs, how: str
):
    """A mean over labels has a term for each, and each example's are of one row: 'auto' says
    reduce, and B is the curvature of the loss.
    """
    t = labels()
    maker = compute(model, graphs, MEANS[how], t, "auto", data_size=-1)
    assert maker.plan.setting == "reduce"
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", BCE, weight=known(t).double()
    )
    assert_equal(model.node.fisher.kron.A, expected.A / N)
    assert_equal(
        model.node.fisher.kron.B,
        expected.B / known(t).sum(),
        1e-5 if "precision" in how else 1e-10,
    )


@pytest.mark.parametrize("how", ALL)
def test_a_mean_over_all_labels_known_or_not(model: Any, graphs: Graphs, how: str):
    t = labels()
    compute(model, graphs, ALL[how], t, "reduce", data_size=-1)
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", BCE, weight=known(t).double()
    )
    assert_equal(model.node.fisher.kron.B, expected.B / (N * C))


@pytest.mark.parametrize("how", ["index", "product"])
@STRATEGIES
def test_monte_carlo_is_unbiased(model: Any, graphs: Graphs, shared_dim: str, how: str):
    t, count = labels(), 250
    maker = compute(model, graphs, MEANS[how], t, shared_dim, fisher_type="fisher_mc")
    samples = []
    for _ in range(count):
        maker.forward_and_backward()
        samples.append(model.node.fisher.kron.B)
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, shared_dim, BCE, weight=known(t).double()
    ).B
    everything = ragged_factors(model.node, graph_examples(model, graphs), N, shared_dim, BCE).B
    stacked = torch.stack(samples)
    error = stacked.std(0) / count**0.5
    assert error.norm() < 0.1 * expected.norm()
    assert ((stacked.mean(0) - expected).abs() <= 5 * error).all()
    assert not ((stacked.mean(0) - everything).abs() <= 5 * error).all()


@pytest.mark.parametrize("how", MEANS)
@STRATEGIES
def test_empirical_against_the_graphs_gradients(
    model: Any, graphs: Graphs, shared_dim: str, how: str
):
    t = labels()
    compute(model, graphs, MEANS[how], t, shared_dim, fisher_type="fisher_emp")
    expected: Any = 0
    for n in range(N):
        outputs: list[Tensor] = []
        handle = model.node.register_forward_hook(
            lambda _m, _a, out, outputs=outputs: outputs.append(out)
        )
        logits = graph_examples(model, graphs)(n)[0]
        handle.remove()
        if known(t[n]).any():
            loss = bce(logits[known(t[n])], t[n][known(t[n])], reduction="sum")
            (b,) = torch.autograd.grad(loss, outputs)
            b = b.sum(0, keepdim=True) if shared_dim == "reduce" else b
            expected = expected + b.T @ b
    assert_equal(model.node.fisher.kron.B, expected, 1e-5 if "precision" in how else 1e-10)


@pytest.mark.parametrize("how", MEANS)
def test_the_gradient_is_that_of_the_loss(model: Any, graphs: Graphs, how: str):
    t = labels()
    (expected,) = torch.autograd.grad(
        MEANS["index"](model(*graphs.arguments), t), model.node.weight
    )
    config = asdl.PreconditioningConfig(
        data_size=N, damping=0.1, ema_decay=1.0, preconditioner_warmup_steps=5
    )
    gm = asdl.KfacGradientMaker(
        model, config, loss_type=BCE, shared_dim="reduce", fisher_type="fisher_mc"
    )
    gm.setup_loss_call(MEANS[how], gm.setup_model_call(model, *graphs.arguments), t)
    _, loss = gm.forward_and_backward()
    kron = model.node.fisher.kron
    tol = 1e-5 if "precision" in how else 1e-10
    assert_equal(model.node.weight.grad, kron.B_inv @ expected @ kron.A_inv, tol)
    assert_equal(loss.detach().double(), MEANS["index"](model(*graphs.arguments), t).detach(), tol)


def test_a_loss_of_some_tasks_has_the_curvature_of_those(model: Any, graphs: Graphs):
    """The loss of the tasks 3 and 1, in that order."""
    t = torch.randint(2, (N, C)).double()
    compute(model, graphs, lambda y, t: bce(y[:, [3, 1]], t[:, [3, 1]]), t, "auto", data_size=-1)
    weight = torch.zeros(N, C)
    weight[:, [1, 3]] = 1
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", BCE, weight=weight
    )
    assert_equal(model.node.fisher.kron.B, expected.B / (2 * N))


def test_weights_of_known_labels(model: Any, graphs: Graphs):
    """Weights of the tasks, positive labels weighted on top, labels picked by index."""
    t, task = labels(), torch.rand(C) + 0.5

    def loss(y: Tensor, t: Tensor) -> Tensor:
        kept = known(t)
        return bce(y[kept], t[kept], weight=task.expand_as(t)[kept], reduction="sum")

    compute(model, graphs, loss, t, "reduce", data_size=-1)
    weight = known(t) * task
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", BCE, weight=weight
    )
    assert_equal(model.node.fisher.kron.B, expected.B)


def test_a_squared_error_of_known_targets(model: Any, graphs: Graphs):
    t = labels()
    compute(
        model,
        graphs,
        lambda y, t: F.mse_loss(y[known(t)], t[known(t)]),
        t,
        "auto",
        loss_type=MSE,
        data_size=-1,
    )
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", MSE, weight=known(t).double()
    )
    assert_equal(model.node.fisher.kron.B, 2 * expected.B / known(t).sum())


def test_no_label_in_the_whole_batch(model: Any, graphs: Graphs):
    """The curvature of a constant is zero, not NaN."""
    t = torch.full((N, C), torch.nan)

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return (bce(y, zeros_for_nan(t), reduction="none") * known(t)).sum() / known(t).sum().clamp(
            min=1
        )

    for fisher_type in ("fisher_exact", "fisher_mc", "fisher_emp"):
        compute(model, graphs, loss, t, "reduce", fisher_type=fisher_type)
        assert not model.node.fisher.kron.B.any() and model.node.fisher.kron.A.any()


def test_a_logit_that_is_used_twice(model: Any, graphs: Graphs):
    """It is no selection: the loss has two terms of it."""
    t = torch.randint(2, (N, 2)).double()
    compute(model, graphs, lambda y, t: bce(y[:, [0, 0]], t, reduction="sum"), t, "reduce")
    weight = torch.zeros(N, C)
    weight[:, 0] = 2
    expected = ragged_factors(
        model.node, graph_examples(model, graphs), N, "reduce", BCE, weight=weight
    )
    assert_equal(model.node.fisher.kron.B, expected.B)
