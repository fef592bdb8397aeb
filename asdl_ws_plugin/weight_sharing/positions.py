"""Telling layers which example their positions belong to: once per batch, for a whole model.

``with segments(model, node=..., edge=...)`` and ``with padding(model, mask)`` say it for the steps
inside of the block, :meth:`WeightSharingLinear.set_segments` for one layer and one step.
:mod:`~.attach` computes it from the model's own inputs. Whoever says it, a step keeps it in one
place, :attr:`.capture.Record.positions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .ragged import Mask, Segments

__all__ = [
    "GRAPH",
    "Positions",
    "WeightSharingLinear",
    "make_padding",
    "make_positions",
    "padding",
    "positions_of",
    "segments",
    "take_own_positions",
    "take_positions",
]

GRAPH = "graph"  # the role of layers that see one row for each example
_ATTRIBUTE = "_weight_sharing_positions"
_OWN = "_weight_sharing_own_positions"


@dataclass
class Positions:
    """What is known of the positions of one batch.

    Attributes:
        roles: role -> the rows of layers in that role.
        masks: name -> padding mask of layers whose sequences have its length.
        num_examples: N, without padding graphs.
        is_inferred: N was read off the largest index, so that there may be more examples without
            rows at the end.
        is_guessed: the masks are arguments of the model that may be masks. They say nothing of N,
            and are those of a layer only where the autograd graph agrees.
    """

    num_examples: int
    roles: dict[str, Segments] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)
    is_inferred: bool = False
    is_guessed: bool = False

    def equals(self, other: Positions) -> bool:
        """Whether the same was said."""
        return (
            self.num_examples == other.num_examples
            and self.roles.keys() == other.roles.keys()
            and self.masks.keys() == other.masks.keys()
            and all(part.equals(other.roles[role]) for role, part in self.roles.items())
            and all(
                torch.equal(mask.mask, other.masks[name].mask) for name, mask in self.masks.items()
            )
        )

    def of(self, num_examples: int) -> Positions:
        """The masks of so many examples."""
        masks = {name: mask for name, mask in self.masks.items() if len(mask.mask) == num_examples}
        return replace(self, num_examples=num_examples, masks=masks)

    def joined(self, other: Positions) -> Positions | None:
        """What both say, one of rows and the other of padding; ``None`` if they do not go
        together.
        """
        both_of_a_kind = (self.roles and other.roles) or (self.masks and other.masks)
        if both_of_a_kind or self.num_examples != other.num_examples:
            return None
        return Positions(
            self.num_examples,
            {**self.roles, **other.roles},
            {**self.masks, **other.masks},
            self.is_inferred and other.is_inferred,
        )

    def with_num_examples(self, num_examples: int) -> Positions:
        """The same rows, with examples without rows at the end."""
        roles = {
            role: part.with_num_examples(num_examples)
            for role, part in self.roles.items()
            if role != GRAPH
        }
        graph = _one_row_each(num_examples, next(iter(roles.values())))
        return Positions(num_examples, {**roles, GRAPH: graph}, self.masks)


class WeightSharingLinear(nn.Linear):
    """``nn.Linear`` on rows of which each belongs to an example: the nodes or edges of graphs.

    Constructor, ``state_dict`` and output are those of ``nn.Linear``. Which example a row belongs
    to is set for a whole model by :func:`segments`, or for this layer by :meth:`set_segments`.

    Args:
        role: ``'node'``, ``'edge'``, ``'graph'`` or a name of the user's: which of the segments the
            layer's rows are. ``None``: found from their number.

    Shapes:
        - input: ``(ΣR_n, in_features)``
        - output: ``(ΣR_n, out_features)``

    >>> from asdl_ws_plugin import WeightSharingLinear, segments
    >>> model = nn.Sequential(WeightSharingLinear(3, 8, role="node"), nn.Tanh())
    >>> with segments(model, node=torch.tensor([0, 0, 1])):  # two graphs of 2 nodes and 1 node
    ...     model(torch.randn(3, 3)).shape
    torch.Size([3, 8])
    """

    role: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        role: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.role = role

    def set_segments(
        self,
        index: Tensor | None = None,
        *,
        ptr: Tensor | None = None,
        num_examples: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Say which example each row of the next step's input belongs to (see :class:`~.Segments`).

        The gradient maker's next step uses them up, so that they are never those of an earlier
        batch. Raises a TypeError or ValueError for anything but segments.
        """
        rows = Segments(index, ptr=ptr, num_examples=num_examples, mask=mask)
        self.__dict__[_OWN] = Positions(rows.num_examples, {self.role or "rows": rows})

    def clear_segments(self) -> None:
        """Forget what :meth:`set_segments` said."""
        self.__dict__.pop(_OWN, None)

    def extra_repr(self) -> str:
        """PyTorch's, with the role."""
        return super().extra_repr() + (f", role={self.role!r}" if self.role is not None else "")


