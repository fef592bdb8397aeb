"""One call of PyTorch's losses as a sum of terms: their weights, and what the loss averages over.

The loss is written ``L = 1/κ Σ_t w_t l_t`` over its terms, with ``w_t = 0`` for a term that it
leaves out, and one ``T`` that it averages over. How each is read, with ``c`` the gradient of L with
respect to what PyTorch's function returned (a number, or one of each term for reduction 'none'),
``h_t`` what the call's own weights do to the second derivative of ``l_t``, and ``m`` the mean of
the weights that are not 0:

===================  ============  ===================  =====================
terms, reduction     ``w_t``       ``κ``                ``T``
===================  ============  ===================  =====================
classes, mean        ``h_t``       ``Σ weights / c``    ``κ``
classes, sum         ``h_t``       ``1/c``              ``κ``
classes, none        ``h_t c_t/m`` ``1/m``              ``κ``
elements, mean       ``h_t``       ``elements / c``     ``rows / c``
elements, sum        ``h_t``       ``1/c``              ``κ``
elements, sum over   ``h_t/m``     ``1/(c m)``          rows that are left in
the sum of weights
squared errors that  ``h_t/m``     ``elements left/c``  rows left in ``/ c``
have weights, mean
elements, none       ``h_t c_t/m`` ``1/m``              ``κ``; rows, if a mean
===================  ============  ===================  =====================

*Classes*: a term is a row of logits with one label. *Elements*: each logit is a term of its own.
*Picked elements* are elements, with ``h_t = 0`` for those that the loss did not pick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from asdl.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE
from torch import Tensor

from ._warn import warn
from .factors import accumulation_dtype
from .observe_loss import Observation

__all__ = ["LossTerms", "observed_terms", "read_one_call", "unread_terms"]


UNKNOWN_SCALE = (
    "The loss calls none of torch's cross_entropy, mse_loss or binary_cross_entropy_with_logits, "
    "so what it averages over is not known. The mean over all terms is assumed; use fisher_mc or "
    "fisher_exact without data_size to be independent of it, or give the loss an attribute "
    "reduction = 'sum' or 'mean'."
)


@dataclass
class LossTerms:
    """The terms of the loss and how the loss is made of them.

    Attributes:
        logits: the tensor that the terms are functions of; part of the autograd graph.
        class_dim: its dimension of classes or outputs; every other index is one term.
        weight: the terms' weights in the summed loss, broadcastable to ``logits``; ``None``: all 1.
            A term that the loss leaves out has weight 0.
        num_terms: T, the number of terms that the loss averages over; 1 for a sum.
        sum_factor: κ; the gradient of the summed loss is ``sum_factor`` times that of the loss.
        has_negative: whether the loss weighs some term negatively, as advantages do.
    """

    logits: Tensor
    class_dim: int
    weight: Tensor | None
    num_terms: Tensor | float
    sum_factor: Tensor | float
    has_negative: bool = False

    @property
    def num_rows(self) -> int:
        """The number of terms, those of weight 0 included."""
        return self.logits.numel() // max(
            1, self.logits.shape[self.class_dim] if self.logits.ndim else 1
        )


def read_one_call(
    loss: Tensor, observations: list[Observation], logits: Tensor, reduction: str | None
) -> LossTerms:
    """The terms of a loss that is one call of PyTorch's, or none: then all rows of the logits.

    Args:
        observations: what :class:`~.observe_loss.LossObserver` saw.
        logits: the model's logits, used where nothing was observed.
        reduction: what the loss function says of itself, used where nothing was observed.

    Raises a ValueError if the loss calls several loss functions, or the logits have their classes
    in the second of three or more dimensions.
    """
    observed = _the_one(loss, observations, logits) if observations else None
    if observed is not None:
        return observed_terms(loss, observed, logits)
    rows = logits.numel() // max(1, logits.shape[-1] if logits.ndim > 1 else 1)
    if reduction not in ("sum", "mean"):
        warn(UNKNOWN_SCALE)
    return unread_terms(logits, 1 if reduction == "sum" else max(1, rows))


def unread_terms(logits: Tensor, count: Tensor | float) -> LossTerms:
    """Every row of the logits, in a loss that averages over so many terms."""
    return LossTerms(logits if logits.ndim > 1 else logits.reshape(-1, 1), -1, None, count, count)


def _the_one(loss: Tensor, observations: list[Observation], logits: Tensor) -> Observation | None:
    """The observation that the loss is made of; ``None`` if there is none."""
    if len(observations) == 1 and observations[0].output is loss:
        return observations[0]
    grads = torch.autograd.grad(
        loss, [o.output for o in observations], retain_graph=True, allow_unused=True
    )
    used = [o for o, grad in zip(observations, grads, strict=True) if grad is not None]
    if len(used) > 1:
        used = [o for o in used if o.input is logits or o.input.data_ptr() == logits.data_ptr()]
        if len(used) != 1:
            raise ValueError(
                f"The loss is made of {len(observations)} calls of torch's loss functions, and it "
                "is not clear which the curvature is of. Select its logits with setup_logits_repr."
            )
    return used[0] if used else None


# ------------------------------------------------------------------------------ one call, its terms


def observed_terms(loss: Tensor, observed: Observation, logits: Tensor) -> LossTerms:
    """The terms of one call, by the table above."""
    dtype = accumulation_dtype(observed.input.dtype)  # half precision ends at 65504 terms
    outer = (
        torch.ones((), dtype=dtype, device=loss.device)
        if observed.output is loss
        else torch.autograd.grad(loss, observed.output, retain_graph=True)[0].to(dtype)
    )
    if observed.loss_type == LOSS_CROSS_ENTROPY:
        return _classes(observed, logits, outer)
    scatter = _scatter_to_elements(observed.input, logits)
    if scatter is None:
        return _elements(observed, logits, outer)
    return _picked_elements(observed, logits, outer, scatter)


def _classes(observed: Observation, logits: Tensor, outer: Tensor) -> LossTerms:
    """A term for every row, as cross-entropy has them."""
    x = observed.input
    if x is logits and x.ndim > 2:
        raise ValueError(
            f"The logits have sizes {tuple(x.shape)} with their {x.shape[1]} classes in the second "
            "dimension; they have to be (N, C) or (N, *, C). Return them with the classes last, "
            "or select them with setup_logits_repr(y.movedim(1, -1))."
        )
    class_dim = 1 if x.ndim > 1 else 0
    weight, total = _class_weights(observed.arguments, x, class_dim)
    negative, outer = _any_negative(outer, weight), outer.abs()
    if observed.reduction == "none" and observed.output.ndim:
        outer = outer.unsqueeze(class_dim)
        mean = _mean_weight(outer)
        return LossTerms(x, class_dim, weight * (outer / mean), 1 / mean, 1 / mean, negative)
    if observed.reduction == "mean":
        sum_factor = (x.numel() // max(1, x.shape[class_dim]) if total is None else total) / outer
    else:
        sum_factor = 1 / outer
    return LossTerms(x, class_dim, weight, sum_factor, sum_factor, negative)


def _elements(observed: Observation, logits: Tensor, outer: Tensor) -> LossTerms:
    """A term for every logit, as MSE and BCE have them."""
    x, weight = observed.input, _element_weights(observed.arguments, observed.input)
    given = _given_weight(observed)
    if x.ndim == 0 or (x.ndim < logits.ndim and x.numel() == logits.numel()):
        sizes = logits.shape if logits.ndim > 1 else torch.Size((x.numel(), 1))  # rows, even flat
    else:
        sizes = x.shape if x.ndim > 1 else torch.Size((x.numel(), 1))
    x, given = x.reshape(sizes), given.reshape(sizes)
    weight = None if weight is None else weight.reshape(sizes)
    outer = outer.reshape(sizes) if outer.ndim else outer
    num_rows = x.numel() // max(1, sizes[-1])
    return _reduced(observed, x, weight, outer, given, x.numel(), num_rows)


def _picked_elements(
    observed: Observation, logits: Tensor, outer: Tensor, scatter: Callable[[Tensor], Tensor]
) -> LossTerms:
    """A term for every logit that the loss picked, in its place among all of them."""
    x, weight = observed.input, _element_weights(observed.arguments, observed.input)
    sizes = logits.shape if logits.ndim > 1 else torch.Size((logits.numel(), 1))
    picked = scatter(torch.ones_like(x)).reshape(sizes)
    return _reduced(
        observed,
        logits.reshape(sizes),
        picked if weight is None else scatter(weight).reshape(sizes),
        scatter(outer).reshape(sizes) if outer.ndim else outer,
        scatter(_given_weight(observed)).reshape(sizes),
        x.numel(),
        torch.count_nonzero(picked.any(-1)),
    )


def _reduced(
    observed: Observation,
    x: Tensor,
    weight: Tensor | None,
    outer: Tensor,
    given: Tensor,
    num_elements: int,
    num_rows: int | Tensor,
) -> LossTerms:
    """Elements by their reduction.

    Args:
        given: the call's own ``weight`` of each element.
        num_elements, num_rows: how many take part; a row takes part if one of its elements does.
    """
    negative, outer = _any_negative(outer, weight), outer.abs()
    if observed.reduction == "none" and observed.output.ndim:
        return _elements_none(x, weight, outer, num_elements, negative)
    is_mean = observed.reduction == "mean"
    # mse_loss divides by the sum of its weights, binary_cross_entropy_with_logits does not.
    is_weighted = observed.loss_type == LOSS_MSE and observed.arguments.get("weight") is not None
    if is_mean and not is_weighted:
        return LossTerms(x, -1, weight, num_rows / outer, num_elements / outer, negative)
    share = outer if is_mean else outer * given.sum()  # of the mean over the weights
    if is_mean or torch.isclose(share, torch.ones_like(outer)):
        mean = given.sum() / torch.count_nonzero(given)
        weight = None if weight is None else weight / mean
        kept = torch.count_nonzero(given.ne(0).any(-1))
        return LossTerms(x, -1, weight, kept / share, torch.count_nonzero(given) / share, negative)
    return LossTerms(x, -1, weight, 1 / outer, 1 / outer, negative)


def _elements_none(
    x: Tensor, weight: Tensor | None, outer: Tensor, num_elements: int, negative: bool
) -> LossTerms:
    """Elements that the user reduces: the weights are what the loss does with each."""
    mean, total, count = _mean_weight(outer), outer.sum(), torch.count_nonzero(outer)
    relative = outer / mean
    num_terms = 1 / mean
    # A mean over the elements, of those that are left in or of all of them, is one over rows.
    if torch.isclose(total, torch.ones_like(total)):
        num_terms = torch.count_nonzero(outer.ne(0).any(-1))
    elif torch.isclose(total * num_elements, count.to(total.dtype)):
        num_terms = torch.full_like(mean, x.numel() // max(1, x.shape[-1]))
    weight = relative if weight is None else weight * relative
    return LossTerms(x, -1, weight, num_terms, 1 / mean, negative)


def _mean_weight(weights: Tensor) -> Tensor:
    """The mean of those that are not 0; 1 where nothing is left to weigh."""
    count = torch.count_nonzero(weights)
    return torch.where(count > 0, weights.sum() / count.clamp(min=1), 1)


def _any_negative(outer: Tensor, weight: Tensor | None) -> bool:
    """Whether a term counts negatively; one without a positive Hessian is refused where that is
    needed.
    """
    return bool((outer < 0).any() or (weight is not None and (weight < 0).any()))


def _scatter_to_elements(x: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Where ``x`` is some of the logits' elements, each at most once: the function that puts values
    of the shape of ``x`` in their places, and 0 in all others; ``None`` if ``x`` is anything else.
    """
    if not 0 < x.numel() < logits.numel():
        return None

    def scatter(values: Tensor) -> Tensor:
        (placed,) = torch.autograd.grad(
            x, logits, values.to(x.dtype), retain_graph=True, allow_unused=True
        )
        return placed

    ones = scatter(torch.ones_like(x))
    if ones is None:
        return None
    with torch.no_grad():
        chosen = ones == 1
        if int(chosen.sum()) != x.numel() or bool((ones != 0).ne(chosen).any()):
            return None
        same = torch.equal(logits[chosen].to(x.dtype).sort().values, x.flatten().sort().values)
    return scatter if same else None


