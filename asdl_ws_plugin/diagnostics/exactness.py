"""``approximation_error``: K-FAC-expand and K-FAC-reduce against the exact block, for any user's
model.

The exact block of a layer is the generalised Gauss-Newton matrix of its weight, ``G = Σ_n Σ_r J_nrᵀ
Λ_nr J_nr`` (eq. 3.5), with J the Jacobian of the logits. With ``Λ = Σ_c s_c s_cᵀ`` it is a sum of
outer products of the examples' gradients of ``s_cᵀ z_nr``, which are back-propagated for one (r, c)
and all examples at once and added up a few hundred rows at a time. The same output gradients make
the Kronecker factors, by the operations that training uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from asdl.grad_maker import LOSS_CROSS_ENTROPY, LOSS_MSE
from asdl.matrices import FISHER_EXACT, SHAPE_KRON
from torch import Tensor, nn

from ..makers import FisherConfig
from ..weight_sharing.capture import Layer
from ..weight_sharing.errors import LayerError
from ..weight_sharing.likelihoods import LOSS_TYPES
from ..weight_sharing.operations import EXPAND, REDUCE
from ..weight_sharing.plan import Plan
from ..weight_sharing.registry import is_supported, strategies
from ..weight_sharing.rules import describe_key, matches_any
from ..weight_sharing.shapes import KFAC_SHAPES, NORMALIZATIONS
from ..weight_sharing.torch_private import AnyBatchNorm
from .exact_blocks import Comparison
from .survey import logits_of, unchanged
from .tables import Printable, Table, as_sizes

__all__ = ["ApproximationError", "LayerComparison", "approximation_error"]


@dataclass
class LayerComparison:
    """How far the approximations of one layer's block are from it.

    Attributes:
        name, type: of the layer.
        weight_sizes: ``(Q, P)``, its weight as a matrix.
        error: strategy -> ``‖B ⊗ A - G‖ / ‖G‖``, in the Frobenius norm.
        cosine: strategy -> the cosine of the gradient preconditioned by ``B ⊗ A`` and by G, both
            damped; NaN where the gradient or a factor is zero. Empty without damping.
    """

    name: str
    type: str
    weight_sizes: tuple[int, int]
    error: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)


@dataclass
class ApproximationError(Printable):
    """What :func:`approximation_error` measured. Prints as a table, with rich where that is
    installed.

    Attributes:
        rows: one for each layer.
        skipped: name -> why, for the layers that were left out.
        num_examples: N, of all batches.
        num_terms: T, the loss terms of all batches.
        damping: what was added before inverting; ``None`` if nothing was inverted.
    """

    rows: list[LayerComparison]
    skipped: dict[str, str]
    num_examples: int
    num_terms: float
    damping: float | None

    def __getitem__(self, name: str) -> LayerComparison:
        """The row of the layer of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def tables(self) -> list[Table]:
        """One row for each layer."""
        first = self.rows[0]
        numbers = [
            *(f"error, {name}" for name in first.error),
            *(f"cosine, {name}" for name in first.cosine),
        ]
        errors = Table(
            "K-FAC against the exact block",
            ("Layer", "Type", "Weight", *numbers),
            frozenset(numbers),
        )
        for row in self.rows:
            values = [f"{value:.3g}" for value in row.error.values()]
            values += [f"{value:.4f}" for value in row.cosine.values()]
            errors.rows.append(
                [row.name or "(the model)", row.type, as_sizes(row.weight_sizes), *values]
            )
        skipped = Table(
            "Left out",
            ("Layer", "Reason"),
            rows=[[name, why] for name, why in self.skipped.items()],
        )
        return [errors, skipped]

    def summary(self) -> list[str]:
        """What was measured on how many examples."""
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        return [f"{self.num_examples} examples, {self.num_terms:g} loss terms{damping}."]


