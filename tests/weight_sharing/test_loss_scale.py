"""The scale of the empirical Fisher of a sum: the terms of all calls, those that share logits once.

A loss ``Σ_t p_t l_t`` over T terms with the weights ``p_t`` is ``1/κ Σ_t κ p_t l_t`` with the mean
weight 1/κ, so that its empirical Fisher is ``1/κ Σ_t g_t g_tᵀ``, with ``g_t`` the gradient of
``κ p_t l_t`` by itself. Ground truth is that sum, one term after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig
from oracles.autograd import assert_equal, run_fisher
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401

pytestmark = pytest.mark.usefixtures("double")

N, D, C = 12, 5, 6
KEPT = torch.arange(N) % 2 == 0
Loss = Callable[[Tensor, Tensor], Tensor]
ce, mse = F.cross_entropy, F.mse_loss


def empirical_factor(loss: Loss, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """B of a linear layer's outputs, and its sum of squares without a scale."""
    model, x, y = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D), torch.randint(0, C, (N,))
    model, x = model.to(dtype), x.to(dtype)
    run_fisher(model, FisherConfig("fisher_emp", ["kron"], shared_dim="expand"), (loss, y), x)
    z = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, y), z)
    return model[0].fisher.kron.B, gradient.mT @ gradient


def by_hand_and_mean(z: Tensor, t: Tensor) -> Tensor:
    return (ce(z, t, reduction="none") * KEPT).sum() / KEPT.sum() + 0.5 * ce(z, t)


def by_index_and_mean(z: Tensor, t: Tensor) -> Tensor:
    return ce(z[KEPT], t[KEPT]) + 0.5 * ce(z, t)


def by_label_and_mean(z: Tensor, t: Tensor) -> Tensor:
    return ce(z, t.where(KEPT, -100)) + 0.5 * ce(z, t)


def as_one_call(z: Tensor, t: Tensor) -> Tensor:
    return ce(z, t, reduction="none") @ (KEPT / KEPT.sum() + 0.5 / N)


@pytest.mark.parametrize(
    "loss", [by_hand_and_mean, by_index_and_mean, by_label_and_mean, as_one_call]
)
def test_two_means_over_different_numbers_of_the_same_terms(loss: Loss):
    """Six rows of weight 1/6 + 1/24, six of 1/24: the mean weight is 1/8."""
    model, x, y = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D), torch.randint(0, C, (N,))
    run_fisher(model, FisherConfig("fisher_emp", ["kron"], shared_dim="expand"), (loss, y), x)
    weights = KEPT / 6 + 0.5 / 12
    expected = torch.zeros(C, C)
    for z, label, weight in zip(model(x).detach(), y, weights, strict=True):
        g = torch.func.grad(lambda z, t=label, w=weight: 8 * w * ce(z, t))(z)
        expected += g.outer(g) / 8
    assert_equal(model[0].fisher.kron.B, expected)


def tasks(z: Tensor, t: Tensor) -> Tensor:
    return 0.3 * ce(z[:, :3], t % 3) + ce(z[:, 3:], t % 2)


def tasks_as_one_call(z: Tensor, t: Tensor) -> Tensor:
    labels = torch.stack([t % 3, t % 2], 1).flatten()
    weights = torch.tensor([0.3, 1.0]).repeat(N) / N
    return ce(z.reshape(-1, 3), labels, reduction="none") @ weights


@pytest.mark.parametrize("loss", [tasks, tasks_as_one_call])
def test_two_tasks_with_weights(loss: Loss):
    """Two terms for each example, of weights 0.3/12 and 1/12: the mean weight is 1.3/24."""
    model, x, y = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D), torch.randint(0, C, (N,))
    run_fisher(model, FisherConfig("fisher_emp", ["kron"], shared_dim="expand"), (loss, y), x)
    scale, expected = 24 / 1.3, torch.zeros(C, C)
    for z, t in zip(model(x).detach(), y, strict=True):  # both terms are of one row of the layer
        one = torch.func.grad(lambda z, t=t: scale * 0.3 / 12 * ce(z[:3], t % 3))(z)
        two = torch.func.grad(lambda z, t=t: scale / 12 * ce(z[3:], t % 2))(z)
        expected += (one + two).outer(one + two) / scale
    assert_equal(model[0].fisher.kron.B, expected)


ZEROS = torch.zeros(N, 3)


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, 3)


def both(t: Tensor) -> Tensor:
    return torch.stack([t % 3, t % 2], 1).flatten()


# name -> a loss, how many terms it has, and the sum of their weights
RELATIVES: dict[str, tuple[Loss, float, float]] = {
    "mixup": (lambda z, t: 0.3 * ce(z, t) + 0.7 * ce(z, t.flip(0)), N, 1),
    "a task that half of the examples have no label for": (
        lambda z, t: ce(z[:, :3], t % 3) + ce(z[:, 3:], (t % 3).where(KEPT, -100)),
        N + N // 2,
        2,
    ),
    "a call of weight 0": (lambda z, t: ce(z, t) + 0.0 * ce(z[:, :2], t % 2), N, 1),
    "classes, and outputs whose terms are elements": (
        lambda z, t: ce(z[:, :3], t % 3) + mse(z[:, 3:], ZEROS.to(z)),
        N + 3 * N,
        2,
    ),
    "classes, and elements of the same logits": (
        lambda z, t: ce(z, t) + 0.1 * mse(z, torch.zeros_like(z)),
        N,
        1.1,
    ),
    "columns that overlap": (lambda z, t: ce(z[:, :4], t % 4) + ce(z[:, 3:], t % 3), N, 2),
    "columns that overlap with some of the others": (
        lambda z, t: ce(z[:, :3], t % 3) + mse(z[:, 2:], torch.zeros_like(z[:, 2:])),
        N + 3 * N,
        2,
    ),
    "rows of two tasks each, half of them twice": (
        lambda z, t: 0.3 * ce(flat(z), both(t)) + 0.7 * ce(flat(z)[::2], both(t)[::2]),
        2 * N,
        1,
    ),
    "similarities beside some of the labels": (
        lambda z, t: ce(z[KEPT], t[KEPT]) + ce(z @ z.mT, torch.arange(N).roll(1)),
        N,
        2,
    ),
}


@pytest.mark.parametrize("case", RELATIVES.values(), ids=RELATIVES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_scale_is_that_of_the_mean_weight(case: tuple[Loss, float, float], dtype: torch.dtype):
    loss, num_terms, sum_of_weights = case
    try:
        found, squares = empirical_factor(loss, dtype)
    except RuntimeError as error:
        if "mse_cpu" not in str(error):
            raise
        pytest.skip("before PyTorch 2.6 there is no mse_loss of bfloat16 on a CPU")
    expected = num_terms / sum_of_weights * squares.double()
    assert_equal(found.double(), expected, 1e-10 if dtype == torch.float64 else 0.02)
