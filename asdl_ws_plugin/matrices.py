"""Curvature matrices that upstream gets wrong, and the bookkeeping around upstream's ``SymMatrix``."""

from __future__ import annotations

import torch
from asdl import symmatrix
from asdl.symmatrix import SymMatrix
from torch import Tensor, nn

__all__ = ["KFE", "UnitWise", "copy_inverses", "merge", "tensors"]

# (part of a SymMatrix, its data, their inverse)
_FIELDS = (
    (None, "data", "inv"),
    ("kron", "A", "A_inv"),
    ("kron", "B", "B_inv"),
    ("unit", "data", "inv"),
    ("diag", "weight", "weight_inv"),
    ("diag", "bias", "bias_inv"),
)


class KFE(symmatrix.KFE):
    """Kronecker-factored eigenbasis. Upstream (0.1a5) multiplies by ``Ub`` and ``Ua`` where it needs a transpose."""

    def mvp(
        self, vec_weight: Tensor, vec_bias: Tensor | None = None, use_inv: bool = False, inplace: bool = False,
        eps: float = 1e-7,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``Ub ((Ubᵀ V Ua) / (scale + eps)) Uaᵀ``, the damped inverse times a vector."""
        scaled = self.Ub.mT @ vec_weight.reshape(self.Ub.shape[0], -1) @ self.Ua / (self.scale[0] + eps)
        weight = (self.Ub @ scaled @ self.Ua.mT).view_as(vec_weight)
        if inplace:
            vec_weight.copy_(weight)
        if vec_bias is None:
            return weight
        bias = self.Ub @ ((self.Ub.mT @ vec_bias) / (self.scale[1] + eps))
        if inplace:
            vec_bias.copy_(bias)
        return weight, bias


class UnitWise(symmatrix.UnitWise):
    """Block per output unit. Upstream (0.1a5) needs a bias, and a weight of two dimensions."""

    def mvp(
        self, vec_weight: Tensor, vec_bias: Tensor | None = None, use_inv: bool = False, inplace: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        blocks = self.inv if use_inv else self.data  # (units, weights of a unit + bias, same)
        units = blocks.shape[0]
        vectors = vec_weight.reshape(units, -1)
        if vec_bias is not None:
            vectors = torch.cat([vectors, vec_bias.reshape(units, 1)], dim=1)
        product = (blocks @ vectors.unsqueeze(2)).squeeze(2)
        weight = (product if vec_bias is None else product[:, :-1]).reshape(vec_weight.shape)
        if inplace:
            vec_weight.copy_(weight)
        if vec_bias is None:
            return weight
        bias = product[:, -1].reshape(vec_bias.shape)
        if inplace:
            vec_bias.copy_(bias)
        return weight, bias


def corrected(matrix: SymMatrix) -> SymMatrix:
    """The same matrix with upstream's wrong parts replaced by the classes above."""
    if matrix.unit is not None:
        matrix.unit = UnitWise(matrix.unit.data, matrix.unit.inv)
    if matrix.kfe is not None:
        matrix.kfe = KFE(matrix.kfe.Ua, matrix.kfe.Ub, matrix.kfe.scale)
    return matrix


def _parts(matrix: SymMatrix) -> list[tuple[object, str, str]]:
    parts = ((matrix if part is None else getattr(matrix, part), data, inv) for part, data, inv in _FIELDS)
    return [(holder, data, inv) for holder, data, inv in parts if holder is not None]


def tensors(matrix: SymMatrix) -> list[Tensor]:
    """The data (not the inverses) of all parts of a matrix."""
    data = [getattr(holder, name) for holder, name, _ in _parts(matrix)]
    if matrix.kfe is not None:
        data += [matrix.kfe.Ua, matrix.kfe.Ub, *matrix.kfe.scale]
    return [tensor for tensor in data if tensor is not None]


def merge(new: SymMatrix, old: SymMatrix, decay: float) -> SymMatrix:
    """``new + decay * old`` in the place of ``new``, with the inverses of ``old``, which stays as it is.

    This is upstream's ``mul_(decay)`` and ``+=`` in one pass that leaves the old matrix intact, so that a step that
    fails later can go back to it.
    """
    for (holder, data, inv), (old_holder, _, _) in zip(_parts(new), _parts(old), strict=True):
        tensor, old_tensor = getattr(holder, data), getattr(old_holder, data)
        if old_tensor is not None:
            if tensor is None or tensor.shape != old_tensor.shape:
                raise ValueError("the accumulated and the new curvature are of different shapes")
            tensor.add_(old_tensor.to(tensor), alpha=decay)
        setattr(holder, inv, getattr(old_holder, inv))
    return new


def copy_inverses(matrix: SymMatrix) -> list[tuple[object, str, Tensor | None]]:
    """References to all inverses of a matrix: what has to be set again to go back."""
    return [(holder, inv, getattr(holder, inv)) for holder, _, inv in _parts(matrix)]


def diagonals(matrix: SymMatrix) -> list[tuple[Tensor, Tensor]]:
    """The diagonals that damping is added to while upstream inverts, as ``(view, copy)``."""
    views = [
        tensor.diagonal(dim1=-2, dim2=-1)
        for tensor in (matrix.data, *((matrix.kron.A, matrix.kron.B) if matrix.kron is not None else ()),
                       matrix.unit.data if matrix.unit is not None else None)
        if tensor is not None
    ]
    return [(view, view.clone()) for view in views]


def fisher_of(module: nn.Module, attr: str) -> SymMatrix | None:
    """The curvature that a module carries."""
    return getattr(module, attr, None)
