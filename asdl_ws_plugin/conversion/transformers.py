"""The converters this package comes with: attention, fused projections, transposed weights,
functional calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..weight_sharing._warn import warn
from ..weight_sharing.blocks import BlocksForward, LinearBlock
from ..weight_sharing.names import SKIP_REASON
from ..weight_sharing.rules import matches_any
from ..weight_sharing.torch_private import own_parameters
from . import graph_networks
from .attention import PROJECTIONS, MultiheadAttention, TransformerEncoder
from .convert import Converter, Site, register_converter
from .routing import LinearForward, RoutedForward

__all__ = ["register_all"]

FUSED_NAMES = ("qkv", "c_attn", "Wqkv", "to_qkv")
_LOOKS_FUSED = re.compile("qkv|query_key_value|c_attn|w_pack", re.IGNORECASE)
# Attention whose fused layer has the outputs of the first head first: its queries, keys and values,
# then the second's.
_BY_HEADS = {
    "timm.models.efficientformer.Attention",
    "timm.models.tiny_vit.Attention",
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention",
    "transformers.models.bloom.modeling_bloom.BloomAttention",
    "transformers.models.falcon.modeling_falcon.FalconAttention",
    "transformers.models.persimmon.modeling_persimmon.PersimmonAttention",
    "transformers.models.codegen.modeling_codegen.CodeGenAttention",
}
_CONV1D = "transformers.pytorch_utils.Conv1D"


class AttentionConverter(Converter):
    """``nn.MultiheadAttention`` becomes :class:`~asdl_ws_plugin.MultiheadAttention`."""

    takes_parameters = True

    def wants(self, site: Site) -> bool:
        module = site.module
        if self.is_result(module):
            return False
        if (
            type(module) is not nn.MultiheadAttention
            and type(module).forward is not nn.MultiheadAttention.forward
        ):
            raise site.refuse(
                "it is a subclass of nn.MultiheadAttention with a forward of its own, whose "
                "projections cannot be made layers without knowing it."
            )
        if type(module) is not nn.MultiheadAttention:
            raise site.refuse("it is a subclass of nn.MultiheadAttention, or has parametrizations.")
        return True

    def is_result(self, module: nn.Module) -> bool:
        return type(module) is MultiheadAttention

    def convert(self, site: Site) -> None:
        module: Any = site.module
        module.__class__ = MultiheadAttention
        module.add_blocks()

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
    """A layer's own weight is cut into blocks, which become its children and are called by its
    ``forward``.
    """

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
        # Where the module around it hands over a bias, this forward takes it as well as the one it
        # replaces.
        module.__dict__["forward"] = BlocksForward(module, names, self.transposed)

    def revert(self, module: nn.Module) -> None:
        forward: Any = module.__dict__.pop("forward")
        for name in forward.names:
            delattr(module, name)

    def made(self, module: nn.Module) -> list[nn.Module]:
        return [getattr(module, name) for name in module.__dict__["forward"].names]


def _is_conv1d(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" == _CONV1D for cls in type(module).__mro__)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of inputs and outputs of a layer that may be cut into blocks."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(weight.shape) if _is_conv1d(module) else None


def _takes(parent: nn.Module | None, inputs: int) -> bool:
    """Whether one of a module's layers, as the projection of an attention's output, has that many
    inputs.
    """
    layers = (
        []
        if parent is None
        else [sizes for module in parent.modules() if (sizes := _sizes(module)) is not None]
    )
    return any(sizes[0] == inputs for sizes in layers)


def _why_whole(site: Site, sizes: tuple[int, int], explicit: bool) -> str | None:
    """Why a layer's outputs are not query, key and value one after the other, as far as one can
    tell.
    """
    inputs, outputs = sizes
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(site.parent).__mro__}
    if getattr(site.parent, "num_key_value_groups", 1) != 1:
        return "its keys and values have fewer heads than its queries"
    if getattr(site.parent, "head_first", False) or classes & _BY_HEADS:
        return "its outputs are ordered by heads, not query, key, value"
    if outputs % 3:
        return f"its {outputs} outputs cannot be three blocks of one size"
    # Not so where keys and values have fewer heads, or where there is no query.
    if not explicit and outputs % (3 * inputs) and not _takes(site.parent, outputs // 3):
        return (
            f"its {outputs} outputs of {inputs} inputs may be blocks of other sizes than one third"
        )
    if not explicit and site.attribute not in FUSED_NAMES:
        return f"'{site.attribute}' does not say how its outputs are ordered"
    return None


def _is_split(site: Site, sizes: tuple[int, int]) -> bool:
    """Whether ``split_qkv`` is for this layer, and can be done."""
    split = site.options.get("split_qkv", False)
    explicit = isinstance(split, Sequence) and matches_any(site.name, site.module, split)
    if not explicit and not (split is True and site.attribute in FUSED_NAMES):
        return False
    reason = _why_whole(site, sizes, explicit)
    if reason is not None and explicit:
        raise site.refuse(f"split_qkv: {reason}.")
    return reason is None


def _warn_of_whole_layers(sites: Sequence[Site]) -> None:
    """Say which layers ``split_qkv=True`` leaves whole though they look as if they were fused, or
    that none does.
    """
    whole: dict[str, list[str]] = {}
    split = False
    for site in sites:
        sizes = _sizes(site.module)
        if isinstance(site.module, (LinearBlock, nn.MultiheadAttention)):
            split = True
        elif sizes is not None and _LOOKS_FUSED.search(site.attribute):
            cross = (
                _is_conv1d(site.module) and sizes[1] == 2 * sizes[0]
            )  # GPT-2's keys and values: two blocks
            reason = None if cross else _why_whole(site, sizes, explicit=False)
            split = split or reason is None
            if reason is not None:
                whole.setdefault(reason, []).append(f"'{site.name}'")
    parts = [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
        for reason, names in whole.items()
    ]
    if parts:
        warn(
            f"split_qkv: left as one layer are {'; '.join(parts)}. If the outputs of one are "
            "query, key and value one after the other, name it, as in "
            f"split_qkv=[{whole[next(iter(whole))][0]}].",
        )
    elif not split:
        warn(
            "split_qkv: nothing was split. No linear layer is called "
            f"{', '.join(FUSED_NAMES[:-1])} or {FUSED_NAMES[-1]}; name those that are fused, as "
            "in split_qkv=['attention.project'].",
        )


class LinearConverter(_BlocksConverter):
    """A fused query-key-value ``nn.Linear`` is cut in three where ``split_qkv`` says so."""

    def check(self, sites: Sequence[Site]) -> None:
        if sites and sites[0].options.get("split_qkv") is True:
            _warn_of_whole_layers(sites)

    def names(self, site: Site) -> tuple[str, ...]:
        module: Any = site.module
        if isinstance(module, LinearBlock) or not _is_split(
            site, (module.in_features, module.out_features)
        ):
            return ()
        if (
            type(module).forward is not nn.Linear.forward
            and type(module).__module__ != "timm.layers.linear"
        ):
            raise site.refuse("split_qkv: it is a subclass of nn.Linear with a forward of its own.")
        return ("q", "k", "v")


class Conv1DConverter(_BlocksConverter):
    """Hugging Face's ``Conv1D``, whose weight is ``(in_features, out_features)``, gets a Linear of
    the transpose.
    """

    transposed = True

    def names(self, site: Site) -> tuple[str, ...]:
        module: Any = site.module
        inputs, outputs = module.weight.shape
        split = site.options.get("split_qkv", False)
        if (
            split is True and site.attribute in FUSED_NAMES and outputs == 2 * inputs
        ):  # cross-attention
            return ("k", "v")
        return ("q", "k", "v") if _is_split(site, (inputs, outputs)) else ("linear",)


class RoutedConverter(Converter):
    """Attention modules that compute ``F.linear(x, self.layer.weight, ...)``: see
    :mod:`~asdl_ws_plugin.routing`.
    """

    def __init__(self, layers: tuple[str, ...], without_batch: tuple[str, ...] = ()) -> None:
        self.layers, self.without_batch = layers, without_batch

    def _layers(self, module: nn.Module) -> list[Any]:
        layers = [getattr(module, name, None) for name in self.layers]
        return [layer for layer in layers if isinstance(layer, nn.Linear)]

    def wants(self, site: Site) -> bool:
        if (
            type(site.module).__module__.startswith("timm.")
            and getattr(site.module, "q_bias", None) is None
        ):
            return bool(self.without_batch)  # calls its layer
        for layer in self._layers(site.module):
            is_plain = type(layer).forward is nn.Linear.forward
            if not is_plain or "weight" not in own_parameters(layer):
                raise site.refuse(
                    f"it uses the weight of its layer, a {type(layer).__name__}, without calling "
                    "it."
                )
            if "forward" in layer.__dict__ and not isinstance(
                layer.forward, (LinearForward, BlocksForward)
            ):
                raise site.refuse(
                    "the forward of its layer was replaced, by you or another library."
                )
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
    """Modules that compute position biases with a small network: its input is a table, the same for
    every example.
    """

    def __init__(self, without_batch: tuple[str, ...]) -> None:
        self.without_batch = without_batch

    def convert(self, site: Site) -> None:
        _mark_without_batch(site.module, self.without_batch)

    def revert(self, module: nn.Module) -> None:
        _unmark(module, self.without_batch)


def _without_batch(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [
        m
        for name in names
        if (child := getattr(module, name, None)) is not None
        for m in child.modules()
    ]


def _mark_without_batch(module: nn.Module, names: tuple[str, ...]) -> None:
    for m in _without_batch(module, names):
        m.__dict__[SKIP_REASON] = (
            "its input is the same for every example, so there are no examples to average over"
        )


def _unmark(module: nn.Module, names: tuple[str, ...]) -> None:
    for m in _without_batch(module, names):
        m.__dict__.pop(SKIP_REASON, None)


def register_all() -> None:
    """Register the converters of this module."""
    register_converter(nn.MultiheadAttention, AttentionConverter())
    register_converter(nn.TransformerEncoder, EncoderConverter())
    register_converter(nn.Linear, LinearConverter())
    register_converter(_CONV1D, Conv1DConverter())
    swin = "torchvision.models.swin_transformer"
    register_converter(f"{swin}.ShiftedWindowAttention", RoutedConverter(("qkv", "proj")))
    register_converter(
        f"{swin}.ShiftedWindowAttentionV2", RoutedConverter(("qkv", "proj"), ("cpb_mlp",))
    )
    register_converter(
        "timm.models.swin_transformer_v2.WindowAttention", RoutedConverter(("qkv",), ("cpb_mlp",))
    )
    for name in ("timm.models.beit.Attention", "timm.models.eva.EvaAttention"):
        register_converter(name, RoutedConverter(("qkv",)))
    register_converter("timm.layers.pos_embed_rel.RelPosMlp", PositionBiasConverter(("mlp",)))
    graph_networks.register_all()
