"""Adam's second moment in the eigenbasis of a layer's own Kronecker factors.

With ``A = Q_A Λ_A Q_Aᵀ`` and ``B = Q_B Λ_B Q_Bᵀ``, the gradient G of a weight is ``Q_Bᵀ G Q_A`` in
the basis in which K-FAC's curvature is diagonal. K-FAC divides it there by products of eigenvalues;
here it is divided by the root of the average of its own squares, as Adam does in the basis of the
parameters (SOAP, Vyas et al. 2024, takes the basis of averages of ``GᵀG`` and ``GGᵀ`` instead). The
factors choose the basis alone, so that their scale does not matter, and nothing is inverted or
damped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capped import multiply, multiply_right

__all__ = ["SecondMoments", "eigenvectors"]

# Keeps an entry whose gradient has always been zero from being divided by zero; Adam's default.
_EPS = 1e-8

Bases = tuple[Tensor, Tensor]  # Q_A and Q_B: whole (P, P), or in blocks (k, b, b)


class _Moment(NamedTuple):
    """Of the gradient of one parameter of a layer, in the layer's basis."""

    average: Tensor  # of the squares; not corrected for its start from zero
    num_seen: int  # gradients


@torch.no_grad()
def eigenvectors(factor: Tensor, side: int) -> Tensor:
    """Orthonormal eigenvectors of a factor, its columns; of blocks for each block.

    Args:
        factor: ``(P, P)``, or blocks ``(k, b, b)`` with zeros where ``k b`` is more than ``side``.
        side: P.

    Returns a tensor of the factor's sizes.
    """
    if factor.shape[-1] == 1:
        return torch.ones_like(factor)
    padding = 0 if factor.ndim == 2 else factor.shape[0] * factor.shape[1] - side
    if padding:
        # Eigenvectors of what is padded must not mix with those of zero eigenvalues, and come last.
        factor = factor.clone()
        factor[-1].diagonal()[-padding:] = factor[-1].diagonal().sum() + 1
    try:
        return torch.linalg.eigh(factor)[1]
    except torch.linalg.LinAlgError:  # it has not converged in float32
        return torch.linalg.eigh(factor.double())[1].to(factor.dtype)


class SecondMoments:
    """Bases of layers and, in them, the averages of squared gradients; by the layers' names.

    Tensors are replaced, never changed, so that :meth:`copy` is one of references.
    """

    def __init__(self) -> None:
        self._bases: dict[str, Bases] = {}
        self._moments: dict[str, dict[str, _Moment]] = {}  # layer -> parameter -> its moment

    def copy(self) -> SecondMoments:
        """One that stays as this is now."""
        other = SecondMoments()
        other._bases = dict(self._bases)
        other._moments = {layer: dict(moments) for layer, moments in self._moments.items()}
        return other

    @torch.no_grad()
    def set_bases(self, layer: str, bases: Bases) -> None:
        """Give a layer other bases, and carry its moments over.

        In new bases that old ones turn into by the rotation R, entries that are uncorrelated have
        the second moments ``R∘R`` times the old ones.
        """
        old = self._bases.get(layer)
        # Before a layer has bases, its basis is the parameters' own.
        A, B = (
            new.mT.square() if old is None else (new.mT @ old[i]).square()
            for i, new in enumerate(bases)
        )
        self._moments[layer] = {
            name: _Moment(_both_sides(B, average, A if average.shape[1] > 1 else None), count)
            for name, (average, count) in self._moments.get(layer, {}).items()
        }
        self._bases[layer] = bases

    @torch.no_grad()
    def precondition(self, layer: Any, decay: float, scale: float) -> None:
        """Divide the gradients of a layer, in place, and multiply them by ``scale``.

        A weight that several modules hold has one moment, and every bias its own.
        """
        parameters = {f"{layer.name}.weight": layer.module.weight}
        for name, module in [(layer.name, layer.module), *layer.tied]:
            bias = getattr(module, "bias", None)
            if not any(bias is p for p in parameters.values()):
                parameters[f"{name}.bias"] = bias
        for name, p in parameters.items():
            if p is not None and p.requires_grad and p.grad is not None:
                p.grad.copy_(self.divide(layer.name, name, p.grad, decay).mul_(scale))

    @torch.no_grad()
    def divide(self, layer: str, name: str, grad: Tensor, decay: float) -> Tensor:
        """A gradient, divided by the roots of its second moments in the layer's basis.

        Args:
            layer: the layer's name.
            name: which of its parameters it is.
            grad: of a weight ``(P_out, ...)``, or of a bias ``(P_out,)``, whose basis is B's.
            decay: Adam's β2.

        Returns:
            A new tensor, in the basis of the parameters.
        """
        A, B = self._bases.get(layer, (None, None))
        dtype = torch.promote_types(torch.float32 if B is None else B.dtype, grad.dtype)
        matrix = grad.reshape(grad.shape[0], -1).to(dtype)
        A = A if grad.ndim > 1 else None
        turned = _both_sides(_transposed(B), matrix, _transposed(A))
        old = self._moments.setdefault(layer, {}).get(name, _Moment(torch.zeros_like(turned), 0))
        moment = _Moment(old.average.lerp(turned.square(), 1 - decay), old.num_seen + 1)
        self._moments[layer][name] = moment
        root = (moment.average / (1 - decay**moment.num_seen)).sqrt()
        return _both_sides(B, turned / (root + _EPS), A).view(grad.shape).to(grad.dtype)

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Layer name -> its bases, and its moments as pairs of a tensor and a count."""
        return {
            layer: {
                "bases": self._bases.get(layer, ()),
                "moments": {name: tuple(moment) for name, moment in moments.items()},
            }
            for layer, moments in self._moments.items()
        }

    def load_state_dict(
        self, state: dict[str, dict[str, Any]], devices: dict[str, torch.device]
    ) -> None:
        """The inverse of :meth:`state_dict`; copies the tensors to the layers' devices."""

        def load(tensor: Tensor, layer: str) -> Tensor:
            return tensor.detach().to(devices[layer], copy=True)

        self._bases = {
            layer: (load(entry["bases"][0], layer), load(entry["bases"][1], layer))
            for layer, entry in state.items()
            if entry["bases"]
        }
        self._moments = {
            layer: {
                name: _Moment(load(average, layer), count)
                for name, (average, count) in entry["moments"].items()
            }
            for layer, entry in state.items()
        }


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT


def _both_sides(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """``left @ matrix @ rightᵀ``; ``None`` is the identity."""
    if left is not None:
        matrix = multiply(left, matrix)
    return matrix if right is None else multiply_right(matrix, right.mT)
