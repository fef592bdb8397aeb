"""The curvature of one batch: one forward pass, its gradient, and the factors of every layer.

Data flows one way: the tensors that :mod:`~.capture` recorded are brought into one layout, handed
to the layers' operations, and become the modules' ``fisher`` at the very end. A step that fails
anywhere leaves nothing.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from asdl.fisher import FisherConfig, FisherMaker
from asdl.grad_maker import GradientMaker
from asdl.matrices import FISHER_EMP, FISHER_EXACT, FISHER_MC, SHAPE_FULL, SHAPE_KFE
from asdl.symmatrix import SymMatrix
from asdl.utils import record_original_requires_grad
from asdl.vector import ParamVector
from torch import Tensor, nn

from ._warn import warn
from .batch import Batch
from .blocks import parameters_of
from .capture import Layer, Record, recording
from .copying import set_state, state_of
from .factors import full_precision
from .joint import joint_curvature, owners, share_inverses
from .layout import fits, infer_num_examples, leading_sizes
from .loss import (
    LOSS_BINARY_CROSS_ENTROPY,
    LOSS_TYPES,
    LossObserver,
    LossTerms,
    check_var,
    exact_output_grads,
    positions_of_terms,
    read_loss,
    sampled_output_grads,
)
from .matrices import corrected, is_of, merge, shared_tensors, tensors, trained
from .matrices import share_inverses as share_inverses_of_blocks
from .plan import Plan
from .positions import GRAPH, Positions, positions_of, take_own_positions
from .ragged import Segments
from .ranks import Ranks, Share
from .rules import SEQUENCE_FIRST
from .transaction import put_aside

__all__ = ["FISHER_FORWARD_ONLY", "WeightSharingFisherMaker"]

FISHER_FORWARD_ONLY = "fisher_forward_only"
FISHER_TYPES = (FISHER_EXACT, FISHER_MC, FISHER_EMP, FISHER_FORWARD_ONLY)

NO_LAYERS = (
    "The model has no layer whose curvature could be computed: none of a supported type that has "
    "a trainable parameter and is not ignored. Is everything frozen, is the model sharded by "
    "FullyShardedDataParallel, scripted or traced by torch.jit, or does it need "
    "asdl_ws_plugin.convert(model) first?"
)
# Between the seeds of consecutive batches: 2**64 over the golden ratio, far apart.
_STRIDE = 0x9E3779B97F4A7C15
_RANK_STRIDE = 0xBF58476D1CE4E5B9  # and of the ranks: odd, so that no two are the same
_INVALID_DATA_SIZE = -1  # upstream's mark for "not given"


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


def check_data_size(data_size: Any) -> None:
    """Raise a ValueError unless it is a number of examples, or not given."""
    if not data_size >= 1 and data_size != _INVALID_DATA_SIZE:
        raise ValueError(f"data_size has to be a number of examples, got {data_size!r}.")


def check_not_sharded(model: nn.Module) -> None:
    """Raise a ValueError if a rank has parts of parameters only."""
    for name, p in model.named_parameters():
        # FSDP1 marks both its flat parameters and those that it leaves to the optimizer.
        if hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False):
            what = (
                "a DTensor, as fully_shard makes them"
                if hasattr(p, "device_mesh")
                else ("sharded by FullyShardedDataParallel")
            )
            raise ValueError(
                f"Parameter '{name}' is {what}: each rank has a part of it, but the curvature is "
                "of whole layers. Train with whole copies of the model on every rank instead, with "
                "DistributedDataParallel or without a wrapper."
            )


def share_of(terms: LossTerms, num_examples: int = 0) -> Share:
    """What the loss of one rank's batch is of the joint loss."""
    kept = terms.num_rows if terms.weight is None else int(torch.count_nonzero(terms.weight))
    return Share(float(terms.sum_factor), float(terms.num_terms), kept, num_examples)


def declared_reduction(maker: GradientMaker) -> str | None:
    """What a gradient maker's loss function says of its own reduction."""
    function = maker._loss_fn
    reduction = maker._loss_fn_kwargs.get("reduction", getattr(function, "reduction", None))
    if reduction is None and isinstance(function, partial):
        reduction = function.keywords.get("reduction", getattr(function.func, "reduction", None))
    return reduction


