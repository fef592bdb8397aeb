"""A gradient maker for loops that call the model and ``backward()`` themselves.

The engine is the gradient makers': a step hands them what :mod:`~.forward_passes` saw, and both
ways end with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import asdl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forward_passes import ForwardPasses, first_logits
from .makers import KfacGradientMaker
from .step_gradients import Changes, StepGradients, are_kept, gradients_of
from .step_statistics import StepStatistics
from .weight_sharing.blocks import LinearBlock
from .weight_sharing.capture import Captured
from .weight_sharing.plan import Plan
from .weight_sharing.torch_private import unwrapped
from .weight_sharing.training_config import TrainingConfig, recommended

__all__ = ["Preconditioner"]

# model -> the one that watches it
_watching: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()

_CONFIG_FIELDS = {field.name for field in dataclasses.fields(TrainingConfig)}


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

    A model has one: making another, as a notebook's cell that runs again does, closes the one
    before.

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
        num_skipped: how many steps were skipped for a gradient that a GradScaler made overflow.

    Raises:
        TypeError: both a configuration and its fields are given, or an option that there is not.
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
        _check_arguments(model, options, maker)
        fields = {name: options.pop(name) for name in _CONFIG_FIELDS & options.keys()}
        if config is not None and fields:
            raise TypeError(f"Give {', '.join(sorted(fields))} in the config, or no config.")
        if config is None:
            config = recommended(**fields)
        self.model = model
        self.maker = maker(unwrapped(model), config, **options)
        self.enabled = True
        self.num_skipped = 0
        self._select = logits or first_logits
        self._statistics = StepStatistics(self.maker, statistics)
        if self.maker.sharded is not None:  # norms are computed together
            self.maker.ranks.agree(f"Preconditioner(statistics={statistics})")
        has_ranks = self.maker.ranks.size > 1
        self._passes = ForwardPasses(model, self.maker.plan, self._on_backward, has_ranks)
        self._overflowed = False
        self._seen_backward = False
        self._done, self._changes = StepGradients(), Changes(self.maker)
        self._before_steps: list[RemovableHandle] = []
        _take_over(self)
        self._watch()

    @property
    def last_step(self) -> dict[str, Any]:
        """Statistics of the last step; empty without ``statistics=True``."""
        return self._statistics.last

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
            RuntimeError: another one was made of the model; curvature was due, but no forward pass
                in training mode, or no backward pass of its loss, was seen; there is no gradient,
                or it is already preconditioned.
        """
        if not self.enabled:
            _check_watching(self)
            return
        if self._overflowed:
            self._next()
            return
        _check_order(self)
        before, due = self._statistics.norm(), self._is_due()
        try:
            with self._statistics.timed("step"):
                self.maker.finish_step()
                self._done.leave(gradients_of(self.maker))
        finally:
            self._next()
        self._statistics.note(before, due, self.num_skipped)

    def step_before(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`step` right before every ``optimizer.step()``, which may be somebody else's
        call: a framework's, or a GradScaler's, which leaves it out where gradients overflow.

        Of several optimizers of one model, the first that steps does it.

        Returns a handle; ``remove()`` undoes it. Raises a TypeError for what is no optimizer.
        """
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise _no_optimizer(optimizer)

        def hook(*_: Any) -> None:
            if self._has_backward():
                self.step()
            elif self.enabled:
                self._changes.warn_if_unseen(self._done, _not_seen(True, bool(self._passes)))

        self._before_steps.append(optimizer.register_step_pre_hook(hook))
        return self._before_steps[-1]

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters whose gradients are preconditioned, and the others, as ``torch.optim``
        takes them.
        """
        return _param_groups(self.maker)

    def state_dict(self) -> dict[str, Any]:
        """That of the gradient maker: all that the next step needs. Take it between steps."""
        return self.maker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there. Raises a ValueError if the state does not fit."""
        self.maker.load_state_dict(state_dict)
        self._next()

    def close(self) -> None:
        """Take all hooks off the model and the optimizers; the preconditioner does nothing
        afterwards.
        """
        self.enabled = False
        for handle in self._before_steps:
            handle.remove()
        self._next()

    # --------------------------------------------------------------------------- from step to step

    def _is_due(self) -> bool:
        return self.enabled and self.maker.do_update_curvature(self.maker.state["step"])

    def _next(self) -> None:
        """The step has ended; let go of what was seen for it, and look out for the next."""
        self._passes.forget()
        self._changes.forget()
        self._overflowed = False
        self._watch()

    def _watch(self) -> None:
        """See forward passes if the next step needs their curvature, or their loss: of several
        ranks each is weighed by its terms.
        """
        self._seen_backward = False
        due = self._is_due()
        self._passes.watch(self.enabled and (due or self.maker.ranks.size > 1), records=due)

    def _has_backward(self) -> bool:
        """Whether there is something to do: a backward pass since the last step."""
        if self._is_due():
            return self._seen_backward
        grads = gradients_of(self.maker)
        return bool(grads) and not self._done.are(grads)

    # ------------------------------------------------------------------------------ a backward pass

    def _on_backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """In the place of ``loss.backward()`` while forward passes are seen."""
        seen = [] if not self.enabled else self._passes.of(loss)
        if not seen:
            loss.backward(gradient, retain_graph, create_graph, inputs)
            return
        _check_backward(len(seen), gradient is not None or inputs is not None or create_graph)
        (forward,) = seen
        captured = self._passes.take(forward, loss, self._select(forward.output))
        is_dropped = self._seen_backward and not are_kept(self.maker)
        is_missed = captured.loss_scale is None and self._changes.warn_if_missed(is_dropped)
        if (
            is_dropped or is_missed or not gradients_of(self.maker)
        ):  # dropped also after a step that a GradScaler skipped
            self.maker.fisher_maker.micro_batches = None
        self._seen_backward = True
        with self._statistics.timed("curvature"), _giving(self.maker, captured, forward.output):
            self._add(captured, forward.joins)
        if not self._overflowed:
            self._changes.note(captured.loss_scale)

    def _add(self, captured: Captured, joins: bool) -> None:
        maker = self.maker
        if captured.loss_scale is None:
            maker.add_micro_batch(joins)
            return
        self._overflowed = False  # of a step that the scaler left out
        try:
            maker.add_micro_batch(joins)
            _check_finite(maker)
        except FloatingPointError:
            # The scaler looks for gradients that are not finite, skips the step and lowers its
            # scale.
            self._overflowed = True
            self.num_skipped += 1
            maker.fisher_maker.micro_batches = None
            for p in maker.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, torch.inf)


def _take_over(prec: Preconditioner) -> None:
    """Close the one that the model had."""
    before = _watching.get(prec.maker.model, lambda: None)()
    if before is not None:
        before.close()
    _watching[prec.maker.model] = weakref.ref(prec)


def _check_watching(prec: Preconditioner) -> None:
    """Raise a RuntimeError if another one was made of the model."""
    if _watching[prec.maker.model]() is not prec:
        raise RuntimeError(
            "Another Preconditioner was made of this model, which has closed this one. Call step() "
            "of the new one."
        )


def _check_order(prec: Preconditioner) -> None:
    """Raise a RuntimeError unless the calls before ``step()`` were those of a loop."""
    due, grads = prec._is_due(), gradients_of(prec.maker)
    if not prec._seen_backward and prec._done.are(grads):
        raise _already_done()
    if not prec._seen_backward and (due or prec._passes):
        raise _not_seen(due, bool(prec._passes))
    if not grads:
        raise _no_gradient()
    if prec._changes.are_there:
        raise _too_late()
    prec._changes.warn_if_scaled()


def _check_arguments(model: Any, options: dict[str, Any], maker: Any) -> None:
    """Raise a TypeError for what is no model, and for an option that nothing here knows."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A Preconditioner is of a model, got a {type(model).__name__}. Pass the nn.Module, "
            "and the parameters to the optimizer."
        )
    if not inspect.isclass(maker) or maker.__module__ != KfacGradientMaker.__module__:
        return  # its options are its own affair
    known = set(_CONFIG_FIELDS)
    classes: tuple[Any, ...] = inspect.getmro(maker)
    for cls in classes:
        known |= inspect.signature(cls.__init__).parameters.keys()
    known -= {"self", "args", "kwargs", "model", "config"}
    for name in sorted(options.keys() - known):
        nearest = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"Did you mean '{nearest[0]}'?" if nearest else f"There are {sorted(known)}."
        raise TypeError(f"Preconditioner has no option '{name}'. {hint}")


