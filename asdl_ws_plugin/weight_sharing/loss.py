"""The user's loss, read off as it is computed, and the output gradients that sample or enumerate
its curvature.

The user's loss is called exactly as it was passed. While it runs, :class:`LossObserver` sees which
of PyTorch's loss functions it calls and with what, so the terms of the loss, what it averages over
and which terms it leaves out are known for functions, modules, lambdas, partials and ASDL's
``setup_loss_repr`` alike.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from asdl.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._warn import warn
from .factors import accumulation_dtype

__all__ = [
    "LOSS_BINARY_CROSS_ENTROPY",
    "LossObserver",
    "LossTerms",
    "check_var",
    "exact_output_grads",
    "positions_of_terms",
    "read_loss",
    "sampled_output_grads",
]

LOSS_BINARY_CROSS_ENTROPY = "binary_cross_entropy"
LOSS_TYPES = (LOSS_CROSS_ENTROPY, LOSS_MSE, LOSS_BINARY_CROSS_ENTROPY)

# torch function -> loss type
_OBSERVED: dict[Any, str] = {
    F.cross_entropy: LOSS_CROSS_ENTROPY,
    # The softmax of log-probabilities are the probabilities: the same Fisher.
    F.nll_loss: LOSS_CROSS_ENTROPY,
    F.mse_loss: LOSS_MSE,
    F.binary_cross_entropy_with_logits: LOSS_BINARY_CROSS_ENTROPY,
}
_SIGNATURES = {function: inspect.signature(function) for function in _OBSERVED}


@dataclass
class Observation:
    """One call of one of PyTorch's loss functions."""

    loss_type: str
    arguments: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        return self.arguments["input"]


class LossObserver(TorchFunctionMode):
    """Notes the calls of PyTorch's loss functions that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[Observation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        loss_type = _OBSERVED.get(func)
        if loss_type is not None:
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
                size_average, reduce = arguments.get("size_average"), arguments.get("reduce")
                arguments["reduction"] = (
                    "none" if reduce is False else "sum" if size_average is False else "mean"
                )
            if arguments["input"].requires_grad:
                self.observations.append(Observation(loss_type, arguments, output))
        return output


@dataclass
class LossTerms:
    """The terms of the loss and how the loss is made of them.

    Attributes:
        logits: the tensor that the terms are functions of; part of the autograd graph.
        class_dim: its dimension of classes or outputs; every other index is one term.
        weight: the terms' weights in the summed loss, broadcastable to ``logits``; ``None``: all 1.
            A term that the loss leaves out has weight 0.
        num_terms: T, the number of terms that the loss averages over; 1 for a sum.
        sum_factor: the gradient of the summed loss is ``sum_factor`` times that of the loss.
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


def read_loss(
    loss: Tensor | None,
    observations: list[Observation],
    logits: Tensor,
    loss_type: str | None,
    reduction: str | None,
) -> LossTerms:
    """What the loss is made of.

    Args:
        loss: the user's loss, or ``None`` if it was not computed.
        observations: what :class:`LossObserver` saw.
        logits: the model's logits, used where nothing was observed.
        loss_type: the likelihood that the curvature is of; ``None`` where it does not matter
            (``fisher_emp``).
        reduction: what the loss function says of itself, used where nothing was observed.

    Raises:
        ValueError: the loss is of another type than ``loss_type``; it calls several loss functions;
            the logits have their classes in the second of three or more dimensions.
    """
    if loss is not None and observations:
        observed = _the_one(loss, observations, logits)
        if observed is not None:
            if loss_type is not None and observed.loss_type != loss_type:
                raise ValueError(
                    f"loss_type is '{loss_type}', but the loss is '{observed.loss_type}'. Pass "
                    f"loss_type='{observed.loss_type}' to the gradient maker."
                )
            return _observed_terms(loss, observed, logits)
    rows = max(1, logits[..., 0].numel() if logits.ndim > 1 else logits.numel())
    if reduction not in ("sum", "mean") and loss is not None:
        warn(
            "The loss calls none of torch's cross_entropy, mse_loss or "
            "binary_cross_entropy_with_logits, so what it averages over is not known. The mean "
            "over all terms is assumed; pass data_size to be independent of it (with fisher_mc "
            "or fisher_exact), or give the loss an attribute reduction = 'sum' or 'mean'.",
        )
    count = 1 if reduction == "sum" else rows
    return LossTerms(logits if logits.ndim > 1 else logits.unsqueeze(-1), -1, None, count, count)


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


