"""Why K-FAC does not see a module, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..conversion.convert import convertible
from ..weight_sharing.capture import Layer
from ..weight_sharing.errors import LayerFault
from ..weight_sharing.plan import Plan
from ..weight_sharing.torch_private import own_parameters
from .survey import Survey

__all__ = ["Reasons", "listed"]

_FIRST_ORDER = "It is left to the first-order optimizer"


class Reasons:
    """What keeps the modules of a model from being seen.

    Args:
        model: the model.
        plan: what a training step does with which layer.
        seen: what one forward pass showed.
        failed: modules -> the error that arranging their inputs raises.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, seen: Survey, failed: dict[nn.Module, Exception]
    ) -> None:
        self.model, self.plan, self.seen, self.failed = model, plan, seen, failed
        self.convertible = convertible(model)
        modules = list(model.modules())
        self.embeddings = {
            id(module.weight)
            for module in modules
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        layers = (module for module in modules if isinstance(module, (nn.Linear, nn.Conv2d)))
        self.weights = {id(own_parameters(module).get("weight")) for module in layers}

    def why(
        self, name: str, module: nn.Module, layer: Layer | None, parameters: list[nn.Parameter]
    ) -> tuple[str, str] | None:
        """Why K-FAC does not see a module, and the remedy; ``None`` if it does."""
        seen, plan = self.seen, self.plan
        key = layer.module if layer is not None else module
        if key in seen.refused:
            return _explained(seen.refused[key], name)
        if name in plan.skipped:
            return _sentence(plan.skipped[name]), f"{_FIRST_ORDER}."
        if layer is None:
            return self._without_operation(name, module, parameters)
        if not any(other in seen.record.calls for other in layer.modules):
            return self._not_called(name, module, layer, parameters)
        edges = [call.edge.node for call in seen.record.calls[layer.module]]
        if not any(node in seen.graph for node in edges):
            return (
                "It does not influence the model's output.",
                "Leave it out of the model, or of ignore_modules.",
            )
        if seen.from_input is not None and not any(node in seen.from_input for node in edges):
            return (
                "Its input does not depend on the model's input, so there are no examples to "
                "average over.",
                f"Leave it to the first-order optimizer with ignore_modules=['{name}'].",
            )
        if key in self.failed:
            return _explained(self.failed[key], name)
        return None

    def _not_called(
        self, name: str, module: nn.Module, layer: Layer, parameters: list[nn.Parameter]
    ) -> tuple[str, str]:
        seen = self.seen
        if layer.module in seen.record.without_graph:
            return (
                "It ran without an autograd graph: under no_grad, or under reentrant activation "
                "checkpointing.",
                "For the latter use checkpoint(..., use_reentrant=False).",
            )
        if any(seen.graph.num_uses(p) for p in parameters):
            if self._convertible(name):
                return (
                    "Its weight is used without calling it.",
                    "Call asdl_ws_plugin.convert(model) before.",
                )
            return (
                "Its weight is used without calling it.",
                "Call the module instead of using its weight.",
            )
        if seen.calls.get(module):
            return (
                "It was called in compiled or scripted code, which skips hooks.",
                "Use the model as it was before.",
            )
        return (
            "It was not called.",
            f"{_FIRST_ORDER}. In evaluation mode a fused fast path may skip it; look at it in "
            "training mode."
            if not self.model.training
            else f"{_FIRST_ORDER}.",
        )

    def _without_operation(
        self, name: str, module: nn.Module, parameters: list[nn.Parameter]
    ) -> tuple[str, str]:
        if isinstance(module, torch.jit.ScriptModule):
            return (
                "It is compiled by torch.jit, so its layers cannot be seen.",
                "Use the model as it was before.",
            )
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            return (
                "What a layer's weight or bias is computed from; K-FAC is for weights that are "
                "Parameters.",
                f"{_FIRST_ORDER}, or remove the parametrization.",
            )
        own = {
            n for n, p in module.named_parameters(recurse=False) if any(p is q for q in parameters)
        }
        return self._without_layer(name, module, own, parameters)

    def _without_layer(
        self, name: str, module: nn.Module, own: set[str], parameters: list[nn.Parameter]
    ) -> tuple[str, str]:
        """Of a module whose own Parameters, by name, are Parameters as they are."""
        kind = type(module).__name__
        if name in self.convertible and "weight" in own:
            return (
                f"There is no operation for {kind}.",
                "Call asdl_ws_plugin.convert(model) before.",
            )
        if name in self.convertible and self.convertible[name].takes_parameters:
            return (
                "It keeps the weights of its linear layers as Parameters of its own.",
                "Call asdl_ws_plugin.convert(model) before.",
            )
        if "weight" in own:
            return (
                f"There is no operation for {kind}.",
                f"{_FIRST_ORDER}, unless you register one with register_operation({kind}, ...).",
            )
        remedy = f"{_FIRST_ORDER}."
        if any(self.is_matrix(p) for p in parameters):
            remedy = (
                f"{_FIRST_ORDER}; to be seen, a matrix has to be the weight of a layer that is "
                "called."
            )
        return f"Raw Parameters ({listed(sorted(own))}), which belong to no layer.", remedy

    def _convertible(self, name: str) -> bool:
        """Whether ``convert`` would change a module that this one is in."""
        path = name.split(".")
        return any(".".join(path[:depth]) in self.convertible for depth in range(len(path)))

    def is_matrix(self, parameter: nn.Parameter) -> bool:
        """Whether layers multiply their inputs with it; embeddings are none."""
        if parameter.ndim < 2 or id(parameter) in self.embeddings:
            return False
        if id(parameter) in self.weights:  # also one that is standardized before
            return True
        return not self.seen.graph.num_uses(parameter) or self.seen.graph.is_multiplied(parameter)


def listed(names: Sequence[str]) -> str:
    """Names in quotes, the first four of them and how many more there are."""
    more = len(names) - 4
    return ", ".join(f"'{name}'" for name in names[:4]) + (f" and {more} more" if more > 0 else "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _explained(error: Exception, name: str) -> tuple[str, str]:
    """Why a layer cannot be handled, and the remedy."""
    leave = f"Leave it to the first-order optimizer with ignore_modules=['{name}']."
    if isinstance(error, LayerFault):
        return error.reason, error.remedy or leave
    return _sentence(str(error)), leave
