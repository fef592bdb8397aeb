"""What a probe of the autograd graph saw of one call, and what that says of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .errors import LayerError
from .layout import Finding, LayoutBook, examples_first, fits
from .rules import LAYOUTS

__all__ = ["Touched", "checked_by_graph"]


@dataclass(frozen=True)
class Touched:
    """The rows of a layer's output that a backward pass reached, booleans of its leading sizes.

    Attributes:
        by_any: from all terms of the loss.
        by_first, by_last: from the first and from the last row of the logits.
    """

    by_any: Tensor
    by_first: Tensor
    by_last: Tensor

    @property
    def is_mixed(self) -> bool:
        """Whether the first and the last example have rows in common."""
        return bool((self.by_first & self.by_last).any())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known, as behind a zero-initialised head."""
        return not bool(self.by_first.any() and self.by_last.any())

    def of_images(self) -> Touched:
        """The same of whole images, ``(N·k, H, W) -> (N·k,)``."""
        rows = (self.by_any, self.by_first, self.by_last)
        return Touched(*(touched.flatten(1).any(1) for touched in rows))

    def agrees(self, layout: str, num_examples: int) -> bool:
        """Whether the rows of each of the two are one example's in that layout."""
        return all(
            int(examples_first(rows.unsqueeze(-1), num_examples, layout).any(1).sum()) <= 1
            for rows in (self.by_first, self.by_last)
        )


def checked_by_graph(
    name: str,
    module: nn.Module,
    finding: Finding,
    sizes: Sequence[int],
    num_examples: int,
    touched: Touched | None,
    book: LayoutBook,
) -> Finding:
    """What sizes said of a layout, checked against what was touched.

    Raises a LayerError for rows merged into the batch that are not of examples in any layout.
    """
    if touched is None or module in book.rule or num_examples == 1:
        return finding
    if touched.is_empty or touched.is_mixed:
        return finding
    fitting = [layout for layout in LAYOUTS if fits(layout, sizes, num_examples)]
    agreeing = [layout for layout in fitting if touched.agrees(layout, num_examples)]
    if finding.layout in agreeing:
        is_certain = len(agreeing) == 1 and len(fitting) > 1
        return replace(finding, is_assumed=False, is_merged=False) if is_certain else finding
    if agreeing:
        return replace(finding, layout=agreeing[0], settles=True, is_assumed=False, is_merged=False)
    if sizes[0] == num_examples or (len(sizes) > 1 and sizes[1] == num_examples):
        return finding  # examples mix with some others
    raise LayerError(
        name,
        f"its {sizes[0]} rows are not {sizes[0] // num_examples} consecutive rows of each of the "
        f"{num_examples} examples, nor are they in another order that is known: the logits of "
        "single examples depend on others of them",
        "Say which example each row belongs to, with segments(model, ...) or attach_segments"
        f"(model), or leave the layer to the first-order optimizer with ignore_modules=['{name}'].",
    )
