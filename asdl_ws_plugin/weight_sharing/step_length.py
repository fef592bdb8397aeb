"""How long a preconditioned step is: as long as the raw gradient, or bounded in what it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .torch_private import foreach_mul_, foreach_norm

__all__ = ["clipped", "grafted"]

# Gradients are asked for again afterwards: ranks may have exchanged the tensors.
Grads = Callable[[], list[Tensor]]


def _norms(grads: list[Tensor]) -> list[Tensor]:
    dtype = torch.promote_types(torch.float32, grads[0].dtype)  # squares of halves overflow
    return list(foreach_norm(grads, 2, dtype=dtype))


@contextlib.contextmanager
def grafted(grads: Grads) -> Iterator[None]:
    """Give each gradient, changed inside of the context, the norm that it had before.

    A gradient that became zero stays zero. Nothing is read back from the device.
    """
    raw = grads()
    before = _norms(raw) if raw else []
    yield
    if not raw:
        return
    changed = grads()
    factors = [
        torch.where(new > 0, old / new, 0.0)
        for old, new in zip(before, _norms(changed), strict=True)
    ]
    foreach_mul_(changed, factors)


@contextlib.contextmanager
def clipped(grads: Grads, bound: float, learning_rate: float) -> Iterator[None]:
    """Shorten the gradients that the context preconditions, so that their step stays in a trust
    region.

    With g before and p = F⁻¹g after, all are multiplied by ``min(1, sqrt(bound / (lr² Σ gᵀp)))``:
    a step ``lr p`` changes the model by the KL divergence ``lr² pᵀFp / 2``, and ``pᵀFp = gᵀp``.
    Nothing is read back from the device.
    """
    raw = [grad.clone() for grad in grads()]
    yield
    if not raw:
        return
    changed = grads()
    products = [(old.double() * new).sum() for old, new in zip(raw, changed, strict=True)]
    total = learning_rate**2 * torch.stack(products).sum()
    factor = torch.where(total > bound, (bound / total).sqrt(), 1.0)
    foreach_mul_(changed, [factor] * len(changed))
