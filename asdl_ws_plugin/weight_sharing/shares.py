"""What a batch that is a part of a joint one has given, and how the parts are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asdl.symmatrix import SymMatrix
from torch import nn

__all__ = ["Part", "Share", "Shares"]


@dataclass(frozen=True)
class Share:
    """What a rank's batch is of the joint one.

    Attributes:
        sum_factor: the gradient of the summed loss over that of the loss: T for a mean over T
            terms, 1 for a sum.
        num_terms: T, the number of terms that the loss averages over; 1 for a sum. It and
            ``sum_factor`` are 0 where a mean has all labels left out.
        num_rows: the number of terms that count.
        num_examples: N.
    """

    sum_factor: float = 1.0
    num_terms: float = 1.0
    num_rows: float = 0.0
    num_examples: float = 0.0


@dataclass(frozen=True)
class Part:
    """The curvature of one batch, which may be a part of a joint one.

    Attributes:
        results: modules and their curvature.
        unseen: the modules that took no part, and why.
        share: what the batch is of the joint one.
        positions: mean number of positions of an example, of layers whose A is divided by it.
        step: what is wanted of the curvature, a :class:`~.step.Step`.
    """

    results: list[tuple[nn.Module, SymMatrix]]
    unseen: dict[nn.Module, str]
    share: Share
    positions: dict[nn.Module, float]
    step: Any


@dataclass(frozen=True)
class Shares:
    """The shares of all ranks, and which of them is one's own."""

    all: list[Share]
    rank: int

    @property
    def is_sum(self) -> bool:
        """Whether the loss is the sum of its terms, so that the joint loss is the sum over the
        ranks. A mean over a single term on every rank is a mean.
        """
        return all(share.sum_factor == 1 for share in self.all) and any(
            share.num_rows > 1 for share in self.all
        )

    def _part(self, amounts: Sequence[float]) -> float:
        total = sum(amounts)
        if not total:  # on every rank, which all see alike
            raise FloatingPointError(
                "Every label is left out on every rank, so there is no loss; nothing was updated."
            )
        return amounts[self.rank] / total

    @property
    def of_gradient(self) -> float:
        """What this rank's gradient is multiplied with in the sum that is the joint gradient."""
        return 1.0 if self.is_sum else self._part([share.sum_factor for share in self.all])

    @property
    def of_terms(self) -> float:
        """The same for what is divided by T, as B is."""
        return 1.0 if self.is_sum else self._part([share.num_terms for share in self.all])

    @property
    def of_examples(self) -> float:
        """The same for what is divided by N, as A is."""
        return self._part([share.num_examples for share in self.all])

    @property
    def of_ranks(self) -> float:
        """The same for what is divided by a ``data_size`` that was given: of one rank's batch."""
        return 1 / len(self.all)

    def of_positions(self, positions: Sequence[float | None]) -> float:
        """What A of K-FAC-expand is multiplied with, besides.

        It is divided by the mean number of positions of an example; in the joint batch, by that of
        the joint batch.

        Args:
            positions: of a layer, that number on each rank; ``None`` where it was not called.
        """
        own = positions[self.rank]
        called = [
            (share.num_examples, count)
            for share, count in zip(self.all, positions, strict=True)
            if count is not None
        ]
        total = sum(n * count for n, count in called)
        return own * sum(n for n, _ in called) / total if own and total else 1.0
