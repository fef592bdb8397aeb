"""The gradients that a step has left in ``.grad``, so that none is preconditioned twice."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .weight_sharing.torch_private import version_of

__all__ = ["StepGradients", "gradients_of"]


def gradients_of(maker: Any) -> list[Tensor]:
    """Those that there are of a gradient maker's model, in the order of the parameters."""
    return [p.grad for p in maker.parameters() if p.grad is not None]


class StepGradients:
    """Gradients as the last step left them."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def leave(self, grads: Sequence[Tensor]) -> None:
        """The step has ended with these."""
        self._left = {id(grad): (weakref.ref(grad), version_of(grad)) for grad in grads}

    def are(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are, untouched, what the last step left. A backward pass makes other
        tensors, or changes these.
        """
        return bool(grads) and all(map(self._is_left, grads))

    def _is_left(self, grad: Tensor) -> bool:
        left, version = self._left.get(id(grad), (None, 0))
        return left is not None and left() is grad and version_of(grad) == version
