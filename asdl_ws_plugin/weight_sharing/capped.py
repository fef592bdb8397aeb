"""Kronecker factors of layers so wide that whole ones cannot be inverted: block diagonals.

A factor of side P has ``k`` equal blocks and is a tensor ``(k, b, b)``; P is padded with zeros to
``k b``. Blocks of one entry make a diagonal. The features of a block are neighbours: for a
convolution the patches of neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from asdl import symmatrix
from torch import Tensor

__all__ = ["BlockDiagonalKron", "capped", "identity", "multiply", "num_blocks"]

# More blocks than this cost more than they are worth: a diagonal instead.
_MOST_BLOCKS = 16


def num_blocks(side: int, max_side: int | None) -> int:
    """How many blocks a factor of this side has: 1 if it is whole, ``side`` if it is a diagonal."""
    if max_side is None:
        return 1
    count = -(-side // max_side)
    return count if count <= _MOST_BLOCKS else side


def capped(
    factor: Callable[[Any, Tensor], Tensor], max_side: int
) -> Callable[[Any, Tensor], Tensor]:
    """``factor(module, data)``, a sum of products of rows of ``data (..., P)``, as a ``(P, P)``
    matrix, or as blocks where P is larger than ``max_side``.
    """

    def blocks(module: Any, data: Tensor) -> Tensor:
        side = data.shape[-1]
        count = num_blocks(side, max_side)
        if count == 1:
            return factor(module, data)
        if count == side:
            return _diagonal(factor, module, data)
        size = -(-side // count)
        padded = F.pad(data, (0, count * size - side))
        return torch.stack([factor(module, part) for part in padded.split(size, dim=-1)])

    return blocks


def _diagonal(factor: Callable[[Any, Tensor], Tensor], module: Any, data: Tensor) -> Tensor:
    # The products of a feature with itself, for all features at once.
    features = data.movedim(-1, 0).unsqueeze(-1).contiguous()
    return torch.func.vmap(lambda one: factor(module, one), chunk_size=1024)(features)


def identity(side: int, max_side: int | None, **options: Any) -> Tensor:
    """The identity as a factor of this side, whole or in blocks; ``options`` as ``torch.eye``'s."""
    count = num_blocks(side, max_side)
    size = -(-side // count)
    eye = torch.eye(size, **options)
    if count == 1:
        return eye
    blocks = eye.repeat(count, 1, 1)
    is_padding = torch.arange(count * size, device=eye.device).view(count, size) >= side
    return blocks.masked_fill_(is_padding.unsqueeze(1), 0.0)


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``matrix @ vectors``: the matrix ``(P, P)`` or blocks ``(k, b, b)``, vectors ``(P, n)``."""
    if matrix.ndim == 2:
        return matrix @ vectors
    count, size, _ = matrix.shape
    side, columns = vectors.shape
    if size == 1:
        return matrix.view(-1, 1) * vectors
    parts = F.pad(vectors, (0, 0, 0, count * size - side)).view(count, size, columns)
    return (matrix @ parts).view(-1, columns)[:side]


class BlockDiagonalKron(symmatrix.Kron):
    """Kronecker factors one or both of which are ``(k, b, b)``. Inverses are of the same sizes."""

    def mvp(
        self,
        vec_weight: Tensor,
        vec_bias: Tensor | None = None,
        use_inv: bool = False,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``B V A``, or with ``use_inv`` that of the inverses; ``B v`` for a bias."""
        A, B = (self.A_inv, self.B_inv) if use_inv else (self.A, self.B)
        product = multiply(B, vec_weight.reshape(vec_weight.shape[0], -1))
        weight = multiply(A, product.mT).mT.reshape(vec_weight.shape)
        if inplace:
            vec_weight.copy_(weight)
        if vec_bias is None:
            return weight
        bias = multiply(B, vec_bias.reshape(-1, 1)).view_as(vec_bias)
        if inplace:
            vec_bias.copy_(bias)
        return weight, bias
