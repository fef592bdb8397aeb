"""Import torchvision (and timm, which needs it) beside a build of torch that its wheel was not made
for.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

__all__ = ["make_importable"]


def make_importable() -> None:
    """Declare the operators that a CUDA build of torchvision misses in a CPU build of torch, if it
    misses them.

    Only their signatures are needed to import it; calling them still fails. Does nothing where
    torchvision imports.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for operator in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            torch.library.define(
                f"torchvision::{operator.split('(')[0]}", f"({operator.split('(', 1)[1]}"
            )
        importlib.import_module("torchvision")
