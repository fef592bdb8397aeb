"""Which example positions belong to, computed from the model's own inputs whenever a curvature step
calls it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .capture import current_record
from .positions import GRAPH, Positions, make_padding, make_positions, positions_of
from .ragged import Mask, Segments
from .torch_private import unwrapped

__all__ = ["attach_padding", "attach_segments"]

_AUTO = "auto"
# What is added to attention's scores leaves a position out if it is at most that.
_MASKED = -1e4
_ATTACHED = "_weight_sharing_attached"  # the handles of what is attached to a model, by source


def attach_segments(
    model: nn.Module, source: str | Callable[..., Positions | Mapping[str, Any]] = "pyg"
) -> RemovableHandle:
    """Compute the segments from the model's own arguments, on every call in a curvature step.

    Attaching the same source again changes nothing. What DistributedDataParallel or torch.compile
    made of a model is that model.

    Args:
        source: ``'pyg'``: the model is called with a PyG ``Data`` or ``Batch``, or with arguments
            named ``edge_index`` and ``batch`` (also by position, by the names in the signature of
            ``forward``). ``'jraph'``: with arguments or an object that has ``n_node`` and
            ``n_edge``, batched with padding as jraph does it (the first padding graph owns all
            padding nodes and edges, later ones are empty). ``'auto'``: as either of both if the
            arguments are of one, and nothing if they are not. Or a function of the model's
            arguments that returns the keyword arguments of :func:`segments`.

    Returns:
        A handle; ``remove()`` detaches.

    Raises:
        ValueError: the source is unknown. When the model is called: the arguments are not as the
            source says.
    """
    if not callable(source) and (not isinstance(source, str) or source not in _SOURCES):
        raise ValueError(
            f"attach_segments: source has to be a function or one of {', '.join(_SOURCES)}."
        )
    return _attach(unwrapped(model), _SegmentsOf(source))


def attach_padding(
    model: nn.Module, source: str | Callable[..., Tensor | Mapping[str, Tensor]]
) -> RemovableHandle:
    """Compute the padding mask from the model's own arguments, on every call in a curvature step.

    Attaching the same source again changes nothing. What DistributedDataParallel or torch.compile
    made of a model is that model.

    Args:
        source: the name of an argument that holds it, where ``attention_mask`` is True (1) for real
            tokens, and any name that ends in ``key_padding_mask`` True for padding, as PyTorch has
            it, where a mask that is added to scores is 0 for real tokens and -1e4 or less, or
            -inf, for padding; or a function of the model's arguments that returns the mask of
            :func:`padding`.
            ``'auto'``: whatever arguments look like masks or padded numbers of tokens, ``(N, R)``,
            also in tuples and dictionaries. Which of them is whose, the autograd graph of the first
            batch with padding tells: a layer's is the one that leaves out most of its positions,
            and none that the loss depends on.

    An argument that is None says that nothing is padding.

    Returns:
        A handle; ``remove()`` detaches.

    Raises:
        TypeError: the source is neither a name nor a function.
        ValueError: ``forward`` has no argument of that name. When the model is called: none was
            found, or it has numbers that are neither 0 nor 1.
    """
    if not isinstance(source, str) and not callable(source):
        raise TypeError(
            "attach_padding: source has to be the name of an argument, 'auto', or a function of "
            f"the model's arguments, got {source!r}. For several masks, a function that returns a "
            "dictionary of them, as {'source': ..., 'target': ...}."
        )
    model = unwrapped(model)
    if isinstance(source, str) and source != _AUTO:
        parameters = inspect.signature(model.forward).parameters
        has_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if source not in parameters and not has_keywords:
            raise ValueError(
                f"attach_padding: {type(model).__name__}.forward has no argument '{source}'; it "
                f"has {', '.join(map(repr, parameters)) or 'none'}."
            )
    return _attach(model, _PaddingOf(source))


def _attach(model: nn.Module, hook: _SegmentsOf | _PaddingOf) -> RemovableHandle:
    """Register a hook, unless its like is there; a model can be pickled with it."""
    attached: dict[Any, RemovableHandle] = model.__dict__.setdefault(_ATTACHED, {})
    key = type(hook).__name__, hook.source
    handle = attached.get(key)
    if handle is None or handle.id not in (handle.hooks_dict_ref() or ()):
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        attached[key] = handle
    return handle


@dataclass(frozen=True)
class _SegmentsOf:
    """A hook before a model's forward pass."""

    source: Any

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if current_record() is None:  # nobody computes curvature
            return
        if isinstance(self.source, str):
            arguments = _Arguments(inspect.signature(module.forward), args, kwargs)
            said = _SOURCES[self.source](arguments)
        else:
            said = self.source(*args, **kwargs)
        if said is not None:
            _note(module, said if isinstance(said, Positions) else make_positions(**said))


