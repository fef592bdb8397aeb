"""Converters for graph neural networks: roles of layers, and PyTorch Geometric's own layers.

PyTorch Geometric is not imported until one of its modules is converted, copied or unpickled.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..weight_sharing.names import PYG_LINEAR, qualified_name
from ..weight_sharing.positions import WeightSharingLinear
from ..weight_sharing.registry import is_supported
from ..weight_sharing.rules import Rules
from .convert import Converter, Site, register_converter

__all__ = ["register_all"]

_BEFORE = "_asdl_ws_before"
_PYG_GCN = "torch_geometric.nn.conv.gcn_conv.GCNConv"


def _role_for(site: Site) -> str | None:
    """What the option ``roles`` says of a module; ``None`` if it says nothing."""
    roles = site.options.get("roles")
    if roles is None:
        return None
    values = Rules(roles, "roles").for_layer(site.name, site.module)
    if len(values) > 1:
        raise ValueError(
            f"roles: module '{site.name}' is given several: {', '.join(map(repr, values))}."
        )
    return values[0] if values else None


class LayerConverter(Converter):
    """Gives a layer the role of its rows; an ``nn.Linear`` becomes
    :class:`~asdl_ws_plugin.WeightSharingLinear`.
    """

    options = ("roles",)

    def check(self, sites: Sequence[Site]) -> None:
        roles = sites[0].options.get("roles") if sites else None
        if roles is not None:
            layers = [
                (site.name, site.module)
                for site in sites
                if is_supported(site.module) or qualified_name(type(site.module)) == PYG_LINEAR
            ]
            Rules(roles, "roles").check_matches(layers)

    def wants(self, site: Site) -> bool:
        return is_supported(site.module) and _role_for(site) is not None

    def class_for(self, module: nn.Module) -> type[nn.Module]:
        """The class that the module gets."""
        return WeightSharingLinear if type(module) is nn.Linear else type(module)

    def convert(self, site: Site) -> None:
        module: Any = site.module
        attributes = module.__dict__
        attributes[_BEFORE] = {"class": type(module)}
        if "role" in attributes:
            attributes[_BEFORE]["role"] = attributes["role"]
        module.__class__ = self.class_for(module)
        self.again(site)

    def again(self, site: Site) -> None:
        """Also of a layer that was converted before."""
        role = _role_for(site)
        if role is not None:
            site.module.__dict__["role"] = role

    def revert(self, module: nn.Module) -> None:
        before = module.__dict__.pop(_BEFORE)
        module.__dict__.pop("role", None)
        module.__class__ = before["class"]
        if "role" in before:
            module.__dict__["role"] = before["role"]


class PygLinearConverter(LayerConverter):
    """``torch_geometric.nn.Linear``, which is no ``nn.Linear``, becomes one that is both."""

    def wants(self, site: Site) -> bool:
        module: Any = site.module
        if qualified_name(type(module)) != PYG_LINEAR:
            return False
        if isinstance(module.weight, UninitializedParameter):
            raise site.refuse(
                "it is lazy and was not initialised yet. Call the model once, then convert it."
            )
        return True

    def class_for(self, module: nn.Module) -> type[nn.Module]:
        return _pyg_classes()["PygLinear"]


class GCNConverter(Converter):
    """``GCNConv`` multiplies ``Ĉ (X Wᵀ)``; converted it multiplies ``(Ĉ X) Wᵀ``, so that its Linear
    sees ã of eq. 3.30.

    The Linear also adds the bias, and is preconditioned with it.
    """

    def wants(self, site: Site) -> bool:
        module: Any = site.module
        if qualified_name(type(module)) != _PYG_GCN:
            return False
        if module.aggr not in ("add", "sum", "mean"):
            raise site.refuse(
                f"its aggregation, {module.aggr!r}, does not commute with its weight."
            )
        if getattr(module, "decomposed_layers", 1) > 1:
            raise site.refuse("it decomposes its features into several layers.")
        if qualified_name(type(module.lin)) != PYG_LINEAR and not isinstance(module.lin, nn.Linear):
            raise site.refuse(f"its weight is in a {type(module.lin).__name__}.")
        return True

    def convert(self, site: Site) -> None:
        module: Any = site.module
        module.__class__ = _pyg_classes()["AggregateFirstGCNConv"]
        if (
            module.bias is not None
        ):  # an attribute, not a Parameter of its own: names and state_dict stay
            module.lin.__dict__["bias"] = module.bias

    def revert(self, module: nn.Module) -> None:
        lin: Any = module.lin
        lin.__dict__.pop("bias", None)
        module.__class__ = _pyg_classes()["GCNConv"]


@functools.cache
def _pyg_classes() -> dict[str, type[nn.Module]]:
    """The classes that need PyTorch Geometric. Attributes of this module, as unpickling wants
    them.
    """
    from torch_geometric.nn import GCNConv

    classes = {"PygLinear": _pyg_linear(), "AggregateFirstGCNConv": _aggregate_first_gcn_conv()}
    for name, cls in classes.items():
        cls.__module__, cls.__qualname__ = __name__, name
        setattr(sys.modules[__name__], name, cls)
    return {**classes, "GCNConv": GCNConv}


def _pyg_linear() -> type[nn.Module]:
    from torch_geometric.nn import Linear as Plain

    class PygLinear(Plain, WeightSharingLinear):
        """``torch_geometric.nn.Linear`` that is a :class:`~asdl_ws_plugin.WeightSharingLinear`."""

        @property
        def in_features(self) -> int:  # type: ignore[override]
            return self.weight.shape[1]

        @property
        def out_features(self) -> int:  # type: ignore[override]
            return self.weight.shape[0]

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            lent = self.__dict__.pop("bias", None)  # GCNConv's own, which saves it itself
            try:
                super()._save_to_state_dict(destination, prefix, keep_vars)
            finally:
                if lent is not None:
                    self.__dict__["bias"] = lent

    return PygLinear


def _aggregate_first_gcn_conv() -> type[nn.Module]:
    from torch_geometric.nn import GCNConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    class AggregateFirstGCNConv(GCNConv):
        """``GCNConv`` whose Linear sees aggregated rows, one for each node: ``φ(W x̃_n)`` of eq.
        2.8.
        """

        def forward(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None = None) -> Tensor:
            if isinstance(x, (tuple, list)):  # it is the one to refuse this
                return super().forward(x, edge_index, edge_weight)
            edge_index, edge_weight = self._normalized(x, edge_index, edge_weight)
            return self.lin(self.propagate(edge_index, x=x, edge_weight=edge_weight))

        def _normalized(
            self, x: Tensor, edge_index: Any, edge_weight: Tensor | None
        ) -> tuple[Any, Tensor | None]:
            """The edges, or the matrix, of ``Ĉ``; kept where the layer is ``cached``."""
            if not self.normalize:
                return edge_index, edge_weight
            is_matrix = not isinstance(edge_index, Tensor)  # torch_sparse's
            cache = "_cached_adj_t" if is_matrix else "_cached_edge_index"
            found = getattr(self, cache)
            if found is None:
                num_nodes = x.size(self.node_dim)
                found = gcn_norm(
                    edge_index,
                    edge_weight,
                    num_nodes,
                    self.improved,
                    self.add_self_loops,
                    self.flow,
                    x.dtype,
                )
                if self.cached:
                    setattr(self, cache, found)
            return (found, edge_weight) if is_matrix else found

    return AggregateFirstGCNConv


def __getattr__(name: str) -> Any:
    if name in ("PygLinear", "AggregateFirstGCNConv"):
        return _pyg_classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_all() -> None:
    """Register the converters of this module."""
    register_converter(nn.Module, LayerConverter())
    register_converter(nn.Linear, LayerConverter())
    register_converter(PYG_LINEAR, PygLinearConverter())
    register_converter(_PYG_GCN, GCNConverter())
