"""laplace-torch's ASDL backends, for models with weight sharing and in half precision.

Not imported by the package; it needs ``pip install laplace-torch``. Use the backends in place of
those of the same names in ``laplace.curvature``, where these differ:

- Jacobians and gradients of single examples are ``torch.func``'s, which knows about weight
  sharing. laplace-torch 0.3 gets them from ``asdl.gradient.batch_gradient(batch_size=...)``, an
  argument that ASDL 0.1a5 does not have (0.1a4 has it, and treats positions as examples).
  Jacobians are taken of one example at a time where that is possible: N times as fast for N.
- Kronecker factors of a model in half precision stay in float32, and what is multiplied with them
  comes back in the model's dtype. laplace-torch multiplies the two as they are, which fails.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace import curvature
from laplace.curvature import CurvatureInterface
from laplace.utils.matrix import Kron, KronDecomposed
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from .weight_sharing.errors import LayerError

__all__ = ["AsdlEF", "AsdlGGN"]


class _MixedKron(Kron):
    """Kronecker factors of a dtype of their own, whatever is multiplied with them."""

    def __add__(self, other: Kron) -> Kron:
        return _MixedKron(super().__add__(other).kfacs)

    def __mul__(self, scalar: Any) -> Kron:
        return _MixedKron(super().__mul__(scalar).kfacs)

    # Called first where a plain Kron is on the left, as a subclass's reflected methods are.
    __radd__ = __add__
    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        return _mixed(super().decompose(damping))


class _MixedKronDecomposed(KronDecomposed):
    """The eigendecomposition of :class:`_MixedKron`, a prior precision added or not."""

    def __add__(self, deltas: Tensor) -> KronDecomposed:
        return _mixed(super().__add__(deltas))

    def __mul__(self, scalar: Any) -> KronDecomposed:
        return _mixed(super().__mul__(scalar))

    __radd__ = __add__
    __rmul__ = __mul__

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        dtype = self.eigenvectors[0][0].dtype
        return super()._bmm(W.to(dtype), exponent).to(W.dtype)


def _mixed(decomposed: KronDecomposed) -> KronDecomposed:
    return _MixedKronDecomposed(
        decomposed.eigenvectors, decomposed.eigenvalues, decomposed.deltas, decomposed.damping
    )


def _check_biases(model: nn.Module) -> None:
    """Raise a LayerError for a layer of whose weight and bias one is frozen: laplace-torch takes a
    factor for each of both where one of them is trained.
    """
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            continue
        if weight.requires_grad != bias.requires_grad:
            frozen = "weight" if bias.requires_grad else "bias"
            raise LayerError(
                name,
                f"its {frozen} is frozen, but not all of it: laplace-torch has no Kronecker "
                "factors of half a layer",
                "Freeze both its weight and its bias, or neither.",
            )


class _WithWeightSharing:
    """What both backends have in common; in front of laplace-torch's own."""

    # Of the backend that this class stands in front of.
    model: nn.Module
    params_dict: dict[str, nn.Parameter]
    buffers_dict: dict[str, Tensor]
    subnetwork_indices: Tensor | None

    gradients = CurvatureInterface.gradients

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The Jacobians of the outputs ``(N, C, parameters)``, and the outputs ``(N, C)``.

        laplace-torch differentiates all outputs of a batch by the parameters and so computes N
        times as much as is needed. Where examples are tensors, and their outputs alone are those of
        the batch, each is differentiated for itself.

        Args:
            x: the inputs, N examples: a tensor ``(N, ...)`` or whatever the model takes.
            enable_backprop: whether the results can be differentiated by ``x``.
        """
        # A pass in training mode may change buffers, and has another dropout each time.
        if enable_backprop or not isinstance(x, Tensor) or self.model.training:
            return CurvatureInterface.jacobians(self, x, enable_backprop)

        def outputs(params: dict[str, Tensor], example: Tensor) -> tuple[Tensor, Tensor]:
            state = (params, self.buffers_dict)
            output = functional_call(self.model, state, (example.unsqueeze(0),)).squeeze(0)
            return output, output

        params = {name: p.detach() for name, p in self.params_dict.items()}
        try:
            found, output = vmap(jacrev(outputs, has_aux=True), (None, 0))(params, x)
            with torch.no_grad():
                together = self.model(x)
        except (IndexError, RuntimeError, ValueError):
            # Not of a single example, or what vmap does not know, as a branch on the data.
            return CurvatureInterface.jacobians(self, x, enable_backprop)
        if output.shape != together.shape or not torch.allclose(
            output, together, rtol=1e-3, atol=1e-3 * float(together.abs().max())
        ):  # Examples depend on each other, as the nodes of one graph do.
            return CurvatureInterface.jacobians(self, x, enable_backprop)
        jacobians = torch.cat([j.flatten(2) for j in found.values()], dim=2)
        if self.subnetwork_indices is not None:
            jacobians = jacobians[:, :, self.subnetwork_indices]
        return jacobians.detach(), output.detach()

    # What laplace-torch takes for linearized predictions, of backends with ASDL in their name.
    functorch_jacobians = jacobians

    def kron(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Kron]:
        _check_biases(self.model)  # type: ignore[attr-defined]
        loss, kron = super().kron(*args, **kwargs)  # type: ignore[misc]
        return loss, _MixedKron(kron.kfacs)


class AsdlGGN(_WithWeightSharing, curvature.AsdlGGN):
    """The generalized Gauss-Newton matrix, exact or (``stochastic=True``) of sampled labels.

    >>> import asdl_ws_plugin, torch
    >>> from asdl_ws_plugin._torchvision import make_importable
    >>> make_importable()
    >>> from asdl_ws_plugin.laplace import AsdlGGN
    >>> from laplace import Laplace
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    >>> data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(4, (32,)))
    >>> posterior = Laplace(
    ...     model,
    ...     "classification",
    ...     subset_of_weights="all",
    ...     hessian_structure="kron",
    ...     backend=AsdlGGN,
    ...     asdl_fisher_kwargs={"shared_dim": "reduce"},
    ... )
    >>> posterior.fit(torch.utils.data.DataLoader(data, batch_size=8))
    >>> posterior.sample(2).shape
    torch.Size([2, 92])
    """


class AsdlEF(_WithWeightSharing, curvature.AsdlEF):
    """The empirical Fisher, of the labels in the data."""

    # laplace-torch halves the curvature of a squared error in its own class, and in no subclass.

    def kron(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Kron]:
        """The loss and the Kronecker factors of one batch, in laplace-torch's scale."""
        loss, kron = super().kron(*args, **kwargs)
        return loss, kron * self._of_halved_error

    def diag(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal of one batch, in laplace-torch's scale."""
        loss, diag = super().diag(*args, **kwargs)
        return loss, diag * self._of_halved_error

    @property
    def _of_halved_error(self) -> float:
        return 0.5 if self.likelihood == "regression" else 1.0
