"""The converters this package comes with: attention, fused projections, transposed weights, functional calls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import gnn
from .attention import PROJECTIONS, MultiheadAttention, TransformerEncoder
from .blocks import BlocksForward, LinearBlock
from .convert import Converter, Site, register_converter
from .routing import LinearForward, RoutedForward
from .rules import matches_any

__all__ = ["register_all"]

logger = logging.getLogger("asdl_ws_plugin")

FUSED_NAMES = ("qkv", "c_attn", "Wqkv", "to_qkv")
SKIP_REASON = "_asdl_ws_skip"


class AttentionConverter(Converter):
    """``nn.MultiheadAttention`` becomes :class:`~asdl_ws_plugin.MultiheadAttention`."""

    takes_parameters = True

    def wants(self, site: Site) -> bool:
        module = site.module
        if self.is_result(module):
            return False
        if type(module) is not nn.MultiheadAttention and type(module).forward is not nn.MultiheadAttention.forward:
            raise site.refuse(
                "it is a subclass of nn.MultiheadAttention with a forward of its own, whose projections cannot be "
                "made layers without knowing it."
            )
        if type(module) is not nn.MultiheadAttention:
            raise site.refuse("it is a subclass of nn.MultiheadAttention, or has parametrizations.")
        return True

    def is_result(self, module: nn.Module) -> bool:
        return type(module) is MultiheadAttention

    def convert(self, site: Site) -> None:
        module: Any = site.module
        module.__class__ = MultiheadAttention
        module._add_blocks()

    def revert(self, module: nn.Module) -> None:
        for name in PROJECTIONS:
            delattr(module, name)
        module.__class__ = nn.MultiheadAttention

    def made(self, module: nn.Module) -> list[nn.Module]:
        return [getattr(module, name) for name in PROJECTIONS]


class EncoderConverter(Converter):
    """``nn.TransformerEncoder`` looks for hooks before it packs its input into a nested tensor."""

    def wants(self, site: Site) -> bool:
        return type(site.module) is nn.TransformerEncoder

    def convert(self, site: Site) -> None:
        site.module.__class__ = TransformerEncoder

    def revert(self, module: nn.Module) -> None:
        module.__class__ = nn.TransformerEncoder


class _BlocksConverter(Converter):
    """A layer's own weight is cut into blocks, which become its children and are called by its ``forward``."""

    options = ("split_qkv",)
    takes_parameters = True
    transposed = False

    def names(self, site: Site) -> tuple[str, ...]:
        """The blocks' names; none if the layer is to stay as it is."""
        raise NotImplementedError

    def wants(self, site: Site) -> bool:
        return bool(self.names(site))

    def convert(self, site: Site) -> None:
        module, names = site.module, self.names(site)
        for i, name in enumerate(names):
            block = LinearBlock(module, "weight", "bias", i, len(names), transposed=self.transposed)
            block.train(module.training)
            module.add_module(name, block)
        # Where the module around it hands over a bias, this forward takes it as well as the one it replaces.
        module.__dict__["forward"] = BlocksForward(module, names, self.transposed)

    def revert(self, module: nn.Module) -> None:
        forward: Any = module.__dict__.pop("forward")
        for name in forward.names:
            delattr(module, name)

    def made(self, module: nn.Module) -> list[nn.Module]:
        return [getattr(module, name) for name in module.__dict__["forward"].names]


def _is_split(site: Site, num_outputs: int) -> bool:
    """Whether ``split_qkv`` is for this layer, and can be done."""
    split = site.options.get("split_qkv", False)
    explicit = isinstance(split, Sequence) and matches_any(site.name, site.module, split)
    if not explicit and not (split is True and site.attribute in FUSED_NAMES):
        return False
    reason = None
    if getattr(site.parent, "head_first", False):
        reason = "its outputs are ordered by heads, not query, key, value"
    elif num_outputs % 3:
        reason = f"its {num_outputs} outputs cannot be three blocks of one size"
    if reason is not None and explicit:
        raise site.refuse(f"split_qkv: {reason}.")
    if reason is not None:
        logger.info("split_qkv: layer '%s' stays one layer: %s", site.name, reason)
    return reason is None


class LinearConverter(_BlocksConverter):
    """A fused query-key-value ``nn.Linear`` is cut in three where ``split_qkv`` says so."""

    def names(self, site: Site) -> tuple[str, ...]:
        module: Any = site.module
        if isinstance(module, LinearBlock) or not _is_split(site, module.out_features):
            return ()
        if type(module).forward is not nn.Linear.forward and type(module).__module__ != "timm.layers.linear":
            raise site.refuse("split_qkv: it is a subclass of nn.Linear with a forward of its own.")
        return ("q", "k", "v")


