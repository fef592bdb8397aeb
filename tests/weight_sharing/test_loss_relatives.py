"""Sums that users train with have the curvature of the whole loss, or are refused.

Ground truth is ``torch.func.hessian`` of the loss with respect to the logits, and its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import assert_equal, run_fisher
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401

pytestmark = pytest.mark.usefixtures("double")

N, D, C = 12, 5, 6
Loss = Callable[[Tensor, Tensor], Tensor]
KEPT = torch.arange(N) % 2 == 0
ce = F.cross_entropy


def masked_by_hand_and_mean(z: Tensor, t: Tensor) -> Tensor:
    each = ce(z, t, reduction="none")
    return (each * KEPT).sum() / KEPT.sum() + 0.5 * ce(z, t.flip(0))


def z_loss(z: Tensor, t: Tensor) -> Tensor:
    return ce(z, t) + 0.1 * z.logsumexp(-1).square().mean()


def load_balancing(z: Tensor, t: Tensor) -> Tensor:
    """Of a router's logits: the experts' shares of the rows have no gradient."""
    shares = F.one_hot(z.argmax(-1), C).to(z).mean(0)
    return ce(z, t) + 0.1 * C * (shares * z.softmax(-1).mean(0)).sum()


def deep_supervision(z: Tensor, t: Tensor) -> Tensor:
    return 0.3 * ce(z[:, :3], t % 3) + ce(z[:, 3:], t % 3)


def contrastive_beside_labels(z: Tensor, t: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    similarities = (unit @ unit.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return ce(z, t) + 0.3 * ce(similarities, torch.arange(len(z)).roll(1))


def factor(loss: Loss, fisher_type: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D), torch.randint(0, C, (N,))
    config: Any = FisherConfig(fisher_type, ["kron"], shared_dim="expand")
    run_fisher(model, config, (loss, y), x)
    return model, model(x).detach(), y


@pytest.mark.parametrize(
    "loss", [masked_by_hand_and_mean, z_loss, load_balancing, deep_supervision]
)
def test_a_sum_has_the_positive_part_of_its_own_hessians(loss: Loss):
    model, logits, y = factor(loss, "fisher_exact")
    whole = torch.func.hessian(loss)(logits, y)
    values, vectors = torch.linalg.eigh(torch.stack([whole[i, :, i] for i in range(N)]))
    expected = vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT
    assert_equal(model[0].fisher.kron.B, expected.sum(0))


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_mc"])
def test_a_contrastive_term_beside_labels_is_refused(fisher_type: str):
    with pytest.raises(ValueError, match=r"mixes rows.*fisher_emp"):
        factor(contrastive_beside_labels, fisher_type)


def test_a_contrastive_term_beside_labels_has_an_empirical_fisher():
    """Both calls have one term for each example: a term's weight is the sum of theirs."""
    model, logits, y = factor(contrastive_beside_labels, "fisher_emp")
    gradient = torch.func.grad(contrastive_beside_labels)(logits, y)
    assert_equal(model[0].fisher.kron.B, N / 1.3 * gradient.mT @ gradient)


# ------------------------------------------------------------- losses as users write them, one each

PICKED = torch.arange(N) % 3 != 0
W = torch.linspace(0.1, 1.7, N, dtype=torch.double)
CLASSES = torch.linspace(0.3, 1.5, C, dtype=torch.double)
REAL = torch.sin(torch.arange(N * C, dtype=torch.double)).view(N, C)
BITS = (REAL > 0).double()
PLACES = torch.arange(N)


