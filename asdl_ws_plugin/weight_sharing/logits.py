"""Which part of the model's output are the logits: what the user selected, or what the loss is
given of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from asdl.grad_maker import DummyObject, GetFirstItem
from torch import Tensor

__all__ = ["SELECT_LOGITS", "logits_of"]

SELECT_LOGITS = (
    "Select them with setup_logits_repr, as in\n"
    "    output = maker.setup_model_call(model, ...)\n"
    "    maker.setup_logits_repr(output.logits)"
)
_FIRST = DummyObject([GetFirstItem()])  # what ASDL takes for the logits unless it is told


def logits_of(output: Any, selected: DummyObject, loss_arguments: Iterable[Any]) -> Any:
    """The logits, as a part of the model's output.

    Args:
        output: of the model.
        selected: what :meth:`setup_logits_repr` said.
        loss_arguments: those of the loss function. Where nothing was selected, the one tensor that
            they take out of the output is the logits, as ``output.logits`` or ``output[1]``, also
            if the loss is given a part of it (``output.logits[:, :-1]``) or, of several parts in
            one, the first.

    Returns:
        A tensor, or something else if the loss takes none or several.
    """
    logits = selected.eval(output)
    if _operators(selected) != _operators(_FIRST):
        return logits
    arguments = [value for value in loss_arguments if isinstance(value, DummyObject)]
    given = {
        id(tensor): tensor
        for argument in arguments
        if (tensor := _tensor_of(argument, output)) is not None
    }
    return next(iter(given.values())) if len(given) == 1 and id(logits) not in given else logits


def _tensor_of(argument: DummyObject, output: Any) -> Tensor | None:
    """The first tensor on the way to a part of the output, where gradients go."""
    value = output
    for operator in _operators(argument):
        if isinstance(value, Tensor):  # what is done with the logits is a part of the loss
            break
        value = DummyObject([operator]).eval(value)
    value = _FIRST.eval(value)
    return value if isinstance(value, Tensor) and value.requires_grad else None


def _operators(value: DummyObject) -> list[Any]:
    # Any other way to ask for the attribute may make a new DummyObject.
    return vars(value)["_operators"]
