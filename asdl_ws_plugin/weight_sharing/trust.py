"""How much K-FAC trusts its curvature: damping by the length of the step that the optimizer makes.

The step that lowers a quadratic model of the loss the most, among all that are as long as the
optimizer's, is ``(F + λ)⁻¹ g`` with the λ that makes it as long (Levenberg and Marquardt). With a
small learning rate that is a large λ and the direction is the gradient's: what a short step changes
is not limited by curvature. With a large one λ is small and the direction is K-FAC's. Nothing has to
be said of the optimizer: its step is read off the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepTrust"]

# By how much the damping changes in one update at most. The length of a damped step is proportional
# to 1 / damping where damping is large, so there an update by the ratio of the lengths is exact.
_MOST = 4.0
_START, _LARGEST = 10.0, 1e4


class StepTrust:
    """The relative damping of every layer.

    Args:
        least: the smallest damping.
        ratio: K-FAC's own step ``(F + λ)⁻¹ g`` is made this many times as long as the optimizer's.
    """

    def __init__(self) -> None:
        self.dampings: dict[nn.Module, Tensor] = {}
        self._before: dict[nn.Module, Tensor] = {}
        self._lengths: dict[nn.Module, Tensor] = {}

    def damping(self, module: nn.Module, like: Tensor) -> Tensor:
        """Of a layer; a scalar on the device of ``like``, its curvature."""
        if module not in self.dampings:
            self.dampings[module] = torch.full((), _START, dtype=like.dtype, device=like.device)
        return self.dampings[module]

    @torch.no_grad()
    def note(self, modules: Iterable[Any]) -> None:
        """After a step was preconditioned, before its length is changed: how long it is, and where
        the parameters are.
        """
        trainable = [m for m in modules if m.weight.grad is not None]
        self._before = {m: m.weight.detach().clone() for m in trainable}
        if trainable:
            norms = torch._foreach_norm([m.weight.grad for m in trainable])
            self._lengths = dict(zip(trainable, norms, strict=True))

    @torch.no_grad()
    def update(self, least: float, ratio: float) -> None:
        """Move the dampings to where K-FAC's last step would have been as long as the optimizer's.

        Where the parameters did not move, as between micro-batches, it stays.
        """
        modules: list[Any] = list(self._before)
        if not modules:
            return
        moved = torch._foreach_sub([m.weight.detach() for m in modules], list(self._before.values()))
        for module, made in zip(modules, torch._foreach_norm(moved), strict=True):
            damping = self.dampings.get(module)
            if damping is None:
                continue
            factor = self._lengths[module] / (ratio * made)
            factor = torch.where(made > 0, factor, 1.0).nan_to_num(1.0).clamp(1 / _MOST, _MOST)
            self.dampings[module] = (damping * factor).clamp(least, _LARGEST)
        self._before = {}