def _no_optimizer(found: Any) -> TypeError:
    return TypeError(
        f"step_before takes an optimizer, got a {type(found).__name__}. Pass the "
        "torch.optim.Optimizer whose step() is to follow, as in prec.step_before(optimizer)."
    )


def _already_done() -> RuntimeError:
    return RuntimeError(
        "The gradients in .grad are those that the last step has preconditioned: there was no "
        "backward pass since. Call step() once for each step of the optimizer, after "
        "loss.backward()."
    )


def _no_gradient() -> RuntimeError:
    return RuntimeError(
        "There is no gradient: zero_grad() was called between loss.backward() and step(), or there "
        "was no backward pass. The order is optimizer.zero_grad(), loss.backward(), prec.step(), "
        "optimizer.step()."
    )


def _too_late() -> RuntimeError:
    return RuntimeError(
        "Parameters have changed since loss.backward(): an optimizer has stepped already, with a "
        "gradient that was not preconditioned. The order is loss.backward(), prec.step(), "
        "optimizer.step(). In the closure of optimizer.step(closure), call prec.step() after "
        "loss.backward(), without step_before."
    )


def _not_seen(is_due: bool, was_called: bool) -> RuntimeError:
    why = "Curvature is due in this step" if is_due else "Ranks are weighed by their losses"
    what = (
        "the model was called, but no loss.backward() on what it returned was seen"
        if was_called
        else "no call of the model in training mode was seen since the last step"
    )
    return RuntimeError(
        f"{why}, and {what}. Call the module that the Preconditioner was given, in training "
        "mode, and loss.backward() or prec.backward(loss)."
    )


