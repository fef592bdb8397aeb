"""What will be done with which layer of a model, and what batches have settled of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asdl.operations import Operation
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .blocks import LinearBlock, has_blocks, is_trainable
from .capture import Layer
from .errors import LayerRuntimeError
from .layout import LayoutBook
from .live import NO_BATCH
from .operations import EXPAND, REDUCE, completed
from .registry import find_operation
from .rules import AUTO
from .selection import select_layers
from .shapes import unit_wise_or_diag
from .subclasses import Subclasses

__all__ = ["Plan"]

logger = logging.getLogger(__name__.partition(".")[0])


class Plan:
    """The layers of a model whose curvature is wanted, and how.

    Args:
        model: the model.
        fisher_shapes: ASDL's shapes, a string or rules.
        shared_dim: a strategy, or rules.
        ignore_modules: ASDL's: modules, classes, parts of names.
        kronecker_only: leave out every layer that does not get Kronecker factors.
        on_refusal: called with the name, the module and the error for a layer that cannot be
            handled, instead of raising it; the layer is left out.

    Attributes:
        layouts: which dimension of the layers' tensors is the batch.
        skipped: name -> why its curvature is not computed, for every supported layer that is left
            out.
        unsupported: name -> why, for every other module with trainable parameters of its own.
        setting: ``'expand'`` or ``'reduce'``, what ``'auto'`` decided; ``None`` before its first
            curvature step.

    Raises:
        TypeError, ValueError: a rule is malformed, unknown, or matches nothing; a layer cannot be
            handled.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher_shapes: str | Sequence[Any],
        shared_dim: str | Sequence[Any],
        ignore_modules: Sequence[Any] | None = None,
        kronecker_only: bool = False,
        on_refusal: Callable[[str, nn.Module, ValueError], None] | None = None,
    ) -> None:
        self.model = model
        self.setting: str | None = None
        # Wider Kronecker factors are in blocks (:mod:`~.capped`); upstream damps factors in place.
        self.max_side: int | None = None
        self.damps_in_place = True
        self._known_blocks = {m for m in model.modules() if isinstance(m, LinearBlock)}
        self._subclasses = Subclasses()
        found = select_layers(
            model, fisher_shapes, shared_dim, ignore_modules or (), kronecker_only, on_refusal
        )
        self.skipped, self.unsupported = found.skipped, found.unsupported
        self._selected, self._strategy = found.layers, found.strategy
        self._unit_wise, self.time_major = found.unit_wise, found.time_major
        self._by_module = {layer.module: layer for layer in found.layers}
        self.layouts = LayoutBook()
        self.layouts.rule, self.layouts.declared = found.rule, found.declared
        self.layouts.is_graph = any(
            cls.__name__ == "MessagePassing"
            for module in model.modules()
            for cls in type(module).__mro__
        )
        self._log_skipped()

    def _log_skipped(self) -> None:
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(f"'{name}'")
        for reason, these in names.items():
            logger.info("left to the first-order optimizer: %s: %s", ", ".join(these), reason)

    def __repr__(self) -> str:
        layers = [layer for layer in self.layers if layer.name not in self.skipped]
        strategies: dict[str, list[str]] = {}
        for layer in layers:
            strategy = self.strategy_of(layer) or "auto, not decided yet"
            strategies.setdefault(f"{strategy}, {layer.shape}", []).append(layer.name)
        lines = [f"{key}: {', '.join(names)}" for key, names in strategies.items()]
        trainable = self.layers
        frozen = [layer.name for layer in self._selected if layer not in trainable]
        lines += [f"frozen: {', '.join(frozen)}"] if frozen else []
        lines += [
            f"left out: {name}: {reason}"
            for name, reason in (self.skipped | self.unsupported).items()
        ]
        return "\n  ".join([f"Plan of {len(layers)} layers", *lines])

    def as_dict(self) -> dict[str, Any]:
        """The plan as data, which ``json`` writes: what ``print(gm.plan)`` says, and more.

        ``"setting"`` is what ``'auto'`` decided. ``"layers"`` has an entry for each layer, with its
        ``"name"``, ``"class"``, ``"shape"``, ``"strategy"`` (``None``: not decided yet),
        ``"layout"`` (``None``: not settled yet), ``"positions"`` (the role of the rows or the
        padding mask of each call, as far as batches have settled it), ``"tied"`` (the names of
        other modules with its weight) and ``"frozen"``. ``"left_out"`` maps the names of all other
        modules with parameters of their own to the reason, but for those of ``ignore_modules``.
        """
        trainable = {layer.module for layer in self.layers}
        layers = [
            {
                "name": layer.name,
                "class": type(layer.module).__name__,
                "shape": layer.shape,
                "strategy": self.strategy_of(layer),
                "layout": self.layouts.given(layer.module)
                or self.layouts.settled.get(layer.module),
                "positions": self.layouts.positions_of(layer.module),
                "tied": [name for name, _ in layer.tied],
                "frozen": layer.module not in trainable,
            }
            for layer in self._selected
            if layer.name not in self.skipped
        ]
        left_out = {name: str(reason) for name, reason in (self.skipped | self.unsupported).items()}
        return {"setting": self.setting, "layers": layers, "left_out": left_out}

    # ----------------------------------------------------------------------------------- the layers

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._by_module

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a trainable parameter now; freezing and unfreezing is seen at
        once.
        """
        layers = [
            layer
            for layer in self._selected
            if any(is_trainable(module) for module in layer.modules)
        ]
        for layer in layers:
            if layer.module in self._unit_wise:
                layer.shape = unit_wise_or_diag(layer.module)
        return layers

    @property
    def all_layers(self) -> list[Layer]:
        """The layers, those that are frozen now included."""
        return list(self._selected)

    def layers_of(self, shape: str) -> list[Layer]:
        """The layers that get this shape."""
        return [layer for layer in self.layers if layer.shape == shape]

    def layer_of(self, module: nn.Module) -> Layer:
        """The layer that a module is the first, or the only one, of."""
        return self._by_module[module]

    def is_in_attention(self, name: str) -> bool:
        """Whether a layer belongs to an ``nn.MultiheadAttention`` that was not converted."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(parent, nn.MultiheadAttention) and not has_blocks(parent)

    def check_still_complete(self) -> None:
        """Raise a RuntimeError if the model got layers by a conversion after the plan was made."""
        for name, module in self.model.named_modules():
            if isinstance(module, LinearBlock) and module not in self._known_blocks:
                raise LayerRuntimeError(
                    name,
                    "was made by a conversion after the gradient maker was created",
                    "Call convert(model) first, then create the gradient maker.",
                )

    # ----------------------------------------------------------------------------------- strategies

    def strategy_of(self, layer: Layer) -> str | None:
        """The layer's strategy; ``None`` where ``'auto'`` has not decided yet."""
        strategy = self._strategy[layer.module]
        return self.setting if strategy == AUTO else strategy

    @property
    def is_auto(self) -> bool:
        """Whether there is a layer whose strategy the first batch decides."""
        return AUTO in self._strategy.values()

    def decide(self, num_terms: int, num_examples: int) -> None:
        """Settle ``'auto'``: a loss term for every position is the expand setting, one for every
        example reduce.
        """
        self.layouts.num_terms = num_terms
        if self.setting is None and self.is_auto:
            self.setting = REDUCE if num_terms <= num_examples else EXPAND
            logger.info(
                "shared_dim='auto': the loss has %d terms for %d examples, the %s setting",
                num_terms,
                num_examples,
                self.setting,
            )

    def note_absent(self, absent: Mapping[nn.Module, str]) -> None:
        """Keep which layers turned out to have no examples to average over."""
        for module, reason in absent.items():
            if reason == NO_BATCH:
                self.skipped[self.layer_of(module).name] = reason

    def remember(self) -> Callable[[], None]:
        """A function that takes back what was decided and settled after now."""
        setting, restore_layouts = self.setting, self.layouts.remember()

        def restore() -> None:
            self.setting = setting
            restore_layouts()

        return restore

    def operation_of(self, layer: Layer) -> type[Operation]:
        """The class of the operation that computes the layer's curvature."""
        # Before 'auto' has decided, either operation knows what the layer's features are.
        operation = find_operation(layer.module, self.strategy_of(layer) or EXPAND)
        assert operation is not None, layer.name
        return completed(operation, type(layer.module))

    # -------------------------------------------------------------------------------------- a call

    def check_call(
        self, layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor
    ) -> GradientEdge | None:
        """For :func:`.capture.recording`: see :meth:`.subclasses.Subclasses.check_call`."""
        return self._subclasses.check_call(layer, module, in_data, out)

    def has_channels_first(self, module: nn.Module) -> bool:
        """Whether the layer's features are dimension 1 of its input."""
        return self._subclasses.has_channels_first(module)

    def num_feature_dims(self, layer: Layer, module: nn.Module) -> int:
        """How many trailing dimensions of a module's tensors are features."""
        operation: Any = self.operation_of(layer)(layer.module, [])
        return operation.num_feature_dims(module)
