"""The operations that strategies of one's own are built on; see
:mod:`~.weight_sharing.operations`.
"""

from .weight_sharing.operations import (
    BatchNorm,
    Conv2dExpand,
    Conv2dReduce,
    Embedding,
    LayerNorm,
    LinearExpand,
    LinearReduce,
)

__all__ = [
    "BatchNorm",
    "Conv2dExpand",
    "Conv2dReduce",
    "Embedding",
    "LayerNorm",
    "LinearExpand",
    "LinearReduce",
]
