"""laplace-torch on ASDL's backend: its posterior has the exact blocks where K-FAC-reduce is
exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

import asdl_ws_plugin  # noqa: F401
from asdl_ws_plugin._torchvision import make_importable
from asdl_ws_plugin.upstream import is_native

make_importable()  # torchmetrics, which laplace-torch needs, looks for torchvision
laplace = pytest.importorskip("laplace")
curvature = pytest.importorskip("laplace.curvature")

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 12, 5, 3, 2
BATCH = 4


class Pooled(nn.Module):
    """Two layers over positions, the mean over them, and a head: linear, so that K-FAC-reduce is
    exact (prop. 3.5).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, 4), nn.Linear(4, 3), nn.Linear(3, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)).mean(1))


def fit(
    model: nn.Module,
    likelihood: str,
    structure: str,
    x: torch.Tensor,
    y: torch.Tensor,
    **options: Any,
) -> Any:
    approximation = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights="all",
        hessian_structure=structure,
        backend=curvature.AsdlGGN,
        asdl_fisher_kwargs=options,
    )
    approximation.fit(DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return approximation


def exact_blocks(model: nn.Module, likelihood: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The GGN of the loss summed over the examples (with 1/2 for the squared error), a block for
    each parameter.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    if likelihood == "classification":
        probs = torch.softmax(model(x), -1).detach()
        hessians = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    else:
        hessians = torch.eye(C).expand(N, C, C)
    return {
        name: torch.einsum("ncp,ncd,ndq->pq", j.flatten(2), hessians, j.flatten(2))
        for name, j in jacobians.items()
    }


def data(likelihood: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, R, D), torch.randn(N, C) if likelihood == "regression" else torch.randint(
        C, (N,)
    )


def blocks_of(matrix: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    found, start = {}, 0
    for name, p in model.named_parameters():
        part = slice(start, start + p.numel())
        found[name], start = (
            matrix[part, part] if matrix.ndim == 2 else matrix[part],
            start + p.numel(),
        )
    return found


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_the_diagonal_posterior_has_the_exact_diagonal(likelihood: str) -> None:
    model, (x, y) = nn.Sequential(Pooled(), nn.Tanh(), nn.Linear(C, C)), data(likelihood)
    found = blocks_of(fit(model, likelihood, "diag", x, y, shared_dim="reduce").H.detach(), model)
    for name, block in exact_blocks(model, likelihood, x).items():
        torch.testing.assert_close(found[name], block.diagonal(), rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")  # upstream's own
def test_the_kronecker_posterior_has_the_exact_blocks_of_a_linear_network() -> None:
    model, (x, y) = Pooled(), data("regression")
    expected = exact_blocks(model, "regression", x)

    def errors(shared_dim: str | None) -> dict[str, float]:
        posterior = fit(model, "regression", "kron", x, y, shared_dim=shared_dim)
        found = blocks_of(posterior.H_facs.to_matrix().detach(), model)
        return {
            name: float((found[name] - block).norm() / block.norm())
            for name, block in expected.items()
        }

    assert max(errors("reduce").values()) < 1e-10
    assert errors("expand")["first.weight"] > 0.1
    assert errors(None)["first.weight"] > (
        0.1 if is_native() else 1
    )  # stock ASDL's A lacks 1/R, too
    assert max(value for name, value in errors("expand").items() if name.startswith("head")) < 1e-10


@pytest.mark.filterwarnings(
    "ignore:.*does not support backprop through the functional variance:UserWarning"
)
def test_layers_without_kronecker_factors_are_frozen_first() -> None:
    """As docs/training.md says: laplace-torch knows no unit-wise blocks."""
    model, (x, y) = (
        nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), Pooled()),
        data("classification"),
    )
    model[2].first = nn.Linear(4, 4)
    model[1].requires_grad_(False)
    posterior = fit(model, "classification", "kron", x, y, shared_dim="reduce")
    probs = posterior(x)
    assert probs.shape == (N, C)
    torch.testing.assert_close(probs.sum(-1), torch.ones(N))
