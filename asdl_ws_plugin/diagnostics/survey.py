"""One forward pass under which nothing changes, and what was seen in it.

The calls of a plan's layers are recorded as in a training step; beside them stand the calls of
every other module with parameters, and the autograd graph.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..weight_sharing.blocks import has_blocks, parameters_of
from ..weight_sharing.capture import Captured, Layer, recording
from ..weight_sharing.count import Count, count_examples, leading_sizes, num_rows
from ..weight_sharing.nests import tensors_in
from ..weight_sharing.plan import Plan
from ..weight_sharing.positions import take_positions
from ..weight_sharing.torch_private import own_buffers
from .autograd_graph import Graph

__all__ = ["Survey", "logits_of", "unchanged"]


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output: itself, its ``logits``, or the first tensor of floating-point
    numbers in it.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = (
        output.values()
        if isinstance(output, dict)
        else output
        if isinstance(output, (list, tuple))
        else ()
    )
    return next((found for value in values if (found := logits_of(value)) is not None), None)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back whatever a forward pass changes: generators, buffers, modes."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in own_buffers(module).items()
    ]
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                own_buffers(module)[name] = buffer
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)


class Survey:
    """What was seen in the forward pass.

    Attributes:
        calls: how often each module with parameters was called.
        input_sizes: of the first input of its first call.
        record: the calls of the plan's layers.
        count: N, and whose row is whose.
        refused: layers that cannot be handled, with the error.
        graph: the autograd graph of all of the output.
        from_input: its nodes that depend on the inputs, or on Parameters that take their place;
            ``None`` where autograd cannot tell.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        refused: dict[nn.Module, Exception],
        args: Any,
        kwargs: Any,
    ) -> None:
        self.calls: dict[nn.Module, int] = {}
        self.input_sizes: dict[nn.Module, tuple[int, ...]] = {}
        self.refused = refused
        leaves: list[Tensor] = []
        args, kwargs = _traced(args, leaves), _traced(kwargs, leaves)
        output = self._call(model, plan, args, kwargs)
        logits = logits_of(output)
        if logits is None:
            kind = type(output).__name__
            raise TypeError(
                f"There is no tensor of floating-point numbers in the model's output, {kind}."
            )
        self.graph = Graph(tensors_in(output))
        inputs = list(tensors_in([args, kwargs]))
        found = self.graph.depending_on(leaves) if len(leaves) == len(inputs) else set()
        self.from_input = found | self.graph.depending_on(_learned_inputs(model)) if found else None
        if logits.ndim == 0:  # a loss
            self.count = Count((leading_sizes([args, kwargs]) or (1,))[0])
        else:
            captured = Captured(self.record, logits, None, (), [args, kwargs])
            self.count = count_examples(plan.layers, plan.layouts, captured)
        rows, n = num_rows(logits), self.count.num_examples
        self.setting = "reduce" if rows <= n else "expand"
        plan.decide(rows, n)

    def _call(self, model: nn.Module, plan: Plan, args: Any, kwargs: Any) -> Any:
        """The model's output, with every call seen."""
        handles = []
        try:
            for module in model.modules():
                if parameters_of(module) and not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._count, with_kwargs=True))
            said = take_positions(model)
            with recording(
                plan.layers, plan.check_call, self._refuse, said, time_major=plan.time_major
            ) as self.record:
                return model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        sizes = leading_sizes([args, kwargs])
        if sizes is not None:
            self.input_sizes.setdefault(module, sizes)

    def _refuse(self, layer: Layer, error: Exception) -> None:
        self.refused.setdefault(layer.module, error)


def _learned_inputs(model: nn.Module) -> Iterator[Tensor]:
    """Parameters that may be repeated for every example and be layers' inputs: embeddings, class
    tokens, queries.
    """
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module.weight
        elif not has_blocks(module):
            yield from (
                p
                for name, p in module.named_parameters(recurse=False)
                if name not in ("weight", "bias")
            )


def _traced(value: Any, leaves: list[Tensor]) -> Any:
    """The same arguments, with tensors of floating-point numbers that autograd follows, and that
    may be overwritten.
    """
    if isinstance(value, Tensor):
        if type(value) is not Tensor or not value.is_floating_point() or value.is_nested:
            return value.clone() if type(value) is Tensor else value
        leaf = value.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()
    if type(value) in (list, tuple):
        return type(value)(_traced(item, leaves) for item in value)
    if type(value) is dict:
        return {key: _traced(item, leaves) for key, item in value.items()}
    return value