def _check_finite(maker: Any) -> None:
    """Raise a FloatingPointError if a gradient is not finite, on any rank: a scaler knows that of
    its own only, and all have to skip the same steps.
    """
    sharded = maker.sharded is not None
    grads: list[Any] = list(gradients_of(maker))
    parts = [grad.to_local() if sharded else grad for grad in grads]
    norms = [part.abs().max().float() for part in parts if part.numel()]
    maker.ranks.begin()
    if norms and not bool(torch.isfinite(torch.stack(norms)).all()):
        error = FloatingPointError("Gradients overflow.")
        maker.ranks.tell(error)
        raise error
    maker.ranks.agree(f"{maker.fisher_maker.place}, scaled gradients")


@contextlib.contextmanager
def _giving(maker: Any, captured: Captured, output: Any) -> Iterator[None]:
    """Let a gradient maker take what was captured in the place of calling the model."""
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


def _check_backward(num_calls: int, has_arguments: bool) -> None:
    """Refuse a backward pass that is not that of the loss of one call of the model."""
    if num_calls > 1:
        raise ValueError(
            f"The loss depends on {num_calls} calls of the model. Make them one call of a "
            "module that the Preconditioner is given, so that it is clear what an example is."
        )
    if has_arguments:
        raise ValueError(
            "On a step with curvature, and with several ranks on every step, backward() takes no "
            "gradient, inputs or create_graph."
        )


def _param_groups(maker: Any) -> list[dict[str, Any]]:
    if maker.sharded is not None:  # a forward pass alone leaves whole ones in the model
        maker.sharded.reshard()
    inside = {id(p) for p in _preconditioned(maker.plan)}
    groups: list[dict[str, Any]] = [
        {"params": [], "preconditioned": True},
        {"params": [], "preconditioned": False},
    ]
    for p in maker.parameters():
        if p.requires_grad:
            groups[id(p) not in inside]["params"].append(p)
    return groups


def _preconditioned(plan: Plan) -> Iterator[nn.Parameter]:
    for layer in plan.layers:
        for module in layer.modules:
            for kind in ("weight", "bias"):
                p: Any = (
                    module.owned(kind)
                    if isinstance(module, LinearBlock)
                    else getattr(module, kind, None)
                )
                if p is not None and p.requires_grad:
                    yield p
