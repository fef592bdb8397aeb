"""What is wanted of a batch beside its curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asdl.vector import ParamVector
from torch import Tensor

from .count import Count
from .reading import Reading

__all__ = ["NOT_GIVEN", "Step", "check_data_size"]

NOT_GIVEN = -1  # upstream's mark for a data_size that is not


def check_data_size(data_size: Any) -> None:
    """Raise a ValueError unless it is a number of examples, or not given."""
    if not data_size >= 1 and data_size != NOT_GIVEN:
        raise ValueError(f"data_size has to be a number of examples, got {data_size!r}.")


@dataclass(frozen=True)
class Step:
    """What is wanted of a batch beside its curvature.

    Attributes:
        data_size: D; -1: the curvature is that of the loss that was passed.
        scale: multiplies every matrix; the Kronecker factors are multiplied with it each.
        accumulate: add to the curvature of earlier batches.
        calc_loss_grad: accumulate the gradient of the loss into ``.grad``.
        fvp: compute the Fisher-vector product with ``vec`` instead.
        vec: see ``fvp``.
    """

    data_size: int = NOT_GIVEN  # |D|
    scale: float = 1.0
    accumulate: bool = False
    calc_loss_grad: bool = False
    fvp: bool = False
    vec: ParamVector | None = None

    @property
    def has_data_size(self) -> bool:
        """Whether the examples that the curvature is averaged over were counted by the user."""
        return self.data_size != NOT_GIVEN

    def scales(
        self, reading: Reading, count: Count, has_loss: bool, loss_scale: Tensor | None = None
    ) -> tuple[Any, Any]:
        """What A and B are multiplied with."""
        if self.has_data_size:
            return self.scale / self.data_size, self.scale / self.data_size
        if not has_loss:
            raise ValueError("data_size is not specified, and there is no loss to tell it from.")
        # A factor that a GradScaler multiplies the loss with is none of its curvature.
        sum_factor = reading.sum_factor if loss_scale is None else reading.sum_factor * loss_scale
        return self.scale / count.num_examples, self.scale / sum_factor
