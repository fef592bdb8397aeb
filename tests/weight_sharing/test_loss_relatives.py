"""Sums that users train with have the curvature of the whole loss, or are refused.

Ground truth is ``torch.func.hessian`` of the loss with respect to the logits, and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig
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
