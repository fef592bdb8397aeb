"""Oracles: blocks, Kronecker factors and per-example gradients, brute force from autograd in
float64.

The oracles do not use the package, or hooks on gradients. Sizes: N examples, R positions of a
layer, R' loss terms of
an example, C outputs of a term, P and Q a layer's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from asdl_ws_plugin.weight_sharing.capture import Layer, recording
from asdl_ws_plugin.weight_sharing.registry import is_supported
from oracles.layers import perturbed, rows_of, seen_by

CE, MSE, BCE = "cross_entropy", "mse", "binary_cross_entropy"


def rel_error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).norm() / expected.norm()).item()


def assert_equal(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    error = rel_error(actual, expected)
    assert error < tol, f"relative error {error:.2e}"


def covariance(size: int) -> Tensor:
    """A random, well-conditioned covariance matrix with correlations."""
    root = torch.randn(size, size)
    return root @ root.T / size + 0.5 * torch.eye(size)


# -------------------------------------------------------------------------------------- likelihoods


def negative_log_likelihood(loss_type: str, var: Any = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Of one term: a function of its logits ``(C,)`` and its label."""
    if loss_type == CE:
        return lambda z, y: F.cross_entropy(z, y)
    if loss_type == BCE:
        return lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum")

    def gaussian(z: Tensor, y: Tensor) -> Tensor:
        cov = torch.as_tensor(var, dtype=z.dtype)
        cov = cov if cov.ndim == 2 else torch.diag(cov.expand(len(z)))
        return (z - y) @ torch.linalg.inv(cov) @ (z - y) / 2

    return gaussian


def loss_hessians(logits: Tensor, loss_type: str, var: Any = 1.0) -> Tensor:
    """Λ of every term by double differentiation. ``(N, R', C) -> (N, R', C, C)``."""
    nll = negative_log_likelihood(loss_type, var)
    label = torch.zeros((), dtype=torch.long) if loss_type == CE else torch.zeros(logits.shape[-1])
    flat = logits.detach().reshape(-1, logits.shape[-1])
    return vmap(lambda z: hessian(nll)(z, label))(flat).view(*logits.shape, logits.shape[-1])


# ---------------------------------------------------------------------------------------- Jacobians


def _rows_of(logits: Tensor) -> Tensor:
    """Logits ``(1, C)``, ``(1, *, C)`` of one example, or ``(R', C)`` of a model that flattens, as
    ``(R', C)``.
    """
    return logits.reshape(-1, logits.shape[-1])


