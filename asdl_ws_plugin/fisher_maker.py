"""The curvature of one batch: one forward pass, its gradient, and the factors of every layer.

Data flows one way: the tensors that :mod:`~asdl_ws_plugin.capture` recorded are brought into one layout, handed to
the layers' operations, and become the modules' ``fisher`` at the very end. A step that fails anywhere leaves nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from asdl.fisher import FisherConfig, FisherMaker
from asdl.matrices import FISHER_EMP, FISHER_EXACT, FISHER_MC, SHAPE_FULL, SHAPE_KFE, SHAPE_LAYER_WISE
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
from asdl.symmatrix import SymMatrix
from asdl.utils import record_original_requires_grad
from asdl.vector import ParamVector
from torch import Tensor, nn

from . import factors
from .capture import Call, Layer, Record, recording
from .layout import examples_first, infer_num_examples, leading_sizes
from .loss import (
    LOSS_TYPES,
    LossObserver,
    LossTerms,
    exact_output_grads,
    read_loss,
    sampled_output_grads,
)
from .matrices import corrected, merge, tensors
from .plan import Plan
from .rules import BATCH_FIRST, SEQUENCE_FIRST

__all__ = ["FISHER_FORWARD_ONLY", "WeightSharingFisherMaker"]

FISHER_FORWARD_ONLY = "fisher_forward_only"
FISHER_TYPES = (FISHER_EXACT, FISHER_MC, FISHER_EMP, FISHER_FORWARD_ONLY)

_INVALID_DATA_SIZE = -1  # upstream's mark for "not given"
_OPERATIONS = {
    "full": OP_BATCH_GRADS,
    "layer_wise": OP_COV,
    "kron": OP_COV_KRON,
    "swift_kron": OP_COV_SWIFT_KRON,
    "kfe": OP_COV_KFE,
    "unit_wise": OP_COV_UNIT_WISE,
    "diag": OP_COV_DIAG,
}


class WeightSharingFisherMaker(FisherMaker):
    """Computes the Fisher information of a model whose layers share weights over positions.

    A drop-in for the makers of ``asdl.fisher``; :func:`asdl.get_fisher_maker` returns it for a configuration with
    ``shared_dim``. Supports ``fisher_exact``, ``fisher_mc``, ``fisher_emp`` and ``fisher_forward_only``, for
    ``cross_entropy``, ``mse`` and ``binary_cross_entropy`` with logits ``(N, C)`` or ``(N, *, C)``.

    Args:
        model: the model.
        config: ``config.shared_dim`` is a strategy or a list of rules (see :class:`~asdl_ws_plugin.plan.Plan`);
            ``config.var`` a number, or a tensor ``(C,)`` or ``(C, C)``: the covariance of the Gaussian likelihood.

    Attributes:
        plan: the layers and what is done with them.
        unseen: the layers that took no part in the last batch, with the reason.

    Raises:
        TypeError, ValueError: the configuration is invalid.
    """

    _loss_reduction = None  # the user's loss is evaluated as it is

    def __init__(self, model: nn.Module, config: FisherConfig) -> None:
        super().__init__(model, config)
        if config.fisher_type not in FISHER_TYPES:
            raise ValueError(f"fisher_type has to be one of {', '.join(FISHER_TYPES)}, got {config.fisher_type!r}.")
        if config.fisher_type != FISHER_EMP and config.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type has to be one of {', '.join(LOSS_TYPES)}, got {config.loss_type!r}.")
        if config.n_mc_samples < 1:
            raise ValueError(f"n_mc_samples has to be at least 1, got {config.n_mc_samples!r}.")
        self.plan = Plan(
            model, config.fisher_shapes, config.shared_dim, config.ignore_modules,
            kronecker_only=config.fisher_type == FISHER_FORWARD_ONLY,
        )
        if not self.plan.layers:
            raise ValueError("The model has no layer whose curvature could be computed.")
        several_passes = config.fisher_type == FISHER_EXACT or (
            config.fisher_type == FISHER_MC and config.n_mc_samples > 1
        )
        if several_passes and any(layer.shape == SHAPE_KFE for layer in self.plan.layers):
            raise ValueError("The shape 'kfe' needs a single backward pass: fisher_emp, or fisher_mc with one sample.")
        self.unseen: dict[nn.Module, str] = {}
        # Set by the gradient maker: what the accumulated curvature is multiplied with before the new one is added.
        self.decay = 1.0
        self._reported: set[str] = set()

    @property
    def is_fisher_emp(self) -> bool:
        return self.config.fisher_type == FISHER_EMP

    @property
    def do_local_accumulate(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------------------ one batch

    def forward_and_backward(
        self,
        data_size: int = _INVALID_DATA_SIZE,
        scale: float | None = None,
        accumulate: bool = False,
        calc_loss_grad: bool = False,
        calc_inv: bool = False,
        fvp: bool = False,
        damping: float | None = None,
        vec: ParamVector | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Compute the curvature of a batch, and with ``calc_loss_grad`` the gradient of the loss.

        Args:
            data_size: D, the number of examples the curvature is averaged over. Left out, it is the curvature of the
                loss that was passed (contract, section 2).
            scale: multiplies every matrix; the Kronecker factors are multiplied with it each.
            accumulate: add to the curvature of earlier batches.
            calc_loss_grad: also accumulate the gradient of the loss, as it was passed, into ``.grad``.
            calc_inv: replace the curvature by its damped inverse.
            fvp: compute the Fisher-vector product with ``vec`` instead.
            damping: added to the diagonal before inverting.

        Returns:
            The model's output and the loss (``None`` if neither the gradient nor the Fisher type needs it).

        Raises:
            ValueError: the batch is empty; a layer's input fits no layout; logits and loss do not go together.
            FloatingPointError: the loss or a factor is not finite.
            RuntimeError: no layer's hook fired.
        """
        if accumulate and calc_inv:
            raise ValueError("accumulate and calc_inv cannot be True at the same time.")
        if fvp and calc_inv:
            raise ValueError("fvp and calc_inv cannot be True at the same time.")
        config, plan = self.config, self.plan
        data_size = config.data_size if data_size == _INVALID_DATA_SIZE else data_size
        scale = config.scale if scale is None else scale
        has_loss = self._loss_fn is not None or self._dummy_loss is not None
        if (self.is_fisher_emp or calc_loss_grad) and not has_loss:
            raise ValueError("No loss is set. Call setup_loss_call() or setup_loss_repr() first.")

        layers = plan.layers
        record, loss, observations = self._forward(layers, has_loss)
        logits = self._logits
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"The logits have to be a tensor, got {type(logits).__name__}. Select them with setup_logits_repr."
            )
        if logits.numel() == 0:
            raise ValueError(f"The batch is empty: the logits have sizes {tuple(logits.shape)}.")
        if loss is not None and not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(f"The loss is {loss.detach().cpu().tolist()}; nothing was updated.")
        if not record.calls:
            raise RuntimeError(self._nothing_seen(layers, record))

        loss_type = None if self.is_fisher_emp else config.loss_type
        terms = read_loss(loss, observations, logits, loss_type, self._declared_reduction())
        num_examples = self._num_examples(layers, record)
        plan.decide(terms.num_rows, num_examples)
        if data_size == _INVALID_DATA_SIZE:
            if loss is None:
                raise ValueError("data_size is not specified, and there is no loss to tell it from.")
            scale_A, scale_B = scale / num_examples, scale / terms.num_terms
        else:
            scale_A = scale_B = scale / data_size
        if config.fisher_type == FISHER_FORWARD_ONLY:
            scale_B = scale_A

        self._record_requires_grad()
        batch = _Batch(self, layers, record, num_examples, scale_A, fvp=fvp, vec=vec)
        batch.take_inputs()
        self._backward(batch, terms, loss, scale_B, calc_loss_grad)
        self.unseen = batch.unseen()
        self._report_unseen(layers, record)
        self._commit(batch, accumulate, fvp)
        if calc_inv:
            self._invert(layers, damping)
        return self._model_output, loss if self.is_fisher_emp or calc_loss_grad else None

    def _forward(self, layers: list[Layer], has_loss: bool) -> tuple[Record, Tensor | None, list[Any]]:
        loss, observer = None, LossObserver()
        # A loss given by its representation may have been computed inside of the model.
        watch = observer if self._loss_fn is None and has_loss else contextlib.nullcontext()
        with recording(layers, self.plan.check_call) as record, watch:
            self.call_model()
        if has_loss:
            with observer:
                loss = self.call_loss()
        return record, loss, observer.observations

    def _backward(
        self, batch: _Batch, terms: LossTerms, loss: Tensor | None, scale_B: Any, calc_loss_grad: bool
    ) -> None:
        config = self.config
        if self.is_fisher_emp:
            assert loss is not None
            batch.scale = scale_B * terms.sum_factor**2
            if calc_loss_grad:
                with batch.taking_output_grads():
                    loss.backward()
            else:
                batch.take_output_grads(loss, None, retain_graph=False)
            batch.end_of_pass()
            return
        if config.fisher_type == FISHER_FORWARD_ONLY:
            batch.scale = scale_B
            batch.identity_output_grads()
        elif config.fisher_type == FISHER_MC:
            generator = None
            if config.seed is not None:
                generator = torch.Generator(terms.logits.device).manual_seed(int(config.seed))
            batch.scale = scale_B / config.n_mc_samples
            for i in range(config.n_mc_samples):
                grads = sampled_output_grads(terms, config.loss_type, config.var, generator)
                last = i == config.n_mc_samples - 1
                batch.take_output_grads(terms.logits, grads, retain_graph=calc_loss_grad or not last)
                batch.end_of_pass()
        else:
            batch.scale = scale_B
            position, num_positions = self._positions(terms, batch)
            for grads in exact_output_grads(terms, config.loss_type, position, num_positions, config.var):
                batch.take_output_grads(terms.logits, grads, retain_graph=True)
                batch.end_of_pass()
        if calc_loss_grad:
            assert loss is not None
            loss.backward()

    # ---------------------------------------------------------------------------------- reading the batch

    def _declared_reduction(self) -> str | None:
        function = self._loss_fn
        reduction = self._loss_fn_kwargs.get("reduction", getattr(function, "reduction", None))
        if reduction is None and isinstance(function, partial):
            reduction = function.keywords.get("reduction", getattr(function.func, "reduction", None))
        return reduction

    def _num_examples(self, layers: list[Layer], record: Record) -> int:
        logits = self._logits
        book = self.plan.layouts
        declared = [
            call.unmodified_input(layer.name)
            for layer in layers
            if book.rule.get(layer.module, book.declared.get(layer.module)) == SEQUENCE_FIRST
            for call in record.calls.get(layer.module, ())
        ]
        sequence_first = next((tuple(x.shape[:-1]) for x in declared if x.ndim > 2), None)
        inputs = leading_sizes([self._model_args, self._model_kwargs])
        return infer_num_examples(logits.shape[:-1] or logits.shape, inputs, sequence_first)

    def _positions(self, terms: LossTerms, batch: _Batch) -> tuple[Tensor, int]:
        """The position of every loss term within its example, and the number of positions."""
        logits = self._logits
        if logits.ndim == 1:
            logits = logits.unsqueeze(-1)
        num_examples = batch.num_examples
        sizes = logits.shape[:-1]
        rows = sizes.numel()
        ids = torch.arange(rows, device=logits.device)
        if sizes[0] % num_examples == 0 and not (len(sizes) > 1 and sizes[1] == num_examples != sizes[0]):
            position = ids % (rows // num_examples)
        elif len(sizes) > 1 and sizes[1] == num_examples:
            inner = sizes[2:].numel()
            position = ids // (num_examples * inner) * inner + ids % inner
        else:
            raise ValueError(f"Logits of sizes {tuple(logits.shape)} do not hold {num_examples} examples.")
        x = terms.logits.movedim(terms.class_dim, -1)
        if x.reshape(-1, x.shape[-1]).shape[0] == rows and x.data_ptr() == logits.data_ptr():
            return position, rows // num_examples
        # The loss selects or reorders rows: find out which by sending row numbers back through the selection.
        probe = torch.zeros_like(x)
        probe.view(-1, x.shape[-1])[:, 0] = torch.arange(1, x.numel() // x.shape[-1] + 1, device=x.device)
        (found,) = torch.autograd.grad(x, logits, probe, retain_graph=True)
        number = found.reshape(rows, -1)[:, 0].round().long()
        order = number[number > 0] - 1
        expected = torch.arange(len(order), device=order.device)
        if not torch.equal(order.sort().values, expected) or len(order) != x.numel() // x.shape[-1]:
            raise ValueError("fisher_exact needs a loss of logits that are rows of the model's logits.")
        selected = torch.empty_like(order)
        selected[order] = position[number > 0]
        return selected, rows // num_examples

    def _record_requires_grad(self) -> None:
        for p in self.model.parameters():  # upstream's operations ask for it
            record_original_requires_grad(p)

    def _nothing_seen(self, layers: list[Layer], record: Record) -> str:
        if record.without_graph:
            names = ", ".join(f"'{layer.name}'" for layer in layers if layer.module in record.without_graph)
            return (
                f"Every layer ({names}) ran without an autograd graph: under no_grad, or under reentrant activation "
                "checkpointing. For the latter use checkpoint(..., use_reentrant=False)."
            )
        return (
            f"None of the model's layers (the first is '{layers[0].name}') was called as a module, so no curvature can "
            "be computed. Is the model that was passed to setup_model_call another one than the gradient maker's, "
            "scripted by torch.jit, or does a fused fast path skip its modules?"
        )

    def _report_unseen(self, layers: list[Layer], record: Record) -> None:
        for layer in layers:
            reason = self.unseen.get(layer.module)
            if reason is None:
                continue
            if layer.module in record.without_graph and layer.module not in record.calls:
                grads = [p for p in layer.module.parameters() if p.grad is not None and p.requires_grad]
                reason = "ran without an autograd graph (no_grad, or reentrant activation checkpointing)"
                if grads:
                    raise RuntimeError(
                        f"Layer '{layer.name}' {reason}, but has a gradient. Use checkpoint(..., use_reentrant=False)."
                    )
            if layer.shape == SHAPE_FULL:
                raise RuntimeError(f"Layer '{layer.name}' {reason}; the full Fisher needs every layer of the model.")
            if layer.name not in self._reported:
                self._reported.add(layer.name)
                warnings.warn(
                    f"Layer '{layer.name}' {reason} in this step; its gradient is not preconditioned where that "
                    "happens. Leave it out with ignore_modules to silence this.",
                    stacklevel=4,
                )

    # ------------------------------------------------------------------------------------------ the results

    def _commit(self, batch: _Batch, accumulate: bool, fvp: bool) -> None:
        """Make the batch's matrices the modules' own, all or none."""
        attr = self.config.fvp_attr if fvp else self.config.fisher_attr
        results: list[tuple[nn.Module, Any]] = []
        context = batch.context
        for layer in batch.layers:
            if layer.module in self.unseen:
                continue
            if fvp:
                results.append((layer.module, context.cvp_paramvector(layer.module, pop=True)))
            else:
                results.append((layer.module, context.cov_symmatrix(layer.module, pop=True)))
        full = context.full_cvp_paramvector if fvp else context.full_cov_symmatrix
        results.append((self.model, full(self.model, pop=True)))
        results = [(module, result) for module, result in results if result is not None]
        if not fvp:
            results = [(module, corrected(matrix)) for module, matrix in results]
            self._check_finite(results, batch)
        if accumulate and not fvp:
            merged = []
            for module, new in results:
                old = getattr(module, attr, None)
                merged.append((module, new if old is None else merge(new, old, self.decay)))
            results = merged
        else:
            self.zero_fisher(fvp=fvp)
        for module, result in results:
            setattr(module, attr, result)

    def _check_finite(self, results: list[tuple[nn.Module, SymMatrix]], batch: _Batch) -> None:
        sums = [(module, tensor.sum()) for module, matrix in results for tensor in tensors(matrix)]
        if sums and bool(torch.isfinite(torch.stack([s.double() for _, s in sums])).all()):
            return
        for module, value in sums:
            if not bool(torch.isfinite(value)):
                name = next((layer.name for layer in batch.layers if layer.module is module), "")
                raise FloatingPointError(f"Layer '{name}': its curvature is not finite; nothing was updated.")

    def _invert(self, layers: list[Layer], damping: float | None) -> None:
        modules = [(layer.name, layer.module) for layer in layers] + [("", self.model)]
        for name, module in modules:
            matrix = getattr(module, self.config.fisher_attr, None)
            if matrix is None:
                continue
            try:
                matrix.update_inv(damping, replace=True)
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(
                    f"Layer '{name}': its curvature plus damping {damping} is not positive definite. ({error})"
                ) from error


class _Batch:
    """The operations of one batch, fed with inputs once and with output gradients once for every backward pass."""

    def __init__(
        self, maker: WeightSharingFisherMaker, layers: list[Layer], record: Record, num_examples: int, scale: Any,
        fvp: bool, vec: ParamVector | None,
    ) -> None:
        self.maker, self.layers, self.record = maker, layers, record
        self.num_examples = num_examples
        self.scale_A = scale
        self.scale: Any = scale
        self.fvp = fvp
        self.context = OperationContext(vectors=vec)
        self._layout: dict[nn.Module, list[str]] = {}
        self._received: dict[nn.Module, list[Tensor | None]] = {}
        self._with_grads: set[nn.Module] = set()
        model = maker.model
        for layer in layers:
            if layer.module in record.calls:
                self.context.register_operation(layer.module, self._operation(layer))
        if not self.context.is_operation_registered(model):
            self.context.register_operation(model, Operation(model, []))

    def _operation(self, layer: Layer) -> Operation:
        name = _OPERATIONS[layer.shape]
        if self.fvp:
            if layer.shape not in (SHAPE_FULL, SHAPE_LAYER_WISE):
                raise ValueError(f"Fisher-vector products are for 'full' and 'layer_wise', not '{layer.shape}'.")
            name = OP_CVP if layer.shape == SHAPE_LAYER_WISE else name
        operation_class = self.maker.plan.operation_of(layer)
        if name not in operation_class.supported_operations:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer.module).__name__}) does not support the shape '{layer.shape}'."
            )
        return operation_class(layer.module, [name], model_for_kernel=self.maker.model)

    def unseen(self) -> dict[nn.Module, str]:
        """The layers without curvature in this batch, and why."""
        reasons = {}
        for layer in self.layers:
            if layer.module not in self.record.calls:
                reasons[layer.module] = "was not called"
            elif layer.module not in self._with_grads:
                reasons[layer.module] = "does not influence the logits or the loss"
        return reasons

    # ---------------------------------------------------------------------------------------------- inputs

    def take_inputs(self) -> None:
        """Bring every layer's inputs into ``(N, R, P)`` and compute what needs nothing else."""
        with torch.no_grad():
            for layer in self.layers:
                calls = self.record.calls.get(layer.module)
                if calls is None:
                    continue
                operation = self.context.get_operation(layer.module)
                in_data = self._inputs(layer, calls, operation)
                operation.set_cov_scale(self.scale_A)
                operation.forward_post_process(in_data, None)
                for call in calls:
                    call.release_input()

    def _inputs(self, layer: Layer, calls: list[Call], operation: Operation) -> Tensor:
        module, n = layer.module, self.num_examples
        book = self.maker.plan.layouts
        parts, layouts = [], []
        for call in calls:
            x = call.unmodified_input(layer.name)
            if isinstance(module, nn.Embedding):
                x = x.unsqueeze(-1)
            if self.maker.plan.has_channels_first(module):
                x = self._batched_image(layer, x)
                if x.shape[0] % n:
                    raise ValueError(
                        f"Layer '{layer.name}': the first of its input's sizes {tuple(x.shape)} does not match the "
                        f"{n} examples of the batch."
                    )
                layouts.append(BATCH_FIRST)
                if not isinstance(module, nn.Conv2d):
                    x = examples_first(x.movedim(1, -1), n, BATCH_FIRST)
                elif len(calls) > 1:
                    x = examples_first(factors.patches(x, module), n, BATCH_FIRST)
                elif x.shape[0] != n:  # images merged into the batch
                    x = examples_first(operation.preprocess_in_data(module, x, None), n, BATCH_FIRST)
                parts.append(x)
                continue
            dims = _num_feature_dims(operation, module)
            if x.ndim == dims:  # a single example without a batch dimension
                x = x.unsqueeze(0)
            layout = book.resolve(layer.name, module, x.shape[:-dims], n)
            layouts.append(layout)
            parts.append(examples_first(x, n, layout, dims))
        self._layout[module] = layouts
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x.squeeze(-1) if isinstance(module, nn.Embedding) else x

    def _batched_image(self, layer: Layer, x: Tensor) -> Tensor:
        unbatched = 3 if isinstance(layer.module, (nn.Conv2d, nn.BatchNorm2d)) else 1
        return x.unsqueeze(0) if x.ndim == unbatched else x

    # ------------------------------------------------------------------------------------ output gradients

    def take_output_grads(self, outputs: Tensor, grad_outputs: Tensor | None, retain_graph: bool) -> None:
        """One backward pass that stops at the layers' outputs: no weight gradient is computed."""
        calls = [(layer, i, call) for layer in self.layers
                 for i, call in enumerate(self.record.calls.get(layer.module, ()))]
        if not outputs.requires_grad:
            raise RuntimeError("The logits do not depend on any parameter that requires a gradient.")
        grads: list[Tensor | None] = list(torch.autograd.grad(
            outputs, [call.edge for _, _, call in calls], grad_outputs, retain_graph=retain_graph, allow_unused=True
        ))
        for k, (layer, i, _) in enumerate(calls):
            grad, grads[k] = grads[k], None
            self._receive(layer, i, grad)

    @contextlib.contextmanager
    def taking_output_grads(self) -> Iterator[None]:
        """Take the gradients of the layers' outputs out of a backward pass that somebody else starts."""
        handles = []

        def hook(layer: Layer, i: int, output_nr: int) -> Callable[[tuple[Tensor | None, ...]], None]:
            return lambda grads: self._receive(layer, i, grads[output_nr])

        try:
            for layer in self.layers:
                for i, call in enumerate(self.record.calls.get(layer.module, ())):
                    node = call.edge.node
                    handles.append(node.register_prehook(hook(layer, i, call.edge.output_nr)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _receive(self, layer: Layer, i: int, grad: Tensor | None) -> None:
        module = layer.module
        calls = self.record.calls[module]
        if len(calls) == 1:
            if grad is not None:
                self._process(layer, [grad])
            return
        received = self._received.setdefault(module, [None] * len(calls))
        received[i] = grad

    def end_of_pass(self) -> None:
        """Process layers that were called several times, and the full Fisher, after a backward pass."""
        for layer in self.layers:
            received = self._received.pop(layer.module, None)
            if received is not None and any(grad is not None for grad in received):
                calls = self.record.calls[layer.module]
                self._process(layer, [
                    next(g for g in received if g is not None).new_zeros(call.out_shape) if grad is None else grad
                    for call, grad in zip(calls, received, strict=True)
                ])
        model = self.maker.model
        if self.fvp:
            self.context.calc_full_cvp(model, scale=self.scale)
        else:
            self.context.calc_full_cov(model, scale=self.scale)
        self.context.clear_batch_grads()

    def _process(self, layer: Layer, grads: list[Tensor]) -> None:
        module, n = layer.module, self.num_examples
        operation = self.context.get_operation(module)
        with torch.no_grad():
            parts = []
            for grad, call, layout in zip(
                grads, self.record.calls[module], self._layout[module], strict=True
            ):
                grad = grad.detach().reshape(call.out_shape)
                if self.maker.plan.has_channels_first(module):
                    grad = self._batched_image(layer, grad).movedim(1, -1)
                dims = _num_feature_dims(operation, module)
                grad = grad.unsqueeze(0) if grad.ndim == dims else grad
                parts.append(examples_first(grad, n, layout, dims))
            out_grads = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            operation.set_cov_scale(self.scale)
            operation.backward_pre_process(
                out_grads, self.context.get_vectors_by_module(module, flatten=True) if self.fvp else None
            )
            self._with_grads.add(module)

    def identity_output_grads(self) -> None:
        """``fisher_forward_only``: B is the identity, summed over the examples."""
        for layer in self.layers:
            if layer.module not in self.record.calls:
                continue
            weight: Any = layer.module.weight
            identity = torch.eye(
                weight.shape[0], device=weight.device, dtype=factors.accumulation_dtype(weight.dtype)
            )
            operation = self.context.get_operation(layer.module)
            operation.accumulate_result(identity.mul_(self.num_examples * self.scale), OP_COV_KRON, "B")
            self._with_grads.add(layer.module)


def _num_feature_dims(operation: Operation, module: nn.Module) -> int:
    """How many trailing dimensions of a layer's tensors are features; one for a user's operation that does not say."""
    count = getattr(operation, "num_feature_dims", None)
    return 1 if count is None else count(module)
