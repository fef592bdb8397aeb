"""laplace-torch on ASDL's backend: its posterior has the exact blocks where K-FAC-reduce is
exact.
"""

from __future__ import annotations

import copy
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
backends = pytest.importorskip("asdl_ws_plugin.laplace")

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
    backend: Any = None,
    **options: Any,
) -> Any:
    approximation = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights="all",
        hessian_structure=structure,
        backend=backend or curvature.AsdlGGN,
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


# ------------------------------------------------------------------ the backends of this package


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_of_which_half_is_frozen_is_refused_by_name(part: str) -> None:
    model, (x, y) = Pooled(), data("classification")
    getattr(model.second, part).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"Layer 'second': its {part} is frozen.*or neither"):
        fit(model, "classification", "kron", x, y, backends.AsdlGGN, shared_dim="reduce")


def a_backend(name: str, model: nn.Module, likelihood: str) -> Any:
    model.output_size = C  # type: ignore[assignment]  # what laplace-torch finds out when it fits
    return getattr(backends, name)(model, likelihood)


@pytest.mark.parametrize("name", ["AsdlGGN", "AsdlEF"])
def test_jacobians_of_single_examples_are_those_of_autograd(name: str) -> None:
    model, (x, _) = nn.Sequential(Pooled(), nn.Tanh(), nn.Linear(C, C)), data("classification")
    found, output = a_backend(name, model, "classification").jacobians(x)
    torch.testing.assert_close(output, model(x).detach())
    for n in range(N):
        for c in range(C):
            grads = torch.autograd.grad(model(x[n : n + 1])[0, c], list(model.parameters()))
            expected = torch.cat([grad.flatten() for grad in grads])
            torch.testing.assert_close(found[n, c], expected, rtol=1e-10, atol=1e-14)


class Centred(nn.Module):
    """Every example depends on all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5 * x.mean(0)


class Branching(nn.Module):
    """What ``vmap`` does not know: a branch on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.sum() > 0 else x.cos()


@pytest.mark.parametrize("between", [Centred, Branching])
def test_jacobians_of_examples_that_depend_on_each_other(between: type[nn.Module]) -> None:
    model, (x, _) = nn.Sequential(Pooled(), between(), nn.Linear(C, C)).eval(), data("regression")
    found, output = a_backend("AsdlGGN", model, "regression").jacobians(x)
    together = model(x)
    torch.testing.assert_close(output, together.detach())
    for n in range(N):
        for c in range(C):
            grads = torch.autograd.grad(together[n, c], list(model.parameters()), retain_graph=True)
            expected = torch.cat([grad.flatten() for grad in grads])
            torch.testing.assert_close(found[n, c], expected, rtol=1e-10, atol=1e-14)


def test_jacobians_are_taken_of_one_example_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by laplace-torch's way, N times as much work; of a subnetwork, too."""
    model, (x, _) = Pooled().eval(), data("regression")
    backend = a_backend("AsdlGGN", model, "regression")
    whole, _ = curvature.CurvatureInterface.jacobians(backend, x)
    monkeypatch.setattr(curvature.CurvatureInterface, "jacobians", None)
    torch.testing.assert_close(backend.jacobians(x)[0], whole)
    torch.testing.assert_close(backend.functorch_jacobians(x)[0], whole)  # as in predictions
    backend.subnetwork_indices = torch.tensor([0, 5, 11])
    torch.testing.assert_close(backend.jacobians(x)[0], whole[..., [0, 5, 11]])


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_gradients_of_single_examples_are_those_of_autograd(likelihood: str) -> None:
    model, (x, y) = nn.Sequential(Pooled(), nn.Tanh(), nn.Linear(C, C)), data(likelihood)
    backend = a_backend("AsdlEF", model, likelihood)
    found, total = backend.gradients(x, y)
    losses = [backend.lossfunc(model(x[n : n + 1]), y[n : n + 1]) for n in range(N)]
    torch.testing.assert_close(total, torch.stack(losses).sum().detach())
    for n in range(N):
        grads = torch.autograd.grad(losses[n], list(model.parameters()))
        expected = torch.cat([grad.flatten() for grad in grads])
        torch.testing.assert_close(found[n], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_the_empirical_diagonal_is_the_sum_of_squared_gradients(likelihood: str) -> None:
    """In laplace-torch's scale: half of it for the squared error, which has no 1/2 of its own."""
    model, (x, y) = Pooled(), data(likelihood)
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for n in range(N):
        z = model(x[n : n + 1])
        if likelihood == "regression":
            loss = (z - y[n : n + 1]).square().sum()
        else:
            loss = nn.functional.cross_entropy(z, y[n : n + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected += torch.cat([grad.flatten() for grad in grads]).square()
    backend = a_backend("AsdlEF", model, likelihood)
    _, found = backend.diag(x, y, N=N, shared_dim="reduce")
    expected *= 0.5 if likelihood == "regression" else 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings(
    "ignore:.*does not support backprop through the functional variance:UserWarning"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_has_the_kronecker_posterior_of_its_float32_copy(
    dtype: torch.dtype,
) -> None:
    """Predictions, the marginal likelihood and samples, where laplace-torch alone raises."""
    torch.set_default_dtype(torch.float32)
    model, (x, y) = Pooled(), data("classification")
    half = copy.deepcopy(model).to(dtype)
    model.load_state_dict(half.state_dict())  # the same, rounded weights
    posteriors = [
        fit(m, "classification", "kron", inputs, y, backends.AsdlGGN, shared_dim="reduce")
        for m, inputs in ((model, x.to(dtype).float()), (half, x.to(dtype)))
    ]
    assert all(p.H.eigenvalues[0][0].dtype is torch.float32 for p in posteriors)
    tolerance: dict[str, float] = {"rtol": 0.05, "atol": 8 * torch.finfo(dtype).eps}
    expected, found = (p(x.to(dtype).to(next(p.model.parameters()))) for p in posteriors)
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, **tolerance)
    expected, found = (p.log_marginal_likelihood() for p in posteriors)
    torch.testing.assert_close(found.float(), expected, **tolerance)
    samples = posteriors[1].sample(3)
    assert samples.dtype is dtype and samples.isfinite().all()
