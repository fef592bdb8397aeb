"""What the user's loss is made of, and the check of it: nothing is taken for granted.

The loss is the sum of the calls of PyTorch's losses that were observed on the logits, each with its
weight. Its gradient with respect to the logits has to equal the sum of theirs. It does where the
autograd graph has no other way from the loss to the logits, which is told without a number;
where it has one, the gradients are compared. A loss with anything else in it has its own Hessian
with respect to each row of the logits (:mod:`~.own_hessian`).

===========================================  ====================================================
found                                        curvature
===========================================  ====================================================
one call, or several, and nothing else       theirs, the sum of their terms' (:mod:`~.read_loss`)
something else, beside calls or alone        the positive part of the loss's own Hessians
a call's terms with weights that depend on   the same
the logits, as in a focal loss
calls of other tensors than the logits       left out, unless it is the only call
===========================================  ====================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from asdl.grad_maker import LOSS_MSE
from torch import Tensor

from ._warn import warn
from .likelihoods import LOSS_TYPES, likelihood_of
from .loss_graph import LossGraph, places_of
from .observe_loss import Observation
from .output_grads import CallPart, HessianPart, Part
from .own_hessian import depends_on_elements_alone, roots_of_positive_parts, row_hessians
from .read_loss import UNKNOWN_SCALE, LossTerms, observed_terms, unread_terms
from .shared_terms import CountedCall, num_different_terms

__all__ = ["LOSS_AUTO", "Reading", "check_loss_type", "read_loss"]

LOSS_AUTO = "auto"


@dataclass(frozen=True)
class Reading:
    """What a loss is made of.

    Attributes:
        calls: the observed calls that it is made of, with their terms.
        is_whole: whether they are all of it.
        sum_factor: κ; the gradient of the summed loss is that of the loss times κ.
        num_terms: T, the number of rows that the loss averages over; 1 for a sum.
        num_rows: how many rows of the logits have a term.
        loss, logits: as they were read.
        parts: what is back-propagated, once it is made.
    """

    calls: list[tuple[str, LossTerms]]
    is_whole: bool
    sum_factor: Tensor | float
    num_terms: Tensor | float
    num_rows: int
    loss: Tensor | None
    logits: Tensor
    parts: list[Part] = field(default_factory=list)

    @property
    def source(self) -> LossTerms:
        """The terms of the one call that the loss is, or else all rows of the logits."""
        if self.is_whole and len(self.calls) == 1:
            return self.calls[0][1]
        return unread_terms(self.logits, self.sum_factor)

    def with_parts(self, var: Any, of_loss: bool) -> Reading:
        """The same, with what is back-propagated for the curvature of the summed loss.

        Args:
            var: of the Gaussian likelihood.
            of_loss: whether it has to be that of the loss as it was passed times κ. Otherwise a
                squared error is half of one, which is ASDL's convention.

        Raises a ValueError if a term is weighed negatively, or what was not read has no Hessian.
        """
        if not self.is_whole:
            assert self.loss is not None
            if not _is_one(var):
                raise ValueError(
                    "var is the variance of the Gaussian likelihood behind mse_loss, but the loss "
                    "is not read as calls of it. Leave var out; the loss's own scale counts."
                )
            roots = roots_of_positive_parts(row_hessians(self.loss, self.logits))
            return replace(self, parts=[HessianPart(self.logits, roots, self.sum_factor)])
        if any(terms.has_negative for _, terms in self.calls):
            raise ValueError(
                "The loss weighs terms negatively, as advantages do, so its curvature need not be "
                "positive. Use fisher_type='fisher_emp', the second moment of its gradients."
            )
        found: list[Part] = []
        for loss_type, terms in self.calls:
            factor = 1.0 if len(self.calls) == 1 else self.sum_factor / terms.sum_factor
            factor = factor * 2 if of_loss and loss_type == LOSS_MSE else factor
            found.append(CallPart(terms, likelihood_of(loss_type, var), factor))
        return replace(self, parts=found)


def read_loss(
    loss: Tensor | None,
    observations: list[Observation],
    logits: Tensor,
    loss_type: str | None,
    *,
    num_examples: int | None = None,
    reduction: str | None = None,
    count: Tensor | float | None = None,
    needs_scale: bool = True,
) -> Reading:
    """What the loss is made of.

    Args:
        loss: the user's loss, or ``None`` if it was not computed.
        observations: what :class:`~.observe_loss.LossObserver` saw.
        logits: the model's logits.
        loss_type: the type that the loss is said to have; ``None`` where it does not matter.
        num_examples: N, where the terms themselves matter; ``None`` where only their scale does.
        reduction: what the loss function says of itself, for what is not read.
        count: how many terms the loss says that it averages over, for what is not read.
        needs_scale: whether κ is needed; if it has to be assumed, there is a warning.

    Raises:
        ValueError: the loss is of another type than ``loss_type``; none of several calls is one of
            the logits; the logits have their classes in the second of three or more dimensions.
    """
    if loss is None:
        if loss_type in (None, LOSS_AUTO):
            raise ValueError("There is no loss to read the type from. Give a loss, or a loss_type.")
        terms = unread_terms(logits, logits.numel() // max(1, logits.shape[-1]))
        return _whole([(str(loss_type), terms)], loss, logits)
    graph = LossGraph(loss, observations, logits, num_examples)
    if len(graph.used) > 1 and not graph.of_logits and not graph.has_rest:
        if loss_type is not None:
            raise ValueError(
                f"The loss is made of {len(graph.used)} calls of torch's loss functions, but none "
                f"is of the logits {tuple(logits.shape)}. Select theirs with setup_logits_repr."
            )
        graph.of_logits = graph.used
    calls = graph.of_logits or (graph.used if not graph.has_rest else [])
    _check_type(loss_type, calls)
    found = [(call.loss_type, observed_terms(loss, call, logits)) for call in calls]
    is_sum = bool(found) and (num_examples is None or graph.is_linear(calls))
    if is_sum and (not graph.has_rest or graph.is_all(calls)):
        return _whole(found, loss, logits)
    scale = _assumed_scale(loss, found, logits, reduction, count, needs_scale)
    rows = logits.numel() // max(1, logits.shape[-1] if logits.ndim > 1 else 1)
    return Reading(found, False, scale, scale, rows, loss, logits)


def check_loss_type(loss_type: Any) -> None:
    """Raise a ValueError unless it is a type, ``'auto'``, or left out."""
    if loss_type is not None and loss_type not in (*LOSS_TYPES, LOSS_AUTO):
        raise ValueError(
            f"loss_type has to be one of {', '.join((*LOSS_TYPES, LOSS_AUTO))}, got {loss_type!r}."
        )


def _check_type(loss_type: str | None, calls: list[Observation]) -> None:
    types = list(dict.fromkeys(call.loss_type for call in calls))
    if loss_type in (None, LOSS_AUTO) or types in ([], [loss_type]):
        return
    read = " and ".join(f"'{name}'" for name in types)
    remedy = f"Pass loss_type={read}, or leave it out" if len(types) == 1 else "Leave it out"
    raise ValueError(f"loss_type is '{loss_type}', but the loss is {read}. {remedy}.")


# ------------------------------------------------------------------------------------------- scales


def _whole(calls: list[tuple[str, LossTerms]], loss: Tensor | None, logits: Tensor) -> Reading:
    """A loss that is its calls, and nothing else."""
    if len(calls) == 1:
        terms = calls[0][1]
        return Reading(calls, True, terms.sum_factor, terms.num_terms, terms.num_rows, loss, logits)
    sum_factor = _joint_scale(calls, logits)
    places = [places_of(terms.logits, logits) for _, terms in calls]
    rows = torch.stack([place.reshape(_rows(logits)).any(-1) for place in places]).any(0)
    return Reading(calls, True, sum_factor, sum_factor, int(rows.sum()), loss, logits)


def _joint_scale(calls: list[tuple[str, LossTerms]], logits: Tensor) -> Tensor | float:
    """κ of several calls: how many terms they have, over the sum of what the loss weighs each with.

    So it is that of one call with reduction 'none' and the same weights, if there is one.
    """
    counted = [CountedCall(name, terms) for name, terms in calls if float(1 / terms.sum_factor)]
    weight = sum(int(call.counts.sum()) / call.terms.sum_factor for call in counted)
    return num_different_terms(counted, logits) / weight if float(weight) else 1.0


def _rows(logits: Tensor) -> tuple[int, int]:
    return (-1, logits.shape[-1]) if logits.ndim > 1 else (-1, 1)


def _assumed_scale(
    loss: Tensor,
    found: list[tuple[str, LossTerms]],
    logits: Tensor,
    reduction: str | None,
    count: Tensor | float | None,
    needs_scale: bool,
) -> Tensor | float:
    """κ of a loss that is not, or not all, read: the number of its terms for a mean, 1 for a sum.

    Its calls tell which of the two it is, or ``reduction``. A row that has no gradient has no term.
    """
    if count is not None:
        return count
    if reduction == "sum" or not needs_scale:
        return 1.0
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if grad is None:
        grad = torch.ones_like(logits)
    has_term = grad.reshape(_rows(logits)) != 0
    if found:
        terms = float(torch.count_nonzero(has_term.any(-1)).clamp(min=1))
        scale = float(_whole(found, loss, logits).sum_factor)
        return terms if scale > terms**0.5 else 1.0
    if reduction != "mean":
        warn(UNKNOWN_SCALE)
    has_term = has_term if depends_on_elements_alone(loss, logits) else has_term.any(-1)
    return torch.count_nonzero(has_term).clamp(min=1)


def _is_one(var: Any) -> bool:
    return not isinstance(var, Tensor) and var == 1
