"""Stage 1, *capture*: what every layer of a model saw in one forward pass, and handles on the
gradients of its outputs.

Forward hooks only; they are gone as soon as the forward pass is over. Instead of backward hooks,
the *gradient edge* of each output is kept: the place in the autograd graph where the gradient with
respect to it arrives. An in-place activation after the layer, the user's own hooks, calls by
keyword and repeated calls leave it valid, and ``torch.autograd.grad`` up to these edges computes no
weight gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .chosen import Chosen, chosen_rows
from .errors import LayerRuntimeError, LayerTypeError
from .lineage import Lineage, tracing
from .torch_private import base_of, eagerly, remove_forward_hooks, version_of

__all__ = [
    "Call",
    "Captured",
    "Layer",
    "Record",
    "batch_norm_edge",
    "current_record",
    "first_tensor",
    "is_own_call",
    "last_nodes",
    "output_edge",
    "own_call",
    "reached_nodes",
    "recording",
    "remove_hooks",
]


@dataclass
class Call:
    """One call of a layer. ``edge`` is where the gradient w.r.t. its output, of shape
    ``out_shape``, arrives.

    ``module`` is the one of the layer's modules that was called: modules of one weight may differ
    in all else. ``index`` is the number of the call among the layer's in this forward pass, and
    ``from_input`` says whether its input depends on the model's; ``None`` where that is not known.
    ``chosen`` is what an index made its rows of, if one did.
    """

    module: nn.Module
    in_data: Tensor | None
    out_shape: torch.Size
    edge: GradientEdge
    version: int
    index: int = 0
    from_input: bool | None = None
    chosen: Chosen | None = None

    def unmodified_input(self, name: str) -> Tensor:
        """The layer's input. Raises a RuntimeError if it was modified in place after the call."""
        assert self.in_data is not None
        if version_of(self.in_data) != self.version:
            raise LayerRuntimeError(
                name,
                "its input was modified in place after the layer was called, so its curvature "
                "cannot be computed",
                "Use the out-of-place operation, or ignore_modules.",
            )
        return self.in_data

    def release_input(self) -> None:
        """Let go of the input once everything that needs it was computed."""
        self.in_data = None


@dataclass
class Layer:
    """A layer whose curvature is wanted: all modules that hold its weight (one, unless the weight
    is tied).
    """

    name: str
    module: nn.Module
    shape: str
    tied: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def modules(self) -> list[nn.Module]:
        """The module and those whose weight is tied to its."""
        return [self.module, *(module for _, module in self.tied)]


@dataclass(eq=False)
class Record:
    """What :func:`recording` saw.

    Attributes:
        calls: the calls of each layer.
        without_graph: the layers that ran outside of autograd.
        positions: what was said of the rows of each module, before the model ran and while it did.
        lineage: what depends on the model's arguments, if that is looked at.
        absent: the layers that were called, and have nothing to take part in the step with; why.
        time_major: the sizes ``(R, N)`` of what recurrent modules were given that say so.
    """

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    without_graph: set[nn.Module] = field(default_factory=set)
    positions: dict[nn.Module, Any] = field(default_factory=dict)
    lineage: Lineage | None = None
    absent: dict[nn.Module, str] = field(default_factory=dict)
    time_major: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Captured:
    """A forward pass and its loss: all that the later stages know of a batch.

    Attributes:
        record: what the layers saw.
        logits: the model's logits.
        loss: the user's loss; ``None`` if there is none.
        observations: the calls of PyTorch's loss functions that were seen.
        inputs: the model's arguments, in a nest of containers.
        reduction: what the loss function says of itself.
        num_terms: how many terms the loss says that it averages over.
        loss_scale: what a GradScaler has multiplied the loss with; ``None``: there is none.
        has_labels: whether there is a term in the loss (see :mod:`~.no_labels`).
    """

    record: Record
    logits: Tensor
    loss: Tensor | None
    observations: Sequence[Any]
    inputs: Any
    reduction: str | None = None
    num_terms: Any = None
    loss_scale: Tensor | None = None
    has_labels: bool = True


_records: list[Record] = []
_own_calls: list[None] = []  # one for each that goes on
_MARK = "_asdl_ws_hook"  # of this module's hooks


def current_record() -> Record | None:
    """The record that is being made, if one is."""
    return _records[-1] if _records else None


@contextlib.contextmanager
def own_call() -> Iterator[None]:
    """A model that is called while the context is open is called by a gradient maker."""
    _own_calls.append(None)
    try:
        yield
    finally:
        del _own_calls[-1:]


def is_own_call() -> bool:
    """Whether a model is called for somebody's curvature or by a gradient maker: this is no forward
    pass of the user's loop.
    """
    return bool(_records or _own_calls)


def remove_hooks(model: nn.Module) -> None:
    """Remove what an interrupt between two instructions of :func:`recording` may have left."""
    _records.clear()
    _own_calls.clear()
    for module in model.modules():
        remove_forward_hooks(module, lambda hook: hasattr(hook, _MARK))


def last_nodes(outputs: Tensor, nodes: set[Node]) -> set[Node]:
    """Those of ``nodes`` that a backward pass from ``outputs`` reaches and behind which it meets no
    other of them.

    A pass that computes the gradients there runs through all others that it reaches.
    """
    return reached_nodes(outputs, nodes)[1]


