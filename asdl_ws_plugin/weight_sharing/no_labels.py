"""A rank whose labels are all left out, of several that train together.

A mean over no labels is no number, but in the joint batch such examples are examples without
labels: they count in A, and have no part in B and the gradient. So the rank's loss is a zero with a
gradient of zeros, and its terms are rows of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from asdl.grad_maker import LOSS_CROSS_ENTROPY
from torch import Tensor

from .capture import Captured
from .observe_loss import Observation
from .read_loss import LossTerms
from .reading import Reading

__all__ = ["has_no_label", "reading_without_labels", "with_zero_loss", "zero_loss"]


def has_no_label(
    loss: Tensor | None, observations: Sequence[Observation], logits: Any, count: Any = None
) -> bool:
    """Whether a loss is no number only because it is a mean over no labels.

    Args:
        loss: the user's loss.
        observations: the calls of PyTorch's losses that it is made of.
        logits: the model's; if they are not finite either, training has diverged.
        count: how many terms the loss says that it averages over.
    """
    if loss is None or loss.numel() != 1 or not isinstance(logits, Tensor) or not logits.numel():
        return False
    if not bool(torch.isnan(loss).all()) or not bool(torch.isfinite(logits).all()):
        return False
    if count is not None:
        return float(count) == 0
    return bool(observations) and all(_is_over_nothing(loss, call) for call in observations)


def _is_over_nothing(loss: Tensor, call: Observation) -> bool:
    """Whether all labels of a call are left out, by itself or by the mask of a mean around it."""
    target = call.arguments["target"]
    if call.reduction != "none":
        ignored = call.arguments.get("ignore_index")
        is_class = call.loss_type == LOSS_CROSS_ENTROPY and not torch.is_floating_point(target)
        return is_class and bool((target == ignored).all())
    # 0 / 0 for every term; a NaN from elsewhere leaves the weights of the terms as they are
    (weights,) = torch.autograd.grad(loss, call.output, retain_graph=True, allow_unused=True)
    is_finite = bool(torch.isfinite(call.output).all())
    return is_finite and weights is not None and not bool(torch.isfinite(weights).any())


def zero_loss(logits: Tensor) -> Tensor:
    """A loss of 0 whose gradient is 0."""
    return (logits * 0).sum()


def with_zero_loss(captured: Captured) -> Captured:
    """The same batch, if it has no label, with a loss that says so."""
    observations, count = captured.observations, captured.num_terms
    if not has_no_label(captured.loss, observations, captured.logits, count):
        return captured
    return replace(captured, loss=zero_loss(captured.logits), num_terms=None, has_labels=False)


def reading_without_labels(captured: Captured, loss_type: str | None) -> Reading:
    """Every row of the logits, with weight 0."""
    logits = captured.logits
    rows = logits if logits.ndim > 1 else logits.reshape(-1, 1)
    observed = [call.loss_type for call in captured.observations]
    weight = rows.new_zeros(*rows.shape[:-1], 1)
    terms = LossTerms(rows, -1, weight, 0.0, 1.0)
    name = (observed or [loss_type or LOSS_CROSS_ENTROPY])[0]
    return Reading([(name, terms)], True, 1.0, 0.0, terms.num_rows, captured.loss, logits)
