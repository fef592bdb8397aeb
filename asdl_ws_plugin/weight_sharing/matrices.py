"""Curvature matrices that upstream gets wrong, and the bookkeeping around upstream's
``SymMatrix``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from asdl import symmatrix
from asdl.symmatrix import SymMatrix
from asdl.vector import ParamVector
from torch import Tensor, nn

from .blocks import input_group
from .capped import BlockDiagonalKron
from .torch_private import version_of

__all__ = ["KFE", "Kron", "LayerWise", "UnitWise", "copy_inverses", "merge", "tensors"]

# (part of a SymMatrix, its data, their inverse)
_FIELDS = (
    (None, "data", "inv"),
    ("kron", "A", "A_inv"),
    ("kron", "B", "B_inv"),
    ("unit", "data", "inv"),
    ("diag", "weight", "weight_inv"),
    ("diag", "bias", "bias_inv"),
)
NUM_PARTS = len(_FIELDS)
IS_A = [(part, data) == ("kron", "A") for part, data, _ in _FIELDS]
IS_SYMMETRIC = [part != "diag" for part, _, _ in _FIELDS]
SYMMETRIC_INVERSES = {inv for part, _, inv in _FIELDS if part != "diag"}


class KFE(symmatrix.KFE):
    """Kronecker-factored eigenbasis. Upstream (0.1a5) multiplies by ``Ub`` and ``Ua`` where it
    needs a transpose.
    """

    def mvp(
        self,
        vec_weight: Tensor,
        vec_bias: Tensor | None = None,
        use_inv: bool = False,
        inplace: bool = False,
        eps: float = 1e-7,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``Ub ((Ubᵀ V Ua) / (scale + eps)) Uaᵀ``, the damped inverse times a vector."""
        scaled = (
            self.Ub.mT @ vec_weight.reshape(self.Ub.shape[0], -1) @ self.Ua / (self.scale[0] + eps)
        )
        weight = (self.Ub @ scaled @ self.Ua.mT).view_as(vec_weight)
        if inplace:
            vec_weight.copy_(weight)
        if vec_bias is None:
            return weight
        bias = self.Ub @ ((self.Ub.mT @ vec_bias) / (self.scale[1] + eps))
        if inplace:
            vec_bias.copy_(bias)
        return weight, bias


# Upstream's floor below both parts of a split damping, for what a bias is multiplied with.
_FLOOR = 1e-7


def _bias_share(A: Tensor, B: Tensor, damping: float) -> Tensor:
    """What B's inverse is multiplied with, and A's divided by, so that B's has no larger
    eigenvalues than 1e7.

    The product of both is the same, and so is the answer for a weight. A bias is preconditioned by
    B alone: where B is nothing but rounding errors, as of keys' biases in K-FAC-reduce, so is the
    bias' gradient, and must stay that.
    """
    part = damping**0.5 * (B.diagonal().mean() / A.diagonal().mean()).sqrt()  # of the damping
    is_split = torch.isfinite(part) & (part > 0)
    return torch.where(is_split, (part / _FLOOR).clamp(max=1), torch.ones_like(part))


class Kron(symmatrix.Kron):
    """Kronecker factors whose damping is split at any scale.

    Upstream (0.1a5) gives A and B at least 1e-7 of the damping each, so that the answer is another
    one for A·s² and B/s², which are the same curvature.
    """

    def update_inv(
        self,
        damping: float = 1e-7,
        calc_A_inv: bool = True,
        calc_B_inv: bool = True,
        eps: float = 0.0,
        replace: bool = False,
    ) -> None:
        """Upstream's, with no floor below the two parts of the damping."""
        has_both = self.has_A and self.has_B
        share = _bias_share(self.A, self.B, damping) if has_both else None
        zero = [factor is None or bool((factor == 0).all()) for factor in (self.A, self.B)]
        super().update_inv(damping, calc_A_inv, calc_B_inv, eps, replace)
        if share is not None and calc_A_inv and not zero[0]:
            self.A_inv.div_(share)
        if share is not None and calc_B_inv and not zero[1]:
            self.B_inv.mul_(share)


