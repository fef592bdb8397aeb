"""A gradient maker for loops that call the model and ``backward()`` themselves.

The engine is the gradient makers': a step that records hands them what it saw, and both ways end
with the same bits. Hooks are on the model only while a step is due whose curvature is wanted, and
open only during its forward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import asdl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .makers import KfacGradientMaker
from .weight_sharing.capture import Captured, Record
from .weight_sharing.fisher_maker import recording_of
from .weight_sharing.nests import tensors_in
from .weight_sharing.observe_loss import LossObserver
from .weight_sharing.torch_private import remove_function_mode, unwrapped
from .weight_sharing.training_config import TrainingConfig, recommended

__all__ = ["Preconditioner"]

logger = logging.getLogger("asdl_ws_plugin")

_CONFIG_FIELDS = {field.name for field in dataclasses.fields(TrainingConfig)}


@dataclasses.dataclass
class _Forward:
    """A forward pass that was seen, and whose backward pass was not yet."""

    record: Record
    output: Any
    inputs: Any


class _Watcher(LossObserver):
    """Sees the loss being computed, and ``Tensor.backward`` being called on it."""

    def __init__(self, on_backward: Callable[..., None]) -> None:
        super().__init__()
        self._on_backward = on_backward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return self._on_backward(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Preconditioner:
    """K-FAC in a loop that is already there.

    It takes three lines::

        prec = asdl_ws_plugin.Preconditioner(model)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            prec.step()  # .grad is now the preconditioned gradient
            optimizer.step()
            optimizer.zero_grad()

    Several backward passes before :meth:`step` are micro-batches of one step: their gradients and
    curvature are added up and preconditioned once. With a ``torch.amp.GradScaler``, call
    ``scaler.unscale_(optimizer)`` before :meth:`step`, or let :meth:`step_before` do the right
    thing; the scale of the loss is recognised and is no part of the curvature.

    Args:
        model: the model, or its DistributedDataParallel or compiled wrapper: what the loop calls.
        config: the schedule, damping and average; by default the preset,
            :func:`~asdl_ws_plugin.recommended`. An :class:`asdl.PreconditioningConfig` is ASDL's
            own way: its defaults, and nothing of the preset.
        maker: the class of the gradient maker underneath.
        logits: a function of the model's output that selects the logits. By default they are the
            output, its ``logits``, or its first tensor.
        statistics: whether :attr:`last_step` is filled in, and logged.
        **options: fields of a :class:`~asdl_ws_plugin.TrainingConfig` in the place of the
            preset's, as in ``damping=1e-2``, and options of the gradient maker: ``shared_dim``,
            ``fisher_type``, ``loss_type``, ...

    Attributes:
        maker: the gradient maker, with its ``plan`` and ``setting``.
        enabled: whether curvature is recorded and gradients are preconditioned.
        last_step: statistics of the last step.
        num_skipped: how many steps were skipped for a gradient that a GradScaler made overflow.

    Raises:
        TypeError: both a configuration and its fields are given.
        ValueError: an option is invalid, or there is no layer to precondition.

    >>> import asdl_ws_plugin, torch
    >>> import torch.nn.functional as F
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    >>> prec = asdl_ws_plugin.Preconditioner(model)
    >>> loss = F.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 4, (16,)))
    >>> prec.backward(loss)
    >>> prec.maker.setting
    'reduce'
    """

    def __init__(
        self,
        model: nn.Module,
        config: asdl.PreconditioningConfig | None = None,
        *,
        maker: Any = KfacGradientMaker,
        logits: Callable[[Any], Tensor] | None = None,
        statistics: bool = False,
        **options: Any,
    ) -> None:
        fields = {name: options.pop(name) for name in _CONFIG_FIELDS & options.keys()}
        if config is not None and fields:
            raise TypeError(f"Give {', '.join(sorted(fields))} in the config, or no config.")
        if config is None:
            config = recommended(**fields)
        self.model = model
        self.maker = maker(unwrapped(model), config, **options)
        self.enabled = True
        self.last_step: dict[str, Any] = {}
        self.num_skipped = 0
        self._statistics = statistics
        self._select = logits or _first_logits
        self._handles: list[RemovableHandle] = []
        self._opened: contextlib.ExitStack | None = None
        self._forwards: list[_Forward] = []
        self._watcher: _Watcher | None = None
        self._seconds: dict[str, float] = {}
        self._overflowed = False
        self._seen_backward = False
        self._watch()

    # ------------------------------------------------------------------------------------- the loop

    def backward(self, loss: Tensor, accumulate: bool = False) -> None:
        """``loss.backward()``, and unless other micro-batches follow, :meth:`step`.

        Args:
            loss: the loss, a scalar; a GradScaler may have scaled it.
            accumulate: this is a micro-batch of a step that goes on.
        """
        loss.backward()
        if not accumulate:
            self.step()

    def step(self) -> None:
        """Precondition the gradients in ``.grad``, in place; to be called after the backward pass
        and before the optimizer's step.

        Raises:
            RuntimeError: curvature was due, but no forward pass in training mode, or no backward
                pass of its loss, was seen.
        """
        if not self.enabled:
            return
        if self._overflowed:
            self._forget()
            self._watch()
            return
        maker = self.maker
        self._check_seen()
        before = self._norm() if self._statistics else None
        due = self._is_due()
        try:
            with self._timed("step"):
                maker.finish_step()
        finally:
            self._forget()
            self._watch()
        if self._statistics:
            self._note(before, due)

    def step_before(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`step` right before every ``optimizer.step()``, which may be somebody else's
        call: a framework's, or a GradScaler's, which leaves it out where gradients overflow.

        Of several optimizers of one model, the first that steps does it.

        Returns a handle; ``remove()`` undoes it.
        """

        def hook(*_: Any) -> None:
            if self._has_backward():
                self.step()

        return optimizer.register_step_pre_hook(hook)

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters whose gradients are preconditioned, and the others, as ``torch.optim``
        takes them.
        """
        inside = {id(p) for p in self._preconditioned()}
        groups: list[dict[str, Any]] = [
            {"params": [], "preconditioned": True},
            {"params": [], "preconditioned": False},
        ]
        for p in self.maker.model.parameters():
            if p.requires_grad:
                groups[id(p) not in inside]["params"].append(p)
        return groups

    def state_dict(self) -> dict[str, Any]:
        """That of the gradient maker: all that the next step needs. Take it between steps."""
        return self.maker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there. Raises a ValueError if the state does not fit."""
        self.maker.load_state_dict(state_dict)
        self._forget()
        self._watch()

    def close(self) -> None:
        """Take all hooks off the model; the preconditioner does nothing afterwards."""
        self.enabled = False
        self._forget()
        self._watch()

    # ----------------------------------------------------------------------------- what is recorded

    def _is_due(self) -> bool:
        return self.enabled and self.maker.do_update_curvature(self.maker.state["step"])

    def _watch(self) -> None:
        """Have hooks on the model if the next step needs its curvature, and none if not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen_backward = False
        if not self._is_due():
            return
        model = self.model
        self._handles = [
            model.register_forward_pre_hook(self._open, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not model.training or not torch.is_grad_enabled() or self._opened is not None:
            return
        if not self.enabled:
            return
        if self._watcher is None:
            self._watcher = _Watcher(self._on_backward)
            self._watcher.__enter__()
        plan = self.maker.plan
        plan.check_still_complete()
        self._opened = contextlib.ExitStack()
        record = self._opened.enter_context(recording_of(plan))
        if record.lineage is not None:
            record.lineage.start(args, kwargs)
        self._forwards.append(_Forward(record, None, [args, kwargs]))

    def _close(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._opened is None:
            return
        self._opened.close()
        self._opened = None
        if output is None:  # the forward pass failed
            self._forwards.pop()
        else:
            self._forwards[-1].output = output

    def _on_backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """In the place of ``loss.backward()`` while a curvature step is being recorded."""
        seen = [] if not self.enabled else self._forwards_of(loss)
        if not seen:
            loss.backward(gradient, retain_graph, create_graph, inputs)
            return
        if len(seen) > 1:
            raise ValueError(
                f"The loss depends on {len(seen)} calls of the model. Make them one call of a "
                "module that the Preconditioner is given, so that it is clear what an example is."
            )
        if gradient is not None or inputs is not None or create_graph:
            raise ValueError(
                "On a step with curvature, backward() takes no gradient, inputs or create_graph."
            )
        (forward,) = seen
        assert self._watcher is not None
        watcher = self._watcher
        captured = Captured(
            forward.record,
            self._select(forward.output),
            loss,
            list(watcher.observations),
            forward.inputs,
            loss_scale=watcher.loss_scale,
        )
        if all(p.grad is None for p in self.maker.model.parameters()):
            # Gradients were dropped since, as after a step that a GradScaler skipped.
            self.maker.fisher_maker.micro_batches = None
        self._forwards.remove(forward)
        watcher.observations.clear()
        self._seen_backward = True
        with self._timed("curvature"), self._given(captured, forward.output):
            self._add(captured, loss)
        watcher.loss_scale = None

    def _add(self, captured: Captured, loss: Tensor) -> None:
        maker = self.maker
        if captured.loss_scale is None:
            maker.add_micro_batch()
            return
        try:
            maker.add_micro_batch()
            grads = [p.grad for p in maker.model.parameters() if p.grad is not None]
            norms = torch.stack([grad.abs().max().float() for grad in grads])
            self._overflowed = not bool(torch.isfinite(norms).all())
        except FloatingPointError:
            # The scaler looks for gradients that are not finite, skips the step and lowers its
            # scale.
            self._overflowed = True
            for p in maker.model.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, torch.inf)
        if self._overflowed:
            self.num_skipped += 1
            maker.fisher_maker.micro_batches = None

    @contextlib.contextmanager
    def _given(self, captured: Captured, output: Any) -> Iterator[None]:
        """Let the gradient maker take what was captured in the place of calling the model."""
        maker = self.maker
        maker.setup_model_call(lambda: output)
        maker.setup_loss_call(lambda: captured.loss)
        maker.fisher_maker.given = captured
        try:
            yield
        finally:
            maker.fisher_maker.given = None
            maker.setup_model_call(None)
            maker._model_output = maker._loss = maker._logits = None
            fisher_maker = maker.fisher_maker
            fisher_maker._model_output = fisher_maker._loss = fisher_maker._logits = None

    def _forwards_of(self, loss: Tensor) -> list[_Forward]:
        """The forward passes that a loss depends on."""
        nodes = {}
        for forward in self._forwards:
            for tensor in tensors_in(forward.output):
                if tensor.grad_fn is not None:
                    nodes[tensor.grad_fn] = forward
        found: list[_Forward] = []
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

    def _forget(self) -> None:
        """Let go of what was seen for the step that has ended."""
        self._forwards.clear()
        self._overflowed = False
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._watcher is not None:
            remove_function_mode(self._watcher)
            self._watcher = None

    def _has_backward(self) -> bool:
        """Whether there is something to do: a backward pass since the last step."""
        if self._is_due():
            return self._seen_backward
        return any(p.grad is not None for p in self.maker.model.parameters())

    def _check_seen(self) -> None:
        if not self._is_due() or self._seen_backward:
            return
        what = (
            "the model was called, but loss.backward() was not, on what it returned"
            if self._forwards
            else "no call of the model in training mode was"
        )
        raise RuntimeError(
            f"Curvature is due in this step, and {what} seen. Call the module that the "
            "Preconditioner was given, in training mode, and loss.backward() or "
            "prec.backward(loss)."
        )

    # ----------------------------------------------------------------------------------- statistics

    def _preconditioned(self) -> Iterator[nn.Parameter]:
        for layer in self.maker.plan.layers:
            for module in layer.modules:
                for kind in ("weight", "bias"):
                    p = (
                        module.owned(kind)
                        if hasattr(module, "owned")
                        else getattr(module, kind, None)
                    )
                    if p is not None and p.requires_grad:
                        yield p

    def _norm(self) -> float:
        norms = [p.grad.norm() for p in self.maker.model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        if not self._statistics:
            yield
            return
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def _note(self, norm_before: float | None, had_curvature: bool) -> None:
        maker = self.maker
        step = maker.state["step"] - 1
        ages = self.last_step
        has_inverse = maker.do_update_preconditioner(step)
        self.last_step = {
            "step": step,
            "norm_before": norm_before,
            "norm_after": self._norm(),
            "damping": maker.config.damping,
            "curvature_age": 0 if had_curvature else ages.get("curvature_age", 0) + 1,
            "inverse_age": 0 if has_inverse else ages.get("inverse_age", 0) + 1,
            "seconds": dict(self._seconds),
            "left_out": {
                layer.name: maker.fisher_maker.unseen[layer.module]
                for layer in maker.plan.layers
                if layer.module in maker.fisher_maker.unseen
            },
            "num_skipped": self.num_skipped,
        }
        self._seconds = {}
        logger.info("step %d: %s", step, self.last_step)


def _first_logits(output: Any) -> Tensor:
    """The output, its ``logits``, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensors = list(tensors_in(output))
    if not tensors:
        raise TypeError(
            f"There is no tensor in the model's output, a {type(output).__name__}. Say which are "
            "the logits: Preconditioner(..., logits=lambda output: ...)."
        )
    return tensors[0]
