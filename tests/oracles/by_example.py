"""Ground truth for what a layout, a hook or a wrapper could spoil: Kronecker factors from a loop
over single examples.

One example at a time leaves no question of which dimension is the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import asdl
import torch
from asdl.fisher import FisherConfig
from torch import Tensor, nn

from oracles.autograd import assert_factors, run_fisher
from oracles.layers import output_rows_of, perturbed, rows_of

__all__ = [
    "assert_factors",
    "empirical_factors",
    "fisher",
    "hooks_of",
    "kfac",
    "kron",
    "step",
]


def empirical_factors(
    modules: nn.Module | Sequence[nn.Module],
    summed_loss: Callable[[int], Tensor],
    num_examples: int,
    setting: str,
) -> tuple[Tensor, Tensor]:
    """A and B of one weight (of several modules if it is tied) for ``fisher_emp`` with D = N.

    Args:
        summed_loss: the summed loss of example n, computed from it alone.
    """
    modules = [modules] if isinstance(modules, nn.Module) else modules
    A = B = torch.zeros(())
    for n in range(num_examples):
        with perturbed(modules) as seen:
            loss = summed_loss(n)
        grads = torch.autograd.grad(loss, [zero for *_, zero in seen])
        a = torch.cat([rows_of(module, x) for module, x, _ in seen]).double()
        b = torch.cat(
            [output_rows_of(module, g) for (module, *_), g in zip(seen, grads, strict=True)]
        ).double()
        if setting == "expand":
            A, B = A + a.mT @ a / len(a), B + b.mT @ b
        else:
            A, B = A + torch.outer(a.mean(0), a.mean(0)), B + torch.outer(b.sum(0), b.sum(0))
    return A / num_examples, B / num_examples


def fisher(
    model: nn.Module,
    shared_dim: Any,
    loss: Callable[..., Tensor] | None,
    target: Any,
    *args: Any,
    call: Callable[..., Any] | None = None,
    fisher_type: str = "fisher_emp",
    shapes: Sequence[Any] = ("kron",),
    ignore: Sequence[Any] | None = None,
    seed: int | None = None,
    loss_type: str = "cross_entropy",
    data_size: int = -1,
    **kwargs: Any,
) -> Any:
    """Compute the curvature of one batch through ``get_fisher_maker``; returns the maker."""
    config = FisherConfig(
        fisher_type,
        list(shapes),
        loss_type=loss_type,
        shared_dim=shared_dim,
        data_size=data_size,
        ignore_modules=ignore,
        seed=seed,
    )
    return run_fisher(
        model, config, None if loss is None else (loss, target), *args, call=call, **kwargs
    )


def step(maker: Any, loss: Callable[..., Tensor], target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """One training step's gradient; ``.grad`` is cleared first. Returns the loss."""
    for p in maker.model.parameters():
        p.grad = None
    dummy = maker.setup_model_call(maker.model, *args, **kwargs)
    maker.setup_loss_call(loss, dummy, target)
    return maker.forward_and_backward()[1]


def kfac(model: nn.Module, shared_dim: Any = "reduce", **options: Any) -> Any:
    """A K-FAC gradient maker; PreconditioningConfig's options are told from the maker's by name."""
    names = (
        "data_size",
        "damping",
        "ema_decay",
        "ignore_modules",
        "curvature_upd_interval",
        "preconditioner_upd_interval",
    )
    config = {name: options.pop(name) for name in names if name in options}
    return asdl.KfacGradientMaker(
        model,
        asdl.PreconditioningConfig(**{"damping": 1e-3, **config}),
        shared_dim=shared_dim,
        **options,
    )


def kron(module: Any) -> tuple[Tensor, Tensor]:
    return module.fisher.kron.A, module.fisher.kron.B


def hooks_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every hook that hangs on a model's modules."""
    return {
        name: tuple(
            tuple(getattr(m, attr))
            for attr in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        )
        for name, m in model.named_modules()
    }
