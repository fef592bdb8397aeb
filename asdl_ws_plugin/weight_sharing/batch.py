"""The layers' operations in one batch: fed with inputs once, and with output gradients once a
backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from asdl.matrices import SHAPE_FULL, SHAPE_KFE, SHAPE_KRON, SHAPE_LAYER_WISE, SHAPE_SWIFT_KRON
from asdl.operations import (
    OP_BATCH_GRADS,
    OP_COV,
    OP_COV_DIAG,
    OP_COV_KFE,
    OP_COV_KRON,
    OP_COV_SWIFT_KRON,
    OP_COV_UNIT_WISE,
    OP_CVP,
    Operation,
    OperationContext,
)
from asdl.utils import record_original_requires_grad
from asdl.vector import ParamVector
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import factors
from .arrange import Arranged, arranged_input
from .blocks import LinearBlock, input_group, lent_to, parameters_of
from .capped import capped, identity, kernel_of, output_side
from .capture import Call, Layer, Record, last_nodes
from .errors import LayerError, LayerRuntimeError
from .operations import ExpandFactors
from .plan import Plan
from .ragged import Mask, Segments
from .send_back import receiving, send_back

__all__ = ["Batch"]

_OPERATIONS = {
    "full": OP_BATCH_GRADS,
    "layer_wise": OP_COV,
    "kron": OP_COV_KRON,
    "swift_kron": OP_COV_SWIFT_KRON,
    "kfe": OP_COV_KFE,
    "unit_wise": OP_COV_UNIT_WISE,
    "diag": OP_COV_DIAG,
}


class Batch:
    """Feeds the operations of one batch.

    Args:
        model: the model; carries what belongs to all layers (the full Fisher).
        plan: what is done with which layer.
        layers: the layers whose curvature is wanted.
        record: what they saw.
        arranged: how it is arranged.
        num_examples: N.
        scale: multiplies A, and everything if :attr:`scale` is not set to something else.
        fvp: compute Fisher-vector products with ``vec``.
        operations: layers' modules with operations other than the plan's.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        layers: Sequence[Layer],
        record: Record,
        arranged: Mapping[nn.Module, Arranged],
        num_examples: int,
        scale: Any,
        fvp: bool = False,
        vec: ParamVector | None = None,
        operations: Mapping[nn.Module, Operation] | None = None,
    ) -> None:
        self.model, self.layers, self.record, self.arranged = model, layers, record, arranged
        self.num_examples = num_examples
        self.scale_A = scale
        self.scale: Any = scale  # multiplies what the next backward passes bring
        self.fvp = fvp
        self.max_side, self.damps_in_place = plan.max_side, plan.damps_in_place
        self.context = OperationContext(vectors=vec)
        self._received: dict[nn.Module, list[Tensor | None]] = {}
        self._with_grads: set[nn.Module] = set()
        self._last: tuple[Tensor, set[Node]] | None = None
        _record_requires_grad(model, layers)
        for layer in layers:
            if layer.module in record.calls:
                operation = None if operations is None else operations[layer.module]
                self.context.register_operation(
                    layer.module, operation or _operation_of(layer, plan, model, fvp)
                )
        if not self.context.is_operation_registered(model):
            self.context.register_operation(model, Operation(model, []))

    def unseen(self) -> dict[nn.Module, str]:
        """The layers without curvature in this batch, and why."""
        reasons = {}
        for layer in self.layers:
            if layer.module not in self.record.calls:
                reason = self.record.absent.get(layer.module, "was not called")
                reasons[layer.module] = reason
            elif layer.module not in self._with_grads:
                reasons[layer.module] = (
                    "does not influence the logits, which are the model's first output unless "
                    "setup_logits_repr says otherwise, or those are not what the loss was given,"
                )
        return reasons

    def mean_positions(self) -> dict[nn.Module, float]:
        """How many positions an example has on average, of layers whose A is divided by that."""
        means = {}
        for layer in self.layers:
            calls = self.record.calls.get(layer.module)
            if calls is None or layer.shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON):
                continue
            if not isinstance(self.context.get_operation(layer.module), ExpandFactors):
                continue
            weight: Any = layer.module.weight
            ragged = self.arranged[layer.module].ragged
            rows = sum(call.out_shape.numel() for call in calls) / weight.shape[0]
            count = rows if ragged is None else ragged.num_positions
            means[layer.module] = count / self.num_examples
        return means

    # --------------------------------------------------------------------------------------- inputs

    @torch.no_grad()
    @factors.full_precision()
    def take_inputs(self) -> None:
        """Hand every layer's inputs to its operation, which computes what needs nothing else."""
        shared = _SharedFactors(self.damps_in_place)
        for layer in self.layers:
            calls = self.record.calls.get(layer.module)
            if calls is None:
                continue
            operation: Any = self.context.get_operation(layer.module)
            arranged = self.arranged[layer.module]
            key = _input_key(layer, calls, arranged, operation)
            parts = [
                arranged_input(layer, call, how, operation, len(calls) == 1)
                for call, how in zip(calls, arranged.calls, strict=True)
            ]
            in_data, scale = arranged.join(parts), 1.0
            if arranged.ragged is not None:
                if layer.shape == SHAPE_KFE:
                    raise LayerError(
                        layer.name, "the shape 'kfe' is not supported for ragged positions"
                    )
                in_data, scale = operation.ragged_in_data(in_data, arranged.ragged)
            if isinstance(layer.module, nn.Embedding):
                in_data = in_data.squeeze(-1)
            operation.set_cov_scale(self.scale_A * scale)
            shared.compute(key, layer.module, operation, in_data)
            for call in calls:
                call.release_input()

    # ----------------------------------------------------------------------------- output gradients

    def take_output_grads(
        self, outputs: Tensor, grad_outputs: Tensor | None, retain_graph: bool
    ) -> None:
        """One backward pass that stops at the layers' outputs: no weight gradient is computed."""
        if not outputs.requires_grad:
            raise RuntimeError(
                "The logits do not depend on any parameter that requires a gradient."
            )
        calls = self._calls()
        if self._last is None or self._last[0] is not outputs:
            self._last = outputs, last_nodes(outputs, {call.edge.node for _, call in calls})
        with _naming_reentrant(self.layers, self.record):
            send_back(outputs, grad_outputs, calls, self._receive, self._last[1], retain_graph)

    def taking_output_grads(self) -> contextlib.AbstractContextManager[None]:
        """Take the gradients of the layers' outputs out of a backward pass as it gets there."""
        return receiving(self._calls(), self._receive)

    def _calls(self) -> list[tuple[tuple[Layer, int], Call]]:
        """Every call, by its layer and its number among those of the layer."""
        return [
            ((layer, i), call)
            for layer in self.layers
            for i, call in enumerate(self.record.calls.get(layer.module, ()))
        ]

    def _receive(self, key: tuple[Layer, int], grad: Tensor | None) -> None:
        layer, i = key
        module = layer.module
        calls = self.record.calls[module]
        if len(calls) == 1:
            if grad is not None:
                self.take_grads_of(layer, [grad])
            return
        received = self._received.setdefault(module, [None] * len(calls))
        received[i] = grad

    def end_of_pass(self) -> None:
        """Process layers that were called several times, and the full Fisher, after a backward
        pass.
        """
        for layer in self.layers:
            received = self._received.pop(layer.module, None)
            if received is not None and any(grad is not None for grad in received):
                self.take_grads_of(layer, _completed(received, self.record.calls[layer.module]))
        if self.fvp:
            self.context.calc_full_cvp(self.model, scale=self.scale)
        else:
            self.context.calc_full_cov(self.model, scale=self.scale)
        self.context.clear_batch_grads()

    @torch.no_grad()
    def take_grads_of(self, layer: Layer, grads: list[Tensor]) -> None:
        """Hand the output gradients of a layer's calls to its operation."""
        module = layer.module
        operation: Any = self.context.get_operation(module)
        arranged = self.arranged[module]
        parts = [
            how.apply(how.features_last(grad.detach().reshape(call.out_shape)))
            for grad, call, how in zip(
                grads, self.record.calls[module], arranged.calls, strict=True
            )
        ]
        out_grads = arranged.join(parts)
        if arranged.ragged is not None:
            out_grads = operation.ragged_out_grads(out_grads, arranged.ragged)
        operation.set_cov_scale(self.scale)
        vectors = self.context.get_vectors_by_module(module, flatten=True) if self.fvp else None
        operation.backward_pre_process(out_grads, vectors)
        self._with_grads.add(module)

    def take_identity(self) -> None:
        """``fisher_forward_only``: B is the identity, summed over the examples."""
        for layer in self.layers:
            if layer.module not in self.record.calls:
                continue
            weight: Any = layer.module.weight
            B = identity(
                weight.shape[0],
                output_side(self.max_side, kernel_of(layer.module)),
                device=weight.device,
                dtype=factors.accumulation_dtype(weight.dtype),
            )
            operation = self.context.get_operation(layer.module)
            operation.accumulate_result(B.mul_(self.num_examples * self.scale), OP_COV_KRON, "B")
            self._with_grads.add(layer.module)


