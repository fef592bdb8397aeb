"""The Fisher types: exact, Monte-Carlo (unbiased), empirical and forward-only, for every
likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import (
    BCE,
    CE,
    MSE,
    SelfAttention,
    Tokenwise,
    assert_equal,
    assert_factors,
    computed_fisher,
    covariance,
    example_grads,
    factor_A,
    layer_inputs,
    oracle_factors,
    output_jacobians,
    terms_of,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
SETTINGS = pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
N, R, C = 3, 4, 3


def likelihoods() -> dict[str, dict[str, Any]]:
    return {
        "cross_entropy": {"loss_type": CE},
        "mse": {"loss_type": MSE},
        "mse_number": {"loss_type": MSE, "var": 0.25},
        "mse_vector": {"loss_type": MSE, "var": torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)},
        "mse_matrix": {
            "loss_type": MSE,
            "var": torch.tensor(
                [[1.0, 0.5, 0.1], [0.5, 2.0, -0.6], [0.1, -0.6, 0.7]], dtype=torch.float64
            ),
        },
        "binary_cross_entropy": {"loss_type": BCE},
    }


LIKELIHOODS = pytest.mark.parametrize(
    "likelihood", likelihoods().values(), ids=likelihoods().keys()
)


# -------------------------------------------------------------------------------------- Monte Carlo


def mc_samples(
    model: nn.Module, module: nn.Module, x: Tensor, count: int, shared_dim: str, **config: Any
) -> Tensor:
    """B of ``count`` independent estimates: ``(count, Q, Q)``."""
    maker = get_fisher_maker(
        model,
        FisherConfig("fisher_mc", ["kron"], data_size=len(x), shared_dim=shared_dim, **config),
    )
    maker.setup_model_call(model, x)
    samples = []
    for _ in range(count):
        maker.forward_and_backward()
        samples.append(module.fisher.kron.B)
    return torch.stack(samples)


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """Every entry's mean lies within 5 standard errors (by chance it does not once in 2 million
    entries).

    The standard errors have to be small enough for that to mean something.
    """
    error = samples.std(0) / len(samples) ** 0.5
    assert error.norm() < 0.1 * expected.norm(), "too few samples to tell"
    assert ((samples.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("num_samples", [1, 4])
@SETTINGS
@STRATEGIES
@LIKELIHOODS
def test_monte_carlo_is_unbiased(
    likelihood: dict[str, Any], shared_dim: str, pool: bool, num_samples: int
):
    """Under attention, in both settings: labels are drawn independently for each term."""
    model, x = SelfAttention(pool=pool), torch.randn(2, 3, 4)
    samples = mc_samples(
        model, model.v, x, 300 // num_samples, shared_dim, n_mc_samples=num_samples, **likelihood
    )
    expected = oracle_factors(model, model.v, x, shared_dim, **likelihood)
    assert_mean(samples, expected.B / 2)
    assert_equal(model.v.fisher.kron.A, expected.A / 2)


def test_the_variance_falls_with_the_number_of_samples():
    model, x = SelfAttention(), torch.randn(2, 3, 4)
    one, four = (
        mc_samples(model, model.v, x, 400, "expand", loss_type=CE, n_mc_samples=count).var(0).sum()
        for count in (1, 4)
    )
    assert 3 < one / four < 5.3


def test_upstreams_exact_in_the_expand_setting_is_another_matrix():
    """One column of all terms at once keeps products of different terms: the bound above can tell
    them apart.
    """
    model, x = SelfAttention(), torch.randn(2, 3, 4)
    samples = mc_samples(model, model.v, x, 300, "expand", loss_type=CE)
    columns = []
    outputs: list[Tensor] = []
    handle = model.v.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    logits = model(x)
    handle.remove()
    probs = logits.detach().softmax(-1)
    for c in range(C):
        column = (probs - torch.eye(C)[c]) * probs[..., c, None].sqrt()
        (grad,) = torch.autograd.grad(logits, outputs, column, retain_graph=True)
        columns.append(grad.flatten(0, 1))
    jointly = sum(g.T @ g for g in columns) / 2
    with pytest.raises(AssertionError):
        assert_mean(samples, jointly)


@STRATEGIES
def test_monte_carlo_of_labels_that_are_left_out(shared_dim: str):
    model, x, target = (
        SelfAttention(),
        torch.randn(2, 3, 4),
        torch.tensor([[0, -100, 2], [-100, -100, 1]]),
    )
    maker = get_fisher_maker(
        model, FisherConfig("fisher_mc", ["kron"], CE, data_size=2, shared_dim=shared_dim)
    )
    logits = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, logits.flatten(0, 1), target.flatten())
    samples = []
    for _ in range(300):
        maker.forward_and_backward()
        samples.append(model.v.fisher.kron.B)
    expected = oracle_factors(model, model.v, x, shared_dim, weight=(target >= 0).double())
    assert_mean(torch.stack(samples), expected.B / 2)


def test_a_seed_determines_the_samples_and_leaves_the_global_generator_alone():
    model, x = SelfAttention(), torch.randn(2, 3, 4)
    state = torch.get_rng_state()
    first, second = (
        mc_samples(model, model.v, x, 1, "expand", loss_type=CE, seed=seed)[0] for seed in (1, 1)
    )
    other = mc_samples(model, model.v, x, 1, "expand", loss_type=CE, seed=2)[0]
    assert torch.equal(first, second) and not torch.equal(first, other)
    several = [mc_samples(model, model.v, x, 3, "expand", loss_type=CE, seed=1) for _ in range(2)]
    assert torch.equal(*several) and torch.equal(several[0][0], first)
    assert not torch.equal(
        several[0][0], several[0][1]
    )  # a batch has labels of its own: noise averages out
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------- exact


class Flattening(nn.Module):
    """A model that returns ``(N·R, C)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, 1)


