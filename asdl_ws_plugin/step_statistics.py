"""What the last step of a :class:`~.preconditioner.Preconditioner` did, in numbers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch

from .step_gradients import gradients_of

__all__ = ["StepStatistics"]

logger = logging.getLogger("asdl_ws_plugin")


class StepStatistics:
    """Norms, ages and times of a gradient maker's steps. Switched off, it costs nothing.

    Attributes:
        last: those of the last step.
    """

    def __init__(self, maker: Any, is_on: bool) -> None:
        self.maker, self.is_on = maker, is_on
        self.last: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def norm(self) -> float | None:
        """The norm of all gradients."""
        if not self.is_on:
            return None
        grads = gradients_of(self.maker)
        if self.maker.sharded is not None and grads:
            return self.maker.sharded.norm(grads)
        norms = [grad.norm() for grad in grads]
        return float(torch.stack(norms).norm()) if norms else 0.0

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Around a part of a step."""
        if not self.is_on:
            yield
            return
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def note(self, norm_before: float | None, had_curvature: bool, num_skipped: int) -> None:
        """A step has ended."""
        if not self.is_on:
            return
        maker = self.maker
        step = maker.state["step"] - 1
        ages = self.last
        has_inverse = maker.do_update_preconditioner(step)
        self.last = {
            "step": step,
            "norm_before": norm_before,
            "norm_after": self.norm(),
            "damping": maker.config.damping,
            "curvature_age": 0 if had_curvature else ages.get("curvature_age", 0) + 1,
            "inverse_age": 0 if has_inverse else ages.get("inverse_age", 0) + 1,
            "seconds": dict(self._seconds),
            "left_out": {
                layer.name: maker.fisher_maker.unseen[layer.module]
                for layer in maker.plan.layers
                if layer.module in maker.fisher_maker.unseen
            },
            "num_skipped": num_skipped,
        }
        self._seconds = {}
        logger.info("step %d: %s", step, self.last)
