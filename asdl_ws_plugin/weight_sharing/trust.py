"""How much K-FAC trusts its curvature: damping by the length of the step that the optimizer makes.

The step that lowers a quadratic model of the loss the most, among all that are as long as the
optimizer's, is ``(F + λ)⁻¹ g`` with the λ that makes it as long (Levenberg and Marquardt). With a
small learning rate that is a large λ and the direction is the gradient's: what a short step changes
is not limited by curvature. With a large one λ is small and the direction is K-FAC's. Nothing has
to be said of the optimizer: its step is read off the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepTrust"]

# By how much a damping changes in one update at most. The length of a damped step is proportional
# to 1 / damping where damping is large, so there an update by the ratio of the lengths is exact.
_MOST = 4.0
# The first steps are the raw gradient's.
_START, _LARGEST = 1e3, 1e6


class StepTrust:
    """The relative damping of every layer."""

    def __init__(self) -> None:
        self._dampings: dict[nn.Module, Tensor] = {}
        # of the last step, where the weights were before it, and how long K-FAC's own was
        self._before: dict[nn.Module, Tensor] = {}
        self._lengths: dict[nn.Module, Tensor] = {}

    def damping(self, module: nn.Module, like: Tensor) -> Tensor:
        """Of a layer; a scalar on the device of ``like``, its curvature."""
        if module not in self._dampings:
            self._dampings[module] = torch.full((), _START, dtype=like.dtype, device=like.device)
        return self._dampings[module]

    @torch.no_grad()
    def note(self, modules: Iterable[Any]) -> None:
        """Remember a step that was preconditioned, before its length is changed or it is made."""
        trainable = [m for m in modules if m.weight.grad is not None]
        self._before = {m: m.weight.detach().clone() for m in trainable}
        norms = torch._foreach_norm([m.weight.grad for m in trainable]) if trainable else []
        self._lengths = dict(zip(trainable, norms, strict=True))

    @torch.no_grad()
    def update(self, least: float, ratio: float) -> None:
        """Move the dampings to where K-FAC's step is ``ratio`` times as long as the optimizer's.

        A layer whose weight did not move, as between micro-batches, keeps its damping.

        Args:
            least: the smallest damping.
        """
        modules: list[Any] = [m for m in self._before if m in self._dampings]
        if not modules:
            return
        moved = torch._foreach_sub(
            [m.weight.detach() for m in modules], [self._before[m] for m in modules]
        )
        for module, made in zip(modules, torch._foreach_norm(moved), strict=True):
            factor = (self._lengths[module] / (ratio * made)).clamp(1 / _MOST, _MOST)
            factor = torch.where(made > 0, factor, 1.0)
            self._dampings[module] = (self._dampings[module] * factor).clamp(least, _LARGEST)
        self._before = {}

    def state_dict(self, names: dict[nn.Module, str]) -> dict[str, dict[str, Tensor]]:
        """Tensors by the names of the modules."""
        return {
            kind: {names[module]: tensor for module, tensor in getattr(self, f"_{kind}").items()}
            for kind in ("dampings", "before", "lengths")
        }

    def load_state_dict(
        self, state: dict[str, dict[str, Tensor]], modules: dict[str, nn.Module]
    ) -> None:
        """The inverse of :meth:`state_dict`; copies the tensors to where the modules are."""
        for kind, tensors in state.items():
            loaded = {}
            for name, tensor in tensors.items():
                module: Any = modules[name]
                loaded[module] = tensor.detach().to(module.weight.device, copy=True)
            setattr(self, f"_{kind}", loaded)
