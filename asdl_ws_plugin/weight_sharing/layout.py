"""Which dimension of a layer's tensor is the batch.

There are two layouts. *Batch first* is ``(N·k, *, P)``: examples outermost, with positions merged
into the batch or not (the windows of a Swin Transformer, a decoder that flattens). *Sequence first*
is ``(R, N, *, P)`` or, flattened, ``(R·N, P)``. A layer's layout is settled once, by the first of
these that says something: the user's rule, the ``batch_first`` of the enclosing module, the sizes
of a batch that only one layout fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._warn import warn
from .errors import LayerError
from .ragged import Segments
from .rules import BATCH_FIRST, LAYOUTS, SEQUENCE_FIRST

__all__ = [
    "Finding",
    "LayoutBook",
    "MaskOf",
    "declared_layout",
    "examples_first",
    "find_layout",
    "find_role",
    "fits",
]


def declared_layout(model: nn.Module, name: str) -> str | None:
    """What the modules around a layer say about its layout, the innermost first; ``None`` if they
    say nothing.
    """
    path = name.split(".") if name else []
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
            # What a stack has beside its layers, as its last norm, has their layout.
            module = module.layers[0]
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            module = module.self_attn  # torch keeps the option of the whole layer there
        batch_first = getattr(module, "batch_first", None)
        if isinstance(batch_first, bool):
            return BATCH_FIRST if batch_first else SEQUENCE_FIRST
    return None


def fits(layout: str, sizes: Sequence[int], num_examples: int) -> bool:
    """Whether a tensor ``(*sizes, features)`` of these leading sizes can hold that many examples in
    that layout.
    """
    if layout == BATCH_FIRST:
        return sizes[0] % num_examples == 0
    return sizes[1] == num_examples if len(sizes) > 1 else sizes[0] % num_examples == 0


def examples_first(x: Tensor, num_examples: int, layout: str) -> Tensor:
    """``(N·k, *, P)`` or ``(R, N, *, P)`` to ``(N, R, P)``; a view wherever one exists."""
    features = x.shape[-1]
    if layout == BATCH_FIRST:
        return x.reshape(num_examples, -1, features)
    if x.ndim == 2:  # (r n) p
        x = x.reshape(-1, num_examples, features)
    return x.transpose(0, 1).reshape(num_examples, -1, features)


class MaskOf(NamedTuple):
    """A padding mask by name, and how many real positions a layer has in front of its own, as class
    tokens are, and behind.
    """

    name: str
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Finding:
    """What the sizes of one call say.

    Attributes:
        layout: the layer's.
        settles: whether later batches have to agree.
        is_assumed: the other layout fits as well.
        is_merged: rows without a dimension for the positions were read as positions merged into
            the batch, for their number alone.
        leading: the first size, where the other dimensions show what it stands for.
        role: of ragged rows, the only role that has so many; empty otherwise.
        mask: which padding mask is the layer's.
        settles_mask: whether that is kept for later batches.
        undecided: the masks between which this batch does not tell.
    """

    layout: str = BATCH_FIRST
    settles: bool = False
    is_assumed: bool = False
    is_merged: bool = False
    leading: int | None = None
    role: str = ""
    mask: MaskOf | None = None
    settles_mask: bool = False
    undecided: tuple[str, ...] = ()


class LayoutBook:
    """The layouts of one model's layers: those that rules and modules declare, and those that
    batches settled.

    Attributes:
        rule, declared, settled: module -> layout.
        roles: (module, number of the call) -> the role of its rows.
        chosen: (module, number of the call) -> the layout of what an index chose its rows from;
            ``None``: the index is of something else, and sizes decide.
        without_batch: the calls (layer's module, number) whose input is no batch.
        masks: (module, number of the call) -> which padding mask is its, if its length does not say
            it; ``None``: nothing is padding.
        looked_at: the names of arguments that were tried as masks, in a batch with padding by them.
        is_probed, num_probes: whether the autograd graph was asked, and how often.
        is_graph: rows of graphs are never read as a fixed number of positions.
        num_terms: how many terms the last loss had.
    """

    def __init__(self) -> None:
        self.rule: dict[nn.Module, str] = {}
        self.declared: dict[nn.Module, str] = {}
        self.settled: dict[nn.Module, str] = {}
        self.roles: dict[tuple[nn.Module, int], str] = {}
        self.chosen: dict[tuple[nn.Module, int], str | None] = {}
        self.without_batch: set[tuple[nn.Module, int]] = set()
        self.masks: dict[tuple[nn.Module, int], MaskOf | None] = {}
        self.looked_at: set[str] = set()
        self.is_probed = False
        self.num_probes = 0
        self.is_graph = False
        self.num_terms: int | None = None
        self._assumed: list[tuple[str, tuple[int, ...]]] = []
        self._merged: dict[nn.Module, tuple[str, int]] = {}
        self._evident: set[int] = set()  # first sizes of layers whose others show what they are
        self._reported_merged = False

    def given(self, module: nn.Module) -> str | None:
        """The layout that a rule gives a module, or the modules around it."""
        return self.rule.get(module, self.declared.get(module))

    def positions_of(self, module: nn.Module) -> list[dict[str, Any]]:
        """What batches have settled of the rows of each of a module's calls: their role, or their
        padding mask and how many real positions are in front of its own and behind.
        """
        calls = sorted(call for of, call in {*self.roles, *self.masks} if of is module)
        found = []
        for call in calls:
            entry: dict[str, Any] = {"call": call}
            if (module, call) in self.roles:
                entry["role"] = self.roles[module, call]
            if (module, call) in self.masks:
                mask = self.masks[module, call]
                entry["mask"] = mask and {
                    "name": mask.name,
                    "before": mask.before,
                    "after": mask.after,
                }
            found.append(entry)
        return found

    def note(
        self, name: str, module: nn.Module, call: int, sizes: Sequence[int], finding: Finding
    ) -> None:
        """Keep what was found of a module's ``call``-th call."""
        if finding.role:
            self.roles[module, call] = finding.role
        if finding.settles_mask:
            self.masks[module, call] = finding.mask
        self.looked_at -= set(finding.undecided)
        if finding.settles:
            self.settled[module] = finding.layout
        if finding.is_assumed:
            self._assumed.append((name, tuple(sizes)))
        if finding.is_merged:
            self._merged[module] = name, sizes[0]
        if finding.leading is not None:
            self._evident.add(finding.leading)

    def remember(self) -> Callable[[], None]:
        """A function that takes back what was settled after now."""
        settled, roles, masks = dict(self.settled), dict(self.roles), dict(self.masks)
        without_batch, probes = set(self.without_batch), (self.is_probed, self.num_probes)
        looked_at, chosen = set(self.looked_at), dict(self.chosen)

        def restore() -> None:
            self.chosen = chosen
            self.settled, self.roles, self.masks = settled, roles, masks
            self.without_batch, self.looked_at = without_batch, looked_at
            self.is_probed, self.num_probes = probes
            self._assumed.clear()

        return restore

    def report(self, num_examples: int) -> None:
        """Warn, once for a batch, of the layers whose layout was assumed since the last call."""
        self._report_merged(num_examples)
        if not self._assumed:
            return
        name, sizes = self._assumed[0]
        others = (
            f" (as for {len(self._assumed) - 1} other layers)" if len(self._assumed) > 1 else ""
        )
        self._assumed.clear()
        warn(
            f"Layer '{name}': its input's leading sizes {sizes} fit {num_examples} examples both "
            f"batch first and sequence first{others}. Batch first is assumed; a rule in "
            f"shared_dim says so, or the other, as in ('{name}', 'sequence_first').",
        )

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


def find_layout(
    name: str, module: nn.Module, sizes: Sequence[int], num_examples: int, book: LayoutBook
) -> Finding:
    """The layout of a layer's tensor of these leading sizes (features left out).

    Raises a LayerError if no layout fits, or not the settled one.
    """
    settled = book.rule.get(module) or book.settled.get(module)
    if settled is not None:
        if not fits(settled, sizes, num_examples):
            origin = "by its rule" if module in book.rule else "as earlier batches showed"
            raise LayerError(
                name,
                f"its input is {settled} {origin}, but leading sizes {tuple(sizes)} do not hold "
                f"{num_examples} examples that way",
                _remedy(name),
            )
        return Finding(settled)
    candidates = [layout for layout in LAYOUTS if fits(layout, sizes, num_examples)]
    if not candidates:
        raise LayerError(
            name,
            f"none of the leading sizes {tuple(sizes)} of its input matches the {num_examples} "
            "examples of the batch",
            _remedy(name, sizes),
        )
    declared = book.declared.get(module)
    if len(sizes) == 1:
        return _layout_of_rows(name, sizes[0], num_examples, declared, book.is_graph)
    leading = sizes[0]
    if declared in candidates:
        return Finding(declared, settles=True, leading=leading)
    if len(candidates) == 1 or num_examples == 1:
        return Finding(candidates[0], settles=num_examples > 1, leading=leading)
    return Finding(BATCH_FIRST, settles=True, is_assumed=True, leading=leading)


def _layout_of_rows(
    name: str, num_rows: int, num_examples: int, declared: str | None, is_graph: bool
) -> Finding:
    """The layout of rows without a dimension of their own for the positions: the modules around
    decide. ``(N, P)`` has no positions and ``(N·k, P)`` may be either, so nothing is settled.
    """
    if declared is not None:
        return Finding(declared, settles=True)
    if num_rows != num_examples and is_graph:
        raise LayerError(
            name,
            f"it is not known which of the {num_examples} examples each of its {num_rows} rows "
            "belongs to",
            _remedy(name, (num_rows,)),
        )
    return Finding(BATCH_FIRST, is_merged=num_rows != num_examples)


def find_role(
    name: str,
    module: nn.Module,
    call: int,
    num_rows: int,
    roles: Mapping[str, Segments],
    book: LayoutBook,
    device: torch.device | None = None,
) -> tuple[Segments, str]:
    """The segments of the rows of a layer's ``call``-th call, by its role or by the number of its
    rows; and the role, where that number settles it.

    Raises a LayerError if the role was not given, no role has that many rows, or several have; or
    if the index is on another device than the rows.
    """
    _check_device(name, roles, device)
    known = ", ".join(f"'{role}' with {len(part)} rows" for role, part in roles.items())
    role = str(getattr(module, "role", None) or "")
    if role and role not in roles:
        raise LayerError(name, f"has the role '{role}', which was not given; there are {known}")
    role = role or book.roles.get((module, call), "")
    if role in roles:
        if len(roles[role]) != num_rows:
            raise LayerError(
                name,
                f"its input has {num_rows} rows, but its role '{role}' has {len(roles[role])}",
                _other_rows(name),
            )
        return roles[role], ""
    fitting = [role for role, part in roles.items() if len(part) == num_rows]
    if not fitting:
        raise LayerError(
            name, f"its input has {num_rows} rows, but there are {known}", _other_rows(name)
        )
    if any(not roles[fitting[0]].equals(roles[role]) for role in fitting[1:]):
        raise LayerError(
            name,
            f"its {num_rows} rows fit the roles {', '.join(map(repr, fitting))}",
            f"Give the layer its role, as in convert(model, roles=[('{name}', '{fitting[0]}')]).",
        )
    return roles[fitting[0]], fitting[0] if len(fitting) == 1 else ""


def _check_device(name: str, roles: Mapping[str, Segments], device: torch.device | None) -> None:
    elsewhere = [part.device for part in roles.values() if device not in (None, part.device)]
    if elsewhere:
        raise LayerError(
            name,
            f"its input is on {device}, but the index of its rows on {elsewhere[0]}",
            f"Move the index to {device}.",
        )


def _other_rows(name: str) -> str:
    return (
        "Are the segments those of an earlier batch? If these are rows of another kind, as edges "
        "with self-loops are, give the index of their examples as a role of its own, or leave the "
        f"layer to the first-order optimizer with ignore_modules=['{name}']."
    )


def _remedy(name: str, sizes: Sequence[int] = (0, 0)) -> str:
    if len(sizes) == 1:
        return (
            "If examples have different numbers of rows, as graphs do, say which example each row "
            "belongs to: with segments(model, ...) or attach_segments(model). Or leave the layer "
            f"to the first-order optimizer with ignore_modules=['{name}']."
        )
    return (
        f"Give its layout by a rule in shared_dim, as in ('{name}', 'reduce', 'sequence_first'), "
        f"or leave the layer to the first-order optimizer with ignore_modules=['{name}']."
    )