@dataclass(frozen=True)
class _PaddingOf:
    """A hook before a model's forward pass."""

    source: Any

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if current_record() is None:
            return
        said: Any
        if self.source == _AUTO:
            arguments = _Arguments(inspect.signature(module.forward), args, kwargs)
            said = _masks_of_any(arguments)
        elif isinstance(self.source, str):
            said = _mask_argument(self.source, inspect.signature(module.forward), args, kwargs)
        else:
            said = self.source(*args, **kwargs)
        if said is not None:
            _note(module, said if isinstance(said, Positions) else make_padding(said))


def _mask_argument(
    name: str, signature: inspect.Signature, args: Any, kwargs: Any
) -> Tensor | None:
    """The mask that a model's argument of this name is, True for real tokens."""
    mask = _Arguments(signature, args, kwargs).get(name)
    is_of_padding = name.endswith("key_padding_mask")
    if mask is None:
        if name in signature.parameters:
            return None
        raise ValueError(f"attach_padding: the model was called without '{name}'.")
    if mask.is_floating_point():
        real = mask > _MASKED if is_of_padding else mask != 0
        if bool(((mask == 0) | ~real if is_of_padding else (mask == 0) | (mask == 1)).all()):
            return real
        # Where what is added to scores is 0, a token is real; where a weight is 0, it is not.
        known = f"0 and {_MASKED:g} or less" if is_of_padding else "0 and 1"
        raise ValueError(
            f"attach_padding: the numbers in '{name}' are others than {known}, so which of them "
            "are of padding is not known. Give a function of the model's arguments that returns "
            f"the mask, True for real tokens, as lambda *args, {name}, **kwargs: {name} == 0 for a "
            "mask that is added to attention's scores."
        )
    return ~mask.bool() if is_of_padding else mask.bool()


def _note(module: nn.Module, positions: Positions) -> None:
    """Keep what was said of a module and of those in it for the step that is recorded."""
    record = current_record()
    assert record is not None
    joined: dict[int, Positions] = {}
    for part in module.modules():
        before = record.positions.get(part)
        if before is not None and positions.is_guessed:
            continue  # it is known
        if before is None or before is positions_of(part) or before.is_guessed:
            record.positions[part] = positions
        elif before is not positions and not before.equals(positions):
            both = joined.get(id(before)) or before.joined(positions)
            if both is None:
                raise _given_twice(part, before, positions)
            record.positions[part] = joined[id(before)] = both


def _given_twice(module: nn.Module, before: Positions, after: Positions) -> ValueError:
    what, ways = (
        (
            "The padding masks",
            "Attach one; what attach_padding returned takes an earlier one off: remove().",
        )
        if before.masks and after.masks
        else (
            "The segments",
            "Give them once, with a role for each call, as in attach_segments(model, lambda ...: "
            "{'node_a': ..., 'node_b': ...}), or take an earlier one off with remove() of what "
            "attach_segments returned.",
        )
    )
    return ValueError(
        f"{what} of a {type(module).__name__} were given twice in this step, and are different: "
        f"{before.roles or before.masks} and {after.roles or after.masks}. {ways}"
    )


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


def _masks_of_any(arguments: _Arguments) -> Positions | None:
    """Two-dimensional arguments that may be masks, or numbers of tokens of which 0 is padding;
    ``None`` if there are none.
    """
    masks: dict[str, Mask] = {}
    for name, value in _tensors_of("", arguments.named):
        if value.ndim != 2:
            continue
        real = value != 0
        if value.is_floating_point() and not bool((real == value).all()):
            continue  # numbers, not zeros and ones
        masks[name] = Mask(real)
        if value.is_floating_point() or value.dtype == torch.bool:
            masks[f"not {name}"] = Mask(~real)  # 1 may also say that it is padding
    return Positions(0, masks=masks, is_guessed=True) if masks else None


def _tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nest of containers, by the way to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_of(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors_of(f"{name}.{number}", item)


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


def _from_any(arguments: _Arguments) -> dict[str, Any] | None:
    for names, source in ((("n_node", "n_edge"), _from_jraph), (("edge_index",), _from_pyg)):
        if all(arguments.get(name) is not None for name in names):
            return source(arguments)
    return None


_SOURCES: dict[str, Callable[[_Arguments], dict[str, Any] | None]] = {
    "pyg": _from_pyg,
    "jraph": _from_jraph,
    "auto": _from_any,
}
