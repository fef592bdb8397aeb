"""What a probe of the autograd graph saw of one call, and what that says of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .errors import LayerError
from .layout import Finding, LayoutBook, examples_first, fits
from .rules import LAYOUTS

__all__ = ["Key", "Touched", "checked_by_graph"]

Key = tuple[nn.Module, int]  # a layer's module, and the number of its call


@dataclass(frozen=True)
class Touched:
    """The rows of a layer's output that a backward pass reached, booleans of its leading sizes.

    Attributes:
        by_any: from all terms of the loss.
        by_first, by_last: from the first and from the last row of the logits.
        owner: the number of the only example whose logits a row reaches, -1 where that is not
            certain, -2 where its gradient is nothing but rounding errors; ``None`` if it was not
            asked.
    """

    by_any: Tensor
    by_first: Tensor
    by_last: Tensor
    owner: Tensor | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether the first and the last example have rows in common."""
        return bool((self.by_first & self.by_last).any())

    @property
    def has_owners(self) -> bool:
        """Whether each row that the loss depends on reaches one example's logits alone."""
        return self.owner is not None and bool((self.owner[self.by_any] != -1).all())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known, as behind a zero-initialised head."""
        return not bool(self.by_first.any() and self.by_last.any())

    def of_images(self) -> Touched:
        """The same of whole images, ``(N·k, H, W) -> (N·k,)``."""
        by_any, by_first, by_last = (
            rows.flatten(1).any(1) for rows in (self.by_any, self.by_first, self.by_last)
        )
        owner = None if self.owner is None else self.owner.flatten(1).amax(1)
        return Touched(by_any, by_first, by_last, owner)

    def agrees(self, layout: str, num_examples: int) -> bool:
        """Whether the rows of each of the two are one example's in that layout, and no owner says
        otherwise.
        """
        return not self.contradicts(layout, num_examples) and all(
            int(examples_first(rows.unsqueeze(-1), num_examples, layout).any(1).sum()) <= 1
            for rows in (self.by_first, self.by_last)
        )

    def contradicts(self, layout: str, num_examples: int) -> bool:
        """Whether that layout has rows of two owners in one example, or of one owner in two."""
        if self.owner is None or int(self.owner.max()) >= num_examples:
            return False
        owner = examples_first(self.owner.unsqueeze(-1), num_examples, layout).squeeze(-1)
        most = owner.amax(1)
        owners = most[most >= 0]
        are_others = (owner >= 0) & (owner != most.unsqueeze(1))
        return bool(are_others.any()) or len(owners.unique()) < len(owners)


def checked_by_graph(
    name: str,
    module: nn.Module,
    finding: Finding,
    sizes: Sequence[int],
    num_examples: int,
    touched: Touched | None,
    book: LayoutBook,
    needs_examples: bool = False,
) -> Finding:
    """What sizes said of a layout, checked against what was touched.

    Args:
        needs_examples: it matters which rows are one example's, as it does not for expand where
            nothing is padding.

    Raises a LayerError for rows that are not of examples in any layout.
    """
    if touched is None or module in book.rule or num_examples == 1 or touched.is_mixed:
        return finding
    has_owners = touched.owner is not None and bool((touched.owner >= 0).any())
    if touched.is_empty and not has_owners:
        return finding
    fitting = [layout for layout in LAYOUTS if fits(layout, sizes, num_examples)]
    agreeing = [layout for layout in fitting if touched.agrees(layout, num_examples)]
    if finding.layout in agreeing:
        is_certain = len(agreeing) == 1 < len(fitting)
        return replace(finding, is_assumed=False, is_merged=False) if is_certain else finding
    if agreeing:
        return replace(finding, layout=agreeing[0], settles=True, is_assumed=False, is_merged=False)
    if needs_examples and all(touched.contradicts(layout, num_examples) for layout in fitting):
        raise _of_no_layout(name, sizes, num_examples)
    if len(sizes) > 1 and not needs_examples and touched.has_owners:
        return finding  # in whatever order
    if touched.is_empty or num_examples in sizes[:2]:
        return finding  # examples mix with some others
    raise _of_no_order(name, sizes, num_examples)


def _of_no_layout(name: str, sizes: Sequence[int], num_examples: int) -> LayerError:
    if len(sizes) == 1 and sizes[0] != num_examples:
        return _of_no_order(name, sizes, num_examples)
    return LayerError(
        name,
        f"the leading sizes {tuple(sizes)} of its input seem to hold the {num_examples} examples "
        "of the batch, but its rows are of other examples than that: the graph says whose logits "
        "each of them reaches",
        "Call it with the whole batch at once, and the batch in the first dimension or in the "
        f"second, or leave it to the first-order optimizer with ignore_modules=['{name}'].",
    )


def _of_no_order(name: str, sizes: Sequence[int], num_examples: int) -> LayerError:
    return LayerError(
        name,
        f"its {sizes[0]} rows are not {sizes[0] // num_examples} consecutive rows of each of the "
        f"{num_examples} examples, nor are they in another order that is known: the logits of "
        "single examples depend on others of them",
        "Say which example each row belongs to, with segments(model, ...) or attach_segments"
        f"(model), or leave the layer to the first-order optimizer with ignore_modules=['{name}'].",
    )