# ----------------------------------------------------------------------------- a call's own weights


def _class_weights(
    arguments: dict[str, Any], x: Tensor, class_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Weights of cross-entropy terms, and what its mean divides by; ``None``: the number of terms.

    A term's second derivative is that of ``-log p`` times the sum of what its target, smoothed, and
    the class weights give to the classes. A term that ``ignore_index`` leaves out (compared with
    the *labels*) has weight 0.
    """
    target, class_weight = arguments["target"], arguments["weight"]
    smoothing, dtype = arguments.get("label_smoothing", 0.0), accumulation_dtype(x.dtype)
    num_classes = x.shape[class_dim]
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
    if torch.is_floating_point(target):  # probabilities
        target = target.to(dtype) * (1 - smoothing) + smoothing / num_classes
        if class_weight is not None:
            target = target * class_weight.reshape(
                [-1 if d == class_dim else 1 for d in range(x.ndim)]
            )
        return target.sum(class_dim, keepdim=True), None
    labelled = target != arguments["ignore_index"]
    weight = labelled.to(dtype)
    total = weight.sum()
    if class_weight is not None:
        of_labels = weight * class_weight[target.where(labelled, 0)]
        total = of_labels.sum()  # smoothing does not change what PyTorch divides by
        weight = (1 - smoothing) * of_labels + smoothing * class_weight.mean() * weight
    return weight.unsqueeze(class_dim) if x.ndim > 1 else weight, total


def _given_weight(observed: Observation) -> Tensor:
    """The call's ``weight`` of each of its elements."""
    given, x = observed.arguments.get("weight"), observed.input
    dtype = accumulation_dtype(x.dtype)
    given = torch.ones((), dtype=dtype, device=x.device) if given is None else given.to(dtype)
    return given.expand_as(x)


def _element_weights(arguments: dict[str, Any], x: Tensor) -> Tensor | None:
    """Weights of the elements of an MSE or BCE: ``weight``, and what ``pos_weight`` does to the
    second derivative.
    """
    weight, pos_weight = arguments.get("weight"), arguments.get("pos_weight")
    if weight is not None:
        weight = weight.to(accumulation_dtype(x.dtype)).expand_as(x)
    if pos_weight is not None:
        positive = 1 + (pos_weight - 1) * arguments["target"]
        weight = positive if weight is None else weight * positive
    return weight
