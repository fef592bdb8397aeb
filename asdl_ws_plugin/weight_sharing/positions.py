"""Telling layers which example their positions belong to: once per batch, for a whole model.

``with segments(model, node=..., edge=...)`` and ``with padding(model, mask)`` say it for the steps
inside of the block; :func:`attach_segments` and :func:`attach_padding` compute it from the model's
own inputs, whenever a curvature step calls it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .capture import current_record
from .ragged import Mask, Segments

__all__ = [
    "GRAPH",
    "Positions",
    "WeightSharingLinear",
    "attach_padding",
    "attach_segments",
    "padding",
    "segments",
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
    """

    num_examples: int
    roles: dict[str, Segments] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)
    is_inferred: bool = False

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

    def with_num_examples(self, num_examples: int) -> Positions:
        """The same rows, with examples without rows at the end."""
        roles = {
            role: part.with_num_examples(num_examples)
            for role, part in self.roles.items()
            if role != GRAPH
        }
        return Positions(
            num_examples, {**roles, GRAPH: _one_row_each(num_examples, next(iter(roles.values())))}
        )


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
    masks = {
        name: Mask(value)
        for name, value in (mask.items() if isinstance(mask, Mapping) else [("mask", mask)])
    }
    counts = {value.num_examples for value in masks.values()}
    if len(counts) != 1:
        raise ValueError(f"padding: the masks are of {sorted(counts)} examples.")
    return Positions(counts.pop(), masks=masks)


# ---------------------------------------------------------------------- from the model's own inputs


def attach_segments(
    model: nn.Module, source: str | Callable[..., Positions | Mapping[str, Any]] = "pyg"
) -> RemovableHandle:
    """Compute the segments from the model's own arguments, on every call in a curvature step.

    Args:
        source: ``'pyg'``: the model is called with a PyG ``Data`` or ``Batch``, or with arguments
            named ``edge_index`` and ``batch`` (also by position, by the names in the signature of
            ``forward``). ``'jraph'``: with arguments or an object that has ``n_node`` and
            ``n_edge``, batched with padding as jraph does it (the first padding graph owns all
            padding nodes and edges, later ones are empty). Or a function of the model's arguments
            that returns the keyword arguments of :func:`segments`.

    Returns:
        A handle; ``remove()`` detaches.

    Raises:
        ValueError: the source is unknown. When the model is called: the arguments are not as the
            source says.
    """
    if isinstance(source, str):
        if source not in _SOURCES:
            raise ValueError(
                f"attach_segments: source has to be a function or one of {', '.join(_SOURCES)}."
            )
        reader = _SOURCES[source]
        forward = inspect.signature(model.forward)

        def compute(*args: Any, **kwargs: Any) -> Any:
            return reader(_Arguments(forward, args, kwargs))
    else:
        compute = source
    return _attach(model, compute, lambda said: make_positions(**said))


def attach_padding(
    model: nn.Module, source: str | Callable[..., Tensor | Mapping[str, Tensor]]
) -> RemovableHandle:
    """Compute the padding mask from the model's own arguments, on every call in a curvature step.

    Args:
        source: the name of an argument that holds it, where ``attention_mask`` is True (1) for real
            tokens, and any name that ends in ``key_padding_mask`` True for padding, as PyTorch has
            it; or a function of the model's arguments that returns the mask of :func:`padding`.

    An argument that is None says that nothing is padding.

    Returns:
        A handle; ``remove()`` detaches.

    Raises:
        ValueError: ``forward`` has no argument of that name. When the model is called: none was
            found.
    """
    if isinstance(source, str):
        name = source
        forward = inspect.signature(model.forward)
        parameters = forward.parameters
        if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(
                f"attach_padding: {type(model).__name__}.forward has no argument '{name}'; it has "
                f"{', '.join(map(repr, parameters)) or 'none'}."
            )

        def compute(*args: Any, **kwargs: Any) -> Any:
            arguments = _Arguments(forward, args, kwargs)
            mask = arguments.get(name)
            if mask is None:
                if name in parameters:
                    return None
                raise ValueError(f"attach_padding: the model was called without '{name}'.")
            if mask.is_floating_point():
                mask = (
                    mask.isneginf().logical_not()
                    if name.endswith("key_padding_mask")
                    else mask != 0
                )
                return mask
            return ~mask.bool() if name.endswith("key_padding_mask") else mask.bool()
    else:
        compute = source
    return _attach(model, compute, make_padding)


def _attach(
    model: nn.Module, compute: Callable[..., Any], make: Callable[[Any], Positions]
) -> RemovableHandle:
    def before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
        record = current_record()
        if record is None:  # nobody computes curvature
            return
        said = compute(*args, **kwargs)
        if said is None:
            return
        positions = said if isinstance(said, Positions) else make(said)
        for part in module.modules():
            before = record.positions.setdefault(part, positions)
            if before is not positions and not before.equals(positions):
                raise ValueError(
                    f"The segments of a {type(part).__name__} were given twice in this step, and "
                    f"are different: {before.roles or before.masks} and "
                    f"{positions.roles or positions.masks}. Give them once, with a role for each "
                    "call, as in attach_segments(model, lambda ...: {'node_a': ..., 'node_b': "
                    "...})."
                )

    return model.register_forward_pre_hook(before_forward, with_kwargs=True)


class _Arguments:
    """A model's arguments, found by name: of a parameter, a keyword, or an attribute of one of
    them.
    """

    def __init__(self, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        self.named = dict(bound.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                self.named.update(self.named.pop(parameter.name, {}))

    def get(self, name: str) -> Any:
        if name in self.named:
            return self.named[name]
        for value in self.named.values():
            found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
            if found is not None:
                return found
        return None

    def require(self, name: str, source: str) -> Tensor:
        value = self.get(name)
        if value is None:
            raise ValueError(
                f"attach_segments('{source}'): the model was called without '{name}' (its "
                f"arguments are {', '.join(self.named) or 'none'})."
            )
        return value


def _from_pyg(arguments: _Arguments) -> dict[str, Any]:
    edge_index = arguments.require("edge_index", "pyg")
    batch = arguments.get("batch")
    if not isinstance(batch, Tensor):
        batch = getattr(batch, "batch", None)
    num_examples = arguments.get("num_graphs")
    if batch is None:
        x = arguments.require("x", "pyg")
        batch, num_examples = torch.zeros(x.shape[0], dtype=torch.long, device=x.device), 1
    elif num_examples is None:
        num_examples = arguments.get("batch_size")
    said = {"node": batch, "edge": batch[edge_index[0]]}
    return said if num_examples is None else {**said, "num_examples": int(num_examples)}


def _from_jraph(arguments: _Arguments) -> dict[str, Any]:
    n_node, n_edge = (
        arguments.require("n_node", "jraph").long(),
        arguments.require("n_edge", "jraph").long(),
    )
    num_graphs = len(n_node)
    nonempty = torch.nonzero(n_node).flatten()
    # All padding nodes belong to the first padding graph, so it is the last one that has any.
    num_examples = int(nonempty[-1]) if len(nonempty) else num_graphs
    graph = torch.arange(num_graphs, device=n_node.device)

    def rows(sizes: Tensor) -> Segments:
        index = torch.repeat_interleave(graph, sizes)
        return Segments(index, num_examples=num_examples, mask=index < num_examples)

    return {
        "num_examples": num_examples,
        "node": rows(n_node),
        "edge": rows(n_edge),
        GRAPH: rows(torch.ones_like(n_node)),
    }


_SOURCES = {"pyg": _from_pyg, "jraph": _from_jraph}
