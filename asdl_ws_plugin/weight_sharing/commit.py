"""Stage 6, *commit*: a batch's matrices become the modules' own, all or none."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from asdl.symmatrix import SymMatrix
from torch import nn

from .batch import Batch
from .capture import Layer
from .errors import layer_message
from .factors import full_precision
from .joint import owners, share_inverses
from .matrices import corrected, is_of, merge, shared_tensors, tensors, trained
from .matrices import share_inverses as share_inverses_of_blocks
from .ranks import Ranks

__all__ = ["commit", "commit_products", "invert", "matrices_of"]


@full_precision()
def matrices_of(batch: Batch, unseen: Container[nn.Module]) -> list[tuple[nn.Module, SymMatrix]]:
    """Modules and their curvature in a batch, without the layers that took no part.

    Raises a FloatingPointError if a matrix is not finite.
    """
    context = batch.context
    matrices = [
        (layer.module, context.cov_symmatrix(layer.module, pop=True))
        for layer in batch.layers
        if layer.module not in unseen
    ]
    matrices.append((batch.model, context.full_cov_symmatrix(batch.model, pop=True)))
    results = [(module, corrected(matrix)) for module, matrix in matrices if matrix is not None]
    for module, matrix in results:
        matrix.trained = trained(module)
        matrix.updates = 1
    _check_finite(results, batch.layers)
    return results


@full_precision()
def commit(
    model: nn.Module,
    results: list[tuple[nn.Module, SymMatrix]],
    attr: str,
    decay: float | None,
    least_weight: float | None = None,
) -> None:
    """Make curvature the modules' own.

    Args:
        results: the modules and their curvature.
        attr: the modules' attribute.
        decay: the curvature of earlier batches is multiplied with it and added; ``None``: it is
            dropped.
        least_weight: the k-th update of a matrix has the weight ``max(least_weight, 1 / k)`` in an
            average without bias instead.
    """
    if decay is None:
        _drop(model, attr)
    else:
        results = _merged(results, attr, decay, least_weight)
    for module, matrix in results:
        setattr(module, attr, matrix)


def commit_products(batch: Batch, unseen: Container[nn.Module], attr: str) -> None:
    """Make the batch's Fisher-vector products the modules' own, in the place of earlier ones."""
    context = batch.context
    results = [
        (layer.module, context.cvp_paramvector(layer.module, pop=True))
        for layer in batch.layers
        if layer.module not in unseen
    ]
    results.append((batch.model, context.full_cvp_paramvector(batch.model, pop=True)))
    _drop(batch.model, attr)
    for module, product in results:
        if product is not None:
            setattr(module, attr, product)


def _drop(model: nn.Module, attr: str) -> None:
    for module in model.modules():
        if hasattr(module, attr):
            delattr(module, attr)


def _merged(
    results: list[tuple[nn.Module, SymMatrix]], attr: str, decay: float, least_weight: float | None
) -> list[tuple[nn.Module, SymMatrix]]:
    """The matrices with those of earlier batches added."""
    merged = []
    shared = shared_tensors(new for _, new in results)
    for module, new in results:
        old = getattr(module, attr, None)
        # Else the layer was frozen or unfrozen: a new average.
        if old is not None and is_of(old, module):
            updates = getattr(old, "updates", 0) + 1
            if least_weight is None:
                new = merge(new, old, decay, shared)
            else:
                weight = max(least_weight, 1 / updates)
                new = merge(new, old, 1 - weight, shared, weight)
            new.updates = updates
        merged.append((module, new))
    return merged


def _check_finite(results: list[tuple[nn.Module, SymMatrix]], layers: Sequence[Layer]) -> None:
    sums = [(module, tensor.sum()) for module, matrix in results for tensor in tensors(matrix)]
    if sums and bool(torch.isfinite(torch.stack([s.double() for _, s in sums])).all()):
        return
    for module, value in sums:
        if not bool(torch.isfinite(value)):
            name = next((layer.name for layer in layers if layer.module is module), "")
            raise FloatingPointError(
                layer_message(
                    name,
                    "its curvature is not finite; nothing was updated",
                    "Either the batch has such values, or training has diverged: lower the "
                    "learning rate or raise damping.",
                )
            )


@full_precision()
def invert(
    model: nn.Module,
    layers: Sequence[Layer],
    attr: str,
    damping: Any,
    ranks: Ranks,
    place: str,
) -> None:
    """Replace the modules' curvature by its damped inverse, which one of the ranks computes.

    Raises a LinAlgError if a damped matrix is not positive definite.
    """
    found = [
        (layer.name, layer.module, matrix)
        for layer in layers
        if (matrix := getattr(layer.module, attr, None)) is not None
    ]
    pairs = [(module, matrix) for _, module, matrix in found]
    share_inverses_of_blocks(pairs)
    owner = owners(ranks, pairs)
    mine = [
        (name, matrix)
        for (name, _, matrix), rank in zip(found, owner, strict=True)
        if rank == ranks.rank
    ]
    full = getattr(model, attr, None)
    for name, matrix in [*mine, *([("", full)] if full is not None else [])]:
        try:
            matrix.update_inv(damping, replace=True)
        except torch.linalg.LinAlgError as error:
            reason = f"its curvature plus damping {damping} is not positive definite"
            raise torch.linalg.LinAlgError(layer_message(name, reason, f"({error})")) from error
    share_inverses(ranks, f"{place}, inverses", [m for _, m in pairs], owner, replace=True)
