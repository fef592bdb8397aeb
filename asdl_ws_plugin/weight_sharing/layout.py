"""Which dimension of a layer's tensor is the batch, and how many examples there are.

There are two layouts. *Batch first* is ``(N·k, *, P)``: examples outermost, with positions merged
into the batch or not (the windows of a Swin Transformer, a decoder that flattens). *Sequence first*
is ``(R, N, *, P)`` or, flattened, ``(R·N, P)``. A layer's layout is settled once, by the first of
these that says something: the user's rule, the ``batch_first`` of the enclosing module, the sizes
of a batch that only one layout fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._warn import warn
from .ragged import Segments
from .rules import BATCH_FIRST, SEQUENCE_FIRST

__all__ = [
    "LayoutBook",
    "declared_layout",
    "examples_first",
    "fits",
    "infer_num_examples",
    "leading_sizes",
]


def declared_layout(model: nn.Module, name: str) -> str | None:
    """What the modules around a layer say about its layout, the innermost first; ``None`` if they
    say nothing.
    """
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
            module = module.layers[
                0
            ]  # what a stack has beside its layers, as its last norm, has their layout
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            module = module.self_attn  # torch keeps the option of the whole layer there
        batch_first = getattr(module, "batch_first", None)
        if isinstance(batch_first, bool):
            return BATCH_FIRST if batch_first else SEQUENCE_FIRST
    return None


def fits(layout: str, shape: Sequence[int], num_examples: int) -> bool:
    """Whether a tensor ``(*sizes, features)`` of these leading sizes can hold that many examples in
    that layout.
    """
    if layout == BATCH_FIRST:
        return shape[0] % num_examples == 0
    return shape[1] == num_examples if len(shape) > 1 else shape[0] % num_examples == 0


def examples_first(x: Tensor, num_examples: int, layout: str, num_feature_dims: int = 1) -> Tensor:
    """``(N·k, *, features)`` or ``(R, N, *, features)`` to ``(N, R, features)``; a view wherever
    one exists.
    """
    x = x.flatten(-num_feature_dims) if num_feature_dims > 1 else x
    features = x.shape[-1]
    if layout == BATCH_FIRST:
        return x.reshape(num_examples, -1, features)
    if x.ndim == 2:  # (r n) p
        x = x.reshape(-1, num_examples, features)
    return x.transpose(0, 1).reshape(num_examples, -1, features)


class LayoutBook:
    """The layouts of one model's layers: those that rules and modules declare, and those that
    batches settled.
    """

    def __init__(self) -> None:
        self.rule: dict[nn.Module, str] = {}
        self.declared: dict[nn.Module, str] = {}
        self.settled: dict[nn.Module, str] = {}
        self.roles: dict[tuple[nn.Module, int], str] = {}
        self.is_graph = False  # rows of graphs are never read as a fixed number of positions
        self.num_terms: int | None = None
        self._assumed: list[tuple[str, tuple[int, ...]]] = []
        self._merged: dict[nn.Module, tuple[str, int]] = {}
        self._evident: set[int] = (
            set()
        )  # leading sizes of layers whose other dimensions show that positions are merged
        self._reported_merged = False

    def resolve(self, name: str, module: nn.Module, shape: Sequence[int], num_examples: int) -> str:
        """The layout of a layer's tensor of these leading sizes (features left out).

        Settles it if this batch determines it. Raises a ValueError if no layout fits, or not the
        settled one.
        """
        settled = self.rule.get(module) or self.settled.get(module)
        if settled is not None:
            if not fits(settled, shape, num_examples):
                origin = "by its rule" if module in self.rule else "as earlier batches showed"
                raise ValueError(
                    f"Layer '{name}': its input is {settled} {origin}, but leading sizes "
                    f"{tuple(shape)} do not hold {num_examples} examples that way. {_remedy(name)}"
                )
            return settled
        candidates = [
            layout for layout in (BATCH_FIRST, SEQUENCE_FIRST) if fits(layout, shape, num_examples)
        ]
        if (
            len(shape) == 1
        ):  # rows without a dimension of their own for the positions: the modules around decide
            candidates = candidates[:1]
        if not candidates:
            raise ValueError(
                f"Layer '{name}': none of the leading sizes {tuple(shape)} of its input matches "
                f"the {num_examples} examples of the batch. {_remedy(name, shape)}"
            )
        if len(shape) == 1 and shape[0] != num_examples and module not in self.declared:
            if self.is_graph:
                raise ValueError(
                    f"Layer '{name}': it is not known which of the {num_examples} examples each of "
                    f"its {shape[0]} rows belongs to. {_remedy(name, shape)}"
                )
            self._merged[module] = name, shape[0]
        if len(shape) > 1:
            self.note_leading(shape[0])
        declared = self.declared.get(module)
        if declared in candidates or (declared is not None and len(shape) == 1 and candidates):
            self.settled[module] = declared
            return declared
        if len(candidates) == 1:
            # (N, P) has no positions and (N·k, P) may be either: only a dimension of its own tells
            # something.
            if len(shape) > 1 and num_examples > 1:
                self.settled[module] = candidates[0]
        elif num_examples > 1:
            self.settled[module] = BATCH_FIRST
            self._assumed.append((name, tuple(shape)))
        return candidates[0]

    def resolve_role(
        self,
        name: str,
        module: nn.Module,
        call: int,
        num_rows: int,
        roles: Mapping[str, Segments],
        device: torch.device | None = None,
    ) -> Segments:
        """The segments of the rows of a layer's ``call``-th call: by its role, or by the number of
        its rows.

        Raises a ValueError if the role was not given, no role has that many rows, or several have;
        or if the index is on another device than the rows.
        """
        elsewhere = next(
            (part.device for part in roles.values() if device not in (None, part.device)), None
        )
        if elsewhere is not None:
            raise ValueError(
                f"Layer '{name}': its input is on {device}, but the index of its rows on "
                f"{elsewhere}. Move the index to {device}."
            )
        known = ", ".join(f"'{role}' with {len(part)} rows" for role, part in roles.items())
        role = str(getattr(module, "role", None) or "")
        if role and role not in roles:
            raise ValueError(
                f"Layer '{name}' has the role '{role}', which was not given; there are {known}."
            )
        role = role or self.roles.get((module, call), "")
        if role in roles:
            if len(roles[role]) != num_rows:
                raise ValueError(
                    f"Layer '{name}': its input has {num_rows} rows, but its role '{role}' has "
                    f"{len(roles[role])}. {_other_rows(name)}"
                )
            return roles[role]
        fitting = [role for role, part in roles.items() if len(part) == num_rows]
        if not fitting:
            raise ValueError(
                f"Layer '{name}': its input has {num_rows} rows, but there are {known}. "
                f"{_other_rows(name)}"
            )
        if any(not roles[fitting[0]].equals(roles[role]) for role in fitting[1:]):
            raise ValueError(
                f"Layer '{name}': its {num_rows} rows fit the roles "
                f"{', '.join(map(repr, fitting))}. Give the layer its role, as in convert(model, "
                f"roles=[('{name}', '{fitting[0]}')])."
            )
        if len(fitting) == 1:
            self.roles[module, call] = fitting[0]
        return roles[fitting[0]]

    def remember(self) -> Callable[[], None]:
        """A function that takes back what was settled after now."""
        settled, roles = dict(self.settled), dict(self.roles)

        def restore() -> None:
            self.settled, self.roles = settled, roles
            self._assumed.clear()

        return restore

    def report_assumed(self, num_examples: int) -> None:
        """Warn, once for a batch, of the layers whose layout was assumed since the last call."""
        self._report_merged(num_examples)
        if not self._assumed:
            return
        name, shape = self._assumed[0]
        others = (
            f" (as for {len(self._assumed) - 1} other layers)" if len(self._assumed) > 1 else ""
        )
        self._assumed.clear()
        warn(
            f"Layer '{name}': its input's leading sizes {shape} fit {num_examples} examples both "
            f"batch first and sequence first{others}. Batch first is assumed; a rule in "
            f"shared_dim says so, or the other, as in ('{name}', 'sequence_first').",
        )

    def note_leading(self, size: int) -> None:
        """Take a layer's first size as evidence of what other layers' rows are."""
        self._evident.add(size)

    def _report_merged(self, num_examples: int) -> None:
        """Warn, once, of rows that were read as positions merged into the batch for their number
        alone.
        """
        # Where the loss has a term for each of those rows, they are what the user flattened.
        known = {self.num_terms, *self._evident}
        merged = [(name, rows) for name, rows in self._merged.values() if rows not in known]
        if merged and not self._reported_merged:
            self._reported_merged = True
            name, rows = merged[0]
            warn(
                f"Layer '{name}': its {rows} rows are read as {rows // num_examples} consecutive "
                f"rows of each of the {num_examples} examples. If examples have different numbers "
                "of rows, as graphs do, use segments or attach_segments; if not, the rule "
                f"('{name}', 'batch_first') in shared_dim silences this.",
            )


def _other_rows(name: str) -> str:
    return (
        "Are the segments those of an earlier batch? If these are rows of another kind, as edges "
        "with self-loops are, give the index of their examples as a role of its own, or leave the "
        f"layer to the first-order optimizer with ignore_modules=['{name}']."
    )


def _remedy(name: str, shape: Sequence[int] = (0, 0)) -> str:
    if len(shape) == 1:
        return (
            "If examples have different numbers of rows, as graphs do, say which example each row "
            "belongs to: with segments(model, ...) or attach_segments(model). Or leave the layer "
            f"to the first-order optimizer with ignore_modules=['{name}']."
        )
    return (
        f"Give its layout by a rule in shared_dim, as in ('{name}', 'reduce', 'sequence_first'), "
        f"or leave the layer to the first-order optimizer with ignore_modules=['{name}']."
    )


def leading_sizes(value: Any) -> tuple[int, ...] | None:
    """The sizes of the first tensor with at least one dimension in a nest of arguments; ``None`` if
    there is none.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape) if value.ndim else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((sizes for item in value if (sizes := leading_sizes(item))), None)
    return None


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
    if (
        0 < input_sizes[0] < first and first % input_sizes[0] == 0
    ):  # a loss term for every position, flattened
        return input_sizes[0]
    return first
