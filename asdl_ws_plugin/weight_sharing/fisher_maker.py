"""The curvature of one batch, in six stages that return values.

=========  ======================  ================================================================
stage      file                    what it returns
=========  ======================  ================================================================
capture    :mod:`~.capture`        what every layer saw, the logits and the loss
read       :mod:`~.reading`        the terms of the loss and how it is made of them
count      :mod:`~.count`          N, and whose row is whose
arrange    :mod:`~.arrange`        how the layers' tensors become ``(N, R, P)``
operate    :mod:`~.operate`        the layers' matrices
commit     :mod:`~.commit`         the modules' ``fisher``
=========  ======================  ================================================================

Data flows one way, and nothing of the model is changed before the last stage: a step that fails
anywhere leaves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from asdl.fisher import FisherConfig
from asdl.grad_maker import GradientMaker
from asdl.matrices import FISHER_EMP, FISHER_EXACT, FISHER_MC, SHAPE_KFE
from asdl.vector import ParamVector
from torch import Tensor, nn

from .arrange import arrange
from .batch import Batch
from .capture import Captured, Record
from .commit import commit_products, invert, matrices_of
from .copying import set_state, state_of
from .count import Count, count_examples, leading_sizes
from .evidence import Touched
from .forgotten import ForgottenPadding
from .joint_batches import JointBatches
from .likelihoods import LOSS_BINARY_CROSS_ENTROPY, check_var
from .live import live_record
from .logits import SELECT_LOGITS
from .model_calls import ModelCalls, declared_reduction, recording_of
from .no_labels import reading_without_labels, with_zero_loss
from .operate import FISHER_FORWARD_ONLY, FISHER_TYPES, Estimate, operate
from .plan import Plan
from .probe import counted
from .ranks import Ranks
from .reading import LOSS_AUTO, Reading, check_loss_type, read_loss
from .sharded import sharded_model
from .shares import Part, Share
from .step import NOT_GIVEN, Step, check_data_size
from .torch_private import is_sharded_by_fsdp1, unwrapped
from .unseen import UnseenReport, check_any_called

__all__ = [
    "FISHER_FORWARD_ONLY",
    "Step",
    "WeightSharingFisherMaker",
    "check_data_size",
    "declared_reduction",
    "recording_of",
]

NO_LAYERS = (
    "The model has no layer whose curvature could be computed: none of a supported type that has "
    "a trainable parameter and is not ignored. Is everything frozen, is the model sharded by "
    "FullyShardedDataParallel, scripted or traced by torch.jit, or does it need "
    "asdl_ws_plugin.convert(model) first?"
)


def check_batch(logits: Any, loss: Tensor | None) -> None:
    """Raise a ValueError if there are no examples, a FloatingPointError if the loss is not
    finite.
    """
    if isinstance(logits, Tensor) and logits.numel() == 0:
        raise ValueError(f"The batch is empty: the logits have sizes {tuple(logits.shape)}.")
    if loss is not None and loss.numel() != 1:
        raise ValueError(
            f"The loss has to be a scalar, got sizes {tuple(loss.shape)}. Reduce it to its mean or "
            "sum."
        )
    if loss is not None and not bool(torch.isfinite(loss).all()):
        raise FloatingPointError(
            f"The loss is {loss.detach().cpu().tolist()}; nothing was updated. Either the batch "
            "has such values, every label is left out, or training has diverged: lower the "
            "learning rate or raise damping."
        )


def check_setup(maker: GradientMaker, needs_loss: bool) -> None:
    """Raise a ValueError if a gradient maker was not told what to call."""
    if maker._model_fn is None:
        raise ValueError("No model call is set. Call setup_model_call() first.")
    if needs_loss and maker._loss_fn is None and maker._dummy_loss is None:
        raise ValueError("No loss is set. Call setup_loss_call() or setup_loss_repr() first.")


def check_config(model: nn.Module, config: FisherConfig) -> None:
    """Raise a ValueError for a configuration that there is no curvature for."""
    if config.fisher_type not in FISHER_TYPES:
        raise ValueError(
            f"fisher_type has to be one of {', '.join(FISHER_TYPES)}, got {config.fisher_type!r}."
        )
    if config.fisher_type != FISHER_EMP:
        check_loss_type(config.loss_type)
    if config.n_mc_samples < 1:
        raise ValueError(f"n_mc_samples has to be at least 1, got {config.n_mc_samples!r}.")
    check_data_size(config.data_size)
    check_var(config.var)
    check_not_sharded(model)


def check_not_sharded(model: nn.Module) -> None:
    """Raise a ValueError for a model of FSDP1, of whose parameters a rank has parts only."""
    for name, p in model.named_parameters():
        if is_sharded_by_fsdp1(p):
            raise ValueError(
                f"Parameter '{name}' is sharded by FullyShardedDataParallel: each rank has a part "
                "of it, but the curvature is of whole layers. Shard with fully_shard, which has "
                "replaced it, or train with whole copies of the model on every rank, with "
                "DistributedDataParallel or without a wrapper."
            )


class WeightSharingFisherMaker(ModelCalls, JointBatches):
    """Computes the Fisher information of a model whose layers share weights over positions.

    A drop-in for the makers of ``asdl.fisher``; :func:`asdl.get_fisher_maker` returns it for a
    configuration with ``shared_dim``. Supports ``fisher_exact``, ``fisher_mc``, ``fisher_emp`` and
    ``fisher_forward_only``, for ``cross_entropy``, ``mse`` and ``binary_cross_entropy`` with logits
    ``(N, C)`` or ``(N, *, C)``.

    Args:
        model: the model.
        config: ``config.shared_dim`` is a strategy or a list of rules (see :class:`~.plan.Plan`);
            ``config.var`` a number, or a tensor ``(C,)`` or ``(C, C)``: the covariance of the
            Gaussian likelihood.

    Attributes:
        plan: the layers and what is done with them.
        unseen: the layers that took no part in the last batch, with the reason.
        draws: how many batches labels were drawn for; with ``config.seed``, each batch gets others.

    Raises:
        TypeError, ValueError: the configuration is invalid.
    """

    _loss_reduction = None  # the user's loss is evaluated as it is

    def __init__(self, model: nn.Module, config: FisherConfig) -> None:
        super().__init__(model, config)
        check_config(model, config)
        self.plan = Plan(
            model,
            config.fisher_shapes,
            config.shared_dim,
            config.ignore_modules,
            kronecker_only=config.fisher_type == FISHER_FORWARD_ONLY,
        )
        if not self.plan.layers:
            raise ValueError(NO_LAYERS)
        several_passes = config.fisher_type == FISHER_EXACT or (
            config.fisher_type == FISHER_MC and config.n_mc_samples > 1
        )
        if several_passes and any(layer.shape == SHAPE_KFE for layer in self.plan.layers):
            raise ValueError(
                "The shape 'kfe' needs a single backward pass: fisher_emp, or fisher_mc with one "
                "sample."
            )
        self.unseen: dict[nn.Module, str] = {}
        self.draws = 0
        self.given: Captured | None = None  # a forward pass that the user has made
        self.ranks, self.share = Ranks.alone(), Share()
        self._unseen_report = UnseenReport(self.plan)
        self._forgotten = ForgottenPadding()

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, {**state, "ranks": Ranks.alone()})

    @property
    def is_fisher_emp(self) -> bool:
        """Whether labels are those of the data."""
        return self.config.fisher_type == FISHER_EMP

    @property
    def do_local_accumulate(self) -> bool:
        """Always: the factors of all calls are added up before the inverse, as upstream asks."""
        return True

    # ------------------------------------------------------------------------------------ one batch

    def forward_and_backward(
        self,
        data_size: int = NOT_GIVEN,
        scale: float | None = None,
        accumulate: bool = False,
        calc_loss_grad: bool = False,
        calc_inv: bool = False,
        fvp: bool = False,
        damping: float | None = None,
        vec: ParamVector | None = None,
    ) -> tuple[Any, Tensor | None]:
        """Compute the curvature of a batch, and with ``calc_loss_grad`` the gradient of the loss.

        Args:
            data_size: D, the number of examples the curvature is averaged over. Left out, it is the
                curvature of the loss that was passed.
            scale: multiplies every matrix; the Kronecker factors are multiplied with it each.
            accumulate: add to the curvature of earlier batches.
            calc_loss_grad: also accumulate the gradient of the loss, as it was passed, into
                ``.grad``.
            calc_inv: replace the curvature by its damped inverse.
            fvp: compute the Fisher-vector product with ``vec`` instead.
            damping: added to the diagonal before inverting.

        Returns:
            The model's output and the loss (``None`` if neither the gradient nor the Fisher type
            needs it).

        Raises:
            ValueError: the batch is empty; a layer's input fits no layout; logits and loss do not
                go together.
            FloatingPointError: the loss or a factor is not finite.
            RuntimeError: no layer's hook fired.
        """
        for option, is_set in (("accumulate", accumulate), ("fvp", fvp)):
            if is_set and calc_inv:
                raise ValueError(f"{option} and calc_inv cannot be True at the same time.")
        check_data_size(data_size)
        check_setup(self, needs_loss=self.is_fisher_emp or calc_loss_grad)
        _check_sharded(self, fvp)
        step = Step(
            self.config.data_size if data_size == NOT_GIVEN else data_size,
            self.config.scale if scale is None else scale,
            accumulate,
            calc_loss_grad,
            fvp,
            vec,
        )
        captured = self.capture() if self.given is None else self.given
        if self.ranks.size > 1:
            captured = with_zero_loss(captured)
            if captured.loss is not None:
                self._loss = captured.loss
        self.take(captured, step)
        if calc_inv and self.micro_batches is None:
            attr = self.config.fisher_attr
            invert(self.model, self.plan.layers, attr, damping, self.ranks, self.place)
        return self._model_output, captured.loss if self.is_fisher_emp or calc_loss_grad else None

    def take(self, captured: Captured, step: Step) -> None:
        """Stages 2 to 6: the curvature of what was captured, and the gradient of its loss.

        ``captured`` may be of a forward pass that somebody else made.
        """
        check_captured(captured, self.config.fisher_type, self.plan)
        reading = read(captured, self.plan, self.config, step.has_data_size)
        with self._gathering():
            count, evidence = counted(self.plan, self.plan.layers, captured)
            self._decide(reading.num_rows, count.num_logits_of_examples)
            scales = step.scales(reading, count, captured.loss is not None, captured.loss_scale)
            captured = replace(captured, record=self._live(captured, reading))
            batch = self._arranged(captured, reading, count, evidence, step, scales[0])
            scale_B = scales[0 if self.config.fisher_type == FISHER_FORWARD_ONLY else 1]
            backward = None
            if step.calc_loss_grad:
                assert captured.loss is not None
                is_weighed = self.sharded is not None and self.ranks.size > 1
                share = share_of(reading, 0, captured.loss_scale) if is_weighed else Share()
                weight, backward = self._backward_of(captured.loss, share)
                if self.is_fisher_emp and weight:  # what arrives at the layers has that weight, too
                    scale_B = scale_B / weight**2
            operate(batch, captured, reading, count, self._estimate(), scale_B, backward)
        self._keep(batch, reading, step, captured.loss_scale)

    def _arranged(
        self,
        captured: Captured,
        reading: Reading,
        count: Count,
        evidence: Mapping[tuple[nn.Module, int], Touched],
        step: Step,
        scale: Any,
    ) -> Batch:
        """Stage 4, and the operations that take what was arranged."""
        plan, layers, record = self.plan, self.plan.layers, captured.record
        arranged = arrange(plan, layers, record, count, evidence)
        self._forgotten.look(layers, captured, reading, count, arranged, evidence)
        n, fvp, vec = count.num_examples, step.fvp, step.vec
        return Batch(self.model, plan, layers, record, arranged, n, scale, fvp, vec)

    def _keep(self, batch: Batch, reading: Reading, step: Step, loss_scale: Tensor | None) -> None:
        """Stage 6, for this batch or as a part of a joint one."""
        layers, record, n = batch.layers, batch.record, batch.num_examples
        self.unseen = batch.unseen()
        self._unseen_report.check(layers, record, self.unseen)
        if step.fvp:
            self._unseen_report.report(layers, record, self.unseen)
            commit_products(batch, self.unseen, self.config.fvp_attr)
        else:
            results = matrices_of(batch, self.unseen)
            is_alone = self.ranks.size == 1  # then nothing has to be read back from the device
            share = Share(num_examples=n) if is_alone else share_of(reading, n, loss_scale)
            keep = self._commit if self.micro_batches is None else self._add
            keep(Part(results, self.unseen, share, batch.mean_positions(), step))
            self._unseen_report.report(layers, record, self.unseen)
            self.draws += 1  # products are with one matrix, so its labels are those of one draw
        self.plan.note_absent(record.absent)

    def _live(self, captured: Captured, reading: Reading) -> Record:
        outputs = captured.loss if self.is_fisher_emp else reading.source.logits
        assert outputs is not None
        return live_record(
            captured.record, self.plan.layers, outputs, self.plan.layouts.without_batch
        )

    def _estimate(self) -> Estimate:
        config = self.config
        return Estimate(
            config.fisher_type,
            config.n_mc_samples,
            config.seed,
            self.draws,
            self.ranks.rank if self.ranks.size > 1 else None,
        )


def _check_sharded(maker: WeightSharingFisherMaker, fvp: bool) -> None:
    """Raise a ValueError for what is not supported of a model of ``fully_shard``."""
    if maker.sharded is None and sharded_model(maker.model) is None:
        return
    if fvp or not maker.belongs_to_maker:
        raise ValueError(
            "The model is sharded by fully_shard, which gradient makers and the Preconditioner "
            "understand. Compute Fisher matrices and their products with a whole copy of it."
        )
    if maker.sharded is None:
        raise ValueError(
            "The model was sharded after the gradient maker was made. Make it afterwards."
        )


def share_of(
    reading: Reading, num_examples: int = 0, loss_scale: Tensor | float | None = None
) -> Share:
    """What the loss of one rank's batch is of the joint loss. What a GradScaler multiplies it with
    says nothing of that.
    """
    weight = reading.source.weight
    factor = float(reading.sum_factor) if float(reading.num_terms) else 0.0
    if loss_scale is not None:
        factor *= float(loss_scale)
        factor = 1.0 if abs(factor - 1) < 1e-6 else factor  # a sum, to the last bit
    kept = reading.num_rows if weight is None else int(torch.count_nonzero(weight))
    return Share(factor, factor, kept, num_examples)


def read(
    captured: Captured, plan: Plan, config: FisherConfig, has_data_size: bool = False
) -> Reading:
    """Stage 2: what the loss is made of, and what is back-propagated for its curvature.

    Raises a ValueError for a loss of another type, and for one without a Fisher of that type.
    """
    has_curvature = config.fisher_type in (FISHER_EXACT, FISHER_MC)
    is_emp = config.fisher_type == FISHER_EMP
    if not captured.has_labels:
        reading = reading_without_labels(captured, config.loss_type)
        return reading.with_parts(1, of_loss=not has_data_size) if has_curvature else reading
    num_examples = None
    if has_curvature:
        num_examples = count_examples(plan.layers, plan.layouts, captured).num_examples
    reading = read_loss(
        captured.loss,
        list(captured.observations),
        captured.logits,
        None if is_emp else config.loss_type or LOSS_AUTO,
        num_examples=num_examples,
        reduction=captured.reduction,
        count=captured.num_terms,
        needs_scale=is_emp or (has_curvature and has_data_size),
    )
    return reading.with_parts(config.var, of_loss=not has_data_size) if has_curvature else reading


def check_captured(captured: Captured, fisher_type: str, plan: Plan) -> None:
    """Raise an error if there is nothing in what was captured to compute the curvature of."""
    logits = captured.logits
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The logits have to be a tensor, got {type(logits).__name__}. {SELECT_LOGITS}"
        )
    check_batch(logits, captured.loss)
    sizes = leading_sizes(captured.inputs)
    if logits.ndim == 0 and (logits is captured.loss or (sizes is not None and sizes[0] != 1)):
        raise ValueError(
            "The logits are a single number, but the batch is not a single example. If they are "
            "another of the model's outputs, select them with setup_logits_repr."
        )
    check_any_called(plan.layers, captured.record)
    if not logits.requires_grad and fisher_type in (FISHER_EXACT, FISHER_MC):
        raise RuntimeError(
            f"The logits, of sizes {tuple(logits.shape)}, do not depend on any parameter that "
            "requires a gradient. If another of the model's outputs are the logits, select "
            "them with setup_logits_repr."
        )


def find_fisher_maker(model: nn.Module, config: FisherConfig) -> WeightSharingFisherMaker | None:
    """The maker for a configuration with ``shared_dim``; ``None`` for one without, which is ASDL's
    own affair.

    Raises a ValueError for a configuration without it of a type that only a maker with it has.
    """
    if config.shared_dim is not None:
        return WeightSharingFisherMaker(unwrapped(model), config)
    for value in (config.fisher_type, config.loss_type):
        if value in (FISHER_FORWARD_ONLY, LOSS_BINARY_CROSS_ENTROPY, LOSS_AUTO):
            raise ValueError(
                f"'{value}' needs shared_dim; without weight sharing 'reduce' and 'expand' are the "
                "same, choose either."
            )
    return None
