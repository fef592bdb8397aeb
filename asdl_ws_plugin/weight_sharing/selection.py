"""Which layers of a model get which curvature, by rules and by what their types allow; and why the
others get none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asdl.matrices import SHAPE_KRON, SHAPE_SWIFT_KRON, SHAPE_UNIT_WISE
from torch import nn

from ._warn import warn
from .blocks import LinearBlock, has_blocks, is_trainable, lent_to, weight_key
from .capture import Layer
from .errors import LayerError
from .layout import declared_layout
from .names import PYG_LINEAR, SKIP_REASON, qualified_name
from .operations import EXPAND, REDUCE
from .registry import find_operation, is_supported
from .rules import AUTO, Rules, describe_key, matches_any, shared_dim_rules, strategy_and_layout
from .shapes import KRONECKER, NORMALIZATIONS, SHAPES

__all__ = ["Selection", "select_layers"]


@dataclass
class Selection:
    """The layers of a model that were selected, and what was said of the others.

    Attributes:
        layers: one for each weight; linear layers that share it are one layer that is called
            several times.
        strategy: module -> ``'expand'``, ``'reduce'``, ``'auto'`` or the user's own.
        rule, declared: module -> layout, by a rule and by the modules around it.
        unit_wise: layers with a block for every unit, while there is more than a number.
        skipped: name -> why, for every supported layer that is left out.
        time_major: recurrent modules whose second dimension is the batch.
        unsupported: name -> why, for every other module with trainable parameters of its own.
    """

    layers: list[Layer] = field(default_factory=list)
    strategy: dict[nn.Module, str] = field(default_factory=dict)
    rule: dict[nn.Module, str] = field(default_factory=dict)
    declared: dict[nn.Module, str] = field(default_factory=dict)
    unit_wise: set[nn.Module] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    time_major: list[nn.Module] = field(default_factory=list)


def select_layers(
    model: nn.Module,
    fisher_shapes: str | Sequence[Any],
    shared_dim: str | Sequence[Any],
    ignore_modules: Sequence[Any],
    kronecker_only: bool,
    on_refusal: Callable[[str, nn.Module, ValueError], None] | None,
) -> Selection:
    """Apply the rules to a model. The arguments are those of :class:`~.plan.Plan`.

    Raises:
        TypeError, ValueError: a rule is malformed, unknown, or matches nothing; a layer cannot be
            handled.
    """
    chooser = _Chooser(model, fisher_shapes, shared_dim, kronecker_only)
    for name, module in chooser.supported:
        if matches_any(name, module, ignore_modules):
            continue
        try:
            chooser.add(name, module)
        except ValueError as error:
            if on_refusal is None:
                raise
            on_refusal(name, module, error)
    chooser.report_without_factors()
    found = chooser.found
    _settle_ties(model, found)
    _report_unmatched(model, ignore_modules)
    found.unsupported = _unsupported(model, ignore_modules)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    found.time_major = [module for module in recurrent if not module.batch_first]
    return found


class _Chooser:
    """Takes the layers one by one."""

    def __init__(
        self,
        model: nn.Module,
        fisher_shapes: str | Sequence[Any],
        shared_dim: str | Sequence[Any],
        kronecker_only: bool,
    ) -> None:
        self.model, self.kronecker_only = model, kronecker_only
        self.shapes = Rules(fisher_shapes, "fisher_shape")
        self.shapes.check_values(SHAPES)
        self.rules = shared_dim_rules(shared_dim)
        self.supported = [
            (name, module) for name, module in model.named_modules() if is_supported(module)
        ]
        self.rules.check_matches(self.supported)
        self.found = Selection()
        self._without_factors: list[str] = []

    def add(self, name: str, module: nn.Module) -> None:
        """Select a layer, or note why not. Raises a ValueError if the rules cannot be followed."""
        both = (getattr(module, "weight", None), getattr(module, "bias", None))
        if all(p is None for p in both):
            return  # a LayerNorm without affine parameters
        reason = _why_not(module)
        if reason is not None:
            self.found.skipped[name] = reason
            return
        values = self.shapes.for_layer(name, module)
        if not values:
            return
        if len(values) != 1:
            raise LayerError(name, f"is assigned several Fisher shapes: {values}")
        strategy, layout = self._strategy(name, module)
        shape = self._shape(name, module, values[0])
        if shape is None:
            return
        if shape == SHAPE_UNIT_WISE:
            self.found.unit_wise.add(module)
        self.found.layers.append(Layer(name, module, shape))
        self.found.strategy[module] = strategy
        if layout is not None:
            self.found.rule[module] = layout
        declared = declared_layout(self.model, name)
        if declared is not None:
            self.found.declared[module] = declared

    def _strategy(self, name: str, module: nn.Module) -> tuple[str, str | None]:
        """The layer's strategy, for which there is an operation, and its layout."""
        strategy, layout = strategy_and_layout(self.rules, name, module)
        if strategy is None:
            raise ValueError(
                f"shared_dim: no rule gives layer '{name}' a strategy. Add a default, as in "
                "['reduce', ...]."
            )
        needed = (EXPAND, REDUCE) if strategy == AUTO else (strategy,)
        missing = [which for which in needed if find_operation(module, which) is None]
        if missing:
            both = f", as '{AUTO}' may need it" if strategy == AUTO else ""
            raise LayerError(
                name,
                f"there is no operation for {type(module).__name__} under "
                f"shared_dim='{missing[0]}'{both}",
                "Register one with register_operation, or give it another rule, as in "
                f"('{name}', 'reduce').",
            )
        return strategy, layout

    def _shape(self, name: str, module: nn.Module, shape: str) -> str | None:
        """The shape that a layer of this type gets; ``None`` if it is skipped."""
        if isinstance(module, nn.Embedding) and shape in (*KRONECKER, SHAPE_UNIT_WISE):
            self.found.skipped[name] = (
                "the Kronecker factor of an embedding would have the vocabulary's size squared"
            )
            return None
        if isinstance(module, NORMALIZATIONS) and shape in KRONECKER:
            shape = SHAPE_UNIT_WISE
            if is_trainable(module):
                self._without_factors.append(f"'{name}' ({type(module).__name__})")
        if self.kronecker_only and shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON):
            self.found.skipped[name] = (
                f"fisher_forward_only is for Kronecker factors, not for the shape '{shape}'"
            )
            return None
        if isinstance(module, nn.Conv2d) and module.groups > 1 and shape in KRONECKER:
            raise LayerError(
                name,
                f"a convolution in {module.groups} groups has no single pair of Kronecker factors",
                f"Leave it to the first-order optimizer with ignore_modules=['{name}'], or give it "
                "the shape 'diag' or 'layer_wise'.",
            )
        return shape

    def report_without_factors(self) -> None:
        """Warn of normalization layers that were to have Kronecker factors."""
        if self._without_factors:
            first, *others = self._without_factors
            as_others = f" (as {len(others)} other layers)" if others else ""
            warn(
                f"Layer {first}{as_others} has no Kronecker factors; it gets the shape "
                f"'{SHAPE_UNIT_WISE}'."
            )