def check_setup(maker: GradientMaker, needs_loss: bool) -> None:
    """Raise a ValueError if a gradient maker was not told what to call."""
    if maker._model_fn is None:
        raise ValueError("No model call is set. Call setup_model_call() first.")
    if needs_loss and maker._loss_fn is None and maker._dummy_loss is None:
        raise ValueError("No loss is set. Call setup_loss_call() or setup_loss_repr() first.")


_WITHOUT_GRAPH = "ran without an autograd graph (no_grad, or reentrant activation checkpointing)"


class WeightSharingFisherMaker(FisherMaker):
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
        if config.fisher_type not in FISHER_TYPES:
            raise ValueError(
                f"fisher_type has to be one of {', '.join(FISHER_TYPES)}, got "
                f"{config.fisher_type!r}."
            )
        if config.fisher_type != FISHER_EMP and config.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type has to be one of {', '.join(LOSS_TYPES)}, got {config.loss_type!r}."
            )
        if config.n_mc_samples < 1:
            raise ValueError(f"n_mc_samples has to be at least 1, got {config.n_mc_samples!r}.")
        check_data_size(config.data_size)
        check_var(config.var)
        check_not_sharded(model)
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
        # Set by the gradient maker: what the accumulated curvature is multiplied with before the
        # new one is added.
        self.decay = 1.0
        # Also set by it: that there is one, the processes that train together, where they are in
        # their training, and what this one's last batch was of the joint one.
        self.belongs_to_maker = False
        self.ranks = Ranks.alone()
        self.place = ""
        self.share = Share()
        self._reported: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_state(self, {**state, "ranks": Ranks.alone()})

    @property
    def is_fisher_emp(self) -> bool:
        return self.config.fisher_type == FISHER_EMP

    @property
    def do_local_accumulate(self) -> bool:
        return True

    # ------------------------------------------------------------------------------------ one batch

    def forward_and_backward(
        self,
        data_size: int = _INVALID_DATA_SIZE,
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
        if accumulate and calc_inv:
            raise ValueError("accumulate and calc_inv cannot be True at the same time.")
        if fvp and calc_inv:
            raise ValueError("fvp and calc_inv cannot be True at the same time.")
        config, plan = self.config, self.plan
        check_data_size(data_size)
        data_size = config.data_size if data_size == _INVALID_DATA_SIZE else data_size
        scale = config.scale if scale is None else scale
        has_loss = self._loss_fn is not None or self._dummy_loss is not None
        check_setup(self, needs_loss=self.is_fisher_emp or calc_loss_grad)
        plan.check_still_complete()

        layers = plan.layers
        record, loss, observations = self._forward(layers, has_loss)
        logits = self._logits
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"The logits have to be a tensor, got {type(logits).__name__}. Select them with "
                "setup_logits_repr."
            )
        check_batch(logits, loss)
        if not record.calls:
            raise RuntimeError(self._nothing_seen(layers, record))
        if not logits.requires_grad and config.fisher_type in (FISHER_EXACT, FISHER_MC):
            raise RuntimeError(
                f"The logits, of sizes {tuple(logits.shape)}, do not depend on any parameter that "
                "requires a gradient. If another of the model's outputs are the logits, select "
                "them with setup_logits_repr."
            )

        loss_type = None if self.is_fisher_emp else config.loss_type
        terms = read_loss(loss, observations, logits, loss_type, declared_reduction(self))
        if terms.has_negative and config.fisher_type in (FISHER_EXACT, FISHER_MC):
            raise ValueError(
                "The loss weighs terms negatively, as advantages do, so its curvature need not be "
                "positive. Use fisher_type='fisher_emp', the second moment of its gradients."
            )
        num_examples, positions = count_examples(
            plan, record, logits, self._model_args, self._model_kwargs
        )
        plan.layouts.num_terms = terms.num_rows
        self._decide(terms.num_rows, _num_logits_of_examples(positions, num_examples))
        given = data_size != _INVALID_DATA_SIZE
        if not given:
            if loss is None:
                raise ValueError(
                    "data_size is not specified, and there is no loss to tell it from."
                )
            scale_A, scale_B = scale / num_examples, scale / terms.num_terms
        else:
            scale_A = scale_B = scale / data_size
        if config.fisher_type == FISHER_FORWARD_ONLY:
            scale_B = scale_A

        self._record_requires_grad()
        batch = self._new_batch(layers, record, num_examples, positions, scale_A, fvp, vec)
        batch.take_inputs()
        self._backward(batch, terms, loss, scale_B, calc_loss_grad)
        self.unseen = batch.unseen()
        self._check_seen(layers, record)
        results = self._results(batch, fvp)
        if self.ranks.size > 1 and not fvp:
            self.share = share_of(terms, num_examples)
            results = joint_curvature(
                self.ranks,
                f"{self.place}, curvature",
                plan,
                results,
                self.unseen,
                self.share,
                batch.mean_positions(),
                given,
            )
        self._report_unseen(layers, record)
        self._commit(results, accumulate, fvp)
        self.draws += 1
        if calc_inv:
            self._invert(layers, damping)
        return self._model_output, loss if self.is_fisher_emp or calc_loss_grad else None

    def _new_batch(
        self,
        layers: list[Layer],
        record: Record,
        num_examples: int,
        positions: dict[nn.Module, Positions],
        scale_A: Any,
        fvp: bool,
        vec: ParamVector | None,
    ) -> Batch:
        return Batch(
            self.model,
            self.plan,
            layers,
            record,
            num_examples,
            positions,
            scale_A,
            fvp=fvp,
            vec=vec,
        )

    def _forward(
        self, layers: list[Layer], has_loss: bool
    ) -> tuple[Record, Tensor | None, list[Any]]:
        loss, observer = None, LossObserver()
        # A loss given by its representation may have been computed inside of the model.
        watch = observer if self._loss_fn is None and has_loss else contextlib.nullcontext()
        with recording(layers, self.plan.check_call) as record, watch:
            record.positions.update(take_own_positions(self.model))
            self.call_model()
        if has_loss:
            with observer:
                loss = self.call_loss()
        return record, loss, observer.observations

    @full_precision()
    def _backward(
        self,
        batch: Batch,
        terms: LossTerms,
        loss: Tensor | None,
        scale_B: Any,
        calc_loss_grad: bool,
    ) -> None:
        config = self.config
        if self.is_fisher_emp:
            assert loss is not None
            batch.scale = scale_B * terms.sum_factor**2
            if calc_loss_grad:
                with batch.taking_output_grads():
                    loss.backward()
            else:
                batch.take_output_grads(loss, None, retain_graph=False)
            batch.end_of_pass()
            return
        if config.fisher_type == FISHER_FORWARD_ONLY:
            batch.scale = scale_B
            batch.identity_output_grads()
        elif config.fisher_type == FISHER_MC:
            generator = self._generator(terms.logits.device)
            batch.scale = scale_B / config.n_mc_samples
            for i in range(config.n_mc_samples):
                grads = sampled_output_grads(terms, config.loss_type, config.var, generator)
                last = i == config.n_mc_samples - 1
                batch.take_output_grads(
                    terms.logits, grads, retain_graph=calc_loss_grad or not last
                )
                batch.end_of_pass()
        else:
            batch.scale = scale_B
            position, num_positions = self._positions(terms, batch)
            for grads in exact_output_grads(
                terms, config.loss_type, position, num_positions, config.var
            ):
                batch.take_output_grads(terms.logits, grads, retain_graph=True)
                batch.end_of_pass()
        if calc_loss_grad:
            assert loss is not None
            loss.backward()

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """Where labels are drawn from; ``None``: from the default generator.

        Each batch gets others, and each rank, also where all ranks have one seed.
        """
        seed = self.config.seed
        if seed is None and self.ranks.size == 1:
            return None
        # every rank's default generator goes on alike
        start = int(torch.randint(2**62, ())) if seed is None else int(seed)
        if seed is not None:
            start += self.draws * _STRIDE
        return torch.Generator(device).manual_seed((start + self.ranks.rank * _RANK_STRIDE) % 2**63)

    # ---------------------------------------------------------------------------- reading the batch

    def _decide(self, num_terms: int, num_examples: int) -> None:
        """Settle ``'auto'`` by the joint batch."""
        if self.ranks.size > 1 and self.plan.setting is None and self.plan.is_auto:
            rows = self.ranks.agree(f"{self.place}, setting", [num_terms, num_examples])
            num_terms, num_examples = (int(sum(column)) for column in zip(*rows, strict=True))
        self.plan.decide(num_terms, num_examples)

    def _positions(self, terms: LossTerms, batch: Batch) -> tuple[Tensor, int]:
        """The position of every loss term within its example, and the number of positions."""
        readings = _readings(self._logits, batch)
        if len(readings) > 1:
            found = [batch.crosstalk(self._logits, example) for example, _ in readings]
            best = min(
                range(len(found)), key=lambda i: found[i] or 0.0
            )  # the first where nothing tells
            readings = readings[best:]
        example, position = readings[0]
        of_examples = position[example.flatten() < batch.num_examples]
        num_positions = 1 + int(of_examples.max()) if len(of_examples) else 1
        if num_positions == 1 and terms.num_rows == len(
            position
        ):  # a term of each example, whatever it is made of
            return position, num_positions
        return positions_of_terms(terms, self._logits, position), num_positions

    def _record_requires_grad(self) -> None:
        blocks = (p for layer in self.plan.layers for p in parameters_of(layer.module))
        for p in (*self.model.parameters(), *blocks):  # upstream's operations ask for it
            record_original_requires_grad(p)

    def _nothing_seen(self, layers: list[Layer], record: Record) -> str:
        if record.without_graph:
            names = ", ".join(
                f"'{layer.name}'" for layer in layers if layer.module in record.without_graph
            )
            return (
                f"Every layer ({names}) ran without an autograd graph: under no_grad, or under "
                "reentrant activation checkpointing. For the latter use checkpoint(..., "
                "use_reentrant=False)."
            )
        return (
            f"None of the model's layers (the first is '{layers[0].name}') was called as a module, "
            "so no curvature can be computed. Is the model that was passed to setup_model_call "
            "another one than the gradient maker's, scripted by torch.jit, or does a fused fast "
            "path skip its modules?"
        )

    def _check_seen(self, layers: list[Layer], record: Record) -> None:
        """Raise a RuntimeError if the curvature would be of too little."""
        if all(layer.module in self.unseen for layer in layers) and not record.without_graph:
            raise RuntimeError(
                f"None of the {len(record.calls)} layers that were called (the first is "
                f"'{layers[0].name}') influences the logits or the loss. The loss has to be given "
                "what setup_model_call() returned, not an output of the model; logits that are "
                "not the model's first output are selected with setup_logits_repr()."
            )
        for layer in layers:
            reason = self.unseen.get(layer.module)
            if reason is None:
                continue
            if layer.module in record.without_graph and layer.module not in record.calls:
                reason = _WITHOUT_GRAPH
                if any(p.grad is not None and p.requires_grad for p in parameters_of(layer.module)):
                    raise RuntimeError(
                        f"Layer '{layer.name}' {reason}, but has a gradient. Use checkpoint(..., "
                        "use_reentrant=False)."
                    )
            if layer.shape == SHAPE_FULL:
                raise RuntimeError(
                    f"Layer '{layer.name}' {reason}; the full Fisher needs every layer of the "
                    "model."
                )

    def _report_unseen(self, layers: list[Layer], record: Record) -> None:
        """Warn, once, of layers that took no part in this step."""
        found: dict[tuple[str, str], list[str]] = {}
        for layer in layers:
            reason = self.unseen.get(layer.module)
            if reason is None or layer.name in self._reported:
                continue
            if layer.module in record.without_graph and layer.module not in record.calls:
                reason = _WITHOUT_GRAPH
            self._reported.add(layer.name)
            remedy = "Leave it out with ignore_modules to silence this."
            if self.plan.is_in_attention(layer.name):
                remedy = (
                    "The projections of nn.MultiheadAttention are not called: use convert(model)."
                )
            found.setdefault((reason, remedy), []).append(layer.name)
        for (reason, remedy), names in found.items():
            listed = ", ".join(f"'{name}'" for name in names[:8]) + (
                ", ..." if len(names) > 8 else ""
            )
            which = (
                f"Layer {listed}" if len(names) == 1 else f"{len(names)} layers ({listed}): each"
            )
            warn(
                f"{which} {reason} in this step; its gradient is not preconditioned where that "
                f"happens. {remedy}"
            )

    # ---------------------------------------------------------------------------------- the results

    @full_precision()
    def _results(self, batch: Batch, fvp: bool) -> list[tuple[nn.Module, Any]]:
        """The batch's matrices. Raises a FloatingPointError if one is not finite."""
        results: list[tuple[nn.Module, Any]] = []
        context = batch.context
        for layer in batch.layers:
            if layer.module in self.unseen:
                continue
            if fvp:
                results.append((layer.module, context.cvp_paramvector(layer.module, pop=True)))
            else:
                results.append((layer.module, context.cov_symmatrix(layer.module, pop=True)))
        full = context.full_cvp_paramvector if fvp else context.full_cov_symmatrix
        results.append((self.model, full(self.model, pop=True)))
        results = [(module, result) for module, result in results if result is not None]
        if not fvp:
            results = [(module, corrected(matrix)) for module, matrix in results]
            for module, matrix in results:
                matrix.trained = trained(module)
            self._check_finite(results, batch)
        return results

    @full_precision()
    def _commit(self, results: list[tuple[nn.Module, Any]], accumulate: bool, fvp: bool) -> None:
        """Make matrices the modules' own, all or none."""
        attr = self.config.fvp_attr if fvp else self.config.fisher_attr
        if not self.belongs_to_maker:
            put_aside(self.model)  # what a gradient maker has gathered is not this maker's
        if accumulate and not fvp:
            merged = []
            shared = shared_tensors(new for _, new in results)
            for module, new in results:
                old = getattr(module, attr, None)
                if old is not None and is_of(
                    old, module
                ):  # else the layer was frozen or unfrozen: a new average
                    new = merge(new, old, self.decay, shared)
                merged.append((module, new))
            results = merged
        else:
            self.zero_fisher(fvp=fvp)
        for module, result in results:
            setattr(module, attr, result)

    def _check_finite(self, results: list[tuple[nn.Module, SymMatrix]], batch: Batch) -> None:
        sums = [(module, tensor.sum()) for module, matrix in results for tensor in tensors(matrix)]
        if sums and bool(torch.isfinite(torch.stack([s.double() for _, s in sums])).all()):
            return
        for module, value in sums:
            if not bool(torch.isfinite(value)):
                name = next((layer.name for layer in batch.layers if layer.module is module), "")
                raise FloatingPointError(
                    f"Layer '{name}': its curvature is not finite; nothing was updated. Either the "
                    "batch has such values, or training has diverged: lower the learning rate or "
                    "raise damping."
                )

    @full_precision()
    def _invert(self, layers: list[Layer], damping: float | None) -> None:
        attr = self.config.fisher_attr
        of_layers = [
            (layer.name, layer.module, matrix)
            for layer in layers
            if (matrix := getattr(layer.module, attr, None)) is not None
        ]
        pairs = [(module, matrix) for _, module, matrix in of_layers]
        share_inverses_of_blocks(pairs)
        owner = owners(self.ranks, pairs)
        full = getattr(self.model, attr, None)
        mine = [
            (name, matrix)
            for (name, _, matrix), rank in zip(of_layers, owner, strict=True)
            if rank == self.ranks.rank
        ] + ([("", full)] if full is not None else [])
        for name, matrix in mine:
            try:
                matrix.update_inv(damping, replace=True)
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(
                    f"Layer '{name}': its curvature plus damping {damping} is not positive "
                    f"definite. ({error})"
                ) from error
        share_inverses(
            self.ranks, f"{self.place}, inverses", [m for _, m in pairs], owner, replace=True
        )


