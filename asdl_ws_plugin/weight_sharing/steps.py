"""A step is a transaction, over one batch or several micro-batches: what a gradient maker does from
the forward pass to the gradients in ``.grad``, or nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from .agreement import RankFailure
from .capture import own_call
from .commit import invert
from .fisher_maker import check_batch, check_setup, share_of
from .micro_batches import MicroBatches
from .model_calls import declared_reduction
from .no_labels import has_no_label, zero_loss
from .observe_loss import CountsTerms, LossObserver
from .positions import take_own_positions
from .reading import read_loss
from .shares import Share
from .training import TrainingOptions
from .transaction import Snapshot, carry
from .wrappers import unsynchronized

__all__ = ["TransactionalSteps"]


class TransactionalSteps(CountsTerms, TrainingOptions):
    """The part of :class:`~.grad_maker.WeightSharing` that takes a step."""

    ranks: Any
    put_aside: Any

    #: Skip a step whose loss or curvature is not finite, on any rank, instead of raising a
    #: FloatingPointError: nothing is updated, ``.grad`` stays as it is, the step does not count.
    skip_nonfinite = False
    #: How many steps were skipped.
    num_skipped = 0
    _grads_are_joint = False
    _logits: Any

    def forward_and_backward(self, accumulate: bool = False) -> tuple[Any, Tensor]:
        """One step: the gradient of the loss exactly as it was passed, preconditioned, added to
        ``.grad``.

        Args:
            accumulate: this is a micro-batch and others follow. Gradients and curvature are added
                up, and the call without ``accumulate`` that ends the step preconditions their sum
                once: k micro-batches with the loss divided by k are the joint batch.

        Returns the model's output and the loss. A step that raises leaves ``.grad``, the curvature
        and the step count as they were. With several ranks it raises on all of them.
        """
        if not accumulate and self.fisher_maker.micro_batches is None:
            with self._transaction(), self._noting_updates():
                check_setup(self, needs_loss=True)
                return super().forward_and_backward()
            return self._outputs()
        self.add_micro_batch()
        if not accumulate:
            self.finish_step()
        return self._model_output, self._loss

    def add_micro_batch(self, joint: bool = False) -> None:
        """The gradient of a micro-batch is added to ``.grad``, and its curvature to that of the
        step.

        An error leaves both as they were.

        Args:
            joint: with several ranks, ``.grad`` has the gradients of all of them at the end of this
                call, as DistributedDataParallel leaves them, and not only at that of the step.
        """
        maker = self.fisher_maker
        before = maker.micro_batches
        maker.micro_batches = before or MicroBatches()
        try:
            with self._transaction() as snapshot:
                check_setup(self, needs_loss=True)
                step = self.state["step"]
                if self.do_forward_and_backward(step):
                    self.forward()
                    self.backward()
                    maker.micro_batches = maker.micro_batches.with_share(maker.share)
                if self.do_update_curvature(step):
                    self.update_curvature()
                if self.ranks.size > 1 and (joint or maker.micro_batches.is_joint):
                    self._join_gradients(snapshot)
        except BaseException:
            maker.micro_batches = before
            raise

    def _join_gradients(self, snapshot: Snapshot) -> None:
        """Let ``.grad`` be that of the joint micro-batch; earlier ones that are a rank's own yet
        are joined with it.
        """
        maker = self.fisher_maker
        batches = maker.micro_batches
        assert batches is not None
        share = batches.shares[-1]
        if not batches.is_joint and len(batches.shares) > 1:
            snapshot.add_grads()
            share = batches.share
        self._average(share)
        maker.micro_batches = replace(batches, is_joint=True)

    def _average(self, share: Share) -> None:
        if self.sharded is not None:  # the backward pass has done it
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        what = f"{self.fisher_maker.place}, gradients"
        self.ranks.average_gradients(what, parameters, share)

    def finish_step(self) -> None:
        """Upstream's step after its gradient and curvature: the average, the inverses, and the
        gradients in ``.grad``, preconditioned in place.

        An error leaves the curvature and the step count as they were; the micro-batches are
        dropped, and so are the gradients if preconditioning had begun.
        """
        maker, step = self.fisher_maker, self.state["step"]
        self._grads_are_joint = maker.micro_batches is not None and maker.micro_batches.is_joint
        try:
            with self._transaction(with_grads=False), self._noting_updates():
                self._startup()
                self._commit_micro_batches()
                if self.do_update_preconditioner(step):
                    self.update_preconditioner()
                self._precondition_or_drop()
                self._teardown()
                self.state["step"] += 1
        finally:
            maker.micro_batches = None
            self._grads_are_joint = False

    def _commit_micro_batches(self) -> None:
        maker = self.fisher_maker
        has_curvature = maker.micro_batches is not None and maker.micro_batches.count > 0
        maker.share = Share() if maker.micro_batches is None else maker.micro_batches.share
        if has_curvature:
            maker.commit_micro_batches()
        maker.micro_batches = None
        if has_curvature and not self.do_accumulate:
            attr, damping = self._fisher_attr, self.config.damping
            invert(self.model, self.plan.layers, attr, damping, self.ranks, maker.place)

    def _precondition_or_drop(self) -> None:
        try:
            self.precondition()
        except BaseException:
            for p in self.parameters():
                p.grad = None
            raise

    @contextlib.contextmanager
    def _transaction(self, with_grads: bool = True) -> Iterator[Snapshot]:
        """All or nothing, on all ranks; with :attr:`skip_nonfinite`, nothing is no error.

        Args:
            with_grads: gradients that are there are set aside, since only this step's are
                preconditioned; and they come back if it fails.
        """
        self.ranks.begin()
        if self.sharded is not None and self.fisher_maker.given is None:
            self.sharded.reshard()  # unless a backward pass is to follow
        carry(self)
        before = Snapshot(self, with_grads)
        try:
            if with_grads:
                before.set_aside_grads()
            self.fisher_maker.place = f"step {before.step}"
            with unsynchronized(self._model_fn) if self.ranks.size > 1 else nullcontext():
                yield before
            if with_grads:
                before.add_grads()
        except BaseException as error:
            before.restore()
            if not isinstance(error, RankFailure):
                self.ranks.tell(error)
            if not (self.skip_nonfinite and isinstance(error, FloatingPointError)):
                raise
            self.num_skipped += 1

    def _outputs(self) -> tuple[Any, Any]:
        """The output and the loss of a step that was skipped."""
        maker = self.fisher_maker if self.do_update_curvature() else self
        return maker._model_output, maker._loss

    def call_model(self) -> Any:
        """Upstream's. Ranks of a sharded model wait for each other in it."""
        with own_call(), nullcontext() if self.sharded is None else self.ranks.exchanging():
            return super().call_model()

    def forward(self) -> None:
        """Of a step without curvature. An empty batch or a loss that is not finite is refused here,
        too.
        """
        take_own_positions(self.model)  # a layer's own segments are those of one step
        if self.ranks.size == 1:
            super().forward()
            check_batch(self._logits, self._loss)
            return
        maker, observer, given = self.fisher_maker, LossObserver(), self.fisher_maker.given
        with observer if self._loss_fn is None else nullcontext():
            self.call_model()
        with observer:
            self.call_loss()
        observations, scale = observer.observations, observer.loss_scale
        if given is not None:  # the user's own calls
            observations, scale = list(given.observations), given.loss_scale
            self._logits = given.logits
        if has_no_label(self._loss, observations, self._logits, self._num_terms):
            self._loss, maker.share = zero_loss(self._logits), Share(0.0, 0.0)
            return
        check_batch(self._logits, self._loss)
        reduction = declared_reduction(self._loss_fn, self._loss_fn_kwargs)
        reading = read_loss(self._loss, observations, self._logits, None, reduction=reduction)
        maker.share = share_of(reading, loss_scale=scale)
