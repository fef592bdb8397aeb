"""What one does with Kronecker factors besides preconditioning: trace, log-determinant, products
with powers of them, adding, saving and loading.

Everything here takes ``module.fisher`` as ASDL leaves it there, and stands for the block of the
weight, ``B ⊗ A``, in the order of a weight ``(Q, P)`` flattened by rows; ``A`` is ``(P, P)``, ``B``
``(Q, Q)``. With ``damping`` it is the exact ``B ⊗ A + damping I``, as the posterior of a Laplace
approximation has it, and not the damping of each factor that ASDL preconditions with. With ``bias``
the block of the bias, which is ``B`` alone, counts as well.

No product ``(QP, QP)`` is ever formed. Factors are decomposed where a power or a logarithm needs
it; :func:`decompose` does that once for several calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

import torch
from asdl.symmatrix import Kron, SymMatrix
from torch import Tensor, nn

from .weight_sharing.state_dict import curvature_state, load_curvature_state

__all__ = [
    "Eigenbasis",
    "add",
    "decompose",
    "inverse_root",
    "load",
    "logdet",
    "product",
    "save",
    "trace",
]


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvalues and eigenvectors (in the columns) of both factors; see :func:`decompose`.

    Attributes:
        A_values, A_vectors: ``(P,)``, ``(P, P)``.
        B_values, B_vectors: ``(Q,)``, ``(Q, Q)``.
    """

    A_values: Tensor
    A_vectors: Tensor
    B_values: Tensor
    B_vectors: Tensor

    def values(self, damping: float | Tensor = 0.0) -> Tensor:
        """Eigenvalues of ``B ⊗ A + damping I``: ``(Q, P)``."""
        return torch.outer(self.B_values, self.A_values) + damping


def decompose(fisher: SymMatrix | Kron | Eigenbasis) -> Eigenbasis:
    """The factors' eigendecompositions, which the functions here take in the place of ``fisher``.

    Eigenvalues that rounding made negative are zero.

    Raises:
        ValueError: there are no square Kronecker factors in ``fisher``.
    """
    if isinstance(fisher, Eigenbasis):
        return fisher
    A, B = _factors(fisher)
    A_values, A_vectors = torch.linalg.eigh(A)
    B_values, B_vectors = torch.linalg.eigh(B)
    return Eigenbasis(A_values.clamp(min=0), A_vectors, B_values.clamp(min=0), B_vectors)


def trace(fisher: SymMatrix | Kron | Eigenbasis, *, bias: bool = False) -> Tensor:
    """``tr(B ⊗ A) = tr A · tr B``, a tensor ``()``; with ``bias`` plus ``tr B``."""
    if isinstance(fisher, Eigenbasis):
        of_A, of_B = fisher.A_values.sum(), fisher.B_values.sum()
    else:
        of_A, of_B = (factor.trace() for factor in _factors(fisher))
    return of_A * of_B + of_B if bias else of_A * of_B


def logdet(
    fisher: SymMatrix | Kron | Eigenbasis, damping: float | Tensor = 0.0, *, bias: bool = False
) -> Tensor:
    """``log det(B ⊗ A + damping I)``, a tensor ``()``; with ``bias`` plus that of
    ``B + damping I``.

    Raises:
        ValueError: ``damping`` is negative, or there are no square Kronecker factors.
        torch.linalg.LinAlgError: the matrix is singular to rounding.
    """
    basis = _invertible(decompose(fisher), damping)
    result = basis.values(damping).log().sum()
    return result + (basis.B_values + damping).log().sum() if bias else result


@overload
def product(
    fisher: SymMatrix | Kron | Eigenbasis,
    weight: Tensor,
    *,
    power: float = ...,
    damping: float | Tensor = ...,
) -> Tensor: ...


@overload
def product(
    fisher: SymMatrix | Kron | Eigenbasis,
    weight: Tensor,
    bias: Tensor,
    *,
    power: float = ...,
    damping: float | Tensor = ...,
) -> tuple[Tensor, Tensor]: ...


