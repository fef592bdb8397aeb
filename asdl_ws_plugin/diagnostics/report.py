"""``inspect``: what K-FAC sees of a model, what it does with it, and what to do about the rest.

One forward pass, after which the model, its buffers and all generators are as before. What a row
says of a layer is what a training step would do with it: the plan, the hooks, the layouts and the
arrangement of its inputs are the stages of :mod:`~asdl_ws_plugin.weight_sharing.fisher_maker`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from asdl.matrices import SHAPE_KRON, SHAPE_UNIT_WISE
from torch import nn

from ..weight_sharing.arrange import Arranged, arrange_layer
from ..weight_sharing.blocks import LinearBlock, blocks_of, input_group, lent_to, parameters_of
from ..weight_sharing.capture import Layer
from ..weight_sharing.factors import accumulation_dtype
from ..weight_sharing.plan import Plan
from ..weight_sharing.rules import AUTO
from ..weight_sharing.shapes import KFAC_SHAPES
from ..weight_sharing.torch_private import unwrapped
from .reasons import Reasons, listed
from .survey import Survey, unchanged
from .tables import Printable, Table, as_bytes, as_sizes

__all__ = ["Report", "Row", "inspect"]


@dataclass
class Row:
    """A module with parameters of its own.

    Attributes:
        name: its qualified name.
        type: its class.
        num_parameters: how many numbers its own trainable parameters have.
        num_seen: how many of them K-FAC sees.
        num_frozen: how many numbers its own frozen parameters have.
        calls: how often it was called.
        input_sizes: the sizes of its first input in its first call; ``None`` if it was not called.
        layout: ``'batch_first'``, ``'sequence_first'`` or ``'ragged'``; ``None`` if it has no
            curvature.
        R: the size of its weight-sharing dimension, all its calls together; for ragged rows their
            number over N.
        strategy: ``'expand'``, ``'reduce'`` or the user's own; ``None`` if it has no Kronecker
            factors.
        shape: ``'kron'``, ``'unit_wise'`` or ``'diag'``; ``None`` if it has no curvature.
        factor_sizes: name -> sizes of each of its matrices.
        factor_bytes, inverse_bytes: what they and their inverses take.
        reason, remedy: why K-FAC does not see it, and what to do; empty if it does.
        note: what else is worth knowing.
    """

    name: str
    type: str
    num_parameters: int
    num_seen: int = 0
    num_frozen: int = 0
    calls: int = 0
    input_sizes: tuple[int, ...] | None = None
    layout: str | None = None
    R: float | None = None
    strategy: str | None = None
    shape: str | None = None
    factor_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    factor_bytes: int = 0
    inverse_bytes: int = 0
    reason: str = ""
    remedy: str = ""
    note: str = ""

    @property
    def seen(self) -> bool:
        """Whether its curvature is computed and its gradient preconditioned."""
        return self.shape is not None


@dataclass
class Report(Printable):
    """What :func:`inspect` found. Prints as tables, with rich where that is installed.

    Attributes:
        model: the model's class.
        rows: every module with parameters of its own, in the order of ``named_modules``. A tied
            parameter is listed with each of its modules.
        num_examples: N of the inputs that were given.
        setting: ``'reduce'`` or ``'expand'``, as the sizes of the logits suggest: ``(N, C)`` or
            ``(N, *, C)``.
        num_parameters, num_seen: numbers in all trainable parameters, each once, and how many of
            them K-FAC sees.
        num_matrix_parameters, num_matrix_seen: the same for matrix parameters.
    """

    model: str
    rows: list[Row]
    num_examples: int
    setting: str
    num_parameters: int
    num_seen: int
    num_matrix_parameters: int
    num_matrix_seen: int

    @property
    def coverage(self) -> float:
        """The share, 0 to 1, of trainable parameters whose gradient K-FAC preconditions by
        curvature.

        Weights and biases with Kronecker factors count, and so do normalization layers, which get a
        small block for each unit instead. Every number of a parameter counts once, wherever the
        parameter is used. 0 for a model without trainable parameters.
        """
        return self.num_seen / self.num_parameters if self.num_parameters else 0.0

    @property
    def matrix_coverage(self) -> float:
        """The same share, 0 to 1, of the matrix parameters alone.

        These are the trainable parameters of at least two dimensions that layers multiply their
        inputs with. Left aside are embeddings: weights of ``nn.Embedding``, and raw Parameters that
        are added, concatenated or looked up, as class tokens, position embeddings and relative
        position biases are. A parameter that the forward pass did not use counts as a matrix. 1 for
        a model without matrix parameters.
        """
        return (
            self.num_matrix_seen / self.num_matrix_parameters if self.num_matrix_parameters else 1.0
        )

    @property
    def factor_bytes(self) -> int:
        """What all matrices of the curvature take."""
        return sum(row.factor_bytes for row in self.rows)

    @property
    def inverse_bytes(self) -> int:
        """What their inverses take."""
        return sum(row.inverse_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        names = ("coverage", "matrix_coverage", "factor_bytes", "inverse_bytes")
        totals = {name: getattr(self, name) for name in names}
        result = dataclasses.asdict(self)
        rows = result.pop("rows")
        for row, source in zip(rows, self.rows, strict=True):
            row["seen"] = source.seen
        return {**result, **totals, "rows": rows}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def tables(self) -> list[Table]:
        """What K-FAC sees, and what it does not."""
        columns = (
            "Layer",
            "Type",
            "Input",
            "Layout",
            "R",
            "Calls",
            "Curvature",
            "Factors",
            "Memory",
            "Parameters",
        )
        seen = Table("Seen by K-FAC", columns, frozenset({"R", "Calls", "Memory", "Parameters"}))
        why = ("Layer", "Type", "Parameters", "Reason and remedy")
        unseen = Table("Not seen by K-FAC", why, frozenset({"Parameters"}))
        notes = Table("Notes", ("Layer", "Note"))
        for row in self.rows:
            if row.note:
                notes.rows.append([row.name or "(the model)", row.note])
            if row.seen:
                seen.rows.append(_cells_if_seen(row))
            else:
                unseen.rows.append(_cells_if_unseen(row))
        return [seen, unseen, notes]

    def summary(self) -> list[str]:
        """The setting, the coverage, and the memory in a few sentences."""
        return [
            f"{self.model}: {self.num_examples} examples, the {self.setting} setting (by the "
            "sizes of the logits).",
            f"Coverage: {self.coverage:.1%} of {self.num_parameters:,} trainable parameters; "
            f"{self.matrix_coverage:.1%} of the {self.num_matrix_parameters:,} in matrices, "
            "embeddings aside.",
            f"Memory: {as_bytes(self.factor_bytes)} of curvature and "
            f"{as_bytes(self.inverse_bytes)} of inverses.",
        ]


def _cells_if_seen(row: Row) -> list[str]:
    sizes = row.factor_sizes.items()
    return [
        row.name or "(the model)",
        row.type,
        as_sizes(row.input_sizes or ()),
        row.layout or "",
        "" if row.R is None else f"{row.R:g}",
        str(row.calls),
        row.strategy or row.shape or "",
        "  ".join(f"{key} {as_sizes(size)}" for key, size in sizes),
        as_bytes(row.factor_bytes + row.inverse_bytes),
        f"{row.num_parameters:,}",
    ]


def _cells_if_unseen(row: Row) -> list[str]:
    numbers = f"{row.num_parameters:,}" if row.num_parameters else f"{row.num_frozen:,} frozen"
    return [row.name or "(the model)", row.type, numbers, f"{row.reason} {row.remedy}".strip()]


def inspect(
    model: nn.Module, *args: Any, shared_dim: str | Sequence[Any] = AUTO, **kwargs: Any
) -> Report:
    """Say what K-FAC sees of a model, by one forward pass that changes nothing.

    Args:
        model: the model, in the mode that it shall be looked at. Training mode is what training
            sees.
        args, kwargs: its arguments, as in training. Neither they nor the model's buffers,
            gradients, hooks and modes are changed, and generators go on as if nothing had happened.
        shared_dim: what the gradient maker will be given: a strategy, or rules.

    Returns:
        A :class:`Report` with ``rows`` and ``coverage``.

    Raises:
        TypeError: ``model`` is not a module; there is no tensor in its output; ``shared_dim`` is
            malformed.
        ValueError: a rule in ``shared_dim`` is unknown or matches nothing; a parameter is not
            initialised yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, got {type(model).__name__}.")
    model = unwrapped(model)
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Parameter '{name}' is not initialised yet; call the model once before."
            )
    refused: dict[nn.Module, Exception] = {}
    plan = Plan(
        model,
        KFAC_SHAPES,
        shared_dim,
        on_refusal=lambda name, module, error: refused.update({module: error}),
    )
    with unchanged(model), torch.enable_grad():
        seen = Survey(model, plan, refused, args, kwargs)
        builder = _Builder(model, plan, seen)
        return builder.report()


