"""How long a preconditioned step is: as long as the raw gradient, or bounded in what it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .torch_private import foreach_mul_, foreach_norm

__all__ = ["clipped", "clipping_factor", "grafted", "noting_change"]

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
    products: list[Tensor] = []
    with noting_change(grads, products):
        yield
    if products:
        changed = grads()
        foreach_mul_(changed, [clipping_factor(products, bound, learning_rate)] * len(changed))


@contextlib.contextmanager
def noting_change(grads: Grads, products: list[Tensor]) -> Iterator[None]:
    """Add ``gᵀp`` of each gradient to ``products``: g before, p after the context."""
    raw = [grad.clone() for grad in grads()]
    yield
    changed = grads() if raw else []
    products += [(old.double() * new).sum() for old, new in zip(raw, changed, strict=True)]


def clipping_factor(products: Sequence[Tensor], bound: float, learning_rate: float) -> Tensor:
    """What :func:`clipped` multiplies gradients with, given their ``gᵀp``."""
    total = learning_rate**2 * torch.stack(list(products)).sum()
    return torch.where(total > bound, (bound / total).sqrt(), 1.0)