def reached_nodes(outputs: Tensor, nodes: set[Node]) -> tuple[set[Node], set[Node]]:
    """Those of ``nodes`` that a backward pass from ``outputs`` reaches, and those behind which it
    meets no other of them.
    """
    last: set[Node] = set()
    meets: dict[
        Node, bool
    ] = {}  # whether one of the nodes is there or behind; keeps the visited nodes alive
    root = outputs.grad_fn
    stack = [] if root is None else [(root, False)]
    while stack:
        node, left = stack.pop()
        if left:
            behind = any(meets[other] for other, _ in node.next_functions if other is not None)
            if node in nodes and not behind:
                last.add(node)
            meets[node] = behind or node in nodes
        elif node not in meets:
            meets[node] = False
            stack.append((node, True))
            stack += [
                (other, False)
                for other, _ in node.next_functions
                if other is not None and other not in meets
            ]
    return nodes & meets.keys(), last


def output_edge(out: Tensor) -> GradientEdge:
    """Where the gradient with respect to a layer's output arrives, whatever is done to the output
    in place.
    """
    base = base_of(out)
    if (
        base is not None
        and base.grad_fn is not None
        and base.numel() == out.numel()
        and base.is_contiguous()
        and out.is_contiguous()
    ):
        # F.linear returns a view for inputs of three dimensions. An in-place operation on a view
        # rebuilds the view's node but keeps the base's, so the gradient is taken there.
        return get_gradient_edge(base)
    return get_gradient_edge(out)


def batch_norm_edge(module: nn.Module, in_data: Tensor, out: Tensor) -> GradientEdge | None:
    """Where the gradient with respect to the batch normalization within a module arrives, as before
    an activation.

    ``None`` if the module does not normalize ``in_data`` itself with its own weight and bias.
    """
    own = {id(p) for p in module.parameters(recurse=False)}
    done = {in_data.grad_fn}
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        inner = [other for other, _ in node.next_functions]
        if "BatchNorm" in node.name() and any(
            id(getattr(other, "variable", None)) in own for other in inner
        ):
            source = None if inner[0] is None else getattr(inner[0], "variable", inner[0])
            is_input = (
                source is (in_data if in_data.is_leaf else in_data.grad_fn)
                or not in_data.requires_grad
            )
            return GradientEdge(node, 0) if is_input else None
        todo += inner
    return None


def first_tensor(name: str, module: nn.Module, what: str, values: Any) -> Tensor:
    """The first tensor of a layer's arguments or outputs. Raises a TypeError that names the layer
    if there is none.
    """
    if isinstance(values, Tensor):
        return values
    values = values.values() if isinstance(values, dict) else values
    if isinstance(values, (list, tuple)) or hasattr(values, "__iter__"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise LayerTypeError(name, f"no tensor among its {what}", kind=type(module).__name__)


@contextlib.contextmanager
def recording(
    layers: list[Layer],
    check: Callable[[Layer, nn.Module, Tensor, Tensor], GradientEdge | None] | None = None,
    on_refusal: Callable[[Layer, Exception], None] | None = None,
    positions: Mapping[nn.Module, Any] | None = None,
    traced: nn.Module | None = None,
    time_major: Sequence[nn.Module] = (),
) -> Iterator[Record]:
    """Record the calls of these layers while the context is open.

    Whatever torch.compile compiled runs eagerly meanwhile: compiled code skips hooks, or hides the
    outputs of inner layers from autograd.

    Args:
        layers: the layers.
        check: called as ``check(layer, module, in_data, out)`` with each call. It returns where the
            layer's output gradient arrives; ``None``: at the module's output.
        on_refusal: is handed the error of a call that cannot be recorded, instead of raising it.
        positions: what was said of the rows of modules before.
        traced: the model, if it is to be seen which inputs depend on its own.
        time_major: the recurrent modules whose second dimension is the batch.
    """
    record = Record(positions=dict(positions or {}))
    handles = []
    try:
        for layer in layers:
            for name, module in [(layer.name, layer.module), *layer.tied]:
                hook = _recorder(record, layer, name, module, check, on_refusal)
                # First of all hooks: the user's own may replace the output.
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for module in time_major:
            hook = _sizes_recorder(record)
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        with contextlib.ExitStack() as stack:
            stack.enter_context(eagerly())
            if traced is not None:
                record.lineage = stack.enter_context(tracing(traced))
            _records.append(record)
            yield record
    finally:
        if record in _records:
            _records.remove(record)
        for handle in handles:
            handle.remove()


def _sizes_recorder(record: Record) -> Callable[..., None]:
    """The hook of a recurrent module."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and x.ndim == 3:  # neither packed nor of a single example
            record.time_major.append(tuple(x.shape[:2]))

    setattr(hook, _MARK, True)
    return hook


def _recorder(
    record: Record,
    layer: Layer,
    name: str,
    module: nn.Module,
    check: Callable[[Layer, nn.Module, Tensor, Tensor], GradientEdge | None] | None,
    on_refusal: Callable[[Layer, Exception], None] | None,
) -> Callable[..., None]:
    """The hook of one module of a layer."""

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first_tensor(name, module, "outputs", output)
        if out.grad_fn is None:
            record.without_graph.add(layer.module)
            return
        in_data = first_tensor(name, module, "arguments", args or kwargs)
        edge = None if check is None else check(layer, module, in_data, out)
        calls = record.calls.setdefault(layer.module, [])
        call = Call(
            module,
            in_data.detach(),
            out.shape,
            edge or output_edge(out),
            version_of(in_data),
            len(calls),
            None if record.lineage is None else record.lineage.from_input(in_data),
            chosen_rows(in_data),
        )
        calls.append(call)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            note(args, kwargs, output)
        except (TypeError, ValueError) as error:
            if on_refusal is None:
                raise
            on_refusal(layer, error)

    setattr(hook, _MARK, True)
    return hook
