"""The exact block of a layer, and the passes over a batch that add it up beside its Kronecker
factors.

Both are sums over examples and loss terms of the same output gradients. What they are compared for,
and which layers are, is the business of :mod:`~asdl_ws_plugin.exactness`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig
from asdl.operations import OP_COV_KRON, Operation
from asdl.symmatrix import Kron
from torch import Tensor, nn

from ..weight_sharing import factors
from ..weight_sharing.arrange import arrange
from ..weight_sharing.batch import Batch
from ..weight_sharing.blocks import LinearBlock
from ..weight_sharing.capture import Captured, Layer
from ..weight_sharing.errors import LayerError, layer_message
from ..weight_sharing.fisher_maker import (
    check_captured,
    check_config,
    declared_reduction,
    read,
    recording_of,
)
from ..weight_sharing.live import live_record
from ..weight_sharing.observe_loss import LossObserver, loss_and_count
from ..weight_sharing.operate import exact_passes
from ..weight_sharing.operations import WeightSharingOperation, completed
from ..weight_sharing.plan import Plan
from ..weight_sharing.probe import counted
from ..weight_sharing.ragged import Ragged
from ..weight_sharing.registry import find_operation

__all__ = ["Comparison", "ExactBlock"]

# Gradients of examples are added to the block this many at a time, and a block is compared in parts
# of this many numbers: few enough to be small beside a block of 10,000 weights, enough to be fast.
_ROWS = 256
_PART_NUMEL = 1 << 20


class ExactBlock:
    """The exact block of one layer and its approximations, as sums over examples and terms."""

    def __init__(self, layer: Layer, compare: tuple[str, ...]) -> None:
        self.layer, self.compare = layer, compare
        weight: Any = layer.module.weight
        self.sizes = (weight.shape[0], weight[0].numel())
        options: dict[str, Any] = {
            "dtype": factors.accumulation_dtype(weight.dtype),
            "device": weight.device,
        }
        numel = weight.numel()
        self.exact = torch.zeros(numel, numel, **options)
        self.A = {name: torch.zeros(self.sizes[1], self.sizes[1], **options) for name in compare}
        self.B = {name: torch.zeros(self.sizes[0], self.sizes[0], **options) for name in compare}
        self.grad = torch.zeros(numel, **options)
        self.grad_of_calls = torch.zeros(numel, **options)
        self.unseen = ""
        self._buffer = torch.empty(min(_ROWS, numel), numel, **options)
        self._filled = 0
        self.contributions = 0

    def add(self, grads: Tensor) -> None:
        """Add ``Σ_n g_n g_nᵀ`` for the rows of ``grads``, ``(n, QP)``; their sum is delayed until
        there are many.
        """
        self.contributions += 1
        while len(grads):
            room = min(len(self._buffer) - self._filled, len(grads))
            part, grads = grads.split([room, len(grads) - room])
            self._buffer[self._filled : self._filled + room] = part
            self._filled += room
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Add the rows that were buffered to the block."""
        rows = self._buffer[: self._filled]
        self.exact.addmm_(rows.mT, rows)
        self._filled = 0

    def why_not(self) -> str | None:
        """Why there is nothing to compare."""
        if not self.contributions:
            return f"it {self.unseen or 'took no part'}"
        self.flush()
        if not bool(self.exact.diagonal().any()):
            return "its exact block is zero"
        scale = torch.maximum(self.grad.norm(), self.grad_of_calls.norm())
        if bool(
            (self.grad - self.grad_of_calls).norm()
            > scale * torch.finfo(self.grad.dtype).eps ** 0.5
        ):
            return (
                "its calls do not make up the gradient of its weight, which is also used without "
                "calling it. asdl_ws_plugin.convert(model) may help"
            )
        return None

    def compared(
        self, num_examples: int, num_terms: float, damping: float | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Errors and cosines by strategy. Uses up :attr:`exact`, of which a second copy may not fit
        into memory.
        """
        exact = self.exact.div_(num_terms)
        krons = {
            name: Kron(self.A[name] / num_examples, self.B[name] / num_terms)
            for name in self.compare
        }
        errors = {name: _relative_error(kron.A, kron.B, exact) for name, kron in krons.items()}
        cosines: dict[str, float] = {}
        if damping is None:
            return errors, cosines
        try:
            best = _solved_in_place(exact, self.grad, damping)
            for name, kron in krons.items():
                kron.update_inv(damping)
                cosines[name] = math.nan
                if kron.has_inv and bool(self.grad.any()):
                    preconditioned = (
                        kron.B_inv @ self.grad.view(self.sizes) @ kron.A_inv
                    ).flatten()
                    cosines[name] = F.cosine_similarity(preconditioned, best, dim=0, eps=0.0).item()
        except torch.linalg.LinAlgError as error:
            raise torch.linalg.LinAlgError(
                layer_message(
                    self.layer.name,
                    f"a matrix plus damping {damping} is not positive definite",
                    f"Increase damping, or use the model in double precision. ({error})",
                )
            ) from error
        return errors, cosines


def _relative_error(A: Tensor, B: Tensor, exact: Tensor) -> float:
    """``‖B ⊗ A - exact‖ / ‖exact‖`` without the Kronecker product: some of its rows at a time."""
    P, Q = len(A), len(B)
    rows = exact.view(Q, P, Q, P)
    difference = total = 0.0
    for q in range(0, Q, max(1, _PART_NUMEL // (P * Q * P))):
        part = rows[q : q + max(1, _PART_NUMEL // (P * Q * P))]
        total += part.square().sum(dtype=torch.float64).item()
        kron = B[q : q + len(part), None, :, None] * A[None, :, None, :]  # (b ⊗ a): q p q' p'
        difference += kron.sub_(part).square_().sum(dtype=torch.float64).item()
    return math.sqrt(difference / total)


def _solved_in_place(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    """``(matrix + damping)⁻¹ vector`` by a Cholesky factor in the place of ``matrix``, which is
    symmetric.
    """
    matrix.diagonal().add_(damping)
    lower = matrix.mT  # LAPACK's order of a matrix: nothing is copied
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info):
        raise torch.linalg.LinAlgError(
            f"The leading minor of order {int(info)} of the exact block is not positive."
        )
    x = torch.linalg.solve_triangular(lower, vector.unsqueeze(1), upper=False)
    return torch.linalg.solve_triangular(lower.mT, x, upper=True).squeeze(1)


# ---------------------------------------------------------------------------------------- one batch


class _Collector(WeightSharingOperation, Operation):
    """Hands a layer's arranged tensors in one batch to the operations of the strategies and to its
    exact block.
    """

    def __init__(self, block: ExactBlock) -> None:
        module: Any = block.layer.module
        super().__init__(module, [])
        self.block = block
        self.operations: dict[str, Any] = {}
        for name in block.compare:
            operation = find_operation(module, name)
            if operation is None:
                raise LayerError(block.layer.name, f"there is no operation for it under '{name}'")
            made: Any = completed(operation, type(module))(module, [OP_COV_KRON])
            made.layer_name = block.layer.name
            self.operations[name] = made
        self.is_ragged = False
        self.of_loss = False  # the output gradients that come next are those of the loss

    def ragged_in_data(self, in_data: Tensor, ragged: Ragged) -> tuple[Tensor, float]:
        self.is_ragged = True
        for operation in self.operations.values():
            x, scale = operation.ragged_in_data(in_data, ragged)
            operation.set_cov_scale(scale)
            operation.forward_post_process(x, None)
        return ragged.pad(in_data), 1.0

    def ragged_out_grads(self, out_grads: Tensor, ragged: Ragged) -> Tensor:
        if not self.of_loss:
            for operation in self.operations.values():
                self._take_grads(operation, operation.ragged_out_grads(out_grads, ragged))
        return ragged.pad(out_grads)

    def forward_post_process(self, in_data: Tensor, out_data: Any) -> None:
        if not self.is_ragged:
            for operation in self.operations.values():
                operation.set_cov_scale(1.0)
                operation.forward_post_process(in_data, None)
        is_image = isinstance(self._module, nn.Conv2d) and in_data.ndim == 4
        self.in_data = factors.patches(in_data, self._module) if is_image else in_data

    def backward_pre_process(self, out_grads: Tensor, vector: Any = None) -> None:
        block = self.block
        if self.of_loss:
            for a, b in self._parts(out_grads):
                block.grad_of_calls += factors.per_example_grads(a, b).sum(0).flatten()
            return
        if not self.is_ragged:
            for operation in self.operations.values():
                self._take_grads(operation, out_grads)
        for a, b in self._parts(out_grads):
            block.add(factors.per_example_grads(a, b).flatten(1))

    def _parts(self, out_grads: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and output gradients of a few examples at a time."""
        yield from zip(self.in_data.split(_ROWS), out_grads.split(_ROWS), strict=True)

    @staticmethod
    def _take_grads(operation: Operation, out_grads: Tensor) -> None:
        operation.set_cov_scale(1.0)
        operation.backward_pre_process(out_grads)

    def finish(self) -> None:
        """Add the factors to the block's."""
        for name, operation in self.operations.items():
            result = operation.get_result(OP_COV_KRON, pop=True, default={})
            if "B" in result:
                self.block.A[name] += result["A"]
                self.block.B[name] += result["B"]


class Comparison:
    """The exact Fisher's passes over batches, into blocks instead of the modules' curvature.

    Args:
        model: the model.
        config: what a gradient maker would be given; its layers are those that are compared.
        compare: the strategies.

    Attributes:
        blocks: one for each layer, by module.
        num_examples, num_terms: of all batches.
    """

    def __init__(self, model: nn.Module, config: FisherConfig, compare: tuple[str, ...]) -> None:
        check_config(model, config)
        self.model, self.config = model, config
        self.plan = Plan(model, config.fisher_shapes, config.shared_dim, config.ignore_modules)
        self.blocks = {layer.module: ExactBlock(layer, compare) for layer in self.plan.layers}
        self.num_examples, self.num_terms = 0, 0.0

    def add(
        self, logits: Callable[[Any], Any], loss: Any, args: Any, kwargs: Any, targets: Any
    ) -> None:
        """Add a batch to the blocks.

        Args:
            logits: takes them out of the model's output.
            loss: a function of logits and targets.
            args, kwargs: those of the model.
        """
        captured = self._capture(logits, loss, args, kwargs, targets)
        if not captured.record.calls:
            return
        config, layers = self.config, self.plan.layers
        check_captured(captured, config.fisher_type, self.plan)
        reading = read(captured, self.plan, config, has_data_size=True)
        count, evidence = counted(self.plan, layers, captured)
        self.plan.decide(reading.num_rows, count.num_logits_of_examples)
        outputs = reading.source.logits
        record = live_record(captured.record, layers, outputs, self.plan.layouts.without_batch)
        arranged = arrange(self.plan, layers, record, count, evidence)
        collectors = {module: _Collector(block) for module, block in self.blocks.items()}
        batch = Batch(
            self.model,
            self.plan,
            layers,
            record,
            arranged,
            count.num_examples,
            1.0,
            operations=collectors,
        )
        captured = replace(captured, record=record)
        self.num_examples += count.num_examples
        with factors.full_precision():
            batch.take_inputs()
            self._add_gradients(batch, collectors, captured, float(reading.num_terms))
            exact_passes(batch, captured, reading, count)
        for module, reason in batch.unseen().items():
            self.blocks[module].unseen = reason
        for collector in collectors.values():
            collector.finish()

    def _capture(
        self, logits: Callable[[Any], Any], loss: Any, args: Any, kwargs: Any, targets: Any
    ) -> Captured:
        with recording_of(self.plan) as record:
            output = logits(self.model(*args, **kwargs))
        with LossObserver() as observer:
            value, num_terms = loss_and_count(loss(output, targets))
        if not record.calls:
            for layer in self.plan.layers:
                no_graph = layer.module in record.without_graph
                self.blocks[layer.module].unseen = (
                    "ran without an autograd graph" if no_graph else "was not called"
                )
        first = output[0] if isinstance(output, (tuple, list)) else output
        return Captured(
            record,
            first,
            value,
            observer.observations,
            [args, kwargs],
            declared_reduction(loss),
            num_terms,
        )

    def _add_gradients(
        self,
        batch: Batch,
        collectors: Mapping[nn.Module, _Collector],
        captured: Captured,
        num_terms: float,
    ) -> None:
        """Add the gradients of the summed loss: of the weights, and as the layers' calls make them
        up.
        """
        assert captured.loss is not None
        self.num_terms += num_terms
        modules = [layer.module for layer in batch.layers]
        held: list[Any] = [
            m.owned("weight") if isinstance(m, LinearBlock) else m.weight for m in modules
        ]
        grads = torch.autograd.grad(captured.loss, held, retain_graph=True, allow_unused=True)
        for module, grad in zip(modules, grads, strict=True):
            if grad is not None:
                part = module.part("weight", grad) if isinstance(module, LinearBlock) else grad
                self.blocks[module].grad.add_(part.flatten(), alpha=num_terms)
        for collector in collectors.values():
            collector.of_loss = True
        batch.take_output_grads(captured.loss * num_terms, None, retain_graph=True)
        batch.end_of_pass()
        for collector in collectors.values():
            collector.of_loss = False
