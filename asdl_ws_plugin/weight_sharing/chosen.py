"""Rows that an index chose from those of a batch, as a router chooses the tokens of an expert.

How many rows an expert gets differs from batch to batch, and says nothing of whose they are. The
autograd graph does: it keeps the index, and the sizes of what it was applied to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .torch_private import index_of

__all__ = ["Chosen", "chosen_rows"]

# From a layer's input back to the index. An expert has a handful of functions; whatever chooses
# rows far in front of a layer is not looked for.
_MOST_NODES = 64


@dataclass(frozen=True)
class Chosen:
    """Which rows of a tensor ``(*sizes, P)`` a layer was called with.

    Attributes:
        rows: the number of each in the flattened tensor, integers ``(rows,)``.
        sizes: of the tensor, features and dimensions of size 1 left out.
    """

    rows: Tensor
    sizes: torch.Size


def chosen_rows(x: Tensor) -> Chosen | None:
    """What the graph says of the rows of a layer's input ``(rows, P)``; ``None`` if no index of so
    many rows is near.
    """
    if x.ndim != 2 or x.grad_fn is None or len(x) == 0:
        return None
    nodes: deque[Any] = deque([x.grad_fn])
    seen = {x.grad_fn}
    while nodes:
        node = nodes.popleft()
        found = index_of(node)
        chosen = None if found is None else _chosen(*found, len(x))
        if chosen is not None:
            return chosen
        for before, _ in node.next_functions:
            if before is not None and before not in seen and len(seen) < _MOST_NODES:
                seen.add(before)
                nodes.append(before)
    return None


def _chosen(
    indices: tuple[Tensor | None, ...], sizes: tuple[int, ...], num_rows: int
) -> Chosen | None:
    """What indices choose from a tensor of these sizes, the last of which are features; ``None`` if
    features are chosen, or another number of rows.
    """
    leading = torch.Size(sizes[:-1])
    given = [index for index in indices if index is not None]
    covered = len(indices) + sum(i.ndim - 1 for i in given if i.dtype == torch.bool)
    if not leading or covered > len(leading):
        return None
    ids = torch.arange(leading.numel(), device=given[0].device).view(leading)
    rows = ids[tuple(slice(None) if index is None else index for index in indices)].flatten()
    if len(rows) != num_rows:
        return None
    return Chosen(rows, torch.Size([size for size in leading if size != 1] or [1]))
