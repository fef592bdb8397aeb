"""Whose rows are those that an index chose (:mod:`.chosen`).

Which dimension of what the index was applied to is the batch is not taken for granted: it is
compared, once for each layer, with the examples whose logits the rows reach. An index of something
else, as into a table of embeddings, does not stand that comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .arrangement import Arrangement
from .capture import Call, Record
from .chosen import Chosen
from .count import Count
from .errors import LayerError
from .evidence import Key, Touched
from .layout import Finding, LayoutBook, examples_first, fits
from .positions import Positions
from .ragged import Segments
from .rules import LAYOUTS

__all__ = ["by_index", "learn_owners", "open_calls"]

_MOST_PROBES = 20  # of calls that no probe tells anything of, as where examples mix


def by_index(
    name: str, call: Call, how: Arrangement, count: Count, book: LayoutBook
) -> Arrangement | None:
    """The arrangement of rows that an index chose; ``None`` if their sizes decide.

    Args:
        how: the frame of the call.
        count: what was said of positions.

    Raises a LayerError if some rows may be padding, and it is not known which.
    """
    chosen, n = call.chosen, how.num_examples
    layout = book.chosen.get((call.module, call.index))
    if chosen is None or layout is None or len(how.sizes) > 1 or call.module in book.rule:
        return None
    if book.is_graph or any(said.roles for said in count.positions.values()):
        return None  # as many rows of each example would be an accident
    owners = _by_row(chosen, n, layout)
    if owners is None:
        return None
    mask, used = _real_rows(name, chosen, count.positions.get(call.module), n, layout)
    segments = Segments(owners, num_examples=n, mask=mask)
    if segments.is_dense:  # the same as without an index, to the last bit
        return replace(how, finding=Finding())
    return replace(how, finding=Finding(), ragged=segments, masks=used)


def open_calls(record: Record, book: LayoutBook, num_examples: int) -> bool:
    """Whether a probe may tell whose the rows are that an index chose."""
    if book.num_probes >= _MOST_PROBES:
        return False
    return any(
        call.chosen is not None
        and call.module not in book.rule
        and not _is_in_order(call.chosen, num_examples)
        for _, call in _unknown(record, book)
    )


def learn_owners(
    record: Record, evidence: Mapping[Key, Touched], book: LayoutBook, num_examples: int
) -> None:
    """Keep the layouts of what indices chose rows from, as far as the graph tells the owners of
    some of them.
    """
    for key, call in _unknown(record, book):
        touched = evidence.get(key)
        if call.chosen is None or touched is None or touched.owner is None:
            continue
        told = touched.owner.flatten() >= 0
        if bool(told.any()) and len(told) == len(call.chosen.rows):
            layouts = [
                layout
                for layout in LAYOUTS
                if (owners := _by_row(call.chosen, num_examples, layout)) is not None
                and torch.equal(owners[told], touched.owner.flatten()[told])
            ]
            book.chosen[key] = layouts[0] if layouts else None


def _unknown(record: Record, book: LayoutBook) -> Iterator[tuple[Key, Call]]:
    for module, calls in record.calls.items():
        for call in calls:
            if (module, call.index) not in book.chosen:
                yield (module, call.index), call


def _is_in_order(chosen: Chosen, num_examples: int) -> bool:
    """Whether each example has equally many rows, one after the other, in whatever layout fits."""
    owners = [_by_row(chosen, num_examples, layout) for layout in LAYOUTS]
    return all(one is None or Segments(one, num_examples=num_examples).is_dense for one in owners)


def _by_row(
    chosen: Chosen, num_examples: int, layout: str, values: Tensor | None = None
) -> Tensor | None:
    """The example of each row; or its value of those given by example and position, ``(N, R)``.
    ``None`` if what the rows were chosen from does not have that layout, or as many positions.
    """
    if not fits(layout, chosen.sizes, num_examples):
        return None
    ids = torch.arange(chosen.sizes.numel(), device=chosen.rows.device)
    by_example = examples_first(ids.view(*chosen.sizes, 1), num_examples, layout).squeeze(-1)
    if values is None:
        values = torch.arange(num_examples, device=ids.device).unsqueeze(1).expand_as(by_example)
    if values.shape != by_example.shape:
        return None
    flat = torch.empty_like(ids, dtype=values.dtype)
    flat[by_example.flatten()] = values.flatten()
    return flat[chosen.rows]


def _real_rows(
    name: str, chosen: Chosen, said: Positions | None, num_examples: int, layout: str
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Which rows are no padding, and the name of the mask that says so; ``None``: all of them."""
    given = {} if said is None else said.masks
    masks = {n: mask.mask for n, mask in given.items() if not bool(mask.mask.all())}
    if said is None or not masks:
        return None, ()
    by_row = {n: _by_row(chosen, num_examples, layout, mask) for n, mask in masks.items()}
    fitting = [(rows, (n,)) for n, rows in by_row.items() if rows is not None]
    if said.is_guessed or len(fitting) != 1:
        raise LayerError(
            name,
            "an index chose its rows from those of the batch, some of which may be padding",
            "Give the mask that has a token for each of them, with attach_padding(model, ...) or "
            "padding(model, mask), or leave the layer to the first-order optimizer with "
            f"ignore_modules=['{name}'].",
        )
    return fitting[0]