def _observed_terms(loss: Tensor, observed: Observation, logits: Tensor) -> LossTerms:
    arguments, x = observed.arguments, observed.input
    dtype = accumulation_dtype(x.dtype)  # of weights and counts: half precision ends at 65504 terms
    classes = observed.loss_type == LOSS_CROSS_ENTROPY
    if classes and x is logits and x.ndim > 2:
        raise ValueError(
            f"The logits have sizes {tuple(x.shape)} with their {x.shape[1]} classes in the second "
            "dimension; they have to be (N, C) or (N, *, C). Return them with the classes last, "
            "or select them with setup_logits_repr(y.movedim(1, -1))."
        )
    class_dim = (1 if x.ndim > 1 else 0) if classes else -1
    scatter, weight = None, None
    if classes:
        weight, sum_of_weights = _class_weights(arguments, x, class_dim)
    else:
        weight = _element_weights(arguments, x)
        scatter = _scatter_to_elements(x, logits)
        if (
            scatter is not None
        ):  # the loss picks elements of the logits: each is a part of its row's term
            picked = scatter(torch.ones_like(x))
            weight = picked if weight is None else scatter(weight)
        elif x.ndim == 0 or (x.ndim < logits.ndim and x.numel() == logits.numel()):
            x = _row_view(
                x, logits
            )  # the terms are rows of the logits, also where the loss saw them flattened
            weight = None if weight is None else weight.reshape(x.shape)
        elif x.ndim == 1:
            x, weight = x.unsqueeze(-1), None if weight is None else weight.unsqueeze(-1)
    num_elements = x.numel()
    outer = (
        torch.ones((), dtype=dtype, device=loss.device)
        if observed.output is loss
        else torch.autograd.grad(loss, observed.output, retain_graph=True)[0].to(dtype)
    )
    negative = bool((outer < 0).any() or (weight is not None and (weight < 0).any()))
    outer = (
        outer.abs()
    )  # how much it counts; what has a negative Hessian is refused where that is needed
    if scatter is not None:
        outer = scatter(outer) if outer.ndim else outer
        x = logits if logits.ndim > 1 else logits.unsqueeze(-1)
        picked, weight = (
            picked.reshape(x.shape),
            None if weight is None else weight.reshape(x.shape),
        )
    num_rows = x.numel() // max(1, x.shape[class_dim])
    reduction = arguments["reduction"]
    if reduction == "none" and observed.output.ndim:
        # The user reduces the terms: the weights are what the loss does with each.
        outer = outer.reshape(x.shape) if not classes else outer.unsqueeze(class_dim)
        count = torch.count_nonzero(outer)
        mean_weight = torch.where(
            count > 0, outer.sum() / count.clamp(min=1), 1
        )  # 1: nothing is left to weigh
        relative = outer / mean_weight
        weight = relative if weight is None else weight * relative
        num_terms: Tensor | float = 1 / mean_weight
        if (
            not classes
        ):  # a mean over the elements, of those that are left in or of all of them: terms are rows
            sum_of_weights = outer.sum()
            if torch.isclose(sum_of_weights, torch.ones_like(sum_of_weights)):
                num_terms = torch.count_nonzero(outer.ne(0).any(-1))
            elif torch.isclose(sum_of_weights * num_elements, count.to(sum_of_weights.dtype)):
                num_terms = num_rows
        return LossTerms(x, class_dim, weight, num_terms, 1 / mean_weight, negative)
    if reduction == "sum" and not classes:
        given = arguments.get("weight")
        given = (
            torch.ones((), dtype=dtype, device=loss.device) if given is None else given.to(dtype)
        )
        given = given.expand_as(observed.input)
        if torch.isclose(
            outer * given.sum(), torch.ones_like(outer)
        ):  # divided by the sum of the weights: a mean
            given = (scatter(given) if scatter is not None else given).reshape(x.shape)
            mean_weight = given.sum() / torch.count_nonzero(given)
            weight = None if weight is None else weight / mean_weight
            kept = torch.count_nonzero(given.ne(0).any(-1))
            return LossTerms(x, class_dim, weight, kept, 1 / (outer * mean_weight), negative)
    if reduction == "sum":
        return LossTerms(x, class_dim, weight, 1 / outer, 1 / outer, negative)
    if classes:
        total = num_rows if sum_of_weights is None else sum_of_weights
        return LossTerms(x, class_dim, weight, total / outer, total / outer, negative)
    rows = num_rows if scatter is None else torch.count_nonzero(picked.any(-1))
    return LossTerms(x, class_dim, weight, rows / outer, num_elements / outer, negative)


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


def _row_view(x: Tensor, logits: Tensor) -> Tensor:
    return x.reshape(logits.shape) if logits.ndim > 1 else x.reshape(-1, 1)


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