@pytest.mark.parametrize("flattened_by", ["nobody", "loss_call", "loss", "model"])
@STRATEGIES
@LIKELIHOODS
def test_exact_for_logits_with_positions(
    likelihood: dict[str, Any], shared_dim: str, flattened_by: str
):
    inner, x = SelfAttention(), torch.randn(N, R, 4)
    loss_type = likelihood["loss_type"]
    target = torch.randint(C, (N, R)) if loss_type == CE else torch.rand(N, R, C)
    function = {CE: F.cross_entropy, MSE: F.mse_loss, BCE: F.binary_cross_entropy_with_logits}[
        loss_type
    ]
    model = Flattening(inner) if flattened_by == "model" else inner
    maker = get_fisher_maker(
        model,
        FisherConfig("fisher_exact", ["kron"], data_size=N, shared_dim=shared_dim, **likelihood),
    )
    logits = maker.setup_model_call(model, x)
    if flattened_by == "loss_call":
        maker.setup_loss_call(function, logits.flatten(0, 1), target.flatten(0, 1))
    elif flattened_by == "loss":
        maker.setup_loss_call(lambda y: function(y.reshape(N * R, C), target.flatten(0, 1)), logits)
    elif flattened_by == "model":
        maker.setup_loss_call(function, logits, target.flatten(0, 1))
    maker.forward_and_backward()
    for module in (inner.q, inner.k, inner.v, inner.out):
        expected = oracle_factors(inner, module, x, shared_dim, **likelihood)
        assert_factors(module, expected, N)


@pytest.mark.parametrize("reorder", ["transposed", "selected", "shuffled"])
@STRATEGIES
def test_exact_where_the_loss_reorders_or_selects_rows(shared_dim: str, reorder: str):
    """Which term belongs to which position is found out, not guessed from the order of the rows."""
    model, x, target = SelfAttention(), torch.randn(N, R, 4), torch.randint(C, (N, R))
    used, order = torch.ones(N, R), torch.randperm(N * R)
    if reorder == "selected":
        used = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]])

    def loss(y: Tensor) -> Tensor:
        if reorder == "transposed":
            return F.cross_entropy(y.transpose(0, 1).reshape(-1, C), target.T.flatten())
        if reorder == "selected":
            return F.cross_entropy(y[used.bool()], target[used.bool()])
        return F.cross_entropy(y.flatten(0, 1)[order], target.flatten()[order])

    computed_fisher(model, x, shared_dim, (loss,))
    expected = oracle_factors(model, model.v, x, shared_dim, weight=used)
    assert_equal(model.v.fisher.kron.B, expected.B / N)