def approximation_error(
    model: nn.Module,
    loss_type: str,
    data: Any,
    layers: Sequence[Any] | None = None,
    *,
    damping: float | None = 1e-3,
    compare: Sequence[str] = (EXPAND, REDUCE),
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    logits: Callable[[Any], Any] = logits_of,
    var: Any = 1.0,
    rules: Sequence[Any] = (),
    max_weights: int = 10_000,
) -> ApproximationError:
    """Compare K-FAC-expand and K-FAC-reduce of a model's layers with their exact blocks.

    The block is that of a layer's weight, of the loss averaged over its terms. It takes R'·C
    backward passes a batch, for R' loss terms an example and C logits a term, and memory for one
    matrix of ``max_weights²`` numbers. The model is used in the mode that it is in, and not
    changed; its generators, buffers and gradients are as before.

    Args:
        model: the model.
        loss_type: ``'cross_entropy'``, ``'mse'`` or ``'binary_cross_entropy'``.
        data: one batch, a tuple ``(inputs, targets)``, or an iterable of batches, such as a list or
            a ``DataLoader``. Inputs are a tensor, or a tuple or list of positional, or a dict of
            keyword arguments. Targets: classes ``(N, *)`` (-100: no loss term) or probabilities
            ``(N, *, C)``; for the others ``(N, *, C)``, where NaN leaves a label of
            ``'binary_cross_entropy'`` out.
        layers: which layers: names, parts of names, modules or classes. ``None``: every layer that
            has Kronecker factors and not more than ``max_weights`` weights.
        damping: added to the diagonal of the exact block, and to the Kronecker factors as ASDL does
            it. ``None``: no cosines, which spares a Cholesky decomposition of every block.
        compare: the strategies, as ``shared_dim`` knows them.
        loss: another loss, a function of logits and targets. By default the mean over the terms
            that have a label.
        logits: takes the logits ``(N, C)`` or ``(N, *, C)`` out of the model's output.
        var: of the Gaussian likelihood that ``'mse'`` stands for; a number, or a tensor ``(C,)`` or
            ``(C, C)``.
        rules: layouts of layers, as ``shared_dim`` takes them: ``[('decoder', 'sequence_first')]``.
        max_weights: refuse larger layers; the block of 10,000 weights takes 400 MB in single
            precision.

    Returns:
        An :class:`ApproximationError`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has an invalid value; ``layers`` matches nothing, or a layer that is
            too large or cannot be handled; the examples of a batch depend on each other, as with
            batch normalization in training mode.
        torch.linalg.LinAlgError: a damped matrix is not positive definite.
    """
    _check_arguments(model, loss_type, compare, damping)
    batches = _batches(data)
    function = _mean_loss(loss_type) if loss is None else loss
    chosen, skipped = _choose(model, [EXPAND, *rules], layers, max_weights)
    options: dict[str, Any] = {"loss_type": loss_type, "var": var, "shared_dim": [EXPAND, *rules]}
    options |= {"fisher_type": FISHER_EXACT, "fisher_shapes": [SHAPE_KRON], "data_size": 1}
    rows: list[LayerComparison] = []
    totals: tuple[int, float] = (0, 0.0)
    for group in _groups(chosen, max_weights):
        config = FisherConfig(ignore_modules=_all_but(model, group), **options)
        comparison = Comparison(model, config, tuple(compare))
        with unchanged(model), torch.enable_grad():
            for args, kwargs, targets in batches:
                comparison.add(logits, function, args, kwargs, targets)
        totals = max(totals, (comparison.num_examples, comparison.num_terms))
        for layer in group:
            found = _compared(comparison, layer, totals, damping)
            if isinstance(found, LayerComparison):
                rows.append(found)
            elif layers is not None:
                raise LayerError(layer.name, found)
            else:
                skipped[layer.name] = found
    if not rows:
        raise ValueError(_nothing_to_compare(skipped))
    return ApproximationError(rows, skipped, *totals, damping)


def _compared(
    comparison: Comparison, layer: Layer, totals: tuple[int, float], damping: float | None
) -> LayerComparison | str:
    """A layer's row, or why there is none. Its exact block is let go of, and its memory with it."""
    block = comparison.blocks.pop(layer.module)
    reason = block.why_not()
    if reason is not None:
        return reason
    errors, cosines = block.compared(*totals, damping)
    return LayerComparison(layer.name, type(layer.module).__name__, block.sizes, errors, cosines)


# ---------------------------------------------------------------------------------- what to compare


def _check_arguments(
    model: nn.Module, loss_type: str, compare: Sequence[str], damping: float | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, got {type(model).__name__}.")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type has to be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}.")
    if isinstance(compare, str) or not compare or any(name not in strategies() for name in compare):
        raise ValueError(
            f"compare has to be a list of {', '.join(map(repr, strategies()))}, got {compare!r}."
        )
    if damping is not None and not damping >= 0:
        raise ValueError(f"damping has to be a number that is not negative, got {damping!r}.")
    for name, module in model.named_modules():
        if isinstance(module, AnyBatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Module '{name}' ({type(module).__name__}) normalizes with the statistics of the "
                "batch, so that an example's logits depend on the other examples and there is no "
                "block for each. Call model.eval()."
            )