# ----------------------------------------------------------------------------------------- the rows


class _Builder:
    """Makes the rows. Counts how much of each parameter is seen, since parameters may be tied or
    cut into blocks.
    """

    def __init__(self, model: nn.Module, plan: Plan, seen: Survey) -> None:
        self.model, self.plan, self.seen = model, plan, seen
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = {module: layer for layer in plan.layers for module in layer.modules}
        self.covered: dict[int, int] = {}
        self.failed: dict[nn.Module, Exception] = {}
        self.arranged: dict[nn.Module, Arranged] = {}
        self.groups: set[nn.Module] = set()
        self.reasons = Reasons(model, plan, seen, self.failed)
        for layer in plan.layers:
            self._arrange(layer)

    def report(self) -> Report:
        rows = [
            row
            for module, name in self.names.items()
            if (row := self._row(name, module)) is not None
        ]
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if self.reasons.is_matrix(p)]

        def seen_of(parameters: list[nn.Parameter]) -> int:
            return sum(min(p.numel(), self.covered.get(id(p), 0)) for p in parameters)

        return Report(
            type(self.model).__name__,
            rows,
            self.seen.count.num_examples,
            self.seen.setting,
            sum(p.numel() for p in trainable),
            seen_of(trainable),
            sum(p.numel() for p in matrices),
            seen_of(matrices),
        )

    def _arrange(self, layer: Layer) -> None:
        """What a training step does with the layer's inputs: its layout and R, or the error that it
        would raise.
        """
        calls = self.seen.record.calls.get(layer.module)
        if calls is None or layer.module in self.seen.refused:
            return
        try:
            arranged = arrange_layer(self.plan, layer, calls, self.seen.count)
            self.arranged[layer.module] = arranged
        except (RuntimeError, TypeError, ValueError) as error:
            self.failed[layer.module] = error

    def _row(self, name: str, module: nn.Module) -> Row | None:
        owned = {
            id(p)
            for block in blocks_of(module)
            for p in (block.owned("weight"), block.owned("bias"))
        }
        owned |= {id(p) for child in module.children() for p in lent_to(child)}
        parameters = [p for p in parameters_of(module) if id(p) not in owned]
        if not parameters:
            return None
        row = Row(
            name,
            type(module).__name__,
            num_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            num_frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            calls=self.seen.calls.get(module, 0),
            input_sizes=self.seen.input_sizes.get(module),
        )
        if not row.num_parameters:
            row.reason, row.remedy = "Frozen.", "To train it, call requires_grad_() on it."
            return row
        layer = self.layers.get(module)
        unseen = self.reasons.why(name, module, layer, parameters)
        if unseen is not None:
            row.reason, row.remedy = unseen
            return row
        assert layer is not None
        self._describe(row, layer)
        for kind in ("weight", "bias"):
            p = getattr(module, kind, None)
            if p is None or not p.requires_grad:
                continue
            if kind == "bias" and p is not layer.module.bias and module is not layer.module:
                # Tied layers have one weight; of their biases the first layer's is preconditioned.
                continue
            row.num_seen += p.numel()
            owner = module.owned(kind) if isinstance(module, LinearBlock) else p
            self.covered[id(owner)] = self.covered.get(id(owner), 0) + p.numel()
        row.note = " ".join(self._notes(row, module, layer, parameters))
        return row

    def _describe(self, row: Row, layer: Layer) -> None:
        module: Any = layer.module
        row.shape = layer.shape
        arranged = self.arranged[layer.module]
        row.layout, row.R = arranged.layout, arranged.R
        itemsize = accumulation_dtype(module.weight.dtype).itemsize
        if layer.shape == SHAPE_KRON:
            row.strategy = self.plan.strategy_of(layer)
            outputs, inputs = module.weight.shape[0], module.weight[0].numel()
            row.factor_sizes = {"A": (inputs, inputs), "B": (outputs, outputs)}
        elif layer.shape == SHAPE_UNIT_WISE:
            row.factor_sizes = {"blocks": (module.weight.numel(), 2, 2)}
        else:
            row.factor_sizes = {"diagonal": (row.num_parameters,)}
        if self.names[module] != row.name:  # the matrices of tied layers are listed once
            return
        sizes = dict(row.factor_sizes)
        group = input_group(module)
        if group is not None and group in self.groups:
            sizes.pop("A", None)  # blocks that a layer was split into share A and its inverse
        elif group is not None:
            self.groups.add(group)
        row.factor_bytes = row.inverse_bytes = (
            sum(torch.Size(s).numel() for s in sizes.values()) * itemsize
        )

    def _notes(
        self, row: Row, module: nn.Module, layer: Layer, parameters: list[nn.Parameter]
    ) -> Iterator[str]:
        others = [self.names[other] for other in layer.modules if other is not module]
        if others:
            yield (
                f"Shares its weight with {listed(others)}: one layer that is called several times."
            )
        rest = row.num_parameters - row.num_seen
        if rest:
            names = [
                n
                for n, p in module.named_parameters(recurse=False)
                if p.requires_grad and not self._covers(p)
            ]
            yield f"Of its Parameters, {listed(names)} with {rest:,} numbers are not seen."
        if any(call.finding.is_assumed for call in self.arranged[layer.module].calls):
            yield (
                "Its sizes fit batch first and sequence first; batch first is assumed. A rule in "
                f"shared_dim, as in ('{row.name}', 'sequence_first'), says it."
            )
        weight = getattr(module, "weight", None)
        calls = sum(self.seen.calls.get(other, 0) for other in layer.modules)
        if isinstance(weight, nn.Parameter) and not isinstance(module, LinearBlock):
            uses = self.seen.graph.num_uses(weight)
            if uses > calls:
                yield (
                    f"Its weight is used {uses} times, but the layer called {calls} times; K-FAC "
                    "sees the calls."
                )

    def _covers(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.covered
