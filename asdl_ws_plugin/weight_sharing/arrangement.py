"""How the tensors of one call become ``(N, R, P)``, or rows of segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Finding, examples_first
from .ragged import Ragged, Segments

__all__ = ["Arrangement", "batched"]


def batched(x: Tensor, single: int) -> Tensor:
    """With a dimension for the batch, which a tensor of so many dimensions lacks."""
    return x.unsqueeze(0) if x.ndim == single else x


@dataclass(frozen=True)
class Arrangement:
    """How one call's tensors become ``(N, R, P)``, or rows that belong to segments.

    Attributes:
        finding: their layout, and how it was found.
        num_examples: N.
        sizes: their leading sizes, features left out.
        dims: trailing dimensions that are features.
        channel_dims: of a layer whose features are dimension 1, how many dimensions a single
            example has; 0 for all others.
        ragged: which example each position belongs to, where that differs by example.
        masks: the names of the padding masks that fit.
        length: of the sequences that a mask was looked for.
    """

    finding: Finding
    num_examples: int
    sizes: torch.Size
    dims: int = 1
    channel_dims: int = 0
    ragged: Ragged | None = None
    masks: tuple[str, ...] = ()
    length: int | None = None

    @property
    def layout(self) -> str:
        """``'batch_first'`` or ``'sequence_first'``."""
        return self.finding.layout

    @property
    def R(self) -> float:
        """Positions of an example; of ragged ones the mean."""
        if self.ragged is not None:
            return self.ragged.num_positions / max(1, self.num_examples)
        return self.sizes.numel() / self.num_examples

    def features_last(self, x: Tensor) -> Tensor:
        """The layer's input or output with a dimension for the batch, and one for the features: the
        last.
        """
        if self.channel_dims:
            x = batched(x, self.channel_dims).movedim(1, -1)
        elif x.ndim == self.dims:
            x = x.unsqueeze(0)
        return x.flatten(-self.dims) if self.dims > 1 else x

    def apply(self, x: Tensor) -> Tensor:
        """``(*sizes, P)`` to ``(N, R, P)``, or to rows ``(ΣR_n, P)`` of segments."""
        if isinstance(self.ragged, Segments):
            return x.reshape(-1, x.shape[-1])
        return examples_first(x, self.num_examples, self.layout)
