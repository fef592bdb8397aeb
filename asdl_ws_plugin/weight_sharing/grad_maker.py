"""ASDL's natural-gradient makers for weight sharing: what has to differ from upstream, and nothing
else.

Schedules, the moving average, inverses and preconditioning are upstream's methods, inherited. The
overrides below make a step a transaction, hand curvature to
:class:`~.fisher_maker.WeightSharingFisherMaker`, and leave alone the layers that took no part in
it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from asdl.matrices import SHAPE_KFE
from asdl.precondition.natural_gradient import NaturalGradientMaker, _module_level_shapes
from asdl.symmatrix import SymMatrix
from asdl.vector import ParamVector
from torch import Tensor, nn

from ._warn import warn
from .agreement import RankFailure
from .blocks import has_blocks, parameters_of
from .commit import invert
from .copying import set_state, state_of
from .factors import full_precision
from .fisher_maker import (
    WeightSharingFisherMaker,
    check_batch,
    check_data_size,
    check_setup,
    declared_reduction,
    share_of,
)
from .joint import owners, share_inverses
from .matrices import (
    copy_inverses,
    diagonals,
    dtype_of,
    is_of,
    pairs,
    precondition_bias,
)
from .matrices import share_inverses as share_inverses_of_blocks
from .micro_batches import MicroBatches
from .no_labels import has_no_label, zero_loss
from .observe_loss import LossObserver, loss_and_count
from .positions import take_own_positions
from .ranks import Ranks
from .reading import read_loss
from .registry import supported_classes
from .rules import matches_any
from .shares import Share
from .state_check import check_state
from .state_dict import (
    load_plan_state,
    load_training_state,
    loaded_matrices,
    replace_matrices,
    state_of_maker,
)
from .training import TrainingOptions
from .training_config import check_training_config
from .transaction import Snapshot, carry, curvature_of
from .wrappers import unsynchronized

__all__ = ["WeightSharing", "weight_sharing_class"]


class WeightSharing(TrainingOptions):
    """Mixed into a natural-gradient maker that was given ``shared_dim``."""

    fisher_maker: WeightSharingFisherMaker
    partitions: list[list[int]]
    _supported_classes = property(lambda self: supported_classes())
    _zero_reported = False
    _grads_are_joint = False
    _logits: Any

    #: Skip a step whose loss or curvature is not finite, on any rank, instead of raising a
    #: FloatingPointError: nothing is updated, ``.grad`` stays as it is, the step does not count.
    skip_nonfinite = False
    #: How many steps were skipped.
    num_skipped = 0

    # --------------------------------------------------------------------------------- what is read

    @property
    def plan(self) -> Any:
        """The layers and what is done with them (:class:`~.plan.Plan`)."""
        return self.fisher_maker.plan

    @property
    def setting(self) -> str | None:
        """``'expand'`` or ``'reduce'``, what ``shared_dim='auto'`` decided; ``None`` if it has
        not.
        """
        return self.plan.setting

    @property
    def shared_dim_for(self) -> dict[str, str | None]:
        """Layer name -> strategy, for every layer that is preconditioned."""
        return {layer.name: self.plan.strategy_of(layer) for layer in self.plan.layers}

    # ---------------------------------------------------------------------- a step is a transaction

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
            for p in self.model.parameters():
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

    def call_loss(self) -> Tensor:
        """Upstream's, with the losses of AlgoPerf's workloads understood, too."""
        self._loss, self._num_terms = loss_and_count(super().call_loss())
        return self._loss

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

    # ---------------------------------------------------------------------------------------- state

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

    # ------------------------------------------------------------------------------------ curvature

    def _scale_fisher(self, scale: float) -> None:
        # Upstream decays the average before the forward pass; a batch that fails would have decayed
        # it. The Fisher maker does it when the new curvature is there.
        self.fisher_maker.decay = scale

    def update_curvature(self) -> None:
        """Upstream's; without a moving average the new curvature replaces the old."""
        self.fisher_maker.decay = 1.0
        super().update_curvature()

    @full_precision()
    def update_preconditioner(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, with the factors restored to the last bit after damping was added and taken
        away again.
        """
        config = self.training
        if config is not None and config.relative_damping and not args and not kwargs:
            self._report_zero(self.update_relative_inverses())
            return
        named = [(layer.name, layer.module) for layer in self.plan.layers] + [
            ("the model", self.model)
        ]
        matrices = [
            (name, matrix)
            for name, module in named
            if (matrix := self._get_module_fisher(module)) is not None
        ]
        share_inverses_of_blocks(
            (layer.module, matrix)
            for layer in self.plan.layers
            if (matrix := self._get_module_fisher(layer.module)) is not None
        )
        saved = [(name, *pair) for name, matrix in matrices for pair in diagonals(matrix)]
        if self.do_accumulate and not args and not kwargs:
            for (
                _,
                matrix,
            ) in matrices:  # upstream leaves the inverse of a factor that became zero as it was
                for holder, name, _ in copy_inverses(matrix):
                    setattr(holder, name, None)
        try:
            with self._inverting_own():
                super().update_preconditioner(*args, **kwargs)
        except torch.linalg.LinAlgError as error:
            damped = [name for name, view, copy in saved if not torch.equal(view, copy)]
            name = next(
                iter(damped or self._without_inverse()), "?"
            )  # damping may be too small to be seen
            raise torch.linalg.LinAlgError(
                f"Layer '{name}': its curvature plus damping {self.config.damping} is not positive "
                f"definite; increase damping. ({error})"
            ) from error
        finally:
            for _, view, copy in saved:
                view.copy_(copy)
        self._report_zero(matrices)

    def _without_inverse(self) -> list[str]:
        """Names of the layers whose inverse is missing, in the order of inversion."""
        layers = [
            (layer.name, layer.module)
            for shape in _module_level_shapes
            for layer in self.plan.layers_of(shape)
        ]
        return [
            name
            for name, module in [*layers, ("the model", self.model)]
            if (matrix := self._get_module_fisher(module)) is not None
            and any(inverse is None and data.any() for data, inverse in pairs(matrix))
        ]

    def _report_zero(self, matrices: list[tuple[str, SymMatrix]]) -> None:
        if self._zero_reported:
            return
        zero = [
            name
            for name, matrix in matrices
            if matrix.kron is not None
            and any(inverse is None and not bool(data.any()) for data, inverse in pairs(matrix))
        ]
        if zero:
            self._zero_reported = True
            warn(
                f"The curvature of {len(zero)} layers (the first is '{zero[0]}') is exactly zero: "
                "they are behind a zero-initialised head, or nothing but zeros or padding came "
                "in. Their gradients are not preconditioned until it is not."
            )

    # --------------------------------------------------------------------------------- which layers

    def named_modules_for(self, shape: str) -> list[tuple[str, nn.Module]]:
        """Names and modules of the layers of a shape, as the plan has them."""
        return [(layer.name, layer.module) for layer in self.plan.layers_of(shape)]

    def _is_supported(self, module_name: str, module: nn.Module) -> bool:
        # Upstream takes the model's device from the parameters of supported layers, and blocks have
        # none of their own.
        if has_blocks(module):
            supported = not matches_any(module_name, module, self.config.ignore_modules or ())
        else:
            supported = super()._is_supported(module_name, module)
        if supported and (not module_name or hasattr(nn.ModuleDict, module_name)):
            # upstream keeps layers by name in an nn.ModuleDict
            what = f"has a layer called '{module_name}'" if module_name else "is itself a layer"
            raise ValueError(
                f"The model {what}, which ASDL's gradient makers cannot hold. Train "
                "nn.Sequential(model) instead."
            )
        return supported

    def parameters_for(self, shape: str) -> Iterator[nn.Parameter]:
        """Upstream's, with the views of layers whose weight is a part of a Parameter."""
        for module in self.modules_for(shape):
            yield from (p for p in parameters_of(module) if p.requires_grad)

    def is_module_for_inv_and_precondition(self, module: nn.Module) -> bool:
        """Whether the plan holds this module: nothing else has curvature."""
        return module in self.plan

    def _precondition_module(
        self,
        module: nn.Module,
        shape: str | None = None,
        vectors: ParamVector | None = None,
        vec_weight: Tensor | None = None,
        vec_bias: Tensor | None = None,
        grad_scale: float | None = None,
        use_inv: bool = True,
    ) -> None:
        """Upstream's, for a layer that took part in the last curvature update and has a
        gradient.
        """
        given = vectors is not None or vec_weight is not None
        matrix = self._get_module_fisher(module)
        if module in self.fisher_maker.unseen or matrix is None or not is_of(matrix, module):
            return
        bias: Any = getattr(module, "bias", None)
        trainable: list[Any] = [
            p for p in (module.weight, bias) if p is not None and p.requires_grad
        ]
        if not given and any(p.grad is None for p in trainable):
            return
        use_inv = (
            use_inv and shape != SHAPE_KFE
        )  # an eigenbasis is inverted as it is multiplied with
        if module.weight.requires_grad or given:
            if not given and any(
                p.grad.dtype != dtype_of(matrix) or not p.grad.is_contiguous() for p in trainable
            ):
                # half precision beside curvature in float32, or a gradient that is channels last
                exact = [
                    p.grad.to(dtype_of(matrix), memory_format=torch.contiguous_format)
                    for p in trainable
                ]
                vec_weight, vec_bias = [*exact, None][:2]
                super()._precondition_module(
                    module, shape, None, vec_weight, vec_bias, grad_scale, use_inv
                )
                for p, vec in zip(trainable, exact, strict=True):
                    p.grad.copy_(vec)
            else:
                super()._precondition_module(
                    module, shape, vectors, vec_weight, vec_bias, grad_scale, use_inv
                )
            others = [
                m.bias
                for _, m in self.plan.layer_of(module).tied
                if m.bias is not None and m.bias is not bias
            ]
        else:
            others = [bias]
        if given:
            return
        for p in others:  # without a weight of their own
            if p is not None and p.requires_grad and p.grad is not None:
                grad: Any = p.grad
                grad.mul_(self.grad_scale if grad_scale is None else grad_scale)
                precondition_bias(matrix, grad, self.config.damping)

    # --------------------------------------------------------------------------------- distribution
    #
    # Upstream (0.1a5) averages by position, only layers that it knows, on curvature steps only, and
    # lets each rank keep a history of its own. It sees one process here, which has everything;
    # :mod:`~.ranks` and :mod:`~.joint` see to it that every rank's is that of the joint batch.

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The processes that train together: those of ``sync_group``, or all."""
        return Ranks(self.sync_group, self.device)

    def get_distr_prec_partition(self) -> list[list[int]]:
        """One process has everything, as far as upstream knows."""
        self.world_rank, self.world_size = 0, 1
        # Layers may be frozen and unfrozen later, so there is room for all of them.
        room = sum(1 for _ in self.model.modules())
        return [[0] * room for _ in _module_level_shapes]

    @contextlib.contextmanager
    def _inverting_own(self) -> Iterator[None]:
        """Let upstream invert the layers that are this rank's, and give every rank all inverses."""
        if self.ranks.size == 1:
            yield
            return
        pairs = [
            (layer.module, matrix)
            for layer in self.plan.layers
            if (matrix := self._get_module_fisher(layer.module)) is not None
        ]
        owner = owners(self.ranks, pairs)
        others = {
            module
            for (module, _), rank in zip(pairs, owner, strict=True)
            if rank != self.ranks.rank
        }
        everything = self.partitions
        self.partitions = [
            [int(module in others) for module in self.modules_for(shape)]
            for shape in _module_level_shapes
        ]
        try:
            yield
        finally:
            self.partitions = everything
        what = f"{self.fisher_maker.place}, inverses"
        share_inverses(self.ranks, what, [matrix for _, matrix in pairs], owner)

    @full_precision()
    def precondition(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, of the joint gradient. It ends on all ranks, or on none."""
        given = bool(args or kwargs.get("vectors"))
        is_together = self.ranks.size > 1 and not given
        if is_together and not self._grads_are_joint:
            self._average(self.fisher_maker.share)
        with nullcontext() if given else self._step():
            super().precondition(*args, **kwargs)
        if is_together:
            self.ranks.end(f"{self.fisher_maker.place}, preconditioned")


@functools.cache
def weight_sharing_class(maker_class: type[NaturalGradientMaker]) -> type[WeightSharing]:
    """The same gradient maker with :class:`WeightSharing` mixed in; an instance of it is an
    instance of both.
    """
    if issubclass(maker_class, WeightSharing):
        return maker_class
    return type(
        maker_class.__name__,
        (WeightSharing, maker_class),
        {
            "__doc__": maker_class.__doc__,
            "__module__": maker_class.__module__,
            "_made_by": (weight_sharing_class, maker_class),
        },
    )


def _itself(maker_class: Any) -> Any:
    return maker_class


def _new(make: Callable[[Any], Any], maker_class: Any) -> WeightSharing:
    """An empty gradient maker, for a copy."""
    made = make(maker_class)
    return made.__new__(made)


# Upstream's schedule never meets a step that is no multiple of a fraction, and says nothing.
_WHOLE_NUMBERS = {
    "curvature_upd_interval": 1,
    "preconditioner_upd_interval": 1,
    "curvature_warmup_steps": 0,
    "preconditioner_warmup_steps": 0,
}


def check(maker: WeightSharing) -> None:
    """Refuse what upstream computes wrongly and this package does not mend, and options that make
    no sense.
    """
    config = maker.config
    if not (math.isfinite(config.damping) and config.damping >= 0):
        raise ValueError(f"damping has to be a finite number, at least 0, got {config.damping}.")
    if not (math.isfinite(maker.scale) and maker.scale > 0):
        raise ValueError(f"scale has to be a finite number above 0, got {maker.scale}.")
    check_data_size(config.data_size)
    if maker.training is not None:
        check_training_config(config)
    if maker.do_accumulate and not 0 < config.ema_decay <= 1:
        raise ValueError(f"ema_decay weighs the new curvature, in (0, 1]; got {config.ema_decay}.")
    for name, least in _WHOLE_NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not (value >= least and float(value).is_integer()):
            raise ValueError(f"{name} has to be a whole number, at least {least}, got {value}.")
    if maker.ranks.size > 1 and maker.plan.layers_of(SHAPE_KFE):
        raise NotImplementedError(
            "The shape 'kfe' is for one process: an average of eigenbases is none. Use 'kron'."
        )
    maker.fisher_maker.ranks, maker.fisher_maker.belongs_to_maker = maker.ranks, True
    if maker.do_accumulate and maker.plan.layers_of(SHAPE_KFE):
        raise ValueError(
            "The shape 'kfe' has no moving average; leave ema_decay out of the "
            "PreconditioningConfig."
        )