class SequenceFirst(nn.Module):
    """An ``(N, R, P)`` model, called with ``(R, N, P)``; logits ``(R, N, C)``, ``(R·N, C)`` or
    ``(N, R, C)``.
    """

    batch_first = False

    def __init__(self, logits: str):
        super().__init__()
        self.first, self.last, self.logits = nn.Linear(4, 5), nn.Linear(5, C), logits

    def forward(self, x: Tensor) -> Tensor:
        z = self.example_first(x, 0)
        if self.logits == "flattened":
            return z.flatten(0, 1)
        return z.transpose(0, 1) if self.logits == "transposed" else z

    def example_first(self, x: Tensor, positions: int) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + 0.7 * x.cumsum(positions))  # every term sees the positions before it


@pytest.mark.parametrize("logits", ["as_they_are", "flattened", "transposed"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (3, 3), (6, 3)])
@STRATEGIES
def test_exact_of_logits_that_are_sequence_first(
    shared_dim: str, sizes: tuple[int, int], logits: str
):
    """Which terms are one example's is not told by the sizes of the logits where R = N, or R·N rows
    are left.
    """
    length, count = sizes
    model, x = SequenceFirst(logits), torch.randn(length, count, 4)
    computed_fisher(model, x, shared_dim, data_size=count)

    class BatchFirst(nn.Module):
        def __init__(self, first: nn.Linear):
            super().__init__()
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            return model.example_first(x, 1)

    expected = oracle_factors(BatchFirst(model.first), model.first, x.transpose(0, 1), shared_dim)
    assert_factors(model.first, expected, count)


@STRATEGIES
def test_exact_with_several_dimensions_of_terms(shared_dim: str):
    model = Tokenwise(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C))
    x, target = torch.randn(N, 2, 3, 4), torch.randint(C, (N, 2, 3))
    computed_fisher(model, x, shared_dim, (lambda y: F.cross_entropy(y.movedim(-1, 1), target),))
    expected = oracle_factors(model, model.layers[0], x, shared_dim)
    assert_equal(model.layers[0].fisher.kron.B, expected.B / N)


@pytest.mark.parametrize("loss_type", [MSE, BCE])
def test_exact_with_a_single_output_without_a_dimension(loss_type: str):
    """Logits ``(N,)``: one output a term. The curvature is the loss's as passed: a squared error
    has twice that of half of it.
    """

    class Scalar(Tokenwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)
    model, column, x = (
        Scalar(*layers, pool=True),
        Tokenwise(*layers, pool=True),
        torch.randn(N, R, 4),
    )
    function = F.mse_loss if loss_type == MSE else F.binary_cross_entropy_with_logits
    computed_fisher(
        model, x, "reduce", (function, torch.rand(N)), loss_type=loss_type, data_size=-1
    )
    expected = oracle_factors(column, layers[0], x, "reduce", loss_type)
    factor = 2 if loss_type == MSE else 1
    assert_equal(layers[0].fisher.kron.B, factor * expected.B / N)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_of_none"])
@pytest.mark.parametrize("labels", ["hard", "soft", "unnormalized"])
def test_weights_of_the_terms_of_a_cross_entropy(
    labels: str, reduction: str, weighted: bool, smoothing: float
):
    """B of the last layer is the sum of the second derivatives of the loss as it was passed."""
    model, x = nn.Linear(4, C), torch.randn(6, 4)
    target = torch.tensor([0, 1, 2, 0, -100, 1])
    if labels != "hard":
        target = torch.rand(6, C)
        target = target / target.sum(1, keepdim=True) if labels == "soft" else target
    weight = torch.tensor([0.0, 1.0, 3.0]) if weighted else None

    def loss(y: Tensor) -> Tensor:
        value = F.cross_entropy(
            y,
            target,
            weight=weight,
            label_smoothing=smoothing,
            reduction="none" if reduction == "mean_of_none" else reduction,
        )
        return value.mean() if reduction == "mean_of_none" else value

    computed_fisher(model, x, "reduce", (loss,), data_size=-1)
    second = torch.func.hessian(loss)(model(x).detach())
    assert_equal(model.fisher.kron.B, sum(second[n, :, n] for n in range(6)))


