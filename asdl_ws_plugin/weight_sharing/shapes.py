"""ASDL's shapes of a layer's curvature, and which layers get which."""

from __future__ import annotations

from typing import Any

from asdl.matrices import (
    SHAPE_DIAG,
    SHAPE_FULL,
    SHAPE_KFE,
    SHAPE_KRON,
    SHAPE_LAYER_WISE,
    SHAPE_SWIFT_KRON,
    SHAPE_UNIT_WISE,
)
from torch import nn

__all__ = ["KFAC_SHAPES", "KRONECKER", "NORMALIZATIONS", "SHAPES", "unit_wise_or_diag"]

SHAPES = (
    SHAPE_FULL,
    SHAPE_LAYER_WISE,
    SHAPE_KRON,
    SHAPE_SWIFT_KRON,
    SHAPE_KFE,
    SHAPE_UNIT_WISE,
    SHAPE_DIAG,
)
KRONECKER = (SHAPE_KRON, SHAPE_SWIFT_KRON, SHAPE_KFE)

NORMALIZATIONS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)

# Those of KfacGradientMaker.
KFAC_SHAPES: list[Any] = [SHAPE_KRON, *((cls, SHAPE_UNIT_WISE) for cls in NORMALIZATIONS)]


def unit_wise_or_diag(module: nn.Module) -> str:
    """A unit with one trainable parameter has a number for a block: the diagonal, which upstream
    can compute.
    """
    weight, bias = (
        p is not None and p.requires_grad
        for p in (getattr(module, "weight", None), getattr(module, "bias", None))
    )
    is_block = weight and (bias or not isinstance(module, NORMALIZATIONS))
    return SHAPE_UNIT_WISE if is_block else SHAPE_DIAG
