"""Ground truth for what a layout, a hook or a wrapper could spoil: Kronecker factors from a loop
over single examples.

One example at a time leaves no question of which dimension is the batch. The gradient with respect
to a layer's output is taken by autograd with respect to a zero that is added to it; nothing here
uses the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import asdl
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """What the weight is multiplied with at every position of one example: ``(R, P)``."""
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.reshape(-1, x.shape[-1])


def output_rows_of(module: nn.Module, g: Tensor) -> Tensor:
    g = g.movedim(-3, -1) if isinstance(module, nn.Conv2d) else g
    return g.reshape(-1, g.shape[-1])


@contextlib.contextmanager
def perturbed(modules: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Collect ``(module, input, zero added to the output)`` of every call."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        zero = torch.zeros_like(out, requires_grad=True)
        seen.append((module, (args or tuple(kwargs.values()))[0].detach().clone(), zero))
        return out + zero

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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
    maker = get_fisher_maker(model, config)
    dummy = maker.setup_model_call(model if call is None else call, *args, **kwargs)
    if loss is not None:
        maker.setup_loss_call(loss, dummy, target)
    maker.forward_and_backward()
    return maker


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


def kron(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.fisher.kron.A, module.fisher.kron.B


def assert_factors(module: nn.Module, expected: tuple[Tensor, Tensor], rtol: float = 1e-10) -> None:
    for name, found, want in zip("AB", kron(module), expected, strict=True):
        scale = want.abs().max()
        assert scale > 0, "a factor of zeros tests nothing"
        error = (found.double() - want).abs().max() / scale
        assert error < rtol, f"{name} is off by {error:.2e}"


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
