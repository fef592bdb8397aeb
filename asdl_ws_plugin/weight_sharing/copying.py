"""Copies of gradient makers: ``copy.deepcopy`` and ``pickle``.

What was set up for one step (the calls of the model and the loss, and what they returned) is not
copied: it is set up anew for each step, and belongs to graphs, lambdas and batches that no copy can
have.
"""

from __future__ import annotations

from typing import Any

from asdl.grad_maker import DummyObject, GradientMaker

__all__ = ["set_state", "state_of"]


def state_of(maker: GradientMaker) -> dict[str, Any]:
    """The attributes of a gradient maker that a copy gets."""
    blank = GradientMaker(maker.model)
    state = {
        name: value
        for name, value in vars(maker).items()
        if name == "model" or (name not in vars(blank) and name != "ranks")
    }
    # which logits: upstream's own object cannot be copied, for it has every attribute
    state["_dummy_logits"] = maker._dummy_logits._operators
    return state


def set_state(maker: GradientMaker, state: dict[str, Any]) -> None:
    """Let a new object have these attributes."""
    GradientMaker.__init__(maker, state["model"])
    vars(maker).update({**state, "_dummy_logits": DummyObject(state["_dummy_logits"])})