def focal_of_a_call(z: Tensor, t: Tensor) -> Tensor:
    each = ce(z, t, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def generalized(z: Tensor, t: Tensor) -> Tensor:
    return ((1 - torch.exp(-ce(z, t, reduction="none")) ** 0.7) / 0.7).mean()


def divided_by_a_call(z: Tensor, t: Tensor) -> Tensor:
    return -(2 / (1 + ce(z, t, reduction="none"))).mean()


def hand_mask(z: Tensor, t: Tensor) -> Tensor:
    return (F.mse_loss(z, REAL, reduction="none") * BITS).sum() / BITS.sum()


def elbo_like(z: Tensor, t: Tensor) -> Tensor:
    mean, log_var = z[:, :3], z[:, 3:]
    kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
    return F.mse_loss(mean, REAL[:, :3]) + 0.1 * kl


def tasks_over_their_own_size(z: Tensor, t: Tensor) -> Tensor:
    first, second = ce(z[:, :3], t % 3), ce(z[:, 3:], t % 3)
    return first / first.detach() + second / second.detach()


def pseudo_labels(z: Tensor, t: Tensor) -> Tensor:
    sure = z[6:].softmax(-1).amax(-1) > 0.25
    return ce(z[:6], t[:6]) + (ce(z[6:], z[6:].argmax(-1), reduction="none") * sure).mean()


WRITTEN: dict[str, Loss] = {
    "weighted examples": lambda z, t: (ce(z, t, reduction="none") * W).sum() / W.sum(),
    "weights as a product of vectors": lambda z, t: W @ ce(z, t, reduction="none") / N,
    "einsum": lambda z, t: torch.einsum("n,n->", W, ce(z, t, reduction="none")),
    "picked log_softmax": lambda z, t: -z.log_softmax(-1)[PLACES, t].mean(),
    "logsumexp": lambda z, t: (z.logsumexp(-1) - z[PLACES, t]).mean(),
    "log of a softmax": lambda z, t: F.nll_loss(z.softmax(-1).log(), t),
    "smoothing, class weights, ignored": lambda z, t: ce(
        z, t.where(PICKED, -100), weight=CLASSES, label_smoothing=0.1
    ),
    "all but one ignored": lambda z, t: ce(z, t.where(PLACES == 4, -100)),
    "soft labels, smoothed and weighted": lambda z, t: ce(
        z, REAL.softmax(-1), weight=CLASSES, label_smoothing=0.2
    ),
    "adjusted logits": lambda z, t: ce(z + CLASSES.log(), t),
    "a class that is left out": lambda z, t: ce(z.masked_fill(PLACES[:C] == 5, -torch.inf), t % 5),
    "a further class of zeros": lambda z, t: ce(torch.cat([torch.zeros(N, 1), z], 1), t),
    "mean of the hardest": lambda z, t: ce(z, t, reduction="none").topk(4).values.mean(),
    "the worse of two groups": lambda z, t: torch.stack([ce(z[:6], t[:6]), ce(z[6:], t[6:])]).max(),
    "flooding": lambda z, t: (ce(z, t) - 0.1).abs() + 0.1,
    "clipped": lambda z, t: ce(z, t, reduction="none").clamp(max=2.0).mean(),
    "labels from detached logits": lambda z, t: (
        0.8 * ce(z, t) + 0.2 * ce(z, z.detach().softmax(-1))
    ),
    "rows in another order": lambda z, t: ce(z.flip(0), t.flip(0)),
    "rows twice": lambda z, t: ce(torch.cat([z, z]), torch.cat([t, (t + 1) % C])),
    "a loop over examples": lambda z, t: sum((ce(z[n], t[n]) for n in range(N)), torch.zeros(())),
    "vmap": lambda z, t: torch.vmap(ce)(z, t).mean(),
    "columns one by one": lambda z, t: sum(
        (F.binary_cross_entropy_with_logits(z[:, c], BITS[:, c]) for c in range(C)),
        torch.zeros(()),
    ),
    "probabilities": lambda z, t: F.binary_cross_entropy(z.sigmoid(), BITS),
    "log-odds that add up": lambda z, t: F.binary_cross_entropy_with_logits(z.cumsum(1), BITS),
    "the difference of two logits": lambda z, t: F.binary_cross_entropy_with_logits(
        z[:, 0] - z[:, 1], BITS[:, 0]
    ),
    "poisson": lambda z, t: F.poisson_nll_loss(z, BITS + 1),
    "gaussian with a variance": lambda z, t: F.gaussian_nll_loss(
        z[:, :3], REAL[:, :3], F.softplus(z[:, 3:]) + 0.1
    ),
    "cosine": lambda z, t: (1 - F.cosine_similarity(z, REAL)).mean(),
    "dice of each example": lambda z, t: (
        1 - 2 * (z.sigmoid() * BITS).sum(1) / (z.sigmoid() + BITS).sum(1)
    ).mean(),
    "a distribution's log_prob": lambda z, t: (
        -torch.distributions.Categorical(logits=z).log_prob(t).mean()
    ),
    "squares with a mask": hand_mask,
    "squares with a mask by index": lambda z, t: F.mse_loss(z[BITS > 0], REAL[BITS > 0]),
    "squares of scaled outputs": lambda z, t: F.mse_loss(z * CLASSES + 1, REAL),
    "squares of mixed outputs": lambda z, t: F.mse_loss(z @ (REAL.mT @ REAL), REAL),
    "evidence": elbo_like,
    "tasks over their own size": tasks_over_their_own_size,
    "pseudo labels": pseudo_labels,
    "focal, of a call": focal_of_a_call,
    "generalized, of a call": generalized,
    "a number divided by a call": divided_by_a_call,
}


@pytest.mark.parametrize("loss", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_loss_as_it_is_written_has_the_positive_part_of_its_hessians(loss: Loss):
    model, logits, y = factor(loss, "fisher_exact")
    whole = torch.autograd.functional.hessian(lambda z: loss(z, y), logits)
    values, vectors = torch.linalg.eigh(torch.stack([whole[i, :, i] for i in range(N)]))
    expected = vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT
    assert_equal(model[0].fisher.kron.B, expected.sum(0))


CURVED: dict[str, tuple[Callable[[Tensor], Tensor], Loss]] = {
    "capped logits": (lambda z: 3 * torch.tanh(z / 3), ce),
    "normed logits": (lambda z: 5 * F.normalize(z, dim=-1), ce),
    "centred and scaled logits": (lambda z: F.layer_norm(z, (C,)), ce),
    "squares of probabilities": (torch.sigmoid, lambda z, t: F.mse_loss(z, BITS)),
}


@pytest.mark.parametrize(("function", "loss"), CURVED.values(), ids=CURVED.keys())
def test_a_call_of_a_function_of_the_logits_has_its_gauss_newton_matrix(
    function: Callable[[Tensor], Tensor], loss: Loss
):
    model, logits, y = factor(lambda z, t: loss(function(z), t), "fisher_exact")
    hessian = torch.func.hessian(loss)(function(logits), y)
    J = torch.func.jacrev(function)(logits)
    parts = [J[n, :, n].mT @ hessian[n, :, n] @ J[n, :, n] for n in range(N)]
    assert_equal(model[0].fisher.kron.B, torch.stack(parts).sum(0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: F.mse_loss(z, REAL).sqrt(),
        lambda z, t: ce(z, t).log(),
        lambda z, t: ce(z[:, :3], t % 3) * ce(z[:, 3:], t % 3),
        lambda z, t: ce(z, t, reduction="none").logsumexp(0),
        lambda z, t: ce(z - z.mean(0), t),
    ],
    ids=["root of a mean", "log of a mean", "product of tasks", "tilted", "centred over the batch"],
)
def test_a_curved_function_of_all_terms_mixes_rows(loss: Loss):
    with pytest.raises(ValueError, match=r"mixes rows.*fisher_emp"):
        factor(loss, "fisher_exact")
    model, logits, y = factor(loss, "fisher_emp")  # the remedy
    gradient, B = torch.func.grad(loss)(logits, y), model[0].fisher.kron.B
    expected = gradient.mT @ gradient
    assert_equal(B / B.trace(), expected / expected.trace())


# ------------------------------------------------------------------------- mse_loss and its weight

HAS_WEIGHT = pytest.mark.skipif(
    "weight" not in inspect.signature(F.mse_loss).parameters, reason="mse_loss without a weight"
)
SQUARE_WEIGHT = (W[:, None] * CLASSES).where(BITS > 0, 0.0)


@HAS_WEIGHT
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_of_weighted_squares_divides_by_the_sum_of_the_weights(reduction: str, scale: float):
    """In F.mse_loss, but not in F.binary_cross_entropy_with_logits."""

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return scale * F.mse_loss(z, REAL, weight=SQUARE_WEIGHT, reduction=reduction)

    total = SQUARE_WEIGHT.sum() if reduction == "mean" else 1.0
    model, *_ = factor(loss, "fisher_exact")
    expected = torch.diag(2 * scale * SQUARE_WEIGHT.sum(0) / total)
    assert_equal(model[0].fisher.kron.B, expected)


@HAS_WEIGHT
def test_the_empirical_fisher_of_weighted_squares_is_that_of_squares_weighted_by_hand():
    """The scale is one of the terms that are left in; torch's weight belongs to the term."""

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(z, REAL, weight=SQUARE_WEIGHT)

    model, logits, y = factor(loss, "fisher_emp")
    gradient = torch.func.grad(loss)(logits, y)
    assert_equal(model[0].fisher.kron.B, BITS.sum() * gradient.mT @ gradient)


# -------------------------------------------- a tied embedding, smoothed labels, positions left out


class TiedLanguageModel(nn.Module):
    """The head has the embedding's weight, and is left out; the layer between has curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(C, D), nn.Linear(D, D)
        self.head = nn.Linear(D, C)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embed(ids))))


def smoothed(z: Tensor, t: Tensor) -> Tensor:
    return ce(z.flatten(0, 1), t.flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp", "fisher_mc"])
def test_a_tied_embedding_with_smoothed_labels_and_ignored_positions(fisher_type: str):
    model, ids = TiedLanguageModel(), torch.randint(C, (3, 4))
    t = torch.randint(C, (3, 4))
    t[0, :3], t[2, 1] = -100, -100
    config: Any = FisherConfig(fisher_type, ["kron"], shared_dim="expand")
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(smoothed, maker.setup_model_call(model, ids), t)
    draws = []
    for _ in range(60 if fisher_type == "fisher_mc" else 1):
        maker.forward_and_backward()
        draws.append(model.layer.fisher.kron.B)
    assert not hasattr(model.head, "fisher") and not hasattr(model.embed, "fisher")

    def loss_of(outputs: Tensor) -> Tensor:
        return smoothed(model.head(torch.tanh(outputs)), t)

    inputs = model.embed(ids).detach()
    outputs = model.layer(inputs).detach()
    if fisher_type == "fisher_emp":  # a term for each of the eight labelled positions
        gradient = torch.func.grad(loss_of)(outputs).flatten(0, 1)
        expected = 8 * gradient.mT @ gradient
    else:
        logits = model.head(torch.tanh(outputs)).detach()
        hessian = torch.func.hessian(smoothed)(logits, t)
        J = model.head.weight * (1 - torch.tanh(outputs) ** 2).unsqueeze(-2)
        parts = [J[n, r].mT @ hessian[n, r, :, n, r] @ J[n, r] for n in range(3) for r in range(4)]
        expected = torch.stack(parts).sum(0)
    expected, found = expected.detach(), torch.stack(draws)
    if fisher_type == "fisher_mc":
        error = found.std(0) / len(draws) ** 0.5
        assert error.norm() < 0.25 * expected.norm(), "too few samples to tell"
        assert ((found.mean(0) - expected).abs() <= 5 * error).all()
    else:
        assert_equal(found[0], expected)
    kept = inputs.flatten(0, 1)
    assert_equal(model.layer.fisher.kron.A, kept.mT @ kept / len(kept))
