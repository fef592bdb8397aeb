"""What will be done with which layer of a model: shapes, strategies, layouts, tied weights, and what is left out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from asdl.matrices import (
    SHAPE_DIAG,
    SHAPE_FULL,
    SHAPE_KFE,
    SHAPE_KRON,
    SHAPE_LAYER_WISE,
    SHAPE_SWIFT_KRON,
    SHAPE_UNIT_WISE,
)
from asdl.operations import Operation
from torch import Tensor, nn

from .capture import Layer
from .layout import LayoutBook, declared_layout
from .operations import EXPAND, REDUCE
from .registry import find_operation, is_supported
from .rules import AUTO, Rules, matches_any, shared_dim_rules, strategy_and_layout

__all__ = ["Plan"]

logger = logging.getLogger("asdl_ws_plugin")

SHAPES = (SHAPE_FULL, SHAPE_LAYER_WISE, SHAPE_KRON, SHAPE_SWIFT_KRON, SHAPE_KFE, SHAPE_UNIT_WISE, SHAPE_DIAG)
_KRONECKER = (SHAPE_KRON, SHAPE_SWIFT_KRON, SHAPE_KFE)
_NORMALIZATIONS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class Plan:
    """The layers of a model whose curvature is wanted, and how.

    Args:
        model: the model.
        fisher_shapes: ASDL's shapes, a string or rules.
        shared_dim: a strategy, or rules.
        ignore_modules: ASDL's: modules, classes, parts of names.
        kronecker_only: leave out every layer that does not get Kronecker factors.

    Attributes:
        skipped: name -> why its curvature is not computed, for every supported layer that is left out.
        setting: ``'expand'`` or ``'reduce'``, what ``'auto'`` decided; ``None`` before its first curvature step.

    Raises:
        TypeError, ValueError: a rule is malformed, unknown, or matches nothing; a layer cannot be handled.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher_shapes: str | Sequence[Any],
        shared_dim: str | Sequence[Any],
        ignore_modules: Sequence[Any] | None = None,
        kronecker_only: bool = False,
    ) -> None:
        self.model = model
        self._kronecker_only = kronecker_only
        self.setting: str | None = None
        self.layouts = LayoutBook()
        self.skipped: dict[str, str] = {}
        self._strategy: dict[nn.Module, str] = {}
        self._candidates: list[Layer] = []
        self._by_weight: dict[int, Layer] = {}
        self._channels_first: dict[nn.Module, bool] = {}

        shapes = Rules(fisher_shapes, "fisher_shape")
        shapes.check_values(SHAPES)
        rules = shared_dim_rules(shared_dim)
        supported = [(name, module) for name, module in model.named_modules() if is_supported(module)]
        rules.check_matches(supported)
        for name, module in supported:
            if not matches_any(name, module, ignore_modules or ()):
                self._add(name, module, shapes, rules)
        self._settle_ties()

    def _add(self, name: str, module: nn.Module, shapes: Rules, rules: Rules) -> None:
        if not any(p is not None for p in (getattr(module, "weight", None), getattr(module, "bias", None))):
            return  # a LayerNorm without affine parameters
        shape_values = shapes.for_layer(name, module)
        if not shape_values:
            return
        if len(shape_values) != 1:
            raise ValueError(f"Layer '{name}' is assigned several Fisher shapes: {shape_values}.")
        strategy, layout = strategy_and_layout(rules, name, module)
        if strategy is None:
            raise ValueError(
                f"shared_dim: no rule gives layer '{name}' a strategy. Add a default, as in ['reduce', ...]."
            )
        operation = find_operation(module, EXPAND if strategy == AUTO else strategy)
        if operation is None:
            raise ValueError(
                f"Layer '{name}': there is no operation for {type(module).__name__} under shared_dim='{strategy}'. "
                f"Register one with register_operation, or give it another rule, as in ('{name}', 'reduce')."
            )
        shape = _shape_for(name, module, shape_values[0])
        if shape is None:
            self._skip(name, "the Kronecker factor of an embedding would have the vocabulary's size squared")
            return
        if self._kronecker_only and shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON):
            self._skip(name, f"fisher_forward_only is for Kronecker factors, not for the shape '{shape}'")
            return
        if isinstance(module, nn.Conv2d) and module.groups > 1 and shape in _KRONECKER:
            raise ValueError(
                f"Layer '{name}': a convolution in {module.groups} groups has no single pair of Kronecker factors. "
                f"Leave it to the first-order optimizer with ignore_modules=['{name}'], or give it the shape "
                f"'diag' or 'layer_wise'."
            )
        self._candidates.append(Layer(name, module, shape))
        self._strategy[module] = strategy
        if layout is not None:
            self.layouts.rule[module] = layout
        declared = declared_layout(self.model, name)
        if declared is not None:
            self.layouts.declared[module] = declared

    def _settle_ties(self) -> None:
        """One layer for each weight. Linear layers that share it are one layer that is called several times."""
        embedded = {
            id(module.weight): name for name, module in self.model.named_modules() if isinstance(module, nn.Embedding)
        }
        layers: list[Layer] = []
        for layer in self._candidates:
            weight = getattr(layer.module, "weight", None)
            first = self._by_weight.get(id(weight)) if weight is not None else None
            if first is not None and type(first.module) is type(layer.module):
                first.tied.append((layer.name, layer.module))
            elif first is not None:
                self._skip(layer.name, f"its weight is tied to '{first.name}', which is of another type")
            elif weight is not None and id(weight) in embedded and not isinstance(layer.module, nn.Embedding):
                self._skip(layer.name, f"its weight is tied to the embedding '{embedded[id(weight)]}'")
            else:
                layers.append(layer)
                if weight is not None:
                    self._by_weight[id(weight)] = layer
        self._candidates = layers
        self._modules = {layer.module for layer in layers}

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        logger.info("layer '%s' is left to the first-order optimizer: %s", name, reason)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._modules

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a trainable parameter now; freezing and unfreezing is seen at once."""
        return [layer for layer in self._candidates if _is_trainable(layer.module)]

    def layers_of(self, shape: str) -> list[Layer]:
        return [layer for layer in self._candidates if layer.shape == shape and _is_trainable(layer.module)]

    def strategy_of(self, layer: Layer) -> str | None:
        """The layer's strategy; ``None`` where ``'auto'`` has not decided yet."""
        strategy = self._strategy[layer.module]
        return self.setting if strategy == AUTO else strategy

    @property
    def is_auto(self) -> bool:
        return AUTO in self._strategy.values()

    def decide(self, num_terms: int, num_examples: int) -> None:
        """Settle ``'auto'``: a loss term for every position is the expand setting, one for every example reduce."""
        if self.setting is None and self.is_auto:
            self.setting = REDUCE if num_terms <= num_examples else EXPAND
            logger.info(
                "shared_dim='auto': the loss has %d terms for %d examples, the %s setting",
                num_terms, num_examples, self.setting,
            )

    def operation_of(self, layer: Layer) -> type[Operation]:
        strategy = self.strategy_of(layer)
        operation = find_operation(layer.module, strategy) if strategy is not None else None
        assert operation is not None, layer.name
        return operation

    def check_call(self, layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor) -> None:
        """Look at a call while its tensors are untouched: which dimension does a LayerNorm subclass normalize?"""
        if not isinstance(module, nn.LayerNorm) or type(module).forward is nn.LayerNorm.forward:
            return
        if module in self._channels_first:
            return
        with torch.no_grad():
            for channels_first in (False, True):
                x = in_data.movedim(1, -1) if channels_first and in_data.ndim > 2 else in_data
                if x.shape[-len(module.normalized_shape):] != tuple(module.normalized_shape):
                    continue
                y = F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
                y = y.movedim(-1, 1) if channels_first and in_data.ndim > 2 else y
                if torch.allclose(y.to(out.dtype), out, rtol=1e-2, atol=1e-3):
                    self._channels_first[module] = channels_first
                    return
        raise ValueError(
            f"Layer '{layer.name}' ({type(module).__name__}) is a subclass of LayerNorm that computes something "
            f"else. Leave it to the first-order optimizer with ignore_modules=['{layer.name}']."
        )

    def has_channels_first(self, module: nn.Module) -> bool:
        """Whether the layer's features are dimension 1 of its input."""
        if isinstance(module, (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
            return True
        return self._channels_first.get(module, False)


def _shape_for(name: str, module: nn.Module, shape: str) -> str | None:
    """The shape that is computed where the one asked for is another by a simpler name; ``None``: none."""
    if isinstance(module, nn.Embedding) and shape in (*_KRONECKER, SHAPE_UNIT_WISE):
        return None
    if isinstance(module, _NORMALIZATIONS):
        both = all(p is not None and p.requires_grad for p in (module.weight, module.bias))
        if shape == SHAPE_UNIT_WISE and not both:
            return SHAPE_DIAG  # one parameter a unit: its block is a number
        if shape in _KRONECKER:
            warnings.warn(
                f"Layer '{name}' ({type(module).__name__}) has no Kronecker factors; it gets the shape "
                f"'{SHAPE_UNIT_WISE if both else SHAPE_DIAG}'.",
                stacklevel=4,
            )
            return SHAPE_UNIT_WISE if both else SHAPE_DIAG
    return shape


def _is_trainable(module: nn.Module) -> bool:
    parameters = (getattr(module, "weight", None), getattr(module, "bias", None))  # a user's layer may lack either
    return any(p is not None and p.requires_grad for p in parameters)