def positions_of(module: nn.Module) -> Positions | None:
    """What an enclosing :func:`segments` or :func:`padding` said."""
    return module.__dict__.get(_ATTRIBUTE)


def take_own_positions(model: nn.Module) -> dict[nn.Module, Positions]:
    """What :meth:`WeightSharingLinear.set_segments` said since the last step; the layers forget
    it.
    """
    found = {module: module.__dict__.pop(_OWN, None) for module in model.modules()}
    return {module: positions for module, positions in found.items() if positions is not None}


def take_positions(model: nn.Module) -> dict[nn.Module, Positions]:
    """What was said of a model's modules before it is called, of their own or by a context around
    the step.
    """
    enclosing = {module: positions_of(module) for module in model.modules()}
    said = {module: positions for module, positions in enclosing.items() if positions is not None}
    return {**said, **take_own_positions(model)}


def _one_row_each(num_examples: int, like: Segments) -> Segments:
    return Segments(torch.arange(num_examples, device=like.device), num_examples=num_examples)


def make_positions(
    num_examples: int | None = None, **role_to_index: Tensor | Segments
) -> Positions:
    """Check and complete what is said of a batch. Raises TypeError or ValueError, naming the
    role.
    """
    if not role_to_index:
        raise TypeError(
            "segments: give the index of at least one role, as in segments(model, "
            "node=batch.batch)."
        )
    given = [part.num_examples for part in role_to_index.values() if isinstance(part, Segments)]
    inferred = num_examples is None and not given
    if num_examples is None and given:
        num_examples = max(given)
    roles: dict[str, Segments] = {}
    for role, index in role_to_index.items():
        try:
            roles[role] = (
                index if isinstance(index, Segments) else Segments(index, num_examples=num_examples)
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"segments: role '{role}': {error}") from error
    count = (
        num_examples
        if num_examples is not None
        else max(part.num_examples for part in roles.values())
    )
    devices = {part.device for part in roles.values()}
    if len(devices) > 1:
        raise ValueError(
            f"segments: the indices are on several devices: {', '.join(sorted(map(str, devices)))}."
        )
    for role, part in roles.items():
        if part.num_examples > count:
            raise ValueError(
                f"segments: role '{role}' has {part.num_examples} examples, but there are {count}."
            )
        if part.num_examples < count:
            roles[role] = part.with_num_examples(count)
    positions = Positions(count, roles, is_inferred=inferred)
    positions.roles.setdefault(GRAPH, _one_row_each(count, next(iter(roles.values()))))
    return positions


@contextlib.contextmanager
def _applied(model: nn.Module, positions: Positions) -> Iterator[None]:
    modules = list(model.modules())
    before = [module.__dict__.get(_ATTRIBUTE) for module in modules]
    try:
        for module in modules:
            module.__dict__[_ATTRIBUTE] = positions
        yield
    finally:
        for module, previous in zip(modules, before, strict=True):
            if previous is None:
                module.__dict__.pop(_ATTRIBUTE, None)
            else:
                module.__dict__[_ATTRIBUTE] = previous


@contextlib.contextmanager
def segments(
    model: nn.Module, *, num_examples: int | None = None, **role_to_index: Tensor | Segments
) -> Iterator[None]:
    """Inside of this context, rows of the model's layers belong to examples as these indices say.

    ::

        with segments(model, node=batch.batch, edge=batch.batch[batch.edge_index[0]]):
            gradient_maker.forward_and_backward()

    Args:
        num_examples: N; needed where the last examples may have no rows at all.
        role_to_index: role -> the example of each row ``(rows,)``, integers; or
            :class:`~.ragged.Segments`, for a ``ptr`` or rows to leave out. The role ``graph``, one
            row for each example, need not be given.

    Raises:
        TypeError, ValueError: an index is not a tensor of integers, is negative or out of range.
    """
    positions = make_positions(num_examples, **role_to_index)
    with _applied(model, positions):
        yield


@contextlib.contextmanager
def padding(model: nn.Module, mask: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Inside of this context, positions of the model's sequences that are padding count for
    nothing.

    Args:
        mask: booleans (or 0 and 1) ``(N, R)``, True for a real token; or several by name, as for a
            source and a target. A mask applies to the layers whose sequences have its length.

    Raises:
        TypeError, ValueError: a mask is not of that form, or they are of different N.
    """
    with _applied(model, make_padding(mask)):
        yield


def make_padding(mask: Tensor | Mapping[str, Tensor]) -> Positions:
    """What a context manager holds for a model: one mask, or one for each name."""
    masks = {
        name: Mask(value)
        for name, value in (mask.items() if isinstance(mask, Mapping) else [("mask", mask)])
    }
    counts = {value.num_examples for value in masks.values()}
    if len(counts) != 1:
        raise ValueError(f"padding: the masks are of {sorted(counts)} examples.")
    return Positions(counts.pop(), masks=masks)
