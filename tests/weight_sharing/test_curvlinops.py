"""Factors against curvlinops, on a small transformer and a CNN, wherever the two definitions agree.

They differ where a loss has several terms for an example and the layer's positions mix afterwards:
curvlinops then back-propagates one column of all terms' Hessian roots at once; the oracle there is
autograd, in :mod:`test_fisher_types`. The empirical Fisher is one backward pass in both, so it
agrees everywhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvlinops import KFACLinearOperator
from oracles.autograd import BCE, CE, MSE, assert_equal, computed_fisher, rel_error
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")

N, R, C = 3, 4, 3
LOSSES: dict[str, Any] = {CE: nn.CrossEntropyLoss, MSE: nn.MSELoss, BCE: nn.BCEWithLogitsLoss}


class Block(nn.Module):
    """Pre-norm attention with two heads and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim, bias=False)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts for every token, for a class token, or for the mean of all tokens."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.cls = nn.Parameter(torch.randn(1, 1, 6)) if head == "cls" else None
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, C)
        self.kind = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(x)
        return self.head({"tokens": x, "cls": x[:, 0], "mean": x.mean(1)}[self.kind])


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(4, 4, (2, 3), dilation=(2, 1), bias=False)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))


class ClassesSecond(nn.Module):
    """``(N, C, R)``, which torch's cross-entropy takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def target_for(loss_type: str, *sizes: int) -> Tensor:
    if loss_type == CE:
        return torch.randint(C, sizes)
    target = torch.rand(*sizes, C)
    return target.round() if loss_type == BCE else target


def curvlinops_factors(
    model: nn.Module,
    layer: nn.Module,
    loss: nn.Module,
    x: Tensor,
    target: Tensor,
    approximation: str,
    fisher_type: str,
) -> tuple[Tensor, Tensor]:
    """A without the row and column of the bias, and B, of one layer."""
    operator = KFACLinearOperator(
        model,
        loss,
        list(layer.parameters()),
        [(x, target)],
        fisher_type=fisher_type,
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    (A,), (B,) = operator._input_covariances.values(), operator._gradient_covariances.values()
    size = layer.weight[0].numel()
    return A[:size, :size], B


def divisor_of_B(loss_type: str, reduction: str, num_terms: int) -> float:
    """curvlinops' B is that of the loss, ours with ``data_size=1`` that of the summed one."""
    if reduction == "sum":
        return 1
    return num_terms * (1 if loss_type == CE else C)


def our_factors(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    loss_type: str,
    reduction: str,
    shared_dim: str,
    fisher_type: str,
) -> None:
    loss = LOSSES[loss_type](reduction=reduction)

    def rows(y: Tensor) -> Tensor:
        return loss(
            y.reshape(-1, C), target.flatten() if loss_type == CE else target.reshape(-1, C)
        )

    # The Hessian of a squared error is 2; a Gaussian of variance 1/2 has that loss.
    computed_fisher(
        model,
        x,
        shared_dim,
        (rows,),
        loss_type=loss_type,
        fisher_type=fisher_type,
        data_size=1,
        var=0.5,
        ignore_modules=[nn.LayerNorm],
    )


OPTIONS = [
    pytest.mark.parametrize("shared_dim", ["expand", "reduce"]),
    pytest.mark.parametrize("reduction", ["mean", "sum"]),
    pytest.mark.parametrize("loss_type", [CE, MSE, BCE]),
]


def crossed(test: Any) -> Any:
    for mark in OPTIONS:
        test = mark(test)
    return test


@crossed
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("kind", ["cls", "mean", "cnn"])
def test_factors_are_those_of_curvlinops_in_the_reduce_setting(
    kind: str, fisher_type: str, loss_type: str, reduction: str, shared_dim: str
):
    model: nn.Module = CNN() if kind == "cnn" else Transformer(kind)
    x, target = (
        torch.randn(N, 2, 7, 6) if kind == "cnn" else torch.randn(N, R, 3),
        target_for(loss_type, N),
    )
    ours = {"type-2": "fisher_exact", "empirical": "fisher_emp"}[fisher_type]
    our_factors(model, x, target, loss_type, reduction, shared_dim, ours)
    loss = LOSSES[loss_type](reduction=reduction)
    layers = layers_of(model)
    assert len(layers) == (3 if kind == "cnn" else 14)
    for name, layer in layers.items():
        A, B = curvlinops_factors(model, layer, loss, x, target, shared_dim, fisher_type)
        assert_equal(layer.fisher.kron.A / N, A)
        if (
            name.endswith(".k") and shared_dim == "reduce"
        ):  # a softmax does not see what all keys have in common
            assert layer.fisher.kron.B.norm() < 1e-20 and B.norm() < 1e-20
        else:
            assert_equal(layer.fisher.kron.B / divisor_of_B(loss_type, reduction, N), B)


# The last queries (section 3.2) and what follows the last attention: output r depends on position r
# alone.
TOKENWISE = ("blocks.1.q", "blocks.1.proj", "blocks.1.fc1", "blocks.1.fc2", "head")


@crossed
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_factors_are_those_of_curvlinops_in_the_expand_setting(
    fisher_type: str, loss_type: str, reduction: str, shared_dim: str
):
    model = Transformer("tokens")
    x, target = torch.randn(N, R, 3), target_for(loss_type, N, R)
    theirs = ClassesSecond(model) if loss_type == CE else model
    ours = {"type-2": "fisher_exact", "empirical": "fisher_emp"}[fisher_type]
    our_factors(model, x, target, loss_type, reduction, shared_dim, ours)
    loss = LOSSES[loss_type](reduction=reduction)
    for name, layer in layers_of(model).items():
        A, B = curvlinops_factors(theirs, layer, loss, x, target, shared_dim, fisher_type)
        B = B * divisor_of_B(loss_type, reduction, N * R)
        assert_equal(layer.fisher.kron.A / N, A)
        if name.endswith(".k") and shared_dim == "reduce":
            assert layer.fisher.kron.B.norm() < 1e-20
        elif fisher_type == "empirical" or (shared_dim == "expand" and name in TOKENWISE):
            assert_equal(layer.fisher.kron.B, B)
        else:  # the definitions differ: products of different terms
            assert rel_error(layer.fisher.kron.B, B) > 1e-3


@pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["tokens", "cls", "cnn"])
def test_forward_only_factors_are_those_of_curvlinops_to_their_scale(kind: str, shared_dim: str):
    """B is the identity times the number of examples over data_size in one, without any scale in
    the other.
    """
    model: nn.Module = CNN() if kind == "cnn" else Transformer(kind)
    x = torch.randn(N, 2, 7, 6) if kind == "cnn" else torch.randn(N, R, 3)
    target = target_for(MSE, N, R) if kind == "tokens" else target_for(MSE, N)
    our_factors(model, x, target, MSE, "sum", shared_dim, "fisher_forward_only")
    for layer in layers_of(model).values():
        A, B = curvlinops_factors(
            model, layer, nn.MSELoss(reduction="sum"), x, target, shared_dim, "forward-only"
        )
        assert_equal(layer.fisher.kron.A / N, A)
        assert torch.equal(layer.fisher.kron.B / N, B)
