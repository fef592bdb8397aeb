"""From the terms of a loss to what is back-propagated for its curvature: samples, or the columns of
the terms' Hessian roots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .factors import accumulation_dtype
from .likelihoods import Likelihood
from .read_loss import LossTerms

__all__ = ["exact_output_grads", "positions_of_terms", "sampled_output_grads"]


@torch.no_grad()
def sampled_output_grads(
    terms: LossTerms, likelihood: Likelihood, generator: torch.Generator | None = None
) -> Tensor:
    """Gradient of the negative log-likelihood of one label drawn for each term, of the shape of
    ``terms.logits``.

    Its second moment is the loss Hessian (eq. 3.35), weighted as the loss weights its terms.
    """
    grads = likelihood.sample(_classes_last(terms), generator)
    return _weighted(grads.movedim(-1, terms.class_dim), terms).to(terms.logits.dtype)


@torch.no_grad()
def exact_output_grads(
    terms: LossTerms, likelihood: Likelihood, position: Tensor, num_positions: int
) -> Iterator[Tensor]:
    """The columns of the loss Hessians' square roots, one position at a time.

    Terms at different positions of an example must not be back-propagated together, or their
    products would count; terms of different examples may.

    Args:
        position: the position of each term within its example, shape ``(rows,)``.
        num_positions: R', the number of positions.

    Yields:
        ``num_positions * C`` tensors of the shape of ``terms.logits``.
    """
    logits = _classes_last(terms)
    for column in likelihood.hessian_root(logits):
        grads = _weighted(column.movedim(-1, terms.class_dim), terms).to(terms.logits.dtype)
        for r in range(num_positions):
            if num_positions == 1:
                yield grads
                continue
            here = (position == r).reshape(logits.shape[:-1]).unsqueeze(-1)
            yield grads * here.movedim(-1, terms.class_dim)


def _classes_last(terms: LossTerms) -> Tensor:
    """The terms' logits ``(*, C)``, in at least float32."""
    logits = terms.logits.detach()
    return logits.to(accumulation_dtype(logits.dtype)).movedim(terms.class_dim, -1)


def _weighted(grads: Tensor, terms: LossTerms) -> Tensor:
    return grads if terms.weight is None else grads * terms.weight.to(grads.dtype).sqrt()


def positions_of_terms(terms: LossTerms, logits: Tensor, position: Tensor) -> Tensor:
    """The positions of the loss's terms ``(terms,)``, given those of the rows of the logits
    ``(rows,)``.

    Raises a ValueError if the terms are not rows of the logits, each at most once.
    """
    rows = len(position)
    x = terms.logits.movedim(terms.class_dim, -1)
    if (
        x.shape == logits.shape and x is not logits
    ):  # the loss may replace elements, which are then constants
        numbers = torch.arange(1, x.numel() + 1, device=x.device).view_as(x)
        found = _sent_back(x, logits, numbers)
        if bool(((found == numbers) | (found == 0)).all()):
            return position
    if x.reshape(-1, x.shape[-1]).shape[0] == rows and x.data_ptr() == logits.data_ptr():
        return position
    # The loss selects or reorders rows: find out which by sending row numbers back through the
    # selection. They sum up to zero over the classes, and so they pass through a log_softmax
    # unchanged.
    probe = torch.zeros(x.shape, dtype=torch.long, device=x.device)
    row_numbers = torch.arange(1, x.numel() // x.shape[-1] + 1, device=x.device)
    probe.view(-1, x.shape[-1])[:, 0] = row_numbers
    if x.shape[-1] > 1:
        probe.view(-1, x.shape[-1])[:, 1] = -row_numbers
    number = _sent_back(x, logits, probe).reshape(rows, -1)[:, 0]
    order = number[number > 0] - 1
    expected = torch.arange(len(order), device=order.device)
    if not torch.equal(order.sort().values, expected) or len(order) != x.numel() // x.shape[-1]:
        raise ValueError(
            "fisher_exact needs a loss of logits that are rows of the model's logits, "
            f"{tuple(logits.shape)}; those of the loss have sizes {tuple(x.shape)} with the "
            "classes last. Let the model return them that way, or use fisher_mc."
        )
    selected = torch.empty_like(order)
    selected[order] = position[number > 0]
    return selected


def _sent_back(x: Tensor, logits: Tensor, numbers: Tensor) -> Tensor:
    """The product of whole numbers with the Jacobian of ``x``, rounded, of the sizes of ``logits``.

    Sent digit by digit: half precision, which ``x`` may have or have been cast from, has no larger
    whole numbers.
    """
    base = int(2 / max(torch.finfo(x.dtype).eps, torch.finfo(logits.dtype).eps))
    found = torch.zeros(logits.shape, dtype=torch.long, device=logits.device)
    unit, largest = 1, int(numbers.abs().max()) if numbers.numel() else 0
    while unit <= largest:
        digits = numbers.abs() // unit % base * numbers.sign()
        (part,) = torch.autograd.grad(x, logits, digits.to(x.dtype), retain_graph=True)
        found += part.round().long() * unit
        unit *= base
    return found
