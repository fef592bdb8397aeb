"""What the order of a loop's calls leaves behind: the gradients that a step has left in ``.grad``,
so that none is preconditioned twice, and parameters that were changed before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .weight_sharing._warn import warn
from .weight_sharing.torch_private import version_of

__all__ = ["Changes", "StepGradients", "are_kept", "gradients_of"]

_MOST_DROPPED = 3  # gradients in a row; of a single batch a loop may let go on purpose


def gradients_of(maker: Any) -> list[Tensor]:
    """Those that there are of a gradient maker's model, in the order of the parameters."""
    return [p.grad for p in maker.parameters() if p.grad is not None]


def are_kept(maker: Any) -> bool:
    """Whether there are gradients that others can be added to: ``zero_grad`` lets go of them, or
    with ``set_to_none=False`` makes them zero.
    """
    grads = gradients_of(maker)
    if not grads or maker.sharded is not None:
        return bool(grads)
    return any(bool(grad.any()) for grad in grads)


class StepGradients:
    """Gradients as the last step left them."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def leave(self, grads: Sequence[Tensor]) -> None:
        """The step has ended with these."""
        self._left = {id(grad): (weakref.ref(grad), version_of(grad)) for grad in grads}

    def are(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are, untouched, what the last step left. A backward pass makes other
        tensors, or changes these.
        """
        return bool(grads) and all(map(self._is_left, grads))

    def _is_left(self, grad: Tensor) -> bool:
        left, version = self._left.get(id(grad), (None, 0))
        return left is not None and left() is grad and version_of(grad) == version


# Options that go by the length of gradients.
_OF_SIZES = ("trust", "second_moment", "kl_clip")


class Changes:
    """Whether an optimizer has stepped between a backward pass and the preconditioner's step.

    Parameters that were changed in place show it; those of optimizers with ``fused=True`` do not,
    but their loops drop gradients again and again.
    """

    def __init__(self, maker: Any) -> None:
        self._maker = maker
        self._versions: list[int] | None = None
        self._num_dropped = 0
        self._is_said = self._is_scale_said = self._is_unseen_said = False
        self._scaled: Tensor | None = None

    def note(self, loss_scale: Tensor | None) -> None:
        """There was a backward pass, of a loss that a GradScaler had multiplied with this."""
        if self._maker.sharded is not None:
            return  # whole parameters are put together and dropped meanwhile
        self._versions = [version_of(p) for p in self._maker.parameters()]
        sees_size = any(getattr(self._maker.config, name, None) for name in _OF_SIZES)
        if loss_scale is not None and sees_size and bool(loss_scale != 1):
            self._scaled = self._largest()

    def forget(self) -> None:
        """The step has ended."""
        self._versions, self._num_dropped, self._scaled = None, 0, None

    def _largest(self) -> Tensor:
        return gradients_of(self._maker)[0].detach().abs().max()

    def warn_if_scaled(self) -> None:
        """Warn once of gradients that are as the scaled loss has made them."""
        if self._scaled is None or self._is_scale_said or not self._scaled:
            return
        if bool(self._largest() == self._scaled):
            self._is_scale_said = True
            warn(
                "The gradients are still multiplied by the scale of the GradScaler, and trust, "
                "second_moment and kl_clip go by their length. Call scaler.unscale_(optimizer) "
                "before prec.step(), or prec.step_before(optimizer) once instead of it."
            )

    @property
    def are_there(self) -> bool:
        """Whether parameters have changed since the backward pass."""
        now = [version_of(p) for p in self._maker.parameters()]
        return self._versions is not None and self._versions != now

    def warn_if_missed(self, has_dropped: bool) -> bool:
        """Before a further backward pass: whether an optimizer has stepped with the gradients of
        the last one as they were, of which this warns once.

        Args:
            has_dropped: there are no gradients any more.
        """
        self._num_dropped += has_dropped
        is_missed = self.are_there or self._num_dropped >= _MOST_DROPPED
        if is_missed and not self._is_said:
            self._is_said = True
            warn(
                "An optimizer has stepped, and prec.step() was not called since the last backward "
                "pass: the gradient was not preconditioned. Call prec.step() after "
                "loss.backward() and before optimizer.step(), or prec.step_before(optimizer) once."
            )
        return is_missed

    def warn_if_unseen(self, done: StepGradients, why: RuntimeError) -> None:
        """Warn once that an optimizer steps with gradients that no step has preconditioned."""
        grads = gradients_of(self._maker)
        if grads and not done.are(grads) and not self._is_unseen_said:
            self._is_unseen_said = True
            warn(f"The gradient is not preconditioned: {why}")