def _batches(data: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Of every batch the model's arguments and the targets."""
    batches = [data] if isinstance(data, tuple) else data
    if not isinstance(batches, Iterable):
        raise TypeError(
            "data has to be a tuple (inputs, targets) or an iterable of them, got "
            f"{type(data).__name__}."
        )
    checked = [_checked(batch) for batch in batches]
    if not checked:
        raise ValueError("data has no batches.")
    return checked


def _checked(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The model's arguments and the targets of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"A batch has to be (inputs, targets), got {type(batch).__name__}.")
    inputs, targets = batch
    if isinstance(inputs, dict):
        return (), inputs, targets
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, targets


def _mean_loss(loss_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        return F.cross_entropy(
            rows, y.reshape(rows.shape) if y.is_floating_point() else y.reshape(-1)
        )

    def binary_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
        left_out = torch.isnan(y)
        target, weight = y.masked_fill(left_out, 0).to(z.dtype), left_out.logical_not().to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, target, weight)

    if loss_type == LOSS_CROSS_ENTROPY:
        return cross_entropy
    return F.mse_loss if loss_type == LOSS_MSE else binary_cross_entropy


def _num_weights(layer: Layer) -> int:
    weight: Any = layer.module.weight
    return weight.numel()


def _choose(
    model: nn.Module, shared_dim: list[Any], keys: Sequence[Any] | None, max_weights: int
) -> tuple[list[Layer], dict[str, str]]:
    """The layers, and why others are left out. Raises a ValueError for a key that stands for
    none.
    """
    if isinstance(keys, (str, nn.Module)):
        keys = [keys]
    candidates, reasons = _candidates(model, shared_dim, max_weights)
    if keys is None:
        modules = dict(model.named_modules())
        skipped = {
            n: why for n, why in reasons.items() if not isinstance(modules[n], NORMALIZATIONS)
        }
        if not candidates:
            raise ValueError(_nothing_to_compare(skipped))
        return candidates, skipped
    chosen: list[Layer] = []
    for key in keys:
        matching = [layer for layer in candidates if _matches(layer, key)]
        if not matching:
            raise ValueError(_matches_nothing(model, key, candidates, reasons))
        chosen += [layer for layer in matching if layer not in chosen]
    return chosen, {}


def _candidates(
    model: nn.Module, shared_dim: list[Any], max_weights: int
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be compared, and why others cannot."""
    reasons: dict[str, str] = {}
    plan = Plan(
        model,
        KFAC_SHAPES,
        shared_dim,
        kronecker_only=True,
        on_refusal=lambda name, module, error: reasons.update({name: str(error)}),
    )
    reasons.update(plan.skipped)
    candidates: list[Layer] = []
    for layer in plan.layers:
        weight: Any = layer.module.weight
        if not weight.requires_grad:
            reasons[layer.name] = "its weight is frozen"
        elif weight.numel() > max_weights:
            reasons[layer.name] = (
                f"it has {weight.numel():,} weights, more than max_weights={max_weights:,}"
            )
        else:
            candidates.append(layer)
    return candidates, reasons


def _matches(layer: Layer, key: Any) -> bool:
    """Whether a key of the user's stands for a layer, or for one that is tied to it."""
    modules = [(layer.name, layer.module), *layer.tied]
    return any(matches_any(name, module, [key]) for name, module in modules)


def _matches_nothing(
    model: nn.Module, key: Any, candidates: list[Layer], reasons: dict[str, str]
) -> str:
    named = [n for n, m in model.named_modules() if n in reasons and matches_any(n, m, [key])]
    why = "; ".join(f"'{n}': {reasons[n]}" for n in named)
    known = ", ".join(repr(layer.name) for layer in candidates[:8]) or "none"
    return (
        f"layers: {describe_key(key)} matches no layer with Kronecker factors that can be "
        "compared. " + (why or f"There are {known}.")
    )


def _nothing_to_compare(reasons: dict[str, str]) -> str:
    return "The model has no layer to compare. " + "; ".join(
        f"'{name}': {why}" for name, why in reasons.items()
    )


def _groups(layers: list[Layer], max_weights: int) -> Iterator[list[Layer]]:
    """Layers whose blocks take no more memory together than one of ``max_weights``."""
    group: list[Layer] = []
    for layer in layers:
        if group and sum(_num_weights(other) ** 2 for other in [*group, layer]) > max_weights**2:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _all_but(model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
    kept = {module for layer in layers for module in layer.modules}
    return [module for module in model.modules() if is_supported(module) and module not in kept]
