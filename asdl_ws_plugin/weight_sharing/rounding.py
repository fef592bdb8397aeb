"""Curvature that is nothing but rounding errors.

With one sum over the positions of an example (K-FAC-reduce), the output gradients of attention keys
cancel: a softmax does not see what is added to all scores of a query, so its gradients with respect
to them add up to zero, and with them those of the keys. B would be zero, but is the square of
rounding errors. An inverse with a damping relative to it is of no use: as large as 1e18, it takes
the step from all other layers, or overflows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import Tensor

from .torch_private import foreach_norm
from .trust import mean_eigenvalues

__all__ = ["rounding_noise"]

# Keys of 16 to 256 tokens, at the start and late in a training, had up to 25 eps² in float32
# and float64; their neighbours had from 1 up.
_MARGIN = 1e4
# In half precision eps² is not that small.
_MOST = 1e-4


@torch.no_grad()
def rounding_noise(layers: Iterable[tuple[str, Tensor, SymMatrix]]) -> dict[str, Tensor]:
    """Of layers with Kronecker factors, whether B is rounding noise: names, and scalars that stay
    on the device.

    Args:
        layers: the name, the gradient of the whole weight, and the curvature.

    The mean square of examples' gradients, the trace of the Fisher, is at least the square of the
    mean gradient. So is, about, tr(A) tr(B): where that is as small beside it as the square of the
    precision, it has no digit that is right.
    """
    groups: dict[Any, list[tuple[str, Tensor, SymMatrix]]] = defaultdict(list)
    for name, grad, matrix in layers:
        like = matrix.kron.B
        groups[like.device, like.dtype, grad.dtype].append((name, grad, matrix))
    found: dict[str, Tensor] = {}
    for (_, dtype, precision), group in groups.items():
        names, grads, matrices = zip(*group, strict=True)
        norms = torch.stack(foreach_norm(list(grads), 2, dtype=dtype))
        sizes = [A.shape[:-1].numel() * B.shape[:-1].numel() for A, B in _factors(matrices)]
        traces = mean_eigenvalues(matrices) * norms.new_tensor(sizes)
        least = min(_MARGIN * torch.finfo(precision).eps ** 2, _MOST)
        found |= zip(names, (traces <= least * norms.square()).unbind(), strict=True)
    return found


def _factors(matrices: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    return [matrix.kron.data for matrix in matrices]
