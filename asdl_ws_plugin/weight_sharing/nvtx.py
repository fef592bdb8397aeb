"""NVTX ranges where this build of torch has them: a stand-in for ``torch.cuda.nvtx``.

A CPU-only build has the module but raises a RuntimeError, "NVTX functions not installed", when a
range is entered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["has_nvtx", "range"]


def has_nvtx() -> bool:
    """Whether ranges can be entered."""
    try:
        torch.cuda.nvtx.range_push("asdl")
        torch.cuda.nvtx.range_pop()
        return True
    except RuntimeError:
        return False


@contextlib.contextmanager
def _no_range(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


range = torch.cuda.nvtx.range if has_nvtx() else _no_range
