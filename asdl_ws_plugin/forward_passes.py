"""The forward passes that a user makes, and the losses that are computed of them.

Hooks are on the model only while a step is due that needs one of both, and layers are hooked only
during the forward pass of a step whose curvature is wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .weight_sharing.capture import Captured, Record, is_own_call
from .weight_sharing.fisher_maker import recording_of
from .weight_sharing.nests import tensors_in
from .weight_sharing.observe_loss import LossObserver
from .weight_sharing.plan import Plan
from .weight_sharing.torch_private import (
    active_wrapper,
    add_outermost_function_mode,
    remove_function_mode,
)
from .weight_sharing.wrappers import Held, wrappers_of

__all__ = ["Forward", "ForwardPasses", "first_logits"]


@dataclasses.dataclass(eq=False)
class Forward:
    """A forward pass that was seen, and whose backward pass was not yet.

    Attributes:
        record: what the layers saw; nothing on a step without curvature.
        output: what the model returned.
        inputs: the model's arguments.
        joins: whether a wrapper would have averaged the ranks' gradients in its backward pass.
    """

    record: Record
    output: Any
    inputs: Any
    joins: bool = False


class _Watcher(LossObserver):
    """Sees the loss being computed, and ``Tensor.backward`` being called on it.

    It keeps nobody alive: a model that is dropped within a step would stay for as long as the
    process does.
    """

    def __init__(self, passes: ForwardPasses) -> None:
        super().__init__()
        self._passes = weakref.ref(passes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        passes = self._passes()
        if func is Tensor.backward and passes is not None:
            return passes.on_backward(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class ForwardPasses:
    """Watches a model that somebody else calls, and the losses of its outputs.

    Args:
        model: what is called, wrapped or not.
        plan: the layers that are recorded.
        on_backward: called in the place of ``Tensor.backward``, once a forward pass was seen.
        has_ranks: whether several processes train together; then DistributedDataParallel does not
            average gradients in the forward passes that are seen.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, on_backward: Callable[..., None], has_ranks: bool
    ) -> None:
        self.model, self.plan = model, plan
        self.on_backward, self._has_ranks = on_backward, has_ranks
        self._records = False
        self._handles: list[RemovableHandle] = []
        self._opened: contextlib.ExitStack | None = None
        self._forwards: list[Forward] = []
        self._watcher: _Watcher | None = None
        self._unwatch: weakref.finalize[..., ForwardPasses] | None = None
        self._held, self._held_outside = Held(), Held()

    def __bool__(self) -> bool:
        """Whether there are forward passes whose backward pass was not seen."""
        return bool(self._forwards)

    def watch(self, watches: bool, records: bool) -> None:
        """Have hooks on the model, or none.

        Args:
            watches: whether forward passes are to be seen.
            records: whether what their layers see is wanted, too.
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self._records = [], records
        if watches:
            self._handles = [
                self.model.register_forward_pre_hook(self._open, prepend=True, with_kwargs=True),
                self.model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
            ]

    def forget(self) -> None:
        """Let go of what was seen for the step that has ended."""
        self._forwards.clear()
        self._held.release()
        self._held_outside.release()
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._unwatch is not None:
            self._unwatch()
            self._watcher = self._unwatch = None

    # ------------------------------------------------------------------------------- a forward pass

    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        is_training = model.training and torch.is_grad_enabled()
        if not is_training or self._opened is not None or is_own_call():
            return
        if self._watcher is None:
            self._watcher = _Watcher(self)
            add_outermost_function_mode(self._watcher)
            self._unwatch = weakref.finalize(self, remove_function_mode, self._watcher)
            self._unwatch.atexit = False
        self.plan.check_still_complete()
        with contextlib.ExitStack() as stack:
            joins = self._hold() if self._has_ranks else False
            record = stack.enter_context(recording_of(self.plan)) if self._records else Record()
            self._opened = stack.pop_all()
        if record.lineage is not None:
            record.lineage.start(args, kwargs)
        self._forwards.append(Forward(record, None, [args, kwargs], joins))

    def _hold(self) -> bool:
        """Keep wrappers from averaging: those inside of what is called, until the call has ended,
        and one around it, which is looked at after the call.
        """
        around = active_wrapper()
        outside = [] if around is None else [around]
        joins = self._held.hold(wrappers_of(self.model))
        return self._held_outside.hold(outside) or joins

    def _close(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._opened is None:
            return
        self._opened.close()
        self._opened = None
        self._held.release()
        if output is None:  # the forward pass failed
            self._forwards.pop()
            self._held_outside.release()
        else:
            self._forwards[-1].output = output

    # ------------------------------------------------------------------------------ a backward pass

    def of(self, loss: Tensor) -> list[Forward]:
        """The forward passes that a loss depends on."""
        nodes = {}
        for forward in self._forwards:
            for tensor in tensors_in(forward.output):
                if tensor.grad_fn is not None:
                    nodes[tensor.grad_fn] = forward
        found: list[Forward] = []
        done = {loss.grad_fn}
        todo = [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node in nodes:
                if nodes[node] not in found:
                    found.append(nodes[node])
                continue
            for other, _ in () if node is None else node.next_functions:
                if other is not None and other not in done:
                    done.add(other)
                    todo.append(other)
        return found

    def take(self, forward: Forward, loss: Tensor, logits: Tensor) -> Captured:
        """A forward pass with its loss; it is not kept any longer."""
        assert self._watcher is not None
        self._held_outside.release()
        observations: Sequence[Any] = list(self._watcher.observations)
        captured = Captured(
            forward.record,
            logits,
            loss,
            observations,
            forward.inputs,
            loss_scale=self._watcher.loss_scale,
        )
        self._forwards.remove(forward)
        self._watcher.observations.clear()
        self._watcher.loss_scale = None
        return captured


def first_logits(output: Any) -> Tensor:
    """The output, its ``logits``, or its first tensor.

    Raises a TypeError if there is none.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    found = next(tensors_in(output), None)
    if found is None:
        raise TypeError(
            f"There is no tensor in the model's output, a {type(output).__name__}. Say which are "
            "the logits: Preconditioner(..., logits=lambda output: ...)."
        )
    return found
