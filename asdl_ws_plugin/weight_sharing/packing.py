"""Tensors that ranks exchange, many in one vector; of symmetric matrices one triangle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import accumulation_dtype

__all__ = ["Packed", "buckets", "unpack"]

_BUCKET_NUMEL = 2**25  # elements that are sent at once


class Packed(NamedTuple):
    """A tensor that is sent, and how.

    Attributes:
        tensor: of any shape.
        is_symmetric: it is a matrix ``(n, n)``, or blocks ``(k, n, n)``, of which the triangle on
            and above the diagonal, ``n (n + 1) / 2`` entries, says all.
        weight: it is multiplied with, before; half precision is float32 then.
    """

    tensor: Tensor
    is_symmetric: bool = False
    weight: float | None = None

    @property
    def is_triangle(self) -> bool:
        """Whether one triangle is sent."""
        shape = self.tensor.shape
        return self.is_symmetric and len(shape) > 1 and shape[-1] == shape[-2]

    @property
    def numel(self) -> int:
        """How many elements are sent."""
        if not self.is_triangle:
            return self.tensor.numel()
        *blocks, _, side = self.tensor.shape
        return math.prod(blocks) * side * (side + 1) // 2

    def values(self) -> Tensor:
        """What is sent, ``(numel,)``."""
        tensor = self.tensor.to_dense() if self.tensor.is_sparse else self.tensor
        if self.is_triangle:
            rows, columns = self._triangle()
            tensor = tensor[..., rows, columns]
        tensor = tensor.flatten()
        if self.weight is None:
            return tensor
        return tensor.to(accumulation_dtype(tensor.dtype)) * self.weight

    def take(self, values: Tensor) -> None:
        """Let the tensor have values ``(numel,)``. They are copied, never exchanged: a gradient may
        be a part of a buffer that others know.
        """
        tensor = self.tensor
        values = values.to(tensor.dtype)
        if self.is_triangle:
            rows, columns = self._triangle()
            values = values.view(*tensor.shape[:-2], len(rows))
            tensor[..., rows, columns] = values
            tensor[..., columns, rows] = values
        elif tensor.is_sparse:
            tensor.copy_(values.view(tensor.shape).to_sparse(tensor.sparse_dim()))
        else:
            tensor.copy_(values.view(tensor.shape))

    def _triangle(self) -> tuple[Tensor, Tensor]:
        side = self.tensor.shape[-1]
        rows, columns = torch.triu_indices(side, side, device=self.tensor.device)
        return rows, columns


def buckets(entries: Sequence[Packed]) -> Iterator[list[Packed]]:
    """Tensors of one dtype, in order, in lists of not too many elements."""
    bucket: list[Packed] = []
    numel = 0
    for entry in entries:
        is_other = bucket and entry.tensor.dtype != bucket[0].tensor.dtype
        if bucket and (is_other or numel + entry.numel > _BUCKET_NUMEL):
            yield bucket
            bucket, numel = [], 0
        bucket.append(entry)
        numel += entry.numel
    if bucket:
        yield bucket


def unpack(vector: Tensor, bucket: Sequence[Packed]) -> None:
    """Give the tensors of a bucket their parts of a vector."""
    for entry, values in zip(bucket, vector.split([e.numel for e in bucket]), strict=True):
        entry.take(values)
