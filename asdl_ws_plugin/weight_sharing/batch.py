"""The layers' operations in one batch: fed with inputs once, and with output gradients once a
backward pass.

Whatever a layer sees is *arranged* here, ``(N, R, P)`` or ragged, before an operation gets it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
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
from asdl.vector import ParamVector
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import factors
from .blocks import LinearBlock, input_group, lent_to
from .capture import Call, Layer, Record, last_nodes
from .layout import examples_first
from .operations import LinearExpand, LinearReduce, _Expand
from .plan import OURS, Plan
from .positions import GRAPH, Positions, WeightSharingLinear
from .ragged import Mask, Ragged, Segments
from .rules import BATCH_FIRST, SEQUENCE_FIRST

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


@dataclass
class Arrangement:
    """How one call's tensors become ``(N, R, P)``, or rows that belong to segments."""

    layout: str
    dims: int  # trailing dimensions that are features
    ragged: Ragged | None = None


class Batch:
    """The operations of one batch.

    Args:
        model: the model; carries what belongs to all layers (the full Fisher).
        plan: what is done with which layer.
        layers: the layers whose curvature is wanted.
        record: what they saw.
        num_examples: N.
        positions: which example the positions of a module belong to, for modules of which that was
            said.
        scale: multiplies A, and everything if :attr:`scale` is not set to something else.
        fvp: compute Fisher-vector products with ``vec``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        layers: list[Layer],
        record: Record,
        num_examples: int,
        positions: dict[nn.Module, Positions],
        scale: Any,
        fvp: bool = False,
        vec: ParamVector | None = None,
    ) -> None:
        self.model, self.plan, self.layers, self.record = model, plan, layers, record
        self.num_examples, self.positions = num_examples, positions
        self.scale_A = scale
        self.scale: Any = scale  # multiplies what the next backward passes bring
        self.fvp = fvp
        self.context = OperationContext(vectors=vec)
        self._arranged: dict[nn.Module, list[Arrangement]] = {}
        self._ragged: dict[nn.Module, Ragged] = {}
        self._used_masks: set[str] = set()
        self._lengths: set[int] = set()  # of the sequences that a mask was looked for
        self._factors_A: dict[Any, Tensor] = {}
        self._group_A: dict[Any, Tensor] = {}
        self._received: dict[nn.Module, list[Tensor | None]] = {}
        self._with_grads: set[nn.Module] = set()
        self._last: tuple[Tensor, set[Node]] | None = None
        for layer in layers:
            if layer.module in record.calls:
                self.context.register_operation(layer.module, self._operation(layer))
        if not self.context.is_operation_registered(model):
            self.context.register_operation(model, Operation(model, []))

    def _operation(self, layer: Layer) -> Operation:
        name = _OPERATIONS[layer.shape]
        if self.fvp:
            if layer.shape not in (SHAPE_FULL, SHAPE_LAYER_WISE):
                raise ValueError(
                    f"Fisher-vector products are for 'full' and 'layer_wise', not '{layer.shape}'."
                )
            if isinstance(layer.module, LinearBlock) or lent_to(layer.module):
                raise ValueError(
                    f"Layer '{layer.name}': there are no Fisher-vector products for a layer whose "
                    "weight or bias is another module's, as convert(model) makes them: a vector "
                    "has one part for each Parameter. Use revert(model), or leave the layer out "
                    f"with ignore_modules=['{layer.name}']."
                )
            name = OP_CVP if layer.shape == SHAPE_LAYER_WISE else name
        operation_class = self.plan.operation_of(layer)
        if name not in operation_class.supported_operations:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer.module).__name__}) does not support the shape "
                f"'{layer.shape}'."
            )
        operation = operation_class(layer.module, [name], model_for_kernel=self.model)
        if not operation_class.__module__.startswith(OURS) and isinstance(
            layer.module, (nn.Linear, nn.Conv2d)
        ):
            weight: Any = layer.module.weight
            for factor, size in (("A", weight[0].numel()), ("B", weight.shape[0])):
                method = f"cov_kron_{factor}"
                setattr(operation, method, _checked(layer, getattr(operation, method), size))
        return operation

    def unseen(self) -> dict[nn.Module, str]:
        """The layers without curvature in this batch, and why."""
        reasons = {}
        for layer in self.layers:
            if layer.module not in self.record.calls:
                reasons[layer.module] = "was not called"
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
            if not isinstance(self.context.get_operation(layer.module), _Expand):
                continue
            weight: Any = layer.module.weight
            ragged = self._ragged.get(layer.module)
            rows = sum(call.out_shape.numel() for call in calls) / weight.shape[0]
            means[layer.module] = (
                rows if ragged is None else ragged.num_positions
            ) / self.num_examples
        return means

    # --------------------------------------------------------------------------------------- inputs

    @torch.no_grad()
    @factors.full_precision()
    def take_inputs(self) -> None:
        """Arrange every layer's inputs and compute what needs nothing else."""
        for layer in self.layers:
            calls = self.record.calls.get(layer.module)
            if calls is None:
                continue
            operation = self.context.get_operation(layer.module)
            parts = [
                self._input(layer, i, call, operation, len(calls)) for i, call in enumerate(calls)
            ]
            in_data, scale = self._joined(layer, parts), 1.0
            ragged = self._ragged.get(layer.module)
            if ragged is not None:
                if layer.shape == SHAPE_KFE:
                    raise ValueError(
                        f"Layer '{layer.name}': the shape 'kfe' is not supported for ragged "
                        "positions."
                    )
                take = getattr(operation, "ragged_in_data", None)
                in_data, scale = (
                    take(in_data, ragged) if take is not None else (ragged.pad(in_data), 1.0)
                )
            if isinstance(layer.module, nn.Embedding):
                in_data = in_data.squeeze(-1)
            operation.set_cov_scale(self.scale_A * scale)
            key = self._input_key(layer, calls, operation)
            if key is not None and key in self._factors_A:
                operation.accumulate_result(self._copy_of_A(key, layer.module), OP_COV_KRON, "A")
            else:
                with self._naming(layer, operation, "in_data", in_data):
                    operation.forward_post_process(in_data, None)
                if key is not None:
                    A = self._factors_A[key] = operation.get_result(OP_COV_KRON, "A")
                    self._group_A[key, input_group(layer.module)] = A
            for call in calls:
                call.release_input()
        self.plan.layouts.report_assumed(self.num_examples)
        said = {name for positions in self.positions.values() for name in positions.masks}
        if said - self._used_masks:
            lengths = {
                name: mask.mask.shape[1]
                for positions in self.positions.values()
                for name, mask in positions.masks.items()
                if name not in self._used_masks
            }
            name, length = next(iter(lengths.items()))
            lengths_seen = ", ".join(map(str, sorted(self._lengths)))
            raise ValueError(
                f"padding: no layer has sequences of the length {length} of the mask '{name}', but "
                f"{lengths_seen}."
            )

    def _copy_of_A(self, key: Any, module: nn.Module) -> Tensor:
        """The A of this input: one tensor for all blocks of a layer, a copy for everybody else.

        Upstream adds damping to a factor in place, which must not meet another layer's, of another
        size.
        """
        group = input_group(module)
        if group is None:
            return self._factors_A[key].clone()
        if (key, group) not in self._group_A:
            self._group_A[key, group] = self._factors_A[key].clone()
        return self._group_A[key, group]

    def _input_key(self, layer: Layer, calls: list[Call], operation: Operation) -> Any:
        """Equal for linear layers that saw one and the same tensor, as queries, keys and values do;
        ``None``: alone.
        """
        module = layer.module
        ragged = self._ragged.get(module)
        if (
            len(calls) > 1
            or layer.shape not in (SHAPE_KRON, SHAPE_SWIFT_KRON)
            or type(operation) not in (LinearExpand, LinearReduce)
            or isinstance(ragged, Segments)
        ):
            return None
        (call,), (arrangement,) = calls, self._arranged[module]
        x = call.unmodified_input(layer.name)
        mask = ragged.mask.data_ptr() if isinstance(ragged, Mask) else None
        return (
            type(operation),
            x.data_ptr(),
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            arrangement.layout,
            mask,
        )

    def _input(
        self, layer: Layer, i: int, call: Call, operation: Operation, num_calls: int
    ) -> Tensor:
        """One call's input, arranged: ``(N, R, P)``, rows ``(ΣR_n, P)``, or one image for each
        example.
        """
        module, n = call.module, self.num_examples
        x = call.unmodified_input(layer.name)
        if isinstance(module, nn.Embedding):
            x = x.unsqueeze(-1)
        if self.plan.has_channels_first(module):
            x = self._batched_image(layer, x)
        if isinstance(module, nn.Conv2d):
            if x.shape[0] % n:
                raise ValueError(
                    f"Layer '{layer.name}': the first of its input's sizes {tuple(x.shape)} does "
                    f"not match the {n} examples of the batch."
                )
            self.plan.layouts.note_leading(x.shape[0])
            self._arranged.setdefault(layer.module, []).append(Arrangement(BATCH_FIRST, 1))
            if (
                num_calls > 1 or module is not layer.module
            ):  # a tied one may be of another stride or dilation
                return examples_first(factors.patches(x, module), n, BATCH_FIRST)
            if x.shape[0] == n:
                return x
            # images merged into the batch are further positions
            return examples_first(operation.preprocess_in_data(module, x, None), n, BATCH_FIRST)
        dims = _num_feature_dims(operation, module)
        if self.plan.has_channels_first(module):
            x = x.movedim(1, -1)
        elif x.ndim == dims:  # a single example without a batch dimension
            x = x.unsqueeze(0)
        prepare = getattr(operation, "prepare_in_data", None)
        x = x.flatten(-dims) if dims > 1 else x
        x = prepare(module, x) if prepare is not None else x
        arrangement = self._arrange(layer, module, i, x.shape[:-1], dims, x.device)
        self._arranged.setdefault(layer.module, []).append(arrangement)
        return self._apply(arrangement, x)

    def _arrange(
        self,
        layer: Layer,
        module: nn.Module,
        i: int,
        sizes: torch.Size,
        dims: int,
        device: torch.device,
    ) -> Arrangement:
        n = self.num_examples
        positions = self.positions.get(module)
        if positions is not None and positions.roles:
            rows = self.plan.layouts.resolve_role(
                layer.name, module, i, sizes[0], positions.roles, device
            )
            times = sizes[1:].numel()
            if rows.is_dense:  # the same as without segments, to the last bit
                return Arrangement(BATCH_FIRST, dims)
            return Arrangement(BATCH_FIRST, dims, rows.repeated(times))
        one_row_each = sizes[0] == n and getattr(module, "role", None) in (
            None,
            GRAPH,
        )  # as in node classification
        if (
            isinstance(module, WeightSharingLinear)
            and positions is None
            and len(sizes) == 1
            and not one_row_each
        ):
            raise ValueError(
                f"Layer '{layer.name}': it is not known which example each of its {sizes[0]} rows "
                "belongs to. Say it with segments(model, ...), attach_segments, or the layer's "
                "set_segments."
            )
        if (
            self.plan.has_channels_first(module) and sizes[0] % n == 0
        ):  # images are batch first, of whatever height
            layout = BATCH_FIRST
        else:
            layout = self.plan.layouts.resolve(layer.name, module, sizes, n)
        if positions is not None and positions.masks:
            return Arrangement(
                layout, dims, self._mask_for(layer, module, sizes, layout, positions)
            )
        return Arrangement(layout, dims)

    def _mask_for(
        self, layer: Layer, module: nn.Module, sizes: torch.Size, layout: str, positions: Positions
    ) -> Mask | None:
        """The padding mask of sequences of this length, repeated for further positions of each
        token.
        """
        n = self.num_examples
        if layout == SEQUENCE_FIRST and len(sizes) > 1:
            length, times = sizes[0], sizes[2:].numel()
        elif sizes[0] == n and len(sizes) > 1:
            length, times = sizes[1], sizes[2:].numel()
        else:
            length, times = sizes[0] // n, sizes[1:].numel()
        self._lengths.add(length)
        found = {
            name: mask for name, mask in positions.masks.items() if mask.mask.shape[1] == length
        }
        role = getattr(module, "role", None)
        if role in found:
            found = {role: found[role]}
        if not found:
            total = sizes.numel() // n
            for name, mask in positions.masks.items():
                expected = mask.mask.shape[1]
                if (
                    layout == BATCH_FIRST
                    and sizes[0] != n
                    and expected > 1
                    and total % expected == 0
                ):
                    raise ValueError(
                        f"Layer '{layer.name}': its input merges {total} positions of each example "
                        "into the batch, and it is not clear which of them are padding by the "
                        f"mask '{name}' of sizes ({n}, {expected}). Is the mask that of this "
                        f"batch? Call the layer with (N, {expected}, ...), or leave it out with "
                        f"ignore_modules=['{layer.name}']."
                    )
            return None
        mask = next(iter(found.values()))
        if any(not torch.equal(mask.mask, other.mask) for other in found.values()):
            raise ValueError(
                f"Layer '{layer.name}': the padding masks {', '.join(map(repr, found))} all have "
                f"its length {length}. Pad them to different lengths, or give the layer a role of "
                "that name with convert(model, roles=...)."
            )
        self._used_masks.update(found)
        return mask.repeated(times)

    def _apply(self, arrangement: Arrangement, x: Tensor) -> Tensor:
        """``x`` has its features in the last dimension."""
        if isinstance(arrangement.ragged, Segments):
            return x.reshape(-1, x.shape[-1])
        return examples_first(x, self.num_examples, arrangement.layout)

    def _joined(self, layer: Layer, parts: list[Tensor]) -> Tensor:
        """The calls of a layer as further positions of one."""
        arranged = self._arranged[layer.module]
        ragged: list[Any] = [arrangement.ragged for arrangement in arranged]
        if all(part is None for part in ragged):
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if any(isinstance(part, Segments) for part in ragged):
            for k, (part, x) in enumerate(zip(ragged, parts, strict=True)):
                if part is None:  # dense after all
                    index = torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
                    ragged[k], parts[k] = Segments(index, num_examples=x.shape[0]), x.flatten(0, 1)
                    arranged[k].ragged = ragged[k]
            self._ragged[layer.module] = Segments.cat(ragged)
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        masks = [
            part
            if isinstance(part, Mask)
            else Mask(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
            for part, x in zip(ragged, parts, strict=True)
        ]
        self._ragged[layer.module] = Mask.cat(masks)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def _batched_image(layer: Layer, x: Tensor) -> Tensor:
        unbatched = 3 if isinstance(layer.module, (nn.Conv2d, nn.BatchNorm2d)) else 1
        return x.unsqueeze(0) if x.ndim == unbatched else x

    # ----------------------------------------------------------------------------- output gradients

    def take_output_grads(
        self, outputs: Tensor, grad_outputs: Tensor | None, retain_graph: bool
    ) -> None:
        """One backward pass that stops at the layers' outputs: no weight gradient is computed."""
        calls = [
            (layer, i, call)
            for layer in self.layers
            for i, call in enumerate(self.record.calls.get(layer.module, ()))
        ]
        if not outputs.requires_grad:
            raise RuntimeError(
                "The logits do not depend on any parameter that requires a gradient."
            )
        # Autograd is asked for the last gradients only. It passes the others on its way, and they
        # are taken there, one after the other: asking for them would keep all of them until the
        # pass is over.
        if self._last is None or self._last[0] is not outputs:
            self._last = outputs, last_nodes(outputs, {call.edge.node for _, _, call in calls})
        last = [call for call in calls if call[2].edge.node in self._last[1]]
        if not last:
            return
        try:
            with self.taking_output_grads(leave_out=self._last[1]):
                grads = torch.autograd.grad(
                    outputs,
                    [call.edge for _, _, call in last],
                    grad_outputs,
                    retain_graph=retain_graph,
                    allow_unused=True,
                )
        except RuntimeError as error:
            hidden = next(
                (layer.name for layer in self.layers if layer.module in self.record.without_graph),
                None,
            )
            if hidden is None or "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"Layer '{hidden}' ran under reentrant activation checkpointing. Use "
                "checkpoint(..., use_reentrant=False)."
            ) from error
        for (layer, i, _), grad in zip(last, grads, strict=True):
            self._receive(layer, i, grad)

    def crosstalk(self, logits: Tensor, example: Tensor) -> float | None:
        """How much the rows of the logits, each being of this example, depend on other examples'
        positions.

        It is 0 if that is what they are of, where a batch does not mix its examples. Then weights
        of the examples that the logits are multiplied with reappear at the positions of those
        examples. Seen at a layer that is sequence first or ragged; ``None`` if there is none.

        Args:
            example: integers, of the sizes of the logits without classes.
        """
        weights = torch.arange(1, self.num_examples + 2, device=logits.device, dtype=torch.float32)
        weights = weights / len(weights)  # the last one is of rows that are left out
        weights = weights.to(logits.dtype)
        cotangent = (
            torch.arange(1, logits.numel() + 1, device=logits.device)
            .sin()
            .to(logits.dtype)
            .view_as(logits)
        )
        weighted = (cotangent.view(*example.shape, -1) * weights[example].unsqueeze(-1)).view_as(
            logits
        )
        for layer in reversed(self.layers):
            calls = self.record.calls.get(layer.module, ())
            for call, arrangement in zip(calls, self._arranged.get(layer.module, ()), strict=True):
                ragged = arrangement.ragged
                if not isinstance(ragged, Segments) and arrangement.layout != SEQUENCE_FIRST:
                    continue
                plain, found = (
                    torch.autograd.grad(
                        logits, [call.edge], grads, retain_graph=True, allow_unused=True
                    )[0]
                    for grads in (cotangent, weighted)
                )
                if plain is None or not plain.any():
                    continue
                plain, found = (
                    self._apply(
                        arrangement, grad.reshape(call.out_shape).flatten(-arrangement.dims)
                    )
                    for grad in (plain, found)
                )
                of_rows = weights[:-1].view(-1, 1, 1)
                if isinstance(ragged, Segments):
                    of_rows = weights[ragged.index].unsqueeze(1)
                return float((found - plain * of_rows).norm() / found.norm())
        return None

    @contextlib.contextmanager
    def taking_output_grads(self, leave_out: Container[Node] = ()) -> Iterator[None]:
        """Take the gradients of the layers' outputs out of a backward pass as it gets there."""
        handles = []

        def hook(
            layer: Layer, i: int, output_nr: int
        ) -> Callable[[tuple[Tensor | None, ...]], None]:
            return lambda grads: self._receive(layer, i, grads[output_nr])

        try:
            for layer in self.layers:
                for i, call in enumerate(self.record.calls.get(layer.module, ())):
                    node = call.edge.node
                    if node not in leave_out:
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
        """Process layers that were called several times, and the full Fisher, after a backward
        pass.
        """
        for layer in self.layers:
            received = self._received.pop(layer.module, None)
            if received is not None and any(grad is not None for grad in received):
                calls = self.record.calls[layer.module]
                self._process(
                    layer,
                    [
                        next(g for g in received if g is not None).new_zeros(call.out_shape)
                        if grad is None
                        else grad
                        for call, grad in zip(calls, received, strict=True)
                    ],
                )
        if self.fvp:
            self.context.calc_full_cvp(self.model, scale=self.scale)
        else:
            self.context.calc_full_cov(self.model, scale=self.scale)
        self.context.clear_batch_grads()

    @torch.no_grad()
    def _process(self, layer: Layer, grads: list[Tensor]) -> None:
        module = layer.module
        operation = self.context.get_operation(module)
        parts = []
        for grad, call, arrangement in zip(
            grads, self.record.calls[module], self._arranged[module], strict=True
        ):
            grad = grad.detach().reshape(call.out_shape)
            if self.plan.has_channels_first(call.module):
                grad = self._batched_image(layer, grad).movedim(1, -1)
            elif grad.ndim == arrangement.dims:
                grad = grad.unsqueeze(0)
            grad = grad.flatten(-arrangement.dims) if arrangement.dims > 1 else grad
            parts.append(self._apply(arrangement, grad))
        ragged = self._ragged.get(module)
        if ragged is None:
            out_grads = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        else:
            joined = (
                parts[0]
                if len(parts) == 1
                else torch.cat(parts, dim=0 if isinstance(ragged, Segments) else 1)
            )
            take = getattr(operation, "ragged_out_grads", None)
            out_grads = take(joined, ragged) if take is not None else ragged.pad(joined)
        operation.set_cov_scale(self.scale)
        vectors = self.context.get_vectors_by_module(module, flatten=True) if self.fvp else None
        with self._naming(layer, operation, "out_grads", out_grads):
            operation.backward_pre_process(out_grads, vectors)
        self._with_grads.add(module)

    @contextlib.contextmanager
    def _naming(
        self, layer: Layer, operation: Operation, what: str, data: Tensor
    ) -> Iterator[None]:
        """Say whose operation failed on what, if it is one of the user's."""
        try:
            yield
        except Exception as error:
            if type(operation).__module__.startswith((*OURS, "asdl.")) or str(error).startswith(
                "Layer '"
            ):
                raise
            raise RuntimeError(
                f"Layer '{layer.name}': {type(operation).__name__} failed with {what} of sizes "
                f"{tuple(data.shape)}: {type(error).__name__}: {error}"
            ) from error

    def identity_output_grads(self) -> None:
        """``fisher_forward_only``: B is the identity, summed over the examples."""
        for layer in self.layers:
            if layer.module not in self.record.calls:
                continue
            weight: Any = layer.module.weight
            identity = torch.eye(
                weight.shape[0],
                device=weight.device,
                dtype=factors.accumulation_dtype(weight.dtype),
            )
            operation = self.context.get_operation(layer.module)
            operation.accumulate_result(
                identity.mul_(self.num_examples * self.scale), OP_COV_KRON, "B"
            )
            self._with_grads.add(layer.module)


def _num_feature_dims(operation: Operation, module: nn.Module) -> int:
    """How many trailing dimensions of a layer's tensors are features; one for a user's operation
    that does not say.
    """
    count = getattr(operation, "num_feature_dims", None)
    return 1 if count is None else count(module)


def _checked(layer: Layer, method: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """A method of a user's operation that has to return a matrix of its own: upstream scales it in
    place.
    """

    def call(module: nn.Module, data: Tensor) -> Tensor:
        matrix = method(module, data)
        is_view = matrix.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
        if matrix.shape != (size, size) or is_view:
            raise ValueError(
                f"Layer '{layer.name}': {method.__qualname__} has to return a new matrix of sizes "
                f"({size}, {size}), got "
                f"{'a view of its argument' if is_view else tuple(matrix.shape)}."
            )
        return matrix

    return call
