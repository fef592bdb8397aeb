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
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from asdl.matrices import SHAPE_KFE
from asdl.precondition.natural_gradient import NaturalGradientMaker, _module_level_shapes
from asdl.symmatrix import SymMatrix
from asdl.vector import ParamVector
from torch import Tensor, nn

from ._warn import warn
from .blocks import LinearBlock, has_blocks, lent_to, parameters_of
from .factors import full_precision
from .fisher_maker import WeightSharingFisherMaker, check_batch, check_data_size, check_setup
from .matrices import (
    copy_inverses,
    diagonals,
    dtype_of,
    is_of,
    pairs,
    precondition_bias,
    share_inverses,
)
from .observe_loss import loss_and_count
from .positions import take_own_positions
from .registry import supported_classes
from .rules import matches_any
from .state_dict import (
    check_strategies,
    complete_inverses,
    curvature_state,
    load_curvature_state,
    load_plan_state,
    plan_state,
    rank_state,
)

__all__ = ["WeightSharing", "weight_sharing_class"]

# An ASDL with the patches in patches/ averages curvature and all gradients over the ranks itself.
_KEEPS_RANKS_IN_STEP = hasattr(NaturalGradientMaker, "average_over_ranks")


class WeightSharing(NaturalGradientMaker):
    """Mixed into a natural-gradient maker that was given ``shared_dim``."""

    fisher_maker: WeightSharingFisherMaker
    _supported_classes = property(lambda self: supported_classes())
    _zero_reported = False

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

    def forward_and_backward(self) -> tuple[Any, Tensor]:
        """One step: the gradient of the loss exactly as it was passed, preconditioned, added to
        ``.grad``.

        Returns the model's output and the loss. A step that raises leaves ``.grad``, the curvature
        and the step count as they were.
        """
        check_setup(self, needs_loss=True)
        with self._undone_on_error():
            return super().forward_and_backward()

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        # Only this step's gradient is preconditioned, so the gradients that are already there are
        # set aside.
        held = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for p in held:
            p.grad = None
        before = {
            module: matrix
            for module in self.model.modules()
            if (matrix := self._get_module_fisher(module)) is not None
        }
        inverses = [entry for matrix in before.values() for entry in copy_inverses(matrix)]
        maker = self.fisher_maker
        unseen, decay, draws = maker.unseen, maker.decay, maker.draws
        forget = self.plan.remember()
        buffers = [
            (buffer, buffer.clone()) for buffer in self.model.buffers()
        ]  # a NaN would stay in running averages
        try:
            yield
        except BaseException:
            for p in self.model.parameters():
                p.grad = held.get(p)
            for module in self.model.modules():
                if module in before:
                    self._set_module_fisher(module, before[module])
                elif self._get_module_fisher(module) is not None:
                    delattr(module, self._fisher_attr)
            for holder, name, inverse in inverses:
                setattr(holder, name, inverse)
            maker.unseen, maker.decay, maker.draws = unseen, decay, draws
            forget()
            with torch.no_grad():
                for buffer, copy in buffers:
                    buffer.copy_(copy)
            raise
        for p, grad in held.items():
            p.grad = grad if p.grad is None else grad.add_(p.grad)

    def call_loss(self) -> Tensor:
        """Upstream's, with the losses of AlgoPerf's workloads understood, too."""
        self._loss, _ = loss_and_count(super().call_loss())
        return self._loss

    def forward(self) -> None:
        """Of a step without curvature. An empty batch or a loss that is not finite is refused here,
        too.
        """
        take_own_positions(self.model)  # a layer's own segments are those of one step
        super().forward()
        check_batch(self._logits, self._loss)

    # ---------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The step, the curvature with its inverses, and what batches have settled: all that the
        next step needs.

        Tensors are references, as in ``torch.optim``.
        """
        return {
            **super().state_dict(),
            "curvature": curvature_state(self.model, self._fisher_attr),
            "rank": rank_state(self),
            "weight_sharing": {
                **plan_state(self.plan, self.fisher_maker.unseen),
                "draws": self.fisher_maker.draws,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, mid-interval too. A state with the step alone (ASDL 0.1a5) leaves the
        curvature as it is.

        Raises a ValueError if the state is of another model, of other strategies, or none of a
        gradient maker.
        """
        if "step" not in state_dict:
            raise ValueError("This is no state of a gradient maker: it has no 'step'.")
        check_strategies(self.plan, state_dict.get("weight_sharing", {}))
        if "curvature" in state_dict:
            load_curvature_state(self.model, self._fisher_attr, state_dict["curvature"])
            complete_inverses(self, state_dict)
        if "weight_sharing" in state_dict:
            self.fisher_maker.unseen = load_plan_state(self.plan, state_dict["weight_sharing"])
            self.fisher_maker.draws = state_dict["weight_sharing"].get("draws", 0)
        self.state["step"] = state_dict["step"]

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
        named = [(layer.name, layer.module) for layer in self.plan.layers] + [
            ("the model", self.model)
        ]
        matrices = [
            (name, matrix)
            for name, module in named
            if (matrix := self._get_module_fisher(module)) is not None
        ]
        share_inverses(
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
            # what another rank inverts has no inverse here either, but is not zero
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
    # Upstream reduces factors to the rank that inverts them, and gradients only on curvature steps
    # and of layers that it knows. Here every rank gets the average of both, so that no rank's
    # moving average is its own, and all gradients are in step on every step; which rank inverts and
    # preconditions what, and the broadcast, is upstream's.

    def reduce_scatter_curvature(
        self, kron: Any = None, diag: Any = None, with_grad: bool = True
    ) -> None:
        """Average the curvature over the ranks; every rank gets it."""
        if _KEEPS_RANKS_IN_STEP:
            super().reduce_scatter_curvature(kron, diag, with_grad=False)
            return
        # Not ReduceOp.AVG, which MPI does not have, nor Gloo in older releases of PyTorch.
        for tensor in self.get_fisher_from_model():
            dist.all_reduce(
                tensor.div_(dist.get_world_size(self.sync_group)), group=self.sync_group
            )

    @full_precision()
    def precondition(self, *args: Any, **kwargs: Any) -> None:
        """Upstream's, of gradients that are averaged over the ranks first."""
        if self.world_size > 1 and not _KEEPS_RANKS_IN_STEP:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.div_(dist.get_world_size(self.sync_group))
            self._all_reduce_grad(self.model)
        super().precondition(*args, **kwargs)

    def all_gather_or_reduce_grad(self) -> None:
        """Upstream's broadcast from the owners, of blocks and lent biases too."""
        gather = NaturalGradientMaker.all_gather_or_reduce_grad
        getattr(gather, "__wrapped__", gather)(
            self
        )  # its NVTX decorator fails on builds of torch without it
        # The gradients of blocks are views, and their modules have no Parameters: upstream neither
        # finds nor sets them. Nor does it find a bias that is lent to a layer.
        for enum_shape, shape in enumerate(_module_level_shapes):
            for enum_module, module in enumerate(self.modules_for(shape)):
                owner, ranks = self.partitions[enum_shape][enum_module], self.sync_group_ranks
                for p in (
                    parameters_of(module) if isinstance(module, LinearBlock) else lent_to(module)
                ):
                    if p.requires_grad and p.grad is not None:
                        grad = p.grad.contiguous()
                        dist.broadcast(
                            grad, owner if ranks is None else ranks[owner], group=self.sync_group
                        )
                        p.grad.copy_(grad)

    def computational_cost(self, shape: str, module: nn.Module) -> float:
        """Upstream's estimate, without its assertion on the class's name."""
        return sum(p.numel() for p in parameters_of(module)) ** 0.3

    def get_distr_prec_partition(self) -> list[list[int]]:
        """Which rank inverts what; without ranks, all of it is rank 0."""
        if self.world_size > 1:
            return super().get_distr_prec_partition()
        # Everything is rank 0's. Layers may be frozen and unfrozen later, so there is room for all
        # of them.
        room = sum(1 for _ in self.model.modules())
        return [[0] * room for _ in _module_level_shapes]


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
        },
    )


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
    if maker.do_accumulate and not 0 < config.ema_decay <= 1:
        raise ValueError(f"ema_decay weighs the new curvature, in (0, 1]; got {config.ema_decay}.")
    for name, least in _WHOLE_NUMBERS.items():
        value = getattr(config, name)
        if value is not None and not (value >= least and float(value).is_integer()):
            raise ValueError(f"{name} has to be a whole number, at least {least}, got {value}.")
    if maker.world_size > 1 and not maker.do_accumulate and not _KEEPS_RANKS_IN_STEP:
        raise NotImplementedError(
            "Distributed training needs the moving average: without it ASDL averages the owner's "
            "preconditioned gradients with the other ranks' raw ones. Set ema_decay in the "
            "PreconditioningConfig."
        )
    if maker.do_accumulate and maker.plan.layers_of(SHAPE_KFE):
        raise ValueError(
            "The shape 'kfe' has no moving average; leave ema_decay out of the "
            "PreconditioningConfig."
        )
