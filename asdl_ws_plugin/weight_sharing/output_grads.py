"""What is back-propagated for the curvature of a loss: samples, or the columns of the Hessians'
roots.

A loss is made of *parts*: the calls of PyTorch's losses that were read, or the loss as a whole with
its own Hessians. Each part has a tensor where its gradients start, and the curvature of the summed
loss there: its samples have it as their second moment, its columns as the sum of their outer
products. The curvature of the loss is the sum over the parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .factors import accumulation_dtype
from .likelihoods import Likelihood
from .read_loss import LossTerms

__all__ = ["CallPart", "HessianPart", "Part", "positions_of_terms", "sample_of"]


class Part(ABC):
    """A part of the loss.

    Attributes:
        outputs: where its gradients start, a part of the autograd graph.
        class_dim: its dimension of classes or outputs; every other index is one term.
        num_rows: how many terms it has, those of weight 0 included.
    """

    outputs: Tensor
    class_dim: int
    num_rows: int

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Noise of the sizes of :attr:`outputs`, with the Hessian as its second moment
        (eq. 3.35).
        """

    @abstractmethod
    def columns(self) -> Iterator[Tensor]:
        """The columns of the Hessians' roots, of the sizes of :attr:`outputs`."""

    @abstractmethod
    def positions(self, logits: Tensor, position: Tensor) -> Tensor:
        """The position of each term, given those of the rows of the logits."""

    @torch.no_grad()
    def columns_by_position(self, position: Tensor, num_positions: int) -> Iterator[Tensor]:
        """The columns, one position at a time.

        Terms at different positions of an example must not be back-propagated together, or their
        products would count; terms of different examples may.

        Args:
            position: the position of each term within its example, ``(rows,)``.
            num_positions: R', the number of positions.

        Yields:
            ``num_positions * C`` tensors of the sizes of :attr:`outputs`.
        """
        sizes = self.outputs.movedim(self.class_dim, -1).shape[:-1]
        for column in self.columns():
            for r in range(num_positions):
                if num_positions == 1:
                    yield column
                    continue
                here = (position == r).reshape(sizes).unsqueeze(-1)
                yield column * here.movedim(-1, self.class_dim)


class CallPart(Part):
    """A call of one of PyTorch's losses.

    Args:
        factor: multiplies its curvature.
    """

    def __init__(
        self, terms: LossTerms, likelihood: Likelihood, factor: Tensor | float = 1.0
    ) -> None:
        self.terms, self.likelihood, self.factor = terms, likelihood, factor
        self.outputs, self.class_dim, self.num_rows = terms.logits, terms.class_dim, terms.num_rows

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Minus the score of labels that are drawn, weighted as the loss weighs its terms."""
        return self._weighted(self.likelihood.sample(self._classes_last(), generator))

    @torch.no_grad()
    def columns(self) -> Iterator[Tensor]:
        """Those of the likelihood, weighted as the loss weighs its terms."""
        for column in self.likelihood.hessian_root(self._classes_last()):
            yield self._weighted(column)

    def positions(self, logits: Tensor, position: Tensor) -> Tensor:
        """Those of the rows that the terms are found to be."""
        return positions_of_terms(self.terms, logits, position)

    def _classes_last(self) -> Tensor:
        logits = self.terms.logits.detach()
        return logits.to(accumulation_dtype(logits.dtype)).movedim(self.terms.class_dim, -1)

    def _weighted(self, grads: Tensor) -> Tensor:
        """Gradients with the classes last, weighted, in the place and the dtype of the logits."""
        terms = self.terms
        grads = grads.movedim(-1, terms.class_dim)
        if terms.weight is not None:
            grads = grads * terms.weight.to(grads.dtype).sqrt()
        if isinstance(self.factor, Tensor) or self.factor != 1:
            grads = grads * self.factor**0.5
        return grads.to(terms.logits.dtype)


class HessianPart(Part):
    """The loss as a whole, with the Hessian of each row of the logits.

    Args:
        roots: ``S`` with ``S Sᵀ`` the Hessian of a row's loss, ``(rows, C, C)``.
        factor: multiplies its curvature.
    """

    def __init__(self, logits: Tensor, roots: Tensor, factor: Tensor | float = 1.0) -> None:
        self.outputs = logits if logits.ndim > 1 else logits.reshape(-1, 1)
        self.class_dim, self.num_rows = -1, len(roots)
        self.roots, self.factor = roots, factor

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The roots times standard normal noise."""
        roots = self.roots
        noise = torch.randn(
            (*roots.shape[:-1], 1), dtype=roots.dtype, device=roots.device, generator=generator
        )
        return self._placed((roots @ noise).squeeze(-1))

    @torch.no_grad()
    def columns(self) -> Iterator[Tensor]:
        """Those of the roots."""
        for column in self.roots.unbind(-1):
            yield self._placed(column)

    def positions(self, logits: Tensor, position: Tensor) -> Tensor:
        """Those of the rows of the logits, which have a Hessian each."""
        return position

    def _placed(self, grads: Tensor) -> Tensor:
        return (grads * self.factor**0.5).reshape(self.outputs.shape).to(self.outputs.dtype)


def sample_of(
    parts: list[Part], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Outputs and their gradients for one backward pass that samples the curvature of all parts.

    The parts' noise is independent, so that products of different parts vanish in the mean.
    """
    if len(parts) == 1:
        return parts[0].outputs, parts[0].sample(generator)
    with torch.enable_grad():
        products = [(part.outputs * part.sample(generator)).sum() for part in parts]
        return torch.stack([product.to(products[0].dtype) for product in products]).sum(), None


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
    number = _sent_back(x, logits, probe).reshape(rows, -1).amax(1)
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
