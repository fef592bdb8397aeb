"""The user's loss while it is computed: which of PyTorch's loss functions it calls, and with what.

The loss is called exactly as it was passed, so that functions, modules, lambdas, partials and
ASDL's ``setup_loss_repr`` are seen alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from asdl.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE, GradientMaker
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .factors import accumulation_dtype
from .likelihoods import LOSS_BINARY_CROSS_ENTROPY
from .torch_private import is_called_by_grad_scaler

__all__ = ["CountsTerms", "LossObserver", "Observation", "loss_and_count"]

# torch function -> loss type
_OBSERVED: dict[Any, str] = {
    F.cross_entropy: LOSS_CROSS_ENTROPY,
    # The softmax of log-probabilities are the probabilities: the same Fisher.
    F.nll_loss: LOSS_CROSS_ENTROPY,
    F.mse_loss: LOSS_MSE,
    F.binary_cross_entropy_with_logits: LOSS_BINARY_CROSS_ENTROPY,
}
_MULTIPLICATIONS = (Tensor.mul, Tensor.__mul__, torch.mul)
_SIGNATURES = {function: inspect.signature(function) for function in _OBSERVED}
# Operations that leave the values of log-probabilities as they are.
_MOVES = (
    "View",
    "Reshape",
    "Transpose",
    "Permute",
    "Clone",
    "Index",
    "Select",
    "Slice",
    "Unsqueeze",
    "Squeeze",
    "ToCopy",
    "TBackward",
    "Alias",
)


@dataclass
class Observation:
    """One call of one of PyTorch's loss functions."""

    loss_type: str
    arguments: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The logits."""
        return self.arguments["input"]

    @property
    def reduction(self) -> str:
        """``'mean'``, ``'sum'`` or ``'none'``; the deprecated arguments are understood, too."""
        size_average, reduce = self.arguments.get("size_average"), self.arguments.get("reduce")
        if size_average is None and reduce is None:
            return self.arguments["reduction"]
        return "none" if reduce is False else "sum" if size_average is False else "mean"

    @property
    def others(self) -> list[Tensor]:
        """Its other arguments that have a gradient: labels, or weights, that are computed."""
        found = (self.arguments.get(name) for name in ("target", "weight", "pos_weight"))
        return [value for value in found if isinstance(value, Tensor) and value.requires_grad]


class LossObserver(TorchFunctionMode):
    """Notes the calls of PyTorch's loss functions that are made while it is active.

    Attributes:
        observations: those calls.
        loss_scale: what a ``torch.amp.GradScaler`` has multiplied a loss with meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[Observation] = []
        self.loss_scale: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        loss_type = _OBSERVED.get(func)
        if loss_type is not None:
            bound = _SIGNATURES[func].bind(*args, **kwargs)
            bound.apply_defaults()
            observation = Observation(loss_type, dict(bound.arguments), output)
            x = observation.input
            if x.requires_grad and (func is not F.nll_loss or _is_log_probabilities(x)):
                self.observations.append(observation)
        elif func in _MULTIPLICATIONS and is_called_by_grad_scaler():
            self.loss_scale = args[1]
        return output


def _is_log_probabilities(x: Tensor) -> bool:
    """Whether the classes' exponentials sum up to 1, as ``nll_loss`` takes for granted."""
    node = x.grad_fn
    while node is not None and node.name().startswith(_MOVES):
        node = node.next_functions[0][0]
    if node is not None and node.name() == "LogSoftmaxBackward0":
        return True
    with torch.no_grad():
        total = x.logsumexp(1 if x.ndim > 1 else 0)
        return bool((total.abs() < 10 * torch.finfo(x.dtype).eps ** 0.5).all())


def loss_and_count(value: Any) -> tuple[Tensor, Tensor | float | None]:
    """The loss, and the number of its terms where it says so.

    A mapping with ``'summed'`` and ``'n_valid_examples'``, as AlgoPerf's workloads return it, is
    the quotient of the two.

    Raises a TypeError for anything else that is no tensor.
    """
    if isinstance(value, Tensor):
        return value, None
    if isinstance(value, Mapping) and {"summed", "n_valid_examples"} <= value.keys():
        summed, count = value["summed"], value["n_valid_examples"]
        if isinstance(count, Tensor):  # its inverse scales factors, whatever it was counted in
            count = count.to(accumulation_dtype(summed.dtype))
        return summed / value["n_valid_examples"], count
    if isinstance(value, Mapping):
        found = f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    elif isinstance(value, (tuple, list)):
        items = ", ".join(type(item).__name__ for item in value)
        found = f"a {type(value).__name__} of ({items})"
    else:
        found = f"a value of the type {type(value).__name__}"
    raise TypeError(
        f"The loss has to be a scalar tensor, or a dictionary with 'summed' and "
        f"'n_valid_examples', but the loss function returned {found}. Return the tensor alone, as "
        "lambda *args: loss(*args)[0] does for the first of several."
    )


class CountsTerms(GradientMaker):
    """A gradient maker that understands the losses of AlgoPerf's workloads, too."""

    _num_terms: Any = None  # how many terms the last loss says that it averages over

    def call_loss(self) -> Tensor:
        """ASDL's; of a dictionary, the loss that it tells."""
        self._loss, self._num_terms = loss_and_count(super().call_loss())
        return self._loss
