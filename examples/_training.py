"""What the examples share: the baseline optimizer and its learning-rate schedule, training with
K-FAC-reduce on top of it, and the Fisher matrix of a batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn

import asdl_ws_plugin

__all__ = ["Baseline", "exact_fisher", "linear_layers", "nadamw", "train_classifier"]


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


def train_classifier(model: nn.Module, data: Any, epochs: int, settings: Baseline) -> None:
    """Train with K-FAC-reduce on top of NAdamW; ``data`` has a length and yields ``(x, y)``."""
    optimizer, schedule = nadamw(model, settings, epochs * len(data))
    prec = asdl_ws_plugin.Preconditioner(model, shared_dim="reduce", ignore_modules=[nn.LayerNorm])
    for _ in range(epochs):
        for x, y in data:
            prec.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    prec.close()


def linear_layers(model: nn.Module) -> list[Any]:
    """All ``nn.Linear`` layers, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def exact_fisher(
    model: nn.Module,
    x: Tensor,
    shape: str = "kron",
    shared_dim: str = "reduce",
    loss_type: str = "cross_entropy",
) -> None:
    """Leave the curvature of every layer in ``module.fisher``, averaged over the examples ``x``."""
    config = FisherConfig(
        fisher_type="fisher_exact",
        fisher_shapes=[shape],
        loss_type=loss_type,
        data_size=len(x),
        shared_dim=shared_dim,
        ignore_modules=[nn.LayerNorm],
    )
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, x)
    maker.forward_and_backward()