def _record_requires_grad(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Note of every Parameter, and of the views that stand for some, whether it is trained:
    upstream's operations ask for it.
    """
    blocks = (p for layer in layers for p in parameters_of(layer.module))
    for p in (*model.parameters(), *blocks):
        record_original_requires_grad(p)


def _operation_of(layer: Layer, plan: Plan, model: nn.Module, fvp: bool) -> Operation:
    """The operation that computes the layer's curvature, or its Fisher-vector products."""
    name = _OPERATIONS[layer.shape]
    if fvp:
        if layer.shape not in (SHAPE_FULL, SHAPE_LAYER_WISE):
            raise ValueError(
                f"Fisher-vector products are for 'full' and 'layer_wise', not '{layer.shape}'."
            )
        if isinstance(layer.module, LinearBlock) or lent_to(layer.module):
            raise LayerError(
                layer.name,
                "there are no Fisher-vector products for a layer whose weight or bias is another "
                "module's, as convert(model) makes them: a vector has one part for each Parameter",
                f"Use revert(model), or leave the layer out with ignore_modules=['{layer.name}'].",
            )
        name = OP_CVP if layer.shape == SHAPE_LAYER_WISE else name
    operation_class = plan.operation_of(layer)
    if name not in operation_class.supported_operations:
        raise LayerError(
            layer.name,
            f"does not support the shape '{layer.shape}'",
            kind=type(layer.module).__name__,
        )
    operation = operation_class(layer.module, [name], model_for_kernel=model)
    operation.layer_name = layer.name
    if plan.max_side is not None and operation.splits:
        # The input features of a convolution are its kernels, channel by channel.
        kernel = kernel_of(layer.module)
        operation.cov_kron_A = capped(operation.cov_kron_A, plan.max_side, kernel)
        operation.cov_kron_B = capped(operation.cov_kron_B, output_side(plan.max_side, kernel))
    return operation


@contextlib.contextmanager
def _naming_reentrant(layers: Sequence[Layer], record: Record) -> Iterator[None]:
    """Say which layer ran under reentrant activation checkpointing, if autograd refuses it."""
    try:
        yield
    except RuntimeError as error:
        hidden = [layer.name for layer in layers if layer.module in record.without_graph]
        if not hidden or "use_reentrant" not in str(error):
            raise
        raise LayerRuntimeError(
            hidden[0],
            "it ran under reentrant activation checkpointing",
            "Use checkpoint(..., use_reentrant=False).",
        ) from error


def _completed(received: list[Tensor | None], calls: Sequence[Call]) -> list[Tensor]:
    """Zeros for the calls that no gradient reached in this pass."""
    some = next(grad for grad in received if grad is not None)
    return [
        some.new_zeros(call.out_shape) if grad is None else grad
        for call, grad in zip(calls, received, strict=True)
    ]


# ------------------------------------------------------------------------------------------ one A


def _input_key(layer: Layer, calls: Sequence[Call], arranged: Arranged, operation: Any) -> Any:
    """Equal for layers that saw one and the same tensor, as queries, keys and values do; ``None``:
    alone.
    """
    ragged = arranged.ragged
    if (
        len(calls) > 1
        or layer.shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON)
        or not operation.shares_A
        or isinstance(ragged, Segments)
    ):
        return None
    x = calls[0].unmodified_input(layer.name)
    mask = ragged.mask.data_ptr() if isinstance(ragged, Mask) else None
    return (
        type(operation),
        x.data_ptr(),
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        arranged.calls[0].layout,
        mask,
    )


class _SharedFactors:
    """The A of each input, computed once for all layers that saw it."""

    def __init__(self, damps_in_place: bool) -> None:
        self._damps_in_place = damps_in_place
        self._by_input: dict[Any, Tensor] = {}
        self._by_group: dict[Any, Tensor] = {}

    def compute(self, key: Any, module: nn.Module, operation: Operation, in_data: Tensor) -> None:
        """Let the operation take its input, or an A that is known already."""
        if key is not None and key in self._by_input:
            operation.accumulate_result(self._copy(key, module), OP_COV_KRON, "A")
            return
        operation.forward_post_process(in_data, None)
        if key is not None:
            A = self._by_input[key] = operation.get_result(OP_COV_KRON, "A")
            self._by_group[key, input_group(module)] = A

    def _copy(self, key: Any, module: nn.Module) -> Tensor:
        """One tensor for all; where factors are damped in place, for all blocks of a layer alone,
        and a copy for everybody else, whose damping is of another size.
        """
        if not self._damps_in_place:
            return self._by_input[key]
        group = input_group(module)
        if group is None:
            return self._by_input[key].clone()
        if (key, group) not in self._by_group:
            self._by_group[key, group] = self._by_input[key].clone()
        return self._by_group[key, group]