@STRATEGIES
def test_weights_of_the_terms_of_a_bernoulli_likelihood(shared_dim: str):
    """``weight`` and ``pos_weight`` scale the second derivative of each output's loss."""
    model, x, target = SelfAttention(), torch.randn(N, R, 4), torch.randint(2, (N, R, C)).double()
    weight, pos_weight = torch.rand(C) + 0.5, torch.tensor([2.0, 1.0, 0.3])
    loss = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction="sum")
    computed_fisher(model, x, shared_dim, (loss, target), loss_type=BCE, data_size=-1)

    def terms(y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            y, target, weight=weight, pos_weight=pos_weight, reduction="none"
        )

    logits = terms_of(model, x).requires_grad_()
    (first,) = torch.autograd.grad(terms(logits).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logits)  # the Hessian is diagonal
    b = output_jacobians(model, model.v, x)
    b = b.sum(3, keepdim=True) if shared_dim == "reduce" else b
    assert_equal(model.v.fisher.kron.B, torch.einsum("nrcmp,nrc,nrcmq->pq", b, second, b))


# ---------------------------------------------------------------------------------------- empirical


def summed(loss_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    if loss_type == CE:
        return lambda y, t: F.cross_entropy(y.reshape(-1, C), t.flatten(), reduction="sum")
    function = F.mse_loss if loss_type == MSE else F.binary_cross_entropy_with_logits
    return lambda y, t: function(y, t, reduction="sum")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_type", [CE, MSE, BCE])
@SETTINGS
@STRATEGIES
def test_empirical_against_gradients_of_each_example(
    shared_dim: str, pool: bool, loss_type: str, reduction: str
):
    """Eq. 3.7 and 3.19 with the labels' gradients, whatever the reduction of the loss that was
    passed.
    """
    model, x = SelfAttention(pool=pool), torch.randn(N, R, 4)
    sizes = (N,) if pool else (N, R)
    target = torch.randint(C, sizes) if loss_type == CE else torch.rand(*sizes, C)
    total = summed(loss_type)
    passed = total
    if reduction == "mean":
        function = {CE: F.cross_entropy, MSE: F.mse_loss, BCE: F.binary_cross_entropy_with_logits}[
            loss_type
        ]

        def passed(y: Tensor, t: Tensor) -> Tensor:
            return function(
                y.reshape(-1, C), t.reshape(-1) if loss_type == CE else t.reshape(-1, C)
            )

    computed_fisher(model, x, shared_dim, (passed, target), fisher_type="fisher_emp")
    for module in (model.q, model.k, model.v, model.out):
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda _m, _a, out, outputs=outputs: outputs.append(out)
        )
        expected = 0
        for n in range(N):
            loss = total(model(x[n : n + 1]), target[n : n + 1])
            (b,) = torch.autograd.grad(loss, outputs.pop())
            rows = b[0].sum(0, keepdim=True) if shared_dim == "reduce" else b[0]
            expected = expected + rows.T @ rows
        handle.remove()
        assert_equal(module.fisher.kron.B, expected / N)
        assert_equal(module.fisher.kron.A, factor_A(layer_inputs(model, module, x), shared_dim) / N)


@SETTINGS
def test_empirical_blocks_are_those_of_the_examples_gradients(pool: bool):
    model, x = SelfAttention(pool=pool, bias=False), torch.randn(N, R, 4)
    target = torch.randint(C, (N,) if pool else (N, R))
    computed_fisher(
        model, x, "expand", (summed(CE), target), shapes="layer_wise", fisher_type="fisher_emp"
    )
    for name in ("q", "k", "v", "out"):
        grads = example_grads(
            model, f"{name}.weight", lambda y, n: summed(CE)(y, target[n : n + 1]), x
        )
        assert_equal(model.get_submodule(name).fisher.data, grads.T @ grads / N)


