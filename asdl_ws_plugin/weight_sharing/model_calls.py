"""Stage 1 of a curvature step: the model and the loss are called, and watched meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from asdl.fisher import FisherMaker

from .capture import Captured, Record, recording
from .logits import logits_of
from .observe_loss import CountsTerms, LossObserver
from .plan import Plan
from .positions import take_positions
from .torch_private import eagerly

__all__ = ["ModelCalls", "declared_reduction", "recording_of"]


class ModelCalls(CountsTerms, FisherMaker):
    """The part of :class:`~.fisher_maker.WeightSharingFisherMaker` that calls the model."""

    plan: Plan
    ranks: Any
    sharded: Any

    def capture(self) -> Captured:
        """Stage 1: call the model and the loss."""
        self.plan.check_still_complete()
        loss, num_terms, observer = None, None, LossObserver()
        has_loss = self._loss_fn is not None or self._dummy_loss is not None
        # A loss given by its representation may have been computed inside of the model.
        watch = observer if self._loss_fn is None and has_loss else contextlib.nullcontext()
        with recording_of(self.plan) as record, watch:
            self.call_model()
        if has_loss:
            with observer, eagerly():  # a compiled loss hides the functions that it calls
                loss = self.call_loss()
            num_terms = self._num_terms
        return Captured(
            record,
            self._logits,
            loss,
            observer.observations,
            [self._model_args, self._model_kwargs],
            declared_reduction(self._loss_fn, self._loss_fn_kwargs),
            num_terms,
            observer.loss_scale,
        )

    def call_model(self) -> Any:
        """ASDL's; logits that nobody selected are what the loss is given of the output."""
        with contextlib.nullcontext() if self.sharded is None else self.ranks.exchanging():
            super().call_model()
        arguments = [*self._loss_fn_args, *self._loss_fn_kwargs.values()]
        self._logits = logits_of(self._model_output, self._dummy_logits, arguments)
        return self._model_output


def declared_reduction(function: Any, kwargs: dict[str, Any] | None = None) -> str | None:
    """What a loss function, called with these keyword arguments, says of its reduction."""
    reduction = (kwargs or {}).get("reduction", getattr(function, "reduction", None))
    if reduction is None and isinstance(function, partial):
        inner = getattr(function.func, "reduction", None)
        return function.keywords.get("reduction", inner)
    return reduction


@contextlib.contextmanager
def recording_of(plan: Plan) -> Iterator[Record]:
    """Record a forward pass of the plan's model while the context is open.

    The first batch's is also followed from the model's arguments on.
    """
    said = take_positions(plan.model)
    traced = None if plan.layouts.is_probed else plan.model
    with recording(plan.layers, plan.check_call, None, said, traced, plan.time_major) as record:
        yield record
