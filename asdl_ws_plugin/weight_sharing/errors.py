"""What is said of a layer that cannot be handled: the message is made here, and nowhere else.

A reason is a clause (``its input has 3 rows``) or goes on from the layer's name (``is scripted``);
it ends without a full stop. A remedy is one or more whole sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["LayerError", "LayerFault", "LayerRuntimeError", "LayerTypeError", "layer_message"]

# How a reason begins that needs no colon.
_GOES_ON = ("is ", "has ", "have ", "does ", "was ", "ran ")


def layer_message(name: str | Sequence[str], reason: str, remedy: str = "", kind: str = "") -> str:
    """``Layer 'name' (Kind): reason. Remedy.``, the one form of a message about a layer."""
    names = name if isinstance(name, str) else "' and '".join(name)
    subject = f"Layer '{names}'" + (f" ({kind})" if kind else "")
    sentence = f"{subject}{' ' if reason.startswith(_GOES_ON) else ': '}{reason}."
    return f"{sentence} {remedy}" if remedy else sentence


def _as_sentence(names: Sequence[str], reason: str) -> str:
    if reason.startswith(_GOES_ON):
        reason = " and ".join(["it", *(f"'{name}'" for name in names[1:])]) + f" {reason}"
    return f"{reason[:1].upper()}{reason[1:]}."


class LayerFault(Exception):
    """A layer cannot be handled.

    Args:
        name: the layer's qualified name, or those of the layers that do not go together.
        reason: why.
        remedy: what to do.
        kind: the layer's class, where that is a part of the reason.

    Attributes:
        name: of the first layer.
        reason: why, as a sentence that can stand by itself.
        remedy: what to do; empty if nothing is known.
    """

    def __init__(
        self, name: str | Sequence[str], reason: str, remedy: str = "", kind: str = ""
    ) -> None:
        super().__init__(layer_message(name, reason, remedy, kind))
        names = [name] if isinstance(name, str) else list(name)
        self.name, self.reason, self.remedy = names[0], _as_sentence(names, reason), remedy
        self._made_of = (name, reason, remedy, kind)

    def __reduce__(self) -> Any:  # between processes
        return type(self), self._made_of


class LayerError(LayerFault, ValueError):
    """What was given does not fit the layer."""


class LayerTypeError(LayerFault, TypeError):
    """What the layer was called with, or returned, is of the wrong type."""


class LayerRuntimeError(LayerFault, RuntimeError):
    """Something happened to the layer, or around it, that its curvature cannot be computed with."""