def check_var(var: Any) -> None:
    """Raise a ValueError unless ``var`` is a variance, variances ``(C,)`` or a covariance ``(C,
    C)``.
    """
    if isinstance(var, Tensor) and var.ndim == 2 and var.shape[0] == var.shape[1]:
        symmetric = torch.allclose(var, var.mT)
        if symmetric and not int(
            torch.linalg.cholesky_ex(var.to(accumulation_dtype(var.dtype))).info
        ):
            return
        raise ValueError(
            "var has to be symmetric and positive definite to be the covariance of the outputs."
        )
    if isinstance(var, Tensor) and var.ndim > 1:
        raise ValueError(
            f"var has to be a number or a tensor (C,) or (C, C), got sizes {tuple(var.shape)}."
        )
    if not bool(torch.as_tensor(var > 0).all()):
        raise ValueError(f"var is the variance of the outputs, which is positive; got {var!r}.")


def _half_precision(var: Any, logits: Tensor) -> float | Tensor:
    """``Λ^{1/2}`` of the Gaussian likelihood: a number, or a ``(C, C)`` matrix whose columns are
    gradients.
    """
    if not isinstance(var, Tensor):
        return 1 / math.sqrt(var)
    num_outputs = logits.shape[-1]
    if var.ndim and var.shape[-1] not in ((num_outputs,) if var.ndim == 2 else (1, num_outputs)):
        raise ValueError(f"var has sizes {tuple(var.shape)}, but there are {num_outputs} outputs.")
    var = var.to(logits)
    if var.ndim == 2:
        cholesky = torch.linalg.cholesky(var)
        return torch.linalg.inv(cholesky).mT
    return torch.diag(var.expand(logits.shape[-1]).rsqrt())


def sampled_output_grads(
    terms: LossTerms, loss_type: str, var: Any = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Gradient of the negative log-likelihood of one label drawn for each term, of the shape of
    ``terms.logits``.

    Its second moment is the loss Hessian (eq. 3.35), weighted as the loss weights its terms.
    """
    with torch.no_grad():
        logits = terms.logits.detach()
        logits = logits.to(accumulation_dtype(logits.dtype))
        if loss_type == LOSS_CROSS_ENTROPY:
            grads = torch.softmax(logits, terms.class_dim)
            probs = grads.movedim(terms.class_dim, -1)
            labels = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
            labels = labels.reshape(*probs.shape[:-1], 1).movedim(-1, terms.class_dim)
            grads = grads.scatter_add(
                terms.class_dim, labels, -torch.ones_like(labels, dtype=grads.dtype)
            )
        elif loss_type == LOSS_BINARY_CROSS_ENTROPY:
            probs = torch.sigmoid(logits)
            grads = probs - torch.bernoulli(probs, generator=generator)
        else:
            noise = torch.randn(
                logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
            )
            root = _half_precision(var, logits)
            grads = noise @ root.mT if isinstance(root, Tensor) else noise * root
        return _weighted(grads, terms).to(terms.logits.dtype)


def exact_output_grads(
    terms: LossTerms, loss_type: str, position: Tensor, num_positions: int, var: Any = 1.0
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
    with torch.no_grad():
        logits = (
            terms.logits.detach()
            .to(accumulation_dtype(terms.logits.dtype))
            .movedim(terms.class_dim, -1)
        )
        num_classes = logits.shape[-1]
        eye = torch.eye(num_classes, dtype=logits.dtype, device=logits.device)
        if loss_type == LOSS_CROSS_ENTROPY:
            probs = torch.softmax(logits, -1)
        elif loss_type == LOSS_BINARY_CROSS_ENTROPY:
            probs = torch.sigmoid(logits)
        else:
            root = _half_precision(var, logits)
            columns = root.mT if isinstance(root, Tensor) else eye * root
        for c in range(num_classes):
            if loss_type == LOSS_CROSS_ENTROPY:
                grads = (probs - eye[c]) * probs[..., c, None].sqrt()
            elif loss_type == LOSS_BINARY_CROSS_ENTROPY:
                grads = (probs * (1 - probs)).sqrt() * eye[c]
            else:
                grads = columns[c].expand_as(logits)
            grads = _weighted(grads.movedim(-1, terms.class_dim), terms)
            for r in range(num_positions):
                if num_positions == 1:
                    part = grads
                else:
                    here = (
                        (position == r)
                        .reshape(logits.shape[:-1])
                        .unsqueeze(-1)
                        .movedim(-1, terms.class_dim)
                    )
                    part = grads * here
                yield part.to(terms.logits.dtype)


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


def _weighted(grads: Tensor, terms: LossTerms) -> Tensor:
    return grads if terms.weight is None else grads * terms.weight.to(grads.dtype).sqrt()
