"""What the examples share: the baseline optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

__all__ = ["Baseline", "nadamw"]


class Baseline(Protocol):
    """The options of NAdamW; ``warmup`` is a share of the steps."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def warmup(self) -> float: ...


def nadamw(
    model: nn.Module, settings: Baseline, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """NAdam with decoupled weight decay; a linear warm-up, then a cosine to zero at the last
    step.
    """
    optimizer = torch.optim.NAdam(
        model.parameters(),
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        decoupled_weight_decay=True,
    )
    warmup = max(1, round(settings.warmup * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        [warmup],
    )
    return optimizer, schedule
