"""What the autograd graph of one forward pass tells: which parameters were used, how, and what
depends on what.

Nothing is differentiated; the graph is only walked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["Graph"]

# Nodes that hand a parameter on as it is, or a part of it.
_VIEWS = (
    "View",
    "UnsafeView",
    "T",
    "Transpose",
    "Permute",
    "Reshape",
    "ReshapeAlias",
    "Unsqueeze",
    "Squeeze",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Chunk",
    "Expand",
    "Clone",
    "Alias",
    "ToCopy",
    "Unbind",
    "AsStrided",
    "Mt",
    "WeightNormInterface",
)
_PRODUCTS = ("mm", "mv", "dot", "linear", "convolution", "rnn", "lstm", "gru", "multihead")


class Graph:
    """The graph that a tensor was computed by.

    Args:
        outputs: the tensors to start from.
    """

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        self._consumers: dict[Any, list[Any]] = {}
        self._leaves: dict[int, Any] = {}
        todo = [out.grad_fn for out in outputs if out.grad_fn is not None]
        for node in todo:
            self._consumers.setdefault(node, [])
        done = set()
        while todo:
            node = todo.pop()
            if node in done:
                continue
            done.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                self._leaves[id(variable)] = node
            for inner, _ in node.next_functions:
                if inner is not None:
                    self._consumers.setdefault(inner, []).append(node)
                    todo.append(inner)

    def __contains__(self, node: Any) -> bool:
        """Whether an outputs' value depends on this node's."""
        return node in self._consumers

    def num_uses(self, parameter: Tensor) -> int:
        """How often the outputs' computation reads the parameter."""
        node = self._leaves.get(id(parameter))
        return 0 if node is None else len(self._consumers[node])

    def is_multiplied(self, parameter: Tensor) -> bool:
        """Whether the parameter, or a view of it, is a factor of a matrix product or a
        convolution.
        """
        return any(
            any(part in _name(node).lower() for part in _PRODUCTS)
            and not _name(node).startswith("Upsample")
            for node in self._above(self._leaves.get(id(parameter)), _VIEWS)
        )

    def depending_on(self, leaves: Iterable[Tensor]) -> set[Any]:
        """All nodes whose values depend on one of these leaves."""
        found: set[Any] = set()
        for leaf in leaves:
            found |= self._above(self._leaves.get(id(leaf)), None, found)
        return found

    def _above(
        self, start: Any, through: tuple[str, ...] | None, known: Iterable[Any] = ()
    ) -> set[Any]:
        """What ``start`` is used by, directly or through nodes of these names (``None``: any)."""
        found: set[Any] = set()
        known = set(known)
        todo = [] if start is None else [start]
        while todo:
            for node in self._consumers[todo.pop()]:
                if node in found or node in known:
                    continue
                found.add(node)
                if through is None or _name(node) in through:
                    todo.append(node)
        return found


def _name(node: Any) -> str:
    """``'TBackward0' -> 'T'``."""
    return node.name().rsplit("::", 1)[-1].partition("Backward")[0]
