"""Kronecker factors of layers so wide that whole ones cannot be inverted: block diagonals.

A factor of side P has ``k`` equal blocks and is a tensor ``(k, b, b)``; P is padded with zeros to
``k b``. Blocks of one entry make a diagonal. The features of a block are neighbours: for a
convolution the patches of neighbouring channels, whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from asdl import symmatrix
from torch import Tensor, nn

__all__ = [
    "BlockDiagonalKron",
    "block_sizes",
    "capped",
    "factor_sizes",
    "identity",
    "kernel_of",
    "multiply",
    "multiply_right",
    "output_side",
]

# More blocks than this cost more than they are worth: a diagonal instead.
_MOST_BLOCKS = 16
# The sides of a convolution's blocks, 16 channels of a 3 x 3 kernel and 256 outputs: it has few
# rows beside its many parameters, so that larger ones cost a multiple of the step itself.
_PATCHES_SIDE, _OUTPUTS_SIDE = 144, 256


def block_sizes(side: int, max_side: int | None, kernel: int = 1) -> tuple[int, int]:
    """How many blocks a factor of this side has and the side of each: ``(1, side)`` if it is whole,
    ``(side, 1)`` if it is a diagonal.

    Args:
        side: P.
        max_side: a factor at most that large is whole; ``None``: all are.
        kernel: how many neighbouring features are one channel's, which stay together.
    """
    if max_side is None or side <= max_side:
        return 1, side
    if kernel > 1:
        channels = side // kernel
        count = -(-channels // max(1, min(max_side, _PATCHES_SIDE) // kernel))
        return count, -(-channels // count) * kernel
    count = -(-side // max_side)
    return (count, -(-side // count)) if count <= _MOST_BLOCKS else (side, 1)


def output_side(max_side: int | None, kernel: int) -> int | None:
    """The ``max_side`` of a layer's B: a smaller one for a convolution with a ``kernel`` of more
    than one entry.
    """
    return min(max_side, _OUTPUTS_SIDE) if max_side is not None and kernel > 1 else max_side


def kernel_of(module: nn.Module) -> int:
    """How many entries a kernel has; of anything but a convolution 1."""
    return math.prod(getattr(module, "kernel_size", ()))


def factor_sizes(module: nn.Module, max_side: int | None) -> dict[str, tuple[int, ...]]:
    """The sizes of the tensors that A and B of a layer are: ``(P, P)``, or those of its blocks."""
    weight: Any = module.weight
    kernel = kernel_of(module)
    blocks = {
        "kron.A": block_sizes(weight[0].numel(), max_side, kernel),
        "kron.B": block_sizes(weight.shape[0], output_side(max_side, kernel)),
    }
    return {
        key: (size, size) if count == 1 else (count, size, size)
        for key, (count, size) in blocks.items()
    }


def capped(
    factor: Callable[[Any, Tensor], Tensor], max_side: int | None, kernel: int = 1
) -> Callable[[Any, Tensor], Tensor]:
    """``factor(module, data)``, a sum of products of rows of ``data (..., P)``, as a ``(P, P)``
    matrix, or as blocks where P is larger than ``max_side`` (:func:`block_sizes`).
    """

    def blocks(module: Any, data: Tensor) -> Tensor:
        side = data.shape[-1]
        count, size = block_sizes(side, max_side, kernel)
        if count == 1:
            return factor(module, data)
        if size == 1:
            return _diagonal(factor, module, data)
        parts = _padded(data, count * size).split(size, dim=-1)
        return torch.stack([factor(module, part) for part in parts])

    return blocks


def _padded(data: Tensor, side: int, dim: int = -1) -> Tensor:
    """With zeros behind a dimension, counted from the last, up to a side."""
    missing = side - data.shape[dim]
    return F.pad(data, (0, 0) * (-1 - dim) + (0, missing)) if missing else data


def _diagonal(factor: Callable[[Any, Tensor], Tensor], module: Any, data: Tensor) -> Tensor:
    # The products of a feature with itself, for all features at once.
    features = data.movedim(-1, 0).unsqueeze(-1).contiguous()
    return torch.func.vmap(lambda one: factor(module, one), chunk_size=1024)(features)


def identity(side: int, max_side: int | None, **options: Any) -> Tensor:
    """The identity as a factor of this side, whole or in blocks; ``options`` as ``torch.eye``'s."""
    count, size = block_sizes(side, max_side)
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
    parts = _padded(vectors, count * size, dim=-2).reshape(count, size, columns)
    return (matrix @ parts).view(-1, columns)[:side]


def multiply_right(vectors: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """``vectors @ matrix``: vectors ``(n, P)``, the matrix ``(P, P)`` or blocks ``(k, b, b)``.

    The product is in ``out``, if there is one, a contiguous tensor ``(n, P)``.
    """
    if matrix.ndim == 2:
        return torch.mm(vectors, matrix, out=out)
    count, size, _ = matrix.shape
    rows, side = vectors.shape
    if size == 1:
        return torch.mul(vectors, matrix.view(-1), out=out)

    def by_block(tensor: Tensor) -> Tensor:
        return tensor.view(rows, count, size).transpose(0, 1)

    parts = by_block(_padded(vectors, count * size).contiguous())
    if out is not None and count * size == side:
        torch.bmm(parts, matrix, out=by_block(out))  # no other layout in between
        return out
    product = torch.bmm(parts, matrix).transpose(0, 1).reshape(rows, -1)[:, :side]
    return product if out is None else out.copy_(product)


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
        vectors = vec_weight.reshape(vec_weight.shape[0], -1)
        is_view = inplace and vec_weight.is_contiguous()
        product = multiply_right(multiply(B, vectors), A, out=vectors if is_view else None)
        weight = product.reshape(vec_weight.shape)
        if inplace and not is_view:
            vec_weight.copy_(weight)
        if vec_bias is None:
            return weight
        bias = multiply(B, vec_bias.reshape(-1, 1)).view_as(vec_bias)
        if inplace:
            vec_bias.copy_(bias)
        return weight, bias
