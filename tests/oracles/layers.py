"""What a layer saw and gave, example by example: the part that all oracles share.

The gradient with respect to a layer's output is taken by autograd with respect to a zero that is
added to it. Nothing here uses the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

Example = Callable[[int], Tensor]


def rows_of(module: nn.Module, a: Tensor) -> Tensor:
    """What a layer's weight is multiplied with at every position: ``(R, P)``.

    The patches of a convolution are its own Jacobian with respect to one channel's weight.
    """
    if not isinstance(module, nn.Conv2d):
        return a.reshape(-1, a.shape[-1])

    def first_channel(weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (a,))[:, 0].flatten()

    return jacrev(first_channel)(module.weight.detach())[:, 0].flatten(1)


def output_rows_of(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, or a gradient with respect to it, as ``(R, Q)``."""
    y = y.movedim(-3, -1) if isinstance(module, nn.Conv2d) else y
    return y.reshape(-1, y.shape[-1])


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


def seen_by(
    module: nn.Module, example: Example, num_examples: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For every example, the layer's input ``(R_n, P)`` and the Jacobian of the logits with respect
    to its output, ``(logits, R_n, Q)``; the calls of a layer that is called several times one after
    the other.
    """
    inputs, jacobians = [], []
    for n in range(num_examples):
        with perturbed([module]) as seen:
            logits = example(n).flatten()
        zeros = [zero for *_, zero in seen]
        rows = []
        for logit in logits:
            grads = torch.autograd.grad(
                logit, zeros, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([output_rows_of(module, grad) for grad in grads]))
        inputs.append(torch.cat([rows_of(module, a) for _, a, _ in seen]))
        jacobians.append(torch.stack(rows))
    return inputs, jacobians