class UnitWise(symmatrix.UnitWise):
    """Block per output unit. Upstream (0.1a5) needs a bias, and a weight of two dimensions."""

    def mvp(
        self,
        vec_weight: Tensor,
        vec_bias: Tensor | None = None,
        use_inv: bool = False,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Upstream's, for a bias or a weight alone too."""
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


class LayerWise(SymMatrix):
    """Block per layer. Upstream (0.1a5) lacks ``has_inv``, which it asks for, and needs a bias of
    one dimension.
    """

    @property
    def has_inv(self) -> bool:
        """Whether the inverse is there."""
        return self.inv is not None

    def mvp(
        self,
        vectors: ParamVector | None = None,
        vec_weight: Tensor | None = None,
        vec_bias: Tensor | None = None,
        use_inv: bool = False,
        inplace: bool = False,
    ) -> ParamVector | list[Tensor]:
        """Multiply with the block or its inverse."""
        if vectors is not None:
            return super().mvp(vectors=vectors, use_inv=use_inv, inplace=inplace)
        given = [vec for vec in (vec_weight, vec_bias) if vec is not None]
        products = super().mvp(vec_weight=vec_weight, vec_bias=vec_bias, use_inv=use_inv)
        products = [product.view_as(vec) for product, vec in zip(products, given, strict=True)]
        if inplace:
            for vec, product in zip(given, products, strict=True):
                vec.copy_(product)
        return products


def corrected(matrix: SymMatrix) -> SymMatrix:
    """The same matrix with upstream's wrong parts replaced by the classes above."""
    if matrix.data is not None or matrix.inv is not None:
        matrix = LayerWise(
            matrix.data, matrix.inv, matrix.kron, matrix.kfe, matrix.diag, matrix.unit
        )
    if matrix.kron is not None:
        kron = matrix.kron
        matrix.kron = Kron(kron.A, kron.B, kron.A_inv, kron.B_inv)
    if matrix.unit is not None:
        matrix.unit = UnitWise(matrix.unit.data, matrix.unit.inv)
    kron = matrix.kron
    if kron is not None and any(
        factor is not None and factor.ndim == 3 for factor in (*kron.data, kron.A_inv, kron.B_inv)
    ):
        matrix.kron = BlockDiagonalKron(kron.A, kron.B, kron.A_inv, kron.B_inv)
    if matrix.kfe is not None:
        matrix.kfe = KFE(matrix.kfe.Ua, matrix.kfe.Ub, matrix.kfe.scale)
    return matrix


def _parts(matrix: SymMatrix) -> list[tuple[object, str, str]]:
    parts = (
        (matrix if part is None else getattr(matrix, part), data, inv)
        for part, data, inv in _FIELDS
    )
    return [(holder, data, inv) for holder, data, inv in parts if holder is not None]


def tensors(matrix: SymMatrix) -> list[Tensor]:
    """The data (not the inverses) of all parts of a matrix."""
    data = [getattr(holder, name) for holder, name, _ in _parts(matrix)]
    if matrix.kfe is not None:
        data += [matrix.kfe.Ua, matrix.kfe.Ub, *matrix.kfe.scale]
    return [tensor for tensor in data if tensor is not None]


def data_of(matrix: SymMatrix | None) -> list[Tensor | None]:
    """What a matrix has of every part that an average can be of; of :data:`NUM_PARTS` entries."""
    return [
        getattr(matrix if part is None else getattr(matrix, part, None), data, None)
        for part, data, _ in _FIELDS
    ]


def with_data(data: Sequence[Tensor | None]) -> SymMatrix:
    """The inverse of :func:`data_of`."""
    names = (name if part is None else f"{part}_{name}" for part, name, _ in _FIELDS)
    return corrected(SymMatrix(**dict(zip(names, data, strict=True))))


def drop_inverted(matrix: SymMatrix) -> None:
    """Let go of the data of every part that has an inverse."""
    for holder, data, inv in _parts(matrix):
        if getattr(holder, inv) is not None:
            setattr(holder, data, None)


def shared_tensors(matrices: Iterable[SymMatrix]) -> dict[int, dict[int, Tensor]]:
    """The tensors that belong to several matrices, as a memory for :func:`merge`."""
    seen: set[int] = set()
    shared: dict[int, dict[int, Tensor]] = {}
    for matrix in matrices:
        for tensor in tensors(matrix):
            if id(tensor) in seen:
                shared[id(tensor)] = {}
            seen.add(id(tensor))
    return shared


def precondition_bias(matrix: SymMatrix, grad: Tensor, damping: float) -> None:
    """Multiply a bias's gradient, in place, by the inverse of its block, as upstream does beside a
    weight.
    """
    product: Tensor | None = None
    if matrix.kron is not None and matrix.kron.B_inv is not None:
        product = matrix.kron.B_inv @ grad.to(matrix.kron.B_inv.dtype)
    elif matrix.kfe is not None:
        product = matrix.kfe.Ub @ (
            (matrix.kfe.Ub.mT @ grad.to(matrix.kfe.Ub.dtype)) / (matrix.kfe.scale[-1] + damping)
        )
    elif matrix.diag is not None and matrix.diag.bias_inv is not None:
        product = matrix.diag.bias_inv * grad
    elif matrix.inv is not None and matrix.inv.shape[0] == grad.numel():
        product = (matrix.inv @ grad.flatten().to(matrix.inv.dtype)).view_as(grad)
    if product is not None:
        grad.copy_(product)


def dtype_of(matrix: SymMatrix) -> torch.dtype:
    """The dtype of a matrix or its inverse."""
    found = [
        *tensors(matrix),
        *(inverse for _, _, inverse in copy_inverses(matrix) if inverse is not None),
    ]
    return found[0].dtype


def trained(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's trainable parameters, which a curvature other than Kronecker factors
    is of.
    """
    return tuple(name for name, p in module.named_parameters() if p.requires_grad)


def is_of(matrix: SymMatrix, module: nn.Module) -> bool:
    """Whether a matrix is of the parameters that are trainable now."""
    return matrix.kron is not None or getattr(matrix, "trained", None) in (None, trained(module))


def merge(
    new: SymMatrix,
    old: SymMatrix,
    decay: float,
    shared: dict[int, dict[int, Tensor]] | None = None,
    weight: float = 1.0,
) -> SymMatrix:
    """``weight * new + decay * old`` in the place of ``new``, with the inverses of ``old``, which
    stays as it is.

    This is upstream's ``mul_(decay)`` and ``+=`` in one pass that leaves the old matrix intact, so
    that a step that fails later can go back to it.
    """
    for (holder, data, inv), (old_holder, _, _) in zip(_parts(new), _parts(old), strict=True):
        tensor, old_tensor = getattr(holder, data), getattr(old_holder, data)
        if old_tensor is not None:
            if tensor is None or tensor.shape != old_tensor.shape:
                raise ValueError("the accumulated and the new curvature are of different shapes")
            sums = (shared or {}).get(id(tensor))
            if sums is None:
                _weighed(tensor, weight).add_(old_tensor.to(tensor), alpha=decay)
            else:  # other matrices have this tensor, too
                if id(old_tensor) not in sums:
                    sums[id(old_tensor)] = tensor.mul(weight).add_(
                        old_tensor.to(tensor), alpha=decay
                    )
                setattr(holder, data, sums[id(old_tensor)])
        setattr(holder, inv, getattr(old_holder, inv))
    return new


def _weighed(tensor: Tensor, weight: float) -> Tensor:
    return tensor if weight == 1.0 else tensor.mul_(weight)


class _SharedA:
    """The A of the blocks of one layer: damped by what the blocks' B are on average, and inverted
    once.
    """

    def __init__(self, krons: list[symmatrix.Kron]) -> None:
        self.mean_B = torch.stack([kron.B.diagonal().mean() for kron in krons]).mean()
        self._made_of: tuple[Any, ...] = ()
        self._inverse: Tensor | None = None

    def inverse(self, A: Tensor, damping: float, eps: float) -> Tensor | None:
        if (
            not self._made_of
            or self._made_of[0] is not A
            or self._made_of[1:] != (version_of(A), damping, eps)
        ):
            stand_in = symmatrix.Kron(A, self.mean_B.view(1, 1))
            stand_in.update_inv(damping, calc_B_inv=False, eps=eps)
            if stand_in.A_inv is not None:
                stand_in.A_inv.div_(_bias_share(A, stand_in.B, damping))
            self._inverse, self._made_of = stand_in.A_inv, (A, version_of(A), damping, eps)
        return self._inverse


class BlockKron(Kron):
    """The factors of one block of a fused layer. Its siblings have the same A.

    Upstream splits the damping between A and B by the ratio of their mean eigenvalues. Here B's is
    the mean over all blocks, as in the fused layer, so that A and its inverse are the fused layer's
    and the blocks' alike. The inverses themselves are upstream's, of factors beside a 1x1 stand-in
    with the mean eigenvalue that is wanted.
    """

    _shared: _SharedA

    def update_inv(
        self,
        damping: float = 1e-7,
        calc_A_inv: bool = True,
        calc_B_inv: bool = True,
        eps: float = 0.0,
        replace: bool = False,
    ) -> None:
        if not (self.has_A and self.has_B):
            raise ValueError("data do not exist.")
        stand_in = symmatrix.Kron(
            (self.A.diagonal().mean() * self.B.diagonal().mean() / self._shared.mean_B).view(1, 1),
            self.B,
        )
        A_inv = self._shared.inverse(self.A, damping, eps) if calc_A_inv else None
        if calc_B_inv:
            stand_in.update_inv(damping, calc_A_inv=False, eps=eps)
            if stand_in.B_inv is not None:
                stand_in.B_inv.mul_(_bias_share(stand_in.A, self.B, damping))
        for name, inverse in (("A", A_inv), ("B", stand_in.B_inv)):
            if inverse is not None:
                setattr(self, f"{name}_inv", inverse)
                if replace:
                    setattr(self, name, None)


def share_inverses(matrices: Iterable[tuple[nn.Module, SymMatrix]]) -> None:
    """Let the blocks of a fused layer invert the A that they share once; changes the matrices in
    place.
    """
    groups: dict[nn.Module, list[SymMatrix]] = {}
    for module, matrix in matrices:
        group = input_group(module)
        if (
            group is not None
            and matrix.kron is not None
            and matrix.kron.has_A
            and matrix.kron.has_B
        ):
            groups.setdefault(group, []).append(matrix)
    for group_matrices in groups.values():
        shared = _SharedA([matrix.kron for matrix in group_matrices])
        for matrix in group_matrices:
            matrix.kron.__class__ = BlockKron  # in place: whoever has it to restore it keeps it
            matrix.kron._shared = shared


def copy_inverses(matrix: SymMatrix) -> list[tuple[object, str, Tensor | None]]:
    """References to all inverses of a matrix: what has to be set again to go back."""
    return [(holder, inv, getattr(holder, inv)) for holder, _, inv in _parts(matrix)]


def pairs(matrix: SymMatrix) -> list[tuple[Tensor, Tensor | None]]:
    """``(data, inverse)`` of every part that has data."""
    found = [(getattr(holder, data), getattr(holder, inv)) for holder, data, inv in _parts(matrix)]
    return [(data, inverse) for data, inverse in found if data is not None]


def diagonals(matrix: SymMatrix) -> list[tuple[Tensor, Tensor]]:
    """The diagonals that damping is added to while upstream inverts, as ``(view, copy)``."""
    views = [
        tensor.diagonal(dim1=-2, dim2=-1)
        for tensor in (
            matrix.data,
            *((matrix.kron.A, matrix.kron.B) if matrix.kron is not None else ()),
            matrix.unit.data if matrix.unit is not None else None,
        )
        if tensor is not None
    ]
    return [(view, view.clone()) for view in views]