def terms_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all terms ``(N, R', C)``, example by example."""
    with torch.no_grad():
        return torch.stack([_rows_of(model(x[n : n + 1])) for n in range(len(x))])


def parameter_jacobians(model: nn.Module, parameter: str, x: Tensor) -> Tensor:
    """Of the logits with respect to a parameter, flattened by rows: ``(N, R', C, numel)``."""
    value = model.get_parameter(parameter).detach()

    def logits(p: Tensor, example: Tensor) -> Tensor:
        return _rows_of(functional_call(model, {parameter: p}, (example.unsqueeze(0),)))

    return vmap(jacrev(logits), (None, 0))(value, x).flatten(3)


def output_jacobians(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """``b_{n,r,m}``ᵀ of eq. 3.4: of the logits with respect to the layer's outputs, ``(N, R', C, R,
    Q)``.

    A layer that is called several times has its calls' positions one after the other.
    """
    _, jacobians = seen_by(module, lambda n: model(x[n : n + 1]), len(x))
    return torch.stack(jacobians).unflatten(1, terms_of(model, x).shape[1:])


def layer_inputs(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """What the layer's weight is multiplied with: ``(N, R, P)``."""
    result = []
    for n in range(len(x)):
        with perturbed([module]) as seen, torch.no_grad():
            model(x[n : n + 1])
        result.append(torch.cat([rows_of(module, a) for _, a, _ in seen]))
    return torch.stack(result)


# ------------------------------------------------------------------------------- blocks and factors


def exact_block(
    model: nn.Module,
    parameter: str,
    x: Tensor,
    loss_type: str,
    var: Any = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """``Σ_n Σ_r Jᵀ Λ J`` of one parameter, eq. 3.5: ``(numel, numel)``; terms weighted by ``weight
    (N, R')``.
    """
    jacobians = parameter_jacobians(model, parameter, x)
    lambdas = loss_hessians(terms_of(model, x), loss_type, var)
    if weight is not None:
        lambdas = lambdas * weight.reshape(*lambdas.shape[:2], 1, 1)
    return torch.einsum("nrcp,nrcd,nrdq->pq", jacobians, lambdas, jacobians)


@dataclass
class Factors:
    """Sums over the examples, not divided by D."""

    A: Tensor
    B: Tensor

    @property
    def block(self) -> Tensor:
        """In the order of a weight flattened by rows."""
        return torch.kron(self.B.contiguous(), self.A.contiguous())


def assert_factors(
    module: Any,
    expected: Factors | tuple[Tensor, Tensor],
    data_size: float = 1.0,
    rtol: float = 1e-10,
) -> None:
    """The layer's Kronecker factors are the expected ones over ``data_size``, to ``rtol`` of their
    largest element.
    """
    A, B = (expected.A, expected.B) if isinstance(expected, Factors) else expected
    for name, found, want in (("A", module.fisher.kron.A, A), ("B", module.fisher.kron.B, B)):
        assert found.shape == want.shape, (name, found.shape, want.shape)
        scale = want.abs().max() / data_size
        assert scale > 0, f"{name}: a factor of zeros tests nothing"
        error = (found.double() - want / data_size).abs().max() / scale
        assert error < rtol, f"{name} is off by {error:.2e}"


def factor_A(a: Tensor, strategy: str) -> Tensor:
    """The table of the factors, from ``(N, R, P)``."""
    if strategy == "expand":
        return sum(row.outer(row) for example in a for row in example) / a.shape[1]
    return sum(example.mean(0).outer(example.mean(0)) for example in a)


def oracle_factors(
    model: nn.Module,
    module: nn.Module,
    x: Tensor,
    strategy: str,
    loss_type: str = CE,
    var: Any = 1.0,
    weight: Tensor | None = None,
) -> Factors:
    """Eq. 3.7 and 3.19 with the terms of the loss independent of each other; see also
    :func:`exact_block`.
    """
    b = output_jacobians(model, module, x)  # N R' C R Q
    lambdas = loss_hessians(terms_of(model, x), loss_type, var)
    if weight is not None:
        lambdas = lambdas * weight.reshape(*lambdas.shape[:2], 1, 1)
    if strategy == "reduce":
        b = b.sum(3, keepdim=True)
    B = torch.einsum("nrcmp,nrcd,nrdmq->pq", b, lambdas, b)
    return Factors(factor_A(layer_inputs(model, module, x), strategy), B)


def example_grads(
    model: nn.Module, parameter: str, loss_of: Callable[[Tensor, int], Tensor], x: Tensor
) -> Tensor:
    """Gradient of every example's loss ``loss_of(model(x[n:n+1]), n)``: ``(N, numel)``."""
    grads = []
    for n in range(len(x)):
        (grad,) = torch.autograd.grad(
            loss_of(model(x[n : n + 1]), n), model.get_parameter(parameter)
        )
        grads.append(grad.flatten())
    return torch.stack(grads)


# ------------------------------------------------------------------------------- the package's side


def run_fisher(
    model: nn.Module,
    config: FisherConfig,
    loss: tuple[Any, ...] | None,
    *args: Any,
    call: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Compute the curvature of one batch by ``get_fisher_maker`` and return the maker.

    Args:
        loss: a function and its targets; ``None`` where the Fisher needs none.
        call: what is called with the arguments, the model unless given.
    """
    maker = get_fisher_maker(model, config)
    logits = maker.setup_model_call(model if call is None else call, *args, **kwargs)
    if loss is not None:
        maker.setup_loss_call(loss[0], logits, *loss[1:])
    maker.forward_and_backward()
    return maker


def computed_fisher(
    model: nn.Module,
    x: Tensor,
    shared_dim: Any,
    loss: tuple[Any, ...] | None = None,
    shapes: Any = "kron",
    **config: Any,
) -> Any:
    """Compute the curvature by ``get_fisher_maker`` and return the maker; ``loss``: a function and
    its targets.
    """
    config = {"fisher_type": "fisher_exact", "loss_type": CE, "data_size": len(x), **config}
    return run_fisher(
        model, FisherConfig(fisher_shapes=shapes, shared_dim=shared_dim, **config), loss, x
    )


# ------------------------------------------------------------------------------------------- models


class Tokenwise(nn.Module):
    """Layers one after the other, ``(N, *, P) -> (N, *, C)``; with ``pool`` the mean over the
    positions.
    """

    def __init__(self, *layers: nn.Module, pool: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x.flatten(1, -2).mean(1) if self.pool else x


class SelfAttention(nn.Module):
    """One head with a softmax and an output layer: ``(N, R, P) -> (N, R, C)`` or, with ``pool``,
    ``(N, C)``.

    The tanh keeps the sum of the keys' gradients away from zero: a softmax does not see what all
    keys have in common.
    """

    def __init__(
        self, dim: int = 4, num_classes: int = 3, pool: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, num_classes, bias=bias)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(self.q(x) @ torch.tanh(self.k(x)).mT, -1) @ self.v(x)
        y = self.out(torch.tanh(y))
        return y.mean(1) if self.pool else y


# -------------------------------------------------------------------------- models before and after


def parameter_grads(model: nn.Module) -> dict[str, Tensor | None]:
    """Name -> gradient."""
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_grads(actual: nn.Module, expected: nn.Module, tol: float = 1e-12) -> None:
    """Equal gradients to ``tol`` of the largest one, parameter by parameter."""
    ours, theirs = parameter_grads(actual), parameter_grads(expected)
    assert list(ours) == list(theirs)
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
            continue
        error = (ours[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12)
        assert error < tol, f"{name}: relative error {error:.2e}"


def captured_weight_grads(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """``Σ b aᵀ`` from what the package's hooks saw of every ``nn.Linear``, and ``.grad`` from a
    backward pass.
    """
    layers = [
        Layer(name, module, "kron")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_supported(module)
    ]
    with recording(layers) as record:
        value = loss()
    calls = [(layer.name, call) for layer in layers for call in record.calls.get(layer.module, ())]
    edges = [call.edge for _, call in calls]
    grads = torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True)
    value.backward()
    captured: dict[str, Tensor] = {}
    for (name, call), grad in zip(calls, grads, strict=True):
        if grad is not None:
            product = grad.reshape(-1, grad.shape[-1]).mT @ call.in_data.reshape(
                -1, call.in_data.shape[-1]
            )
            captured[name] = captured[name] + product if name in captured else product
    return captured


def assert_captured(
    model: nn.Module, captured: dict[str, Tensor], without: tuple[str, ...] = ()
) -> None:
    """Every ``nn.Linear`` with a gradient was captured, and its gradient is reproduced."""
    checked = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not is_supported(module) or name in without:
            continue
        if module.weight.grad is not None:
            assert name in captured, f"{name} was not called"
            error = (captured[name] - module.weight.grad).norm() / module.weight.grad.norm().clamp(
                min=1e-12
            )
            assert error < 1e-10, f"{name}: relative error {error:.2e}"
            checked += 1
    assert checked
