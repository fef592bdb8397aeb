"""Where a backward pass has to end so that it meets every layer's output, and no gradient has to be
kept for it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asdl_ws_plugin.weight_sharing.capture import last_nodes, output_edge


def nodes(**outputs: Tensor) -> dict[str, torch.autograd.graph.Node]:
    return {name: output_edge(out).node for name, out in outputs.items()}


def test_last_nodes_of_a_branching_graph() -> None:
    a, b, c, d = (nn.Linear(3, 3) for _ in range(4))
    x = torch.randn(2, 5, 3)  # three dimensions: the outputs are views
    h = a(x)
    u, v, w = b(h.relu_()), c(h), d(x)
    found = nodes(h=h, u=u, v=v, w=w, unused=d(x))
    last = last_nodes(u * v + w, set(found.values()))
    assert {name for name, node in found.items() if node in last} == {"h", "w"}


def test_a_layer_that_is_the_output() -> None:
    layer = nn.Linear(3, 3)
    y = layer(torch.randn(2, 3))
    assert last_nodes(y, set(nodes(y=y).values())) == set(nodes(y=y).values())


def test_a_loss_that_reaches_no_layer_has_no_last_nodes() -> None:
    y = nn.Linear(3, 3)(torch.randn(2, 3))
    other = nn.Linear(3, 3)(torch.randn(2, 3))
    assert last_nodes(y, set(nodes(other=other).values())) == set()
    assert last_nodes(torch.randn(3), set(nodes(other=other).values())) == set()


def test_a_pass_to_the_last_nodes_runs_through_all_others() -> None:
    """Deep, with skips: the gradients met on the way are those that autograd computes when it is
    asked for all.
    """
    layers = [nn.Linear(4, 4) for _ in range(6)]
    x, outputs = torch.randn(3, 4), []
    for layer in layers:
        outputs.append(layer(x))
        x = x + outputs[-1].tanh()
    loss = x.square().sum()
    expected = torch.autograd.grad(loss, outputs, retain_graph=True)
    last = last_nodes(loss, {out.grad_fn for out in outputs})
    assert last == {outputs[0].grad_fn}
    met: dict[int, Tensor] = {}
    for i, out in enumerate(outputs[1:], start=1):
        out.grad_fn.register_prehook(lambda grads, i=i: met.__setitem__(i, grads[0]))
    (met[0],) = torch.autograd.grad(loss, outputs[0])
    for i, grad in enumerate(expected):
        torch.testing.assert_close(met[i], grad)
    assert all(p.grad is None for layer in layers for p in layer.parameters())