def product(
    fisher: SymMatrix | Kron | Eigenbasis,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    power: float = 1.0,
    damping: float | Tensor = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(B ⊗ A + damping I)^power`` times a vector that is given, and returned, as a weight.

    Args:
        fisher: ``module.fisher``, its ``kron``, or what :func:`decompose` makes of it.
        weight: ``(*, Q, P)``, or of the sizes of a convolution's weight, ``(Q, C, kh, kw)``.
        bias: ``(*, Q)``; it is multiplied by ``(B + damping I)^power``.
        power: any number; -1 is the inverse, -0.5 its root.
        damping: what is added to the diagonal, a number or a tensor ``()``; results can be
            differentiated with respect to the latter, as the evidence of a prior precision is.

    Returns:
        The product, of ``weight``'s sizes and dtype; with ``bias`` a pair.

    Raises:
        ValueError: sizes do not fit, ``damping`` is negative, or there are no square factors.
        torch.linalg.LinAlgError: ``power`` is negative and the matrix singular to rounding.
    """
    _check_damping(damping)
    if isinstance(fisher, Eigenbasis) or power != 1:
        fisher = decompose(fisher)
        if power < 0:
            _invertible(fisher, damping)
        A, B = fisher.A_vectors, fisher.B_vectors
    else:
        A, B = _factors(fisher)
    vectors = _as_matrices(weight, A, B)
    vector = None if bias is None else _as_vectors(bias, B)
    if isinstance(fisher, Eigenbasis):  # Qb (values^power * (Qbᵀ W Qa)) Qaᵀ
        result = B @ ((B.mT @ vectors @ A) * fisher.values(damping) ** power) @ A.mT
        if vector is not None:
            vector = ((vector @ B) * (fisher.B_values + damping) ** power) @ B.mT
    else:
        result = B @ vectors @ A + damping * vectors
        if vector is not None:
            vector = vector @ B + damping * vector
    result = result.reshape(weight.shape).to(weight.dtype)
    return result if bias is None or vector is None else (result, vector.to(bias.dtype))


def inverse_root(
    fisher: SymMatrix | Kron | Eigenbasis,
    weight: Tensor,
    damping: float | Tensor = 0.0,
    root: int = 2,
) -> Tensor:
    """``(B ⊗ A + damping I)^(-1/root)`` times a weight ``(*, Q, P)``; of noise it makes a sample of
    ``N(0, (B ⊗ A + damping I)⁻¹)``, the posterior of a Laplace approximation, for ``root=2``.

    Raises:
        ValueError, torch.linalg.LinAlgError: as :func:`product`; or ``root`` is not positive.
    """
    if root <= 0:
        raise ValueError(f"root has to be positive, got {root!r}.")
    return product(fisher, weight, power=-1 / root, damping=damping)


def add(first: SymMatrix | Kron, second: SymMatrix | Kron) -> SymMatrix:
    """The factors of the joint data of both: A and A, B and B are added, as new tensors.

    That is what two batches do whose curvature was computed with the total ``data_size``; it is not
    the sum of the two products ``B ⊗ A``. Inverses do not carry over.

    Raises:
        ValueError: the factors are of different sizes, or one has none.
    """
    for name, one, other in zip("AB", _factors(first), _factors(second), strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"Factors {name} of sizes {tuple(one.shape)} and {tuple(other.shape)} cannot be "
                "added: they are of different layers."
            )
    return SymMatrix(kron=_kron(first) + _kron(second))


def save(model: nn.Module, path: str | PathLike[str], attr: str = "fisher") -> None:
    """Write the curvature of all modules, factors and inverses of any shape, in full precision.

    (ASDL's own ``SymMatrix.save`` rounds to float32.)

    Raises:
        ValueError: no module of the model has an ``attr``.
    """
    state = curvature_state(model, attr)
    if not state:
        raise ValueError(
            f"No module of the model has an attribute '{attr}': there is no curvature to save. "
            "Compute it first, by a gradient maker or by asdl.fisher.get_fisher_maker."
        )
    torch.save(state, path)


def load(model: nn.Module, path: str | PathLike[str], attr: str = "fisher") -> None:
    """Give the modules the curvature of a file by :func:`save`, in the place of what they have, on
    the device and in the dtype of the file's and the model's.

    Raises:
        ValueError: the model lacks a module of the file's, or has another shape there; nothing is
            changed then.
    """
    state: dict[str, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True)
    load_curvature_state(model, attr, state)


# ----------------------------------------------------------------------------------------- checks


def _kron(fisher: Any) -> Kron:
    kron = fisher.kron if isinstance(fisher, SymMatrix) else fisher
    if not isinstance(kron, Kron) or not kron.has_A or not kron.has_B:
        found = fisher if isinstance(fisher, (SymMatrix, Kron)) else type(fisher).__name__
        raise ValueError(
            f"There are no Kronecker factors in {found}. Compute them with fisher_shapes=['kron']; "
            "a gradient maker without ema_decay keeps their inverses only."
        )
    return kron


def _factors(fisher: Any) -> tuple[Tensor, Tensor]:
    kron = _kron(fisher)
    if not (kron.A_is_square and kron.B_is_square):
        raise ValueError(
            f"The factors are of sizes {tuple(kron.A.shape)} and {tuple(kron.B.shape)}: of "
            "'swift_kron', which keeps the rows they are made of. Use the shape 'kron'."
        )
    return kron.A, kron.B


def _check_damping(damping: float | Tensor) -> None:
    if not damping >= 0:
        raise ValueError(f"damping has to be a number that is not negative, got {damping!r}.")


def _invertible(basis: Eigenbasis, damping: float | Tensor) -> Eigenbasis:
    _check_damping(damping)
    for name, values in (("A", basis.A_values), ("B", basis.B_values)):
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        if not damping and bool(values[0] <= rounding):
            raise torch.linalg.LinAlgError(
                f"{name} is singular: its eigenvalues are from {values[0]:.2g} to "
                f"{values[-1]:.2g}. Give a damping, such as a prior precision."
            )
    return basis


def _as_matrices(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``(*, Q, P)`` in the factors' dtype."""
    sizes = (len(B), len(A))
    if weight.shape[-2:] != sizes:
        if weight.ndim < 2 or weight.flatten(1).shape != sizes:
            raise ValueError(
                f"The weight has sizes {tuple(weight.shape)}, but the factors are of a layer with "
                f"{sizes[1]} inputs and {sizes[0]} outputs. Give it as (*, {sizes[0]}, {sizes[1]})."
            )
        weight = weight.flatten(1)
    return weight.to(A.dtype)


def _as_vectors(bias: Tensor, B: Tensor) -> Tensor:
    """``(*, Q)`` in the factors' dtype."""
    if bias.shape[-1:] != B.shape[-1:]:
        raise ValueError(
            f"The bias has sizes {tuple(bias.shape)}, but B is {len(B)} x {len(B)}. Its last "
            "dimension has to be the layer's outputs."
        )
    return bias.to(B.dtype)