# --------------------------------------------------------------------------------------------- ties


def _settle_ties(model: nn.Module, found: Selection) -> None:
    """One layer for each weight. Linear layers that share it are one layer that is called several
    times.
    """
    embedded = {
        weight_key(module): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    layers: list[Layer] = []
    by_weight: dict[Any, Layer] = {}
    for layer in found.layers:
        weight = weight_key(layer.module)
        first = by_weight.get(weight) if weight is not None else None
        if first is not None and type(first.module) is type(layer.module):
            _check_tie(first, layer, found)
            first.tied.append((layer.name, layer.module))
        elif first is not None:
            found.skipped[layer.name] = (
                f"its weight is tied to '{first.name}', which is of another type"
            )
        elif weight in embedded and not isinstance(layer.module, nn.Embedding):
            found.skipped[layer.name] = f"its weight is tied to the embedding '{embedded[weight]}'"
        else:
            layers.append(layer)
            if weight is not None:
                by_weight[weight] = layer
    found.layers = layers


def _check_tie(first: Layer, layer: Layer, found: Selection) -> None:
    """Raise a LayerError if two layers of one weight are not to be treated the same."""

    def wanted(layer: Layer) -> tuple[str, str, str | None]:
        return layer.shape, found.strategy[layer.module], found.rule.get(layer.module)

    if wanted(first) != wanted(layer):
        raise LayerError(
            (layer.name, first.name),
            "have one weight, but their rules are not the same: "
            f"{wanted(layer)} and {wanted(first)}",
        )
    bias, other = (getattr(one.module, "bias", None) for one in (first, layer))
    if layer.shape not in KRONECKER and bias is not other:
        raise LayerError(
            (layer.name, first.name),
            f"have one weight, but not one bias; the shape '{layer.shape}' would take their biases "
            "for one",
            f"Give them the shape '{SHAPE_KRON}', or leave them to the first-order optimizer with "
            f"ignore_modules=['{first.name}', '{layer.name}'].",
        )


# -------------------------------------------------------------------------------- what is left out


def _why_not(module: nn.Module) -> str | None:
    """Why a layer of a supported type has no curvature of its own."""
    reason = getattr(module, SKIP_REASON, None)
    if reason is None and not isinstance(module, LinearBlock):
        for name in ("weight", "bias"):
            p = getattr(module, name, None)
            if p is not None and not isinstance(p, nn.Parameter):
                return f"its {name} is computed from other parameters (a parametrization)"
    return reason


def _report_unmatched(model: nn.Module, ignore_modules: Sequence[Any]) -> None:
    """Warn of keys in ``ignore_modules`` that stand for nothing."""
    unmatched = [
        key
        for key in ignore_modules
        if not isinstance(key, type)
        and not any(matches_any(name, module, [key]) for name, module in model.named_modules())
    ]
    if unmatched:
        warn(
            f"ignore_modules: {', '.join(describe_key(key) for key in unmatched)} matches no "
            "module of the model.",
        )


def _unsupported(model: nn.Module, ignore_modules: Sequence[Any]) -> dict[str, str]:
    """Why modules with parameters of their own that are no layers are left out, by name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_supported(module) or has_blocks(module) or matches_any(name, module, ignore_modules):
            continue
        # A converted GCNConv lends its bias to its layer.
        lent = {id(p) for child in module.children() for p in lent_to(child)}
        own = [
            key
            for key, p in module.named_parameters(recurse=False)
            if p.requires_grad and id(p) not in lent
        ]
        if isinstance(module, nn.MultiheadAttention):
            found[name] = "its projections are not layers; convert(model) makes them layers"
        elif any(qualified_name(cls) == PYG_LINEAR for cls in type(module).__mro__) and own:
            found[name or "(the model)"] = (
                "it is PyG's own Linear; convert(model) makes it a layer that is seen"
            )
        elif own:
            found[name or "(the model)"] = (
                f"{type(module).__name__} has parameters without an operation: {', '.join(own)}"
            )
    return found