def count_examples(
    plan: Plan, record: Record, logits: Tensor, args: Any, kwargs: Any
) -> tuple[int, dict[nn.Module, Positions]]:
    """N of the batch that was recorded, and what was said of the positions of the layers' modules.

    Args:
        args, kwargs: those of the model.
    """
    positions: dict[nn.Module, Positions] = {}
    for layer in plan.layers:
        for module in layer.modules if layer.module in record.calls else ():
            said = record.positions.get(module) or positions_of(module)
            if said is not None:
                positions[module] = said
    if positions:
        return _agreed_num_examples(plan.layers, positions, logits)
    book = plan.layouts
    declared = [
        call.unmodified_input(layer.name)
        for layer in plan.layers
        if book.rule.get(layer.module, book.declared.get(layer.module)) == SEQUENCE_FIRST
        for call in record.calls.get(layer.module, ())
    ]
    sequence_first = next((tuple(x.shape[:-1]) for x in declared if x.ndim > 2), None)
    return infer_num_examples(
        logits.shape[:-1] or logits.shape, leading_sizes([args, kwargs]), sequence_first
    ), {}


def _readings(logits: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The example of each row of the logits, and its position there, in the ways that fit; the
    likeliest first.

    Examples are of the sizes of the logits without classes, N for padding; positions are flat.
    """
    sizes, n = logits.shape[:-1] or logits.shape, batch.num_examples
    rows = sizes.numel()
    # Rows of the logits that are one for each example come first: there may be as many nodes.
    parts = [
        part
        for said in batch.positions.values()
        for role, part in said.roles.items()
        if role == GRAPH
    ]
    parts += [part for said in batch.positions.values() for part in said.roles.values()]
    ragged: list[Segments] = []
    for part in parts:
        if len(part) == rows and not any(part is other or part.equals(other) for other in ragged):
            ragged.append(part)
    if ragged:
        return [(part.index.view(sizes), part.rank()) for part in ragged]
    ids = torch.arange(rows, device=logits.device)
    inner = sizes[2:].numel()
    readings = []
    if sizes[0] % n == 0:
        readings.append((ids // (rows // n), ids % (rows // n)))
    if fits(SEQUENCE_FIRST, sizes, n) and rows > n:
        outer = ids // inner if len(sizes) > 1 else ids
        readings.append((outer % n, outer // n * inner + ids % inner))
        if len(sizes) > 1 and sizes[0] != n:
            readings.reverse()
    if not readings:
        raise ValueError(f"Logits of sizes {tuple(logits.shape)} do not hold {n} examples.")
    return [(example.view(sizes), position) for example, position in readings]


def _num_logits_of_examples(positions: dict[nn.Module, Positions], num_examples: int) -> int:
    """How many rows the logits have if there is one for each example: those of padding graphs are
    among them.
    """
    return max(
        (len(said.roles[GRAPH]) for said in positions.values() if GRAPH in said.roles),
        default=num_examples,
    )


def _agreed_num_examples(
    layers: list[Layer], positions: dict[nn.Module, Positions], logits: Tensor
) -> tuple[int, dict[nn.Module, Positions]]:
    """N as all that was said of the layers' positions has it."""
    counts = {said.num_examples for said in positions.values()}
    if len(counts) > 1:
        names = {
            said.num_examples: layer.name
            for layer in layers
            for module in layer.modules
            if (said := positions.get(module)) is not None
        }
        raise ValueError(
            "The layers' segments are of different numbers of examples: "
            + ", ".join(f"{count} at '{name}'" for count, name in sorted(names.items()))
            + "."
        )
    num_examples = counts.pop()
    if (
        all(said.is_inferred for said in positions.values())
        and logits.ndim == 2
        and logits.shape[0] > num_examples
    ):
        lengths = {len(part) for said in positions.values() for part in said.roles.values()}
        if logits.shape[0] not in lengths - {num_examples}:  # the last examples have no rows
            num_examples = logits.shape[0]
            completed = {
                id(said): said.with_num_examples(num_examples) for said in positions.values()
            }
            positions = {module: completed[id(said)] for module, said in positions.items()}
    return num_examples, positions


def find_fisher_maker(model: nn.Module, config: FisherConfig) -> WeightSharingFisherMaker | None:
    """The maker for a configuration with ``shared_dim``; ``None`` for one without, which is ASDL's
    own affair.

    Raises a ValueError for a configuration without it of a type that only a maker with it has.
    """
    if config.shared_dim is not None:
        return WeightSharingFisherMaker(model, config)
    for value in (config.fisher_type, config.loss_type):
        if value in (FISHER_FORWARD_ONLY, LOSS_BINARY_CROSS_ENTROPY):
            raise ValueError(
                f"'{value}' needs shared_dim; without weight sharing 'reduce' and 'expand' are the "
                "same, choose either."
            )
    return None