class Conv1DConverter(_BlocksConverter):
    """Hugging Face's ``Conv1D``, whose weight is ``(in_features, out_features)``, gets a Linear of the transpose."""

    transposed = True

    def names(self, site: Site) -> tuple[str, ...]:
        module: Any = site.module
        inputs, outputs = module.weight.shape
        split = site.options.get("split_qkv", False)
        if split is True and site.attribute in FUSED_NAMES and outputs == 2 * inputs:  # cross-attention
            return ("k", "v")
        return ("q", "k", "v") if _is_split(site, outputs) else ("linear",)


class RoutedConverter(Converter):
    """Attention modules that compute ``F.linear(x, self.layer.weight, ...)``: see :mod:`~asdl_ws_plugin.routing`."""

    def __init__(self, layers: tuple[str, ...], without_batch: tuple[str, ...] = ()) -> None:
        self.layers, self.without_batch = layers, without_batch

    def _layers(self, module: nn.Module) -> list[Any]:
        layers = [getattr(module, name, None) for name in self.layers]
        return [layer for layer in layers if isinstance(layer, nn.Linear)]

    def wants(self, site: Site) -> bool:
        if type(site.module).__module__.startswith("timm.") and getattr(site.module, "q_bias", None) is None:
            return bool(self.without_batch)  # calls its layer
        for layer in self._layers(site.module):
            if type(layer).forward is not nn.Linear.forward or "weight" not in layer._parameters:
                raise site.refuse(f"it uses the weight of its layer, a {type(layer).__name__}, without calling it.")
            if "forward" in layer.__dict__ and not isinstance(layer.forward, (LinearForward, BlocksForward)):
                raise site.refuse("the forward of its layer was replaced, by you or another library.")
        return True

    def convert(self, site: Site) -> None:
        module = site.module
        for layer in self._layers(module):
            layer.__dict__.setdefault("forward", LinearForward(layer))
        module.__dict__["forward"] = RoutedForward(module)
        _mark_without_batch(module, self.without_batch)

    def revert(self, module: nn.Module) -> None:
        del module.__dict__["forward"]
        for layer in self._layers(module):
            if isinstance(layer.__dict__.get("forward"), LinearForward):
                del layer.__dict__["forward"]
        _unmark(module, self.without_batch)


class PositionBiasConverter(Converter):
    """Modules that compute position biases with a small network: its input is a table, the same for every example."""

    def __init__(self, without_batch: tuple[str, ...]) -> None:
        self.without_batch = without_batch

    def convert(self, site: Site) -> None:
        _mark_without_batch(site.module, self.without_batch)

    def revert(self, module: nn.Module) -> None:
        _unmark(module, self.without_batch)


def _without_batch(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [m for name in names if (child := getattr(module, name, None)) is not None for m in child.modules()]


def _mark_without_batch(module: nn.Module, names: tuple[str, ...]) -> None:
    for m in _without_batch(module, names):
        m.__dict__[SKIP_REASON] = "its input is the same for every example, so there are no examples to average over"


def _unmark(module: nn.Module, names: tuple[str, ...]) -> None:
    for m in _without_batch(module, names):
        m.__dict__.pop(SKIP_REASON, None)


def register_all() -> None:
    """Register the converters of this module."""
    register_converter(nn.MultiheadAttention, AttentionConverter())
    register_converter(nn.TransformerEncoder, EncoderConverter())
    register_converter(nn.Linear, LinearConverter())
    register_converter("transformers.pytorch_utils.Conv1D", Conv1DConverter())
    swin = "torchvision.models.swin_transformer"
    register_converter(f"{swin}.ShiftedWindowAttention", RoutedConverter(("qkv", "proj")))
    register_converter(f"{swin}.ShiftedWindowAttentionV2", RoutedConverter(("qkv", "proj"), ("cpb_mlp",)))
    register_converter("timm.models.swin_transformer_v2.WindowAttention", RoutedConverter(("qkv",), ("cpb_mlp",)))
    for name in ("timm.models.beit.Attention", "timm.models.eva.EvaAttention"):
        register_converter(name, RoutedConverter(("qkv",)))
    register_converter("timm.layers.pos_embed_rel.RelPosMlp", PositionBiasConverter(("mlp",)))
    gnn.register_all()
