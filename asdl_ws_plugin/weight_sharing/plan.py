"""What will be done with which layer of a model: shapes, strategies, layouts, tied weights, and
what is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
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
from torch.autograd.graph import GradientEdge

from ._warn import warn
from .blocks import LinearBlock, has_blocks, is_trainable, weight_key
from .capture import Layer, batch_norm_edge, first_tensor
from .layout import LayoutBook, declared_layout
from .operations import EXPAND, REDUCE
from .registry import find_operation, is_supported
from .rules import AUTO, Rules, describe_key, matches_any, shared_dim_rules, strategy_and_layout

__all__ = ["Plan"]

logger = logging.getLogger(__name__.partition(".")[0])

# Of this package in both of its homes: as a part of a patched ASDL, it serves the rest of the
# plugin as well.
OURS = (f"{__package__}.", "asdl_ws_plugin.")

SHAPES = (
    SHAPE_FULL,
    SHAPE_LAYER_WISE,
    SHAPE_KRON,
    SHAPE_SWIFT_KRON,
    SHAPE_KFE,
    SHAPE_UNIT_WISE,
    SHAPE_DIAG,
)
_PYG_LINEAR = "torch_geometric.nn.dense.linear.Linear"
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
        on_refusal: called with the name, the module and the error for a layer that cannot be
            handled, instead of raising it; the layer is left out.

    Attributes:
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
        self._kronecker_only = kronecker_only
        self.setting: str | None = None
        self.layouts = LayoutBook()
        self.skipped: dict[str, str] = {}
        self.unsupported: dict[str, str] = {}
        self._strategy: dict[nn.Module, str] = {}
        self._candidates: list[Layer] = []
        self._known_blocks = {
            module for module in model.modules() if isinstance(module, LinearBlock)
        }
        self._by_weight: dict[Any, Layer] = {}
        self._checked: set[nn.Module] = set()
        self._channels_first: dict[nn.Module, bool] = {}
        self._without_factors: list[str] = []
        self._unit_wise: set[nn.Module] = (
            set()
        )  # layers with a block for every unit, while there is more than a number

        shapes = Rules(fisher_shapes, "fisher_shape")
        shapes.check_values(SHAPES)
        rules = shared_dim_rules(shared_dim)
        supported = [
            (name, module) for name, module in model.named_modules() if is_supported(module)
        ]
        rules.check_matches(supported)
        for name, module in supported:
            if matches_any(name, module, ignore_modules or ()):
                continue
            try:
                self._add(name, module, shapes, rules)
            except ValueError as error:
                if on_refusal is None:
                    raise
                on_refusal(name, module, error)
        if self._without_factors:
            first, *others = self._without_factors
            as_others = f" (as {len(others)} other layers)" if others else ""
            warn(
                f"Layer {first}{as_others} has no Kronecker factors; it gets the shape "
                f"'{SHAPE_UNIT_WISE}'."
            )
        self._settle_ties()
        self._log_skipped()
        self._note_unsupported(ignore_modules or ())
        self.layouts.is_graph = any(
            cls.__name__ == "MessagePassing"
            for module in model.modules()
            for cls in type(module).__mro__
        )

    def _note_unsupported(self, ignore_modules: Sequence[Any]) -> None:
        """Say of modules with parameters of their own why they are left out."""
        unmatched = [
            key
            for key in ignore_modules
            if not isinstance(key, type)
            and not any(
                matches_any(name, module, [key]) for name, module in self.model.named_modules()
            )
        ]
        if unmatched:
            warn(
                f"ignore_modules: {', '.join(describe_key(key) for key in unmatched)} matches no "
                "module of the model.",
            )
        for name, module in self.model.named_modules():
            if (
                is_supported(module)
                or has_blocks(module)
                or matches_any(name, module, ignore_modules)
            ):
                continue
            if isinstance(module, nn.MultiheadAttention):
                self.unsupported[name] = (
                    "its projections are not layers; convert(model) makes them layers"
                )
            elif own := [
                key for key, p in module.named_parameters(recurse=False) if p.requires_grad
            ]:
                reason = (
                    f"{type(module).__name__} has parameters without an operation: {', '.join(own)}"
                )
                if any(
                    f"{cls.__module__}.{cls.__name__}" == _PYG_LINEAR
                    for cls in type(module).__mro__
                ):
                    reason = "it is PyG's own Linear; convert(model) makes it a layer that is seen"
                self.unsupported[name or "(the model)"] = reason

    def is_in_attention(self, name: str) -> bool:
        """Whether a layer belongs to an ``nn.MultiheadAttention`` that was not converted."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(parent, nn.MultiheadAttention) and not has_blocks(parent)

    def check_still_complete(self) -> None:
        """Raise a RuntimeError if the model got layers by a conversion after the plan was made."""
        for name, module in self.model.named_modules():
            if isinstance(module, LinearBlock) and module not in self._known_blocks:
                raise RuntimeError(
                    f"Layer '{name}' was made by a conversion after the gradient maker was "
                    "created. Call convert(model) first, then create the gradient maker."
                )

    def _add(self, name: str, module: nn.Module, shapes: Rules, rules: Rules) -> None:
        if not any(
            p is not None for p in (getattr(module, "weight", None), getattr(module, "bias", None))
        ):
            return  # a LayerNorm without affine parameters
        reason = _why_not(module)
        if reason is not None:
            self.skipped[name] = reason
            return
        shape_values = shapes.for_layer(name, module)
        if not shape_values:
            return
        if len(shape_values) != 1:
            raise ValueError(f"Layer '{name}' is assigned several Fisher shapes: {shape_values}.")
        strategy, layout = strategy_and_layout(rules, name, module)
        if strategy is None:
            raise ValueError(
                f"shared_dim: no rule gives layer '{name}' a strategy. Add a default, as in "
                "['reduce', ...]."
            )
        needed = (EXPAND, REDUCE) if strategy == AUTO else (strategy,)
        missing = [which for which in needed if find_operation(module, which) is None]
        if missing:
            both = f", as '{AUTO}' may need it" if strategy == AUTO else ""
            raise ValueError(
                f"Layer '{name}': there is no operation for {type(module).__name__} under "
                f"shared_dim='{missing[0]}'{both}. Register one with register_operation, or give "
                f"it another rule, as in ('{name}', 'reduce')."
            )
        shape = shape_values[0]
        if isinstance(module, nn.Embedding) and shape in (*_KRONECKER, SHAPE_UNIT_WISE):
            self.skipped[name] = (
                "the Kronecker factor of an embedding would have the vocabulary's size squared"
            )
            return
        if isinstance(module, _NORMALIZATIONS) and shape in _KRONECKER:
            shape = SHAPE_UNIT_WISE
            if is_trainable(module):
                self._without_factors.append(f"'{name}' ({type(module).__name__})")
        if self._kronecker_only and shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON):
            self.skipped[name] = (
                f"fisher_forward_only is for Kronecker factors, not for the shape '{shape}'"
            )
            return
        if isinstance(module, nn.Conv2d) and module.groups > 1 and shape in _KRONECKER:
            raise ValueError(
                f"Layer '{name}': a convolution in {module.groups} groups has no single pair of "
                "Kronecker factors. Leave it to the first-order optimizer with "
                f"ignore_modules=['{name}'], or give it the shape 'diag' or 'layer_wise'."
            )
        if shape == SHAPE_UNIT_WISE:
            self._unit_wise.add(module)
        self._candidates.append(Layer(name, module, shape))
        self._strategy[module] = strategy
        if layout is not None:
            self.layouts.rule[module] = layout
        declared = declared_layout(self.model, name)
        if declared is not None:
            self.layouts.declared[module] = declared

    def _settle_ties(self) -> None:
        """One layer for each weight. Linear layers that share it are one layer that is called
        several times.
        """
        embedded = {
            weight_key(module): name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding)
        }
        layers: list[Layer] = []
        for layer in self._candidates:
            weight = weight_key(layer.module)
            first = self._by_weight.get(weight) if weight is not None else None
            if first is not None and type(first.module) is type(layer.module):
                if self._wanted(first) != self._wanted(layer):
                    raise ValueError(
                        f"Layer '{layer.name}' and '{first.name}' have one weight, but their rules "
                        f"are not the same: {self._wanted(layer)} and {self._wanted(first)}."
                    )
                if layer.shape not in _KRONECKER and _bias(first.module) is not _bias(layer.module):
                    raise ValueError(
                        f"Layer '{layer.name}' and '{first.name}' have one weight, but not one "
                        f"bias; the shape '{layer.shape}' would take their biases for one. Give "
                        f"them the shape '{SHAPE_KRON}', or leave them to the first-order "
                        f"optimizer with ignore_modules=['{first.name}', '{layer.name}']."
                    )
                first.tied.append((layer.name, layer.module))
            elif first is not None:
                self.skipped[layer.name] = (
                    f"its weight is tied to '{first.name}', which is of another type"
                )
            elif (
                weight is not None
                and weight in embedded
                and not isinstance(layer.module, nn.Embedding)
            ):
                self.skipped[layer.name] = (
                    f"its weight is tied to the embedding '{embedded[weight]}'"
                )
            else:
                layers.append(layer)
                if weight is not None:
                    self._by_weight[weight] = layer
        self._candidates = layers
        self._by_module = {layer.module: layer for layer in layers}

    def _wanted(self, layer: Layer) -> tuple[str, str, str | None]:
        return layer.shape, self._strategy[layer.module], self.layouts.rule.get(layer.module)

    def _log_skipped(self) -> None:
        names: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names.setdefault(reason, []).append(f"'{name}'")
        for reason, these in names.items():
            logger.info("left to the first-order optimizer: %s: %s", ", ".join(these), reason)

    def __repr__(self) -> str:
        layers, strategies = self.layers, dict[str, list[str]]()
        for layer in layers:
            strategy = self.strategy_of(layer) or "auto, not decided yet"
            strategies.setdefault(f"{strategy}, {layer.shape}", []).append(layer.name)
        lines = [f"{key}: {', '.join(names)}" for key, names in strategies.items()]
        frozen = [layer.name for layer in self._candidates if layer not in layers]
        lines += [f"frozen: {', '.join(frozen)}"] if frozen else []
        lines += [
            f"left out: {name}: {reason}"
            for name, reason in (self.skipped | self.unsupported).items()
        ]
        return "\n  ".join([f"Plan of {len(layers)} layers", *lines])

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._by_module

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a trainable parameter now; freezing and unfreezing is seen at
        once.
        """
        layers = [
            layer
            for layer in self._candidates
            if any(is_trainable(module) for module in layer.modules)
        ]
        for layer in layers:
            if layer.module in self._unit_wise:
                layer.shape = _unit_wise_or_diag(layer.module)
        return layers

    @property
    def all_layers(self) -> list[Layer]:
        """The layers, those that are frozen now included."""
        return list(self._candidates)

    def layers_of(self, shape: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.shape == shape]

    def layer_of(self, module: nn.Module) -> Layer:
        """The layer that a module is the first, or the only one, of."""
        return self._by_module[module]

    def strategy_of(self, layer: Layer) -> str | None:
        """The layer's strategy; ``None`` where ``'auto'`` has not decided yet."""
        strategy = self._strategy[layer.module]
        return self.setting if strategy == AUTO else strategy

    @property
    def is_auto(self) -> bool:
        return AUTO in self._strategy.values()

    def decide(self, num_terms: int, num_examples: int) -> None:
        """Settle ``'auto'``: a loss term for every position is the expand setting, one for every
        example reduce.
        """
        if self.setting is None and self.is_auto:
            self.setting = REDUCE if num_terms <= num_examples else EXPAND
            logger.info(
                "shared_dim='auto': the loss has %d terms for %d examples, the %s setting",
                num_terms,
                num_examples,
                self.setting,
            )

    def remember(self) -> Callable[[], None]:
        """A function that takes back what was decided and settled after now."""
        setting, restore_layouts = self.setting, self.layouts.remember()

        def restore() -> None:
            self.setting = setting
            restore_layouts()

        return restore

    def operation_of(self, layer: Layer) -> type[Operation]:
        strategy = self.strategy_of(layer)
        operation = find_operation(layer.module, strategy) if strategy is not None else None
        assert operation is not None, layer.name
        return operation

    def check_call(
        self, layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor
    ) -> GradientEdge | None:
        """Look at a call while its tensors are untouched: is a subclass's layer still what its base
        class is?

        Returns where the gradient of the layer's output arrives if it is not the module's output.
        """
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._check_weight(layer, module, in_data)
            return None
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return self._edge_of_batch_norm(layer, module, in_data, out)
        # which dimension does a LayerNorm subclass normalize?
        if not isinstance(module, nn.LayerNorm) or type(module).forward is nn.LayerNorm.forward:
            return None
        if module in self._channels_first:
            return None
        with torch.no_grad():
            for channels_first in (False, True):
                x = in_data.movedim(1, -1) if channels_first and in_data.ndim > 2 else in_data
                if x.shape[-len(module.normalized_shape) :] != tuple(module.normalized_shape):
                    continue
                y = F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
                y = y.movedim(-1, 1) if channels_first and in_data.ndim > 2 else y
                if torch.allclose(y.to(out.dtype), out, rtol=1e-2, atol=1e-3):
                    self._channels_first[module] = channels_first
                    return None
        raise ValueError(
            f"Layer '{layer.name}' ({type(module).__name__}) is a subclass of LayerNorm that "
            "computes something else. Leave it to the first-order optimizer with "
            f"ignore_modules=['{layer.name}']."
        )

    @staticmethod
    def _edge_of_batch_norm(
        layer: Layer, module: nn.Module, in_data: Tensor, out: Tensor
    ) -> GradientEdge | None:
        """Of a subclass that adds an activation, as timm's do: the output of the normalization."""
        if (
            type(module).forward is nn.modules.batchnorm._BatchNorm.forward
            and "forward" not in module.__dict__
        ):
            return None
        edge = batch_norm_edge(module, in_data, out)
        if edge is None:
            raise ValueError(
                f"Layer '{layer.name}' ({type(module).__name__}) is a subclass of BatchNorm that "
                "computes something else. Leave it to the first-order optimizer with "
                f"ignore_modules=['{layer.name}']."
            )
        return edge

    def _check_weight(self, layer: Layer, module: nn.Linear | nn.Conv2d, in_data: Tensor) -> None:
        """Whether the weight gradient of a subclass of a linear layer is that of such a layer of
        its input.
        """
        base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        forward = module.__dict__.get("forward") or type(module).forward
        known = forward is base.forward or (getattr(forward, "__module__", "") or "").startswith(
            OURS
        )
        if known or module in self._checked or not module.weight.requires_grad:
            return
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        devices = [in_data.device] if in_data.device.type != "cpu" else []
        found: Tensor | None = None
        expected: Tensor | None = None
        try:
            with (
                torch.enable_grad(),
                torch.random.fork_rng(devices, device_type=in_data.device.type),
            ):
                out = first_tensor(layer.name, module, "outputs", module.forward(in_data.detach()))
                cotangent = (
                    torch.arange(out.numel(), device=out.device).sin().view_as(out).to(out.dtype)
                )
                (found,) = torch.autograd.grad(out, module.weight, cotangent, allow_unused=True)
                expected = _weight_grad(module, in_data.detach(), cotangent)
        except TypeError:  # it wants more arguments
            pass
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        off = math.inf if found is None or expected is None else float((found - expected).norm())
        if expected is not None and off <= 1e-2 * float(expected.norm()):
            self._checked.add(module)
            return
        raise ValueError(
            f"Layer '{layer.name}' ({type(module).__name__}) is a subclass of {base.__name__} that "
            "computes something else with its weight. Leave it to the first-order optimizer with "
            f"ignore_modules=['{layer.name}']."
        )

    def has_channels_first(self, module: nn.Module) -> bool:
        """Whether the layer's features are dimension 1 of its input."""
        if isinstance(module, (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
            return True
        return self._channels_first.get(module, False)


def _weight_grad(
    module: nn.Linear | nn.Conv2d, in_data: Tensor, cotangent: Tensor
) -> Tensor | None:
    """What the gradient of a plain layer's weight would be; ``None`` if its output would have other
    sizes.
    """
    if isinstance(module, nn.Linear):
        weight = module.weight
        return cotangent.flatten(0, -2).mT.to(weight.dtype) @ in_data.flatten(0, -2).to(
            weight.dtype
        )
    out = nn.Conv2d.forward(module, in_data)
    if out.shape != cotangent.shape:  # padded by itself, as TensorFlow's "same" is
        return None
    (grad,) = torch.autograd.grad(out, module.weight, cotangent.to(out.dtype))
    return grad


def _unit_wise_or_diag(module: nn.Module) -> str:
    """A unit with one trainable parameter has a number for a block: the diagonal, which upstream
    can compute.
    """
    weight, bias = (
        p is not None and p.requires_grad for p in (module.weight, getattr(module, "bias", None))
    )
    is_block = weight and (bias or not isinstance(module, _NORMALIZATIONS))
    return SHAPE_UNIT_WISE if is_block else SHAPE_DIAG


def _bias(module: nn.Module) -> nn.Parameter | None:
    return getattr(module, "bias", None)


def _why_not(module: nn.Module) -> str | None:
    """Why a layer of a supported type has no curvature of its own."""
    reason = getattr(module, "_asdl_ws_skip", None)  # what convert knows of it
    if reason is None and not isinstance(module, LinearBlock):
        for name in ("weight", "bias"):
            p = getattr(module, name, None)
            if p is not None and not isinstance(p, nn.Parameter):
                return f"its {name} is computed from other parameters (a parametrization)"
    return reason
