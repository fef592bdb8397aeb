"""A backward pass that stops at the layers' outputs and hands out their gradients as it gets there.

Autograd is asked for the last gradients only. It passes the others on its way, and they are taken
there, one after the other: asking for them would keep all of them until the pass is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .capture import Call

__all__ = ["receiving", "send_back"]

Receive = Callable[[Any, "Tensor | None"], None]


@contextlib.contextmanager
def receiving(
    calls: Sequence[tuple[Any, Call]], receive: Receive, leave_out: Container[Node] = ()
) -> Iterator[None]:
    """Take the gradients of the calls' outputs out of a backward pass: ``receive(key, grad)``.

    Args:
        calls: with a key for each.
        leave_out: nodes that are not listened at.
    """
    handles = []

    def hook(key: Any, output_nr: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        return lambda grads: receive(key, grads[output_nr])

    try:
        for key, call in calls:
            if call.edge.node not in leave_out:
                handles.append(call.edge.node.register_prehook(hook(key, call.edge.output_nr)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def send_back(
    outputs: Tensor,
    grad_outputs: Tensor | None,
    calls: Sequence[tuple[Any, Call]],
    receive: Receive,
    last: Container[Node],
    retain_graph: bool,
) -> None:
    """One backward pass; no weight gradient is computed.

    Args:
        calls: with a key for each.
        last: those of the calls' nodes behind which there is no other, see :func:`.last_nodes`.
    """
    at_end = [(key, call) for key, call in calls if call.edge.node in last]
    if not at_end:
        return
    with receiving(calls, receive, leave_out=last):
        grads = torch.autograd.grad(
            outputs,
            [call.edge for _, call in at_end],
            grad_outputs,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    for (key, _), grad in zip(at_end, grads, strict=True):
        receive(key, grad)
