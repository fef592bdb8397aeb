"""Warnings that point at the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

# What lies between the user's line and the place that has something to say.
_INTERNAL = {"asdl", "asdl_ws_plugin", "contextlib", "torch"}


def warn(message: str) -> None:
    """Issue a UserWarning from the innermost frame that is neither this package's, nor ASDL's, nor
    PyTorch's.
    """
    frame, level = sys._getframe(1), 2
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