# ------------------------------------------------------------------------------------- forward only


@SETTINGS
@STRATEGIES
def test_forward_only_has_the_identity_for_B(shared_dim: str, pool: bool):
    model, x = SelfAttention(pool=pool), torch.randn(N, R, 4)
    for data_size in (N, 2 * N):
        computed_fisher(
            model, x, shared_dim, fisher_type="fisher_forward_only", data_size=data_size
        )
        for module in (model.q, model.k, model.v, model.out):
            assert_equal(
                module.fisher.kron.A,
                factor_A(layer_inputs(model, module, x), shared_dim) / data_size,
            )
            assert torch.equal(module.fisher.kron.B, torch.eye(module.out_features) * N / data_size)


PROBES = 5
"""Backward passes of the first batch that look at what its examples touch."""


class CountBackward(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        CountBackward.count += 1
        return grad


class Counting(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return CountBackward.apply(super().forward(x))


@pytest.mark.parametrize(
    ("fisher_type", "options", "passes"),
    [
        ("fisher_forward_only", {}, 1),
        ("fisher_emp", {}, 1),
        ("fisher_mc", {}, 2),
        ("fisher_mc", {"n_mc_samples": 3}, 4),
        ("fisher_exact", {}, C + 1),
    ],
)
@STRATEGIES
def test_number_of_backward_passes(
    shared_dim: str, fisher_type: str, options: dict[str, Any], passes: int
):
    """Of a step in the reduce setting, the gradient's own included; a step without curvature has
    one. The first batch has five more, which look at what its examples touch.
    """
    model, x, target = Counting(pool=True), torch.randn(N, R, 4), torch.randint(C, (N,))
    config = asdl.PreconditioningConfig(
        data_size=N, damping=0.1, ema_decay=1.0, curvature_upd_interval=2
    )
    gm = asdl.KfacGradientMaker(
        model, config, fisher_type=fisher_type, shared_dim=shared_dim, **options
    )
    for expected in (passes + PROBES, 1, passes, 1):
        CountBackward.count = 0
        gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), target)
        gm.forward_and_backward()
        assert CountBackward.count == expected


@pytest.mark.parametrize("positions", [1, R])
def test_exact_costs_a_pass_for_each_output_of_each_position(positions: int):
    model, x = Counting(), torch.randn(N, positions, 4)
    CountBackward.count = 0
    computed_fisher(model, x, "expand")
    assert CountBackward.count == positions * C + PROBES


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_exact"])
def test_the_second_backward_pass_computes_no_weight_gradients(fisher_type: str):
    """Counted in multiplications: forward and gradients of the inputs of each layer but the first
    are all there is.
    """

    model, x = (
        Tokenwise(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, C)),
        torch.randn(N, R, 8),
    )
    maker = get_fisher_maker(
        model, FisherConfig(fisher_type, ["kron"], CE, data_size=N, shared_dim="reduce")
    )
    maker.setup_model_call(model, x)
    maker.forward_and_backward()  # the first batch is looked at more closely
    with FlopCounterMode(display=False) as counter:
        maker.forward_and_backward()
    passes = 1 if fisher_type == "fisher_mc" else R * C
    layers = [8 * 8, 8 * 8, 8 * C]
    network = 2 * N * R * (sum(layers) + passes * sum(layers[1:]))
    factors = 2 * N * (8 * 8 * 3 + passes * (8 * 8 * 2 + C * C))
    assert counter.get_total_flops() == network + factors


def test_covariances_have_to_be_positive_definite():
    model, x = SelfAttention(), torch.randn(N, R, 4)
    with pytest.raises(ValueError, match="var has to be symmetric and positive definite"):
        computed_fisher(model, x, "expand", loss_type=MSE, var=-covariance(C))
