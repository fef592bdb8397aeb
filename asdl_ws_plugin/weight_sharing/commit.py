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
from .matrices import corrected, is_of, merge, share_inverses, shared_tensors, tensors, trained

__all__ = ["commit", "commit_products", "invert"]


@full_precision()
def commit(batch: Batch, unseen: Container[nn.Module], attr: str, decay: float | None) -> None:
    """Make the batch's curvature the modules' own.

    Args:
        unseen: the layers that took no part.
        attr: the modules' attribute.
        decay: the curvature of earlier batches is multiplied with it and added; ``None``: it is
            dropped.

    Raises a FloatingPointError, before anything is changed, if a matrix is not finite.
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
    _check_finite(results, batch.layers)
    if decay is None:
        _drop(batch.model, attr)
    else:
        results = _merged(results, attr, decay)
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
    results: list[tuple[nn.Module, SymMatrix]], attr: str, decay: float
) -> list[tuple[nn.Module, SymMatrix]]:
    """The matrices with those of earlier batches added."""
    merged = []
    shared = shared_tensors(new for _, new in results)
    for module, new in results:
        old = getattr(module, attr, None)
        # Else the layer was frozen or unfrozen: a new average.
        if old is not None and is_of(old, module):
            new = merge(new, old, decay, shared)
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
def invert(model: nn.Module, layers: Sequence[Layer], attr: str, damping: Any) -> None:
    """Replace the modules' curvature by its damped inverse.

    Raises a LinAlgError if a damped matrix is not positive definite.
    """
    modules = [(layer.name, layer.module) for layer in layers] + [("", model)]
    found = [
        (name, module, matrix)
        for name, module in modules
        if (matrix := getattr(module, attr, None)) is not None
    ]
    share_inverses((module, matrix) for _, module, matrix in found)
    for name, _, matrix in found:
        try:
            matrix.update_inv(damping, replace=True)
        except torch.linalg.LinAlgError as error:
            reason = f"its curvature plus damping {damping} is not positive definite"
            raise torch.linalg.LinAlgError(layer_message(name, reason, f"({error})")) from error
