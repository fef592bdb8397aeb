"""The little of the benchmark's ``spec`` that a submission touches."""

from __future__ import annotations

import enum


class ForwardPassMode(enum.Enum):
    """What the model is called for."""

    TRAIN = 0
    EVAL = 1
