"""How many terms a loss of several calls has, where calls may share their terms.

Two tasks with columns of their own have two terms for each example. Two calls on the same logits,
as those of mixup, have one: its gradient is the sum of theirs. So terms that are computed from one
of the logits both are one term, and the others are terms of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from asdl.grad_maker import LOSS_CROSS_ENTROPY
from torch import Tensor

from .loss_graph import is_weighted_by_one, probe_of
from .read_loss import LossTerms

__all__ = ["CountedCall", "num_different_terms"]


@dataclass(frozen=True)
class CountedCall:
    """A call of a loss, and how many of its terms count: those of weight 0 do not.

    Attributes:
        loss_type: its terms are rows of classes for cross-entropy, else elements.
        terms: as they were read.
    """

    loss_type: str
    terms: LossTerms

    @property
    def has_rows(self) -> bool:
        """Whether a term is a row of the call's input."""
        return self.loss_type == LOSS_CROSS_ENTROPY

    @property
    def counts(self) -> Tensor:
        """Which terms count: booleans of the sizes of the call's input, 1 in the place of the
        classes where a term is a row.
        """
        x, weight = self.terms.logits, self.terms.weight
        kept = (x.new_ones(()) if weight is None else weight).expand_as(x)
        return (kept.narrow(self.terms.class_dim, 0, 1) if self.has_rows else kept) != 0

    def sent_to(self, logits: Tensor, term_weights: Tensor | None = None) -> Tensor | None:
        """What arrives at the logits of numbers without a pattern, sent from the terms that count;
        ``None`` if the input is not computed from these logits.

        Args:
            term_weights: what each term's are multiplied with, of the sizes of :attr:`counts`.
        """
        x = self.terms.logits
        values = probe_of(x) * self.counts
        values = values if term_weights is None else values * term_weights
        return torch.autograd.grad(x, logits, values, retain_graph=True, allow_unused=True)[0]


def num_different_terms(calls: Sequence[CountedCall], logits: Tensor) -> int:
    """How many terms the calls have together, those that share a logit counted once.

    Args:
        calls: one that is not computed from the logits is taken to be of all of them.
        logits: ``(*, C)``, or ``(N,)`` with rows of one logit.
    """
    groups: list[tuple[CountedCall, Tensor, int]] = []
    for call in calls:
        sent, size = call.sent_to(logits), int(call.counts.sum())
        place = torch.ones_like(logits, dtype=torch.bool) if sent is None else sent != 0
        if not any(size == other and torch.equal(place, at) for _, at, other in groups):
            groups.append((call, place, size))
    met = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    for _, place, _ in groups:
        met += place
    if not bool((met > 1).any()):
        return sum(size for *_, size in groups)
    members = [(place.flatten(), _term_of_each_logit(call, logits)) for call, place, _ in groups]
    return _num_joined(members)


def _term_of_each_logit(call: CountedCall, logits: Tensor) -> Tensor:
    """The number of the term that each of the logits is a part of, flattened; the number of its row
    where that is not one term.

    The terms' numbers arrive bit by bit: a factor of 1 or 2 is exact in every precision.
    """
    row = torch.arange(logits.numel(), device=logits.device)
    row = row // (logits.shape[-1] if logits.ndim > 1 else 1)
    plain = call.sent_to(logits)
    if plain is None:
        return row
    sizes = call.counts.shape
    number = torch.arange(sizes.numel(), device=logits.device).view(sizes)
    found = torch.zeros(logits.shape, dtype=torch.long, device=logits.device)
    for bit in range((sizes.numel() - 1).bit_length()):
        weighted = call.sent_to(logits, 1 + (number >> bit & 1).to(plain.dtype))
        if weighted is None or not is_weighted_by_one(plain, weighted):
            return row
        found += ((weighted - plain).abs() > plain.abs() / 2).long() << bit
    return found.flatten()


def _num_joined(members: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The number of sets of logits that are left when those of a term are joined.

    Args:
        members: of each call, which of the logits it has, and the number of each one's term.
    """
    total = members[0][0].numel()
    label = torch.arange(total, device=members[0][0].device)
    changed = True
    while changed:
        before = label.clone()
        for has, term in members:
            at, own = has.nonzero().squeeze(-1), term[has]
            size = int(own.max()) + 1 if len(own) else 0
            least = label.new_full((size,), total).scatter_reduce(0, own, label[at], "amin")
            label[at] = least[own]
        changed = not torch.equal(before, label)
    return len(label[torch.stack([has for has, _ in members]).any(0)].unique())
