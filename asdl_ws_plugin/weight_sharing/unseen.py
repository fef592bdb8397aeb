"""Layers that took no part in a step: what is said of them, and when that is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asdl.matrices import SHAPE_FULL
from torch import nn

from ._warn import warn
from .blocks import parameters_of
from .capture import Layer, Record
from .errors import LayerRuntimeError, layer_message
from .plan import Plan

__all__ = ["UnseenReport", "check_any_called"]

_NO_GRAPH = "ran without an autograd graph (no_grad, or reentrant activation checkpointing)"


def check_any_called(layers: Sequence[Layer], record: Record) -> None:
    """Raise a RuntimeError if no layer was called within reach of autograd."""
    if record.calls:
        return
    if record.without_graph:
        names = ", ".join(
            f"'{layer.name}'" for layer in layers if layer.module in record.without_graph
        )
        raise RuntimeError(
            f"Every layer ({names}) ran without an autograd graph: under no_grad, or under "
            "reentrant activation checkpointing. For the latter use checkpoint(..., "
            "use_reentrant=False)."
        )
    raise RuntimeError(
        f"None of the model's layers (the first is '{layers[0].name}') was called as a module, "
        "so no curvature can be computed. Is the model that was passed to setup_model_call "
        "another one than the gradient maker's, scripted by torch.jit, or does a fused fast "
        "path skip its modules?"
    )


class UnseenReport:
    """Warns of each layer once.

    Args:
        plan: what the layers belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._reported: set[str] = set()

    def report(
        self, layers: Sequence[Layer], record: Record, unseen: Mapping[nn.Module, str]
    ) -> None:
        """Warn of the layers that took no part in a step.

        Raises a RuntimeError if no layer did, if one that did not has a gradient all the same, or
        if the full Fisher needs it.
        """
        if all(layer.module in unseen for layer in layers) and not record.without_graph:
            raise RuntimeError(
                f"None of the {len(record.calls)} layers that were called (the first is "
                f"'{layers[0].name}') influences the logits or the loss. The loss has to be given "
                "what setup_model_call() returned, not an output of the model; logits that are "
                "not the model's first output are selected with setup_logits_repr()."
            )
        found: dict[tuple[str, str], list[str]] = {}
        for layer in layers:
            if layer.module not in unseen:
                continue
            reason = _reason(layer, record, unseen[layer.module])
            if layer.module in record.absent:  # which is as it should be
                continue
            if layer.name not in self._reported:
                self._reported.add(layer.name)
                found.setdefault((reason, self._remedy(layer)), []).append(layer.name)
        for (reason, remedy), names in found.items():
            _warn_of(names, reason, remedy)

    def _remedy(self, layer: Layer) -> str:
        if self.plan.is_in_attention(layer.name):
            return "The projections of nn.MultiheadAttention are not called: use convert(model)."
        return "Leave it out with ignore_modules to silence this."


def _reason(layer: Layer, record: Record, reason: str) -> str:
    """Why a layer took no part. Raises a LayerRuntimeError if that is wrong."""
    if layer.module in record.without_graph and layer.module not in record.calls:
        reason = _NO_GRAPH
        if any(p.grad is not None and p.requires_grad for p in parameters_of(layer.module)):
            raise LayerRuntimeError(
                layer.name,
                f"it {reason}, but has a gradient",
                "Use checkpoint(..., use_reentrant=False).",
            )
    if layer.shape == SHAPE_FULL:
        raise LayerRuntimeError(
            layer.name, f"it {reason}; the full Fisher needs every layer of the model"
        )
    return reason


def _warn_of(names: Sequence[str], reason: str, remedy: str) -> None:
    consequence = "its gradient is not preconditioned where that happens"
    if len(names) == 1:
        sentence = f"{reason} in this step; {consequence}"
        warn(layer_message(names[0], sentence, remedy))
        return
    listed = ", ".join(f"'{name}'" for name in names[:8]) + (", ..." if len(names) > 8 else "")
    warn(f"{len(names)} layers ({listed}): each {reason} in this step; {consequence}. {remedy}")
