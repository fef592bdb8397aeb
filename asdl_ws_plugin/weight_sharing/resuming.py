"""What a gradient maker needs to go on elsewhere: its state, its copies, its pickles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from asdl.symmatrix import SymMatrix
from torch import nn

from .copying import set_state, state_of
from .state_check import check_state
from .state_dict import (
    load_plan_state,
    load_training_state,
    loaded_matrices,
    replace_matrices,
    state_of_maker,
)
from .training import TrainingOptions
from .transaction import carry, curvature_of

__all__ = ["Resuming"]


class Resuming(TrainingOptions):
    """The part of :class:`~.grad_maker.WeightSharing` that saves and loads."""

    ranks: Any

    @functools.cached_property
    def put_aside(self) -> dict[nn.Module, SymMatrix]:
        """This maker's curvature of modules that carry another one's now."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The step, the curvature with its inverses, and what batches have settled: all that the
        next step needs, on any number of ranks.

        Tensors are references, as in ``torch.optim``.
        """
        return state_of_maker(self, curvature_of(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, mid-interval too. A state with the step alone (ASDL 0.1a5) leaves the
        curvature as it is.

        Raises a ValueError, with nothing changed, if the state is of another model, of other
        strategies or options, of another version, or damaged.
        """
        check_state(self, state_dict)
        if "curvature" in state_dict:
            matrices = loaded_matrices(self.model, state_dict["curvature"])
            if self.training is not None:
                load_training_state(self, state_dict["training"], dict(matrices))
            carry(self)
            replace_matrices(self.model, self._fisher_attr, matrices)
            self.fisher_maker.unseen = load_plan_state(self.plan, state_dict["weight_sharing"])
            self.fisher_maker.draws = state_dict["weight_sharing"]["draws"]
        self.state["step"] = state_dict["step"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.sync_group is not None:
            raise TypeError(
                "A gradient maker with a sync_group cannot be copied, since process groups cannot. "
                "Make another one, and load this one's state_dict()."
            )
        state = {**state_of(self), "put_aside": curvature_of(self)}
        # A class that is made at run time is found by what it is made of.
        return _new, vars(type(self)).get("_made_by", (_itself, type(self))), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, state)
        self.fisher_maker.ranks = self.ranks


def _itself(maker_class: Any) -> Any:
    return maker_class


def _new(make: Callable[[Any], Any], maker_class: Any) -> Any:
    """An empty gradient maker, for a copy."""
    made = make(maker_class)
    return made.__new__(made)
