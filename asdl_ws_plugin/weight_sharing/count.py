"""Stage 3, *count*: how many examples a batch has, and which of them the rows of layers belong to.

What was said of rows, by a context, by a layer or by the model's own inputs, is in the record by
now (:attr:`.capture.Record.positions`). Where nothing was said, the sizes of the logits and of the
model's first tensor tell N.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Captured, Layer, Record
from .layout import LayoutBook
from .nests import tensors_in
from .positions import GRAPH, Positions
from .ragged import Segments
from .rules import SEQUENCE_FIRST

__all__ = ["Count", "count_examples", "leading_sizes", "num_rows", "row_sizes"]


@dataclass(frozen=True)
class Count:
    """N, and whose row is whose as far as it was said.

    Attributes:
        num_examples: N.
        positions: what was said of the rows of a module, by module.
        is_guess: N is the first size of the model's first tensor, and nothing but that it divides
            the number of logits speaks for it.
        time_major: the leading sizes ``(R, N)`` of what recurrent modules were given that say so.
    """

    num_examples: int
    positions: dict[nn.Module, Positions] = field(default_factory=dict)
    is_guess: bool = False
    time_major: tuple[tuple[int, ...], ...] = ()

    @property
    def num_logits_of_examples(self) -> int:
        """How many rows the logits have if there is one for each example: those of padding graphs
        are among them.
        """
        parts = (said.roles.get(GRAPH) for said in self.positions.values())
        return max((len(part) for part in parts if part is not None), default=self.num_examples)

    def segments_of(self, rows: int) -> list[Segments]:
        """The different segments of so many rows.

        Those with one row for each example come first: there may be as many nodes.
        """
        said = list(self.positions.values())
        parts = [part for one in said for role, part in one.roles.items() if role == GRAPH]
        parts += [part for one in said for part in one.roles.values()]
        different: list[Segments] = []
        for part in parts:
            if len(part) == rows and not any(
                part is other or part.equals(other) for other in different
            ):
                different.append(part)
        return different


def row_sizes(logits: Tensor) -> torch.Size:
    """The sizes of the logits without classes; a vector is one logit for each example, and a number
    that of a single one.
    """
    return logits.shape[:-1] or logits.shape or torch.Size((1,))


def num_rows(logits: Tensor) -> int:
    """How many rows the logits have, at least 1."""
    return max(1, row_sizes(logits).numel())


def count_examples(layers: list[Layer], book: LayoutBook, captured: Captured) -> Count:
    """N of the batch that was captured, and what was said of the positions of the layers' modules.

    Raises a ValueError if the layers' segments are of different numbers of examples.
    """
    count = _count(layers, book, captured)
    return replace(count, time_major=tuple(captured.record.time_major))


def _count(layers: list[Layer], book: LayoutBook, captured: Captured) -> Count:
    record, logits = captured.record, captured.logits
    positions = {
        module: record.positions[module]
        for layer in layers
        if layer.module in record.calls
        for module in layer.modules
        if module in record.positions
    }
    guessed = {module: said for module, said in positions.items() if said.is_guessed}
    if len(guessed) < len(positions):
        said = {module: said for module, said in positions.items() if not said.is_guessed}
        return _agreed(layers, said, logits)
    count = _counted_by_sizes(layers, book, captured)
    return replace(
        count, positions={module: said.of(count.num_examples) for module, said in guessed.items()}
    )


def _counted_by_sizes(layers: list[Layer], book: LayoutBook, captured: Captured) -> Count:
    """N where nothing was said of it."""
    record, logits = captured.record, captured.logits
    sequence_first = _declared_sequence_first(layers, book, record)
    inputs = list(all_sizes(captured.inputs))
    n = infer_num_examples(row_sizes(logits), inputs[0] if inputs else None, sequence_first)
    if logits.ndim != 2 or n == logits.shape[0] or sequence_first is not None:
        return Count(n)
    # The logits are flattened, or the first tensor is not the batch.
    seen = [tuple(x.shape[:-1]) for x in _inputs_of(layers, record)]
    rows = logits.shape[0]
    if any(sizes[0] == rows for sizes in inputs[1:]):
        return Count(rows)
    if any(_flattens_to(sizes, n, rows) for sizes in (*inputs, *seen)):
        return Count(n)
    return Count(n, is_guess=not any(n in sizes[:2] for sizes in seen if len(sizes) > 1))


def _declared_sequence_first(
    layers: list[Layer], book: LayoutBook, record: Record
) -> tuple[int, ...] | None:
    """The leading sizes of a layer's input that is said to be sequence first, or of a recurrent
    module's, if there is one with a dimension for the examples.
    """
    inputs = (
        call.unmodified_input(layer.name)
        for layer in layers
        if book.given(layer.module) == SEQUENCE_FIRST
        for call in record.calls.get(layer.module, ())
    )
    declared = (tuple(x.shape[:-1]) for x in list(inputs) if x.ndim > 2)
    return next(itertools.chain(declared, record.time_major), None)


def _inputs_of(layers: list[Layer], record: Record) -> Iterator[Tensor]:
    for layer in layers:
        for call in record.calls.get(layer.module, ()):
            yield call.unmodified_input(layer.name)


def _flattens_to(sizes: Sequence[int], num_examples: int, rows: int) -> bool:
    """Whether a tensor of these sizes has one row of the logits for each of its leading indices."""
    products = itertools.accumulate(sizes, operator.mul)
    return num_examples in sizes[:2] and len(sizes) > 1 and rows in list(products)[1:]


def all_sizes(value: Any) -> Iterator[tuple[int, ...]]:
    """The sizes of the tensors with at least one dimension in a nest of arguments."""
    return (tuple(tensor.shape) for tensor in tensors_in(value) if tensor.ndim)


def leading_sizes(value: Any) -> tuple[int, ...] | None:
    """The sizes of the first tensor with at least one dimension in a nest of arguments; ``None`` if
    there is none.
    """
    return next(all_sizes(value), None)


def infer_num_examples(
    logits_sizes: Sequence[int],
    input_sizes: Sequence[int] | None,
    sequence_first_sizes: Sequence[int] | None,
) -> int:
    """The number of examples of a batch.

    Args:
        logits_sizes: the sizes of the logits without classes: ``(N,)``, ``(N, *)``, ``(R, N, *)``
            or ``(N·R,)``.
        input_sizes: the sizes of the model's first tensor argument, if it has one.
        sequence_first_sizes: the leading sizes ``(R, N, ...)`` of a layer that is declared sequence
            first.
    """
    first = logits_sizes[0]
    if sequence_first_sizes is not None and len(sequence_first_sizes) > 1:
        candidate = sequence_first_sizes[1]
        if candidate in logits_sizes[:2] or first % candidate == 0:
            return candidate
    if len(logits_sizes) > 1 or input_sizes is None:
        return first
    if 0 < input_sizes[0] < first and first % input_sizes[0] == 0:
        return input_sizes[0]  # a loss term for every position, flattened
    return first


def _agreed(layers: list[Layer], positions: dict[nn.Module, Positions], logits: Tensor) -> Count:
    """N as all that was said of the layers' positions has it."""
    counts = {said.num_examples for said in positions.values()}
    if len(counts) > 1:
        names = {
            said.num_examples: layer.name
            for layer in layers
            for module in layer.modules
            if (said := positions.get(module)) is not None
        }
        raise ValueError(
            "The layers' segments are of different numbers of examples: "
            + ", ".join(f"{count} at '{name}'" for count, name in sorted(names.items()))
            + "."
        )
    num_examples = counts.pop()
    if (
        all(said.is_inferred for said in positions.values())
        and logits.ndim == 2
        and logits.shape[0] > num_examples
    ):
        lengths = {len(part) for said in positions.values() for part in said.roles.values()}
        if logits.shape[0] not in lengths - {num_examples}:  # the last examples have no rows
            num_examples = logits.shape[0]
            completed = {
                id(said): said.with_num_examples(num_examples) for said in positions.values()
            }
            positions = {module: completed[id(said)] for module, said in positions.items()}
    return Count(num_examples, positions)
