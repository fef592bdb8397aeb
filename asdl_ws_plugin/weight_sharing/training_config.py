"""Options of training beyond ASDL's own, and the preset that needs no tuning.

:class:`TrainingConfig` is a ``PreconditioningConfig``: with its defaults, a gradient maker behaves
as with ASDL's. :func:`recommended` sets what makes a learning rate of Adam a good one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asdl.precondition.prec_grad_maker import PreconditioningConfig

__all__ = [
    "TrainingConfig",
    "at_step",
    "check_training_config",
    "recommended",
    "refuse_training_config",
]

# Options that may be callables of the step.
_BY_STEP = (
    "damping",
    "ema_decay",
    "curvature_upd_interval",
    "preconditioner_upd_interval",
    "learning_rate",
)


@dataclass
class TrainingConfig(PreconditioningConfig):
    """A ``PreconditioningConfig`` with what a training that holds its step needs.

    ``damping``, ``ema_decay`` and the two intervals may be numbers or functions of the step (an
    int, from 0).

    Args:
        unbiased: the moving average gives the k-th update of a layer the weight
            ``max(ema_decay, 1 / k)``: the plain mean of the first updates, then upstream's average.
            Upstream's starts from zero, so that its first inverses are up to ``1 / ema_decay**2``
            times too large.
        relative_damping: ``damping`` is a fraction of the mean eigenvalue of a layer's curvature,
            so that it means the same for every layer, scale of the loss and stage of training
            (:func:`~.inverses.split_damping` has the factors' shares).
        trust: ``damping`` is the least of dampings that follow the optimizer's steps (see
            :mod:`~.trust`): where those are too short for curvature to matter, the direction is the
            gradient's. The damping that a quadratic model calls for is divided by ``trust``.
            ``None``: the damping is ``damping``.
        early_updates: curvature and inverses are updated on each of this many first steps, then
            ever more rarely (at step t, every ``t // early_updates`` steps) until the intervals
            are reached.
        graft: every parameter's gradient keeps the norm that it had before it was preconditioned,
            so that a learning rate and ``clip_grad_norm_`` mean what they mean without K-FAC.
        kl_clip: the most that ``learning_rate**2 * Σ gᵀ F⁻¹ g``, twice the Kullback-Leibler
            divergence of one step, may be; a longer step is shortened, all layers alike.
        learning_rate: the optimizer's, for ``kl_clip``; a number or a function of the step.
        max_side: a Kronecker factor of a larger side is a block diagonal of equal blocks at most
            that large; one of more than 16 such blocks is a diagonal. A convolution with a kernel
            of more than one entry has smaller blocks: of A, where it is wider, of whole channels
            with at most 144 rows, and of B of at most 256.
        second_moment: Adam's β2, as 0.95: in front of any optimizer, the gradient of a layer with
            Kronecker factors is divided by the root of its own second moment in the factors'
            eigenbasis, which ``preconditioner_upd_interval`` renews, instead of by the factors
            (:mod:`~.second_moments`). Damping and trust are of the other layers then.
    """

    damping: Any = 1e-7  # λ
    ema_decay: Any = -1
    curvature_upd_interval: Any = None
    preconditioner_upd_interval: Any = 1
    unbiased: bool = False
    relative_damping: bool = False
    trust: float | None = None
    early_updates: int = 0
    graft: bool = False
    kl_clip: float | None = None
    learning_rate: float | Callable[[int], float] | None = None
    max_side: int | None = None
    second_moment: float | None = None  # β₂


def recommended(**options: Any) -> TrainingConfig:
    """The preset: what the README, the documentation and the examples train with.

    Args:
        options: any of :class:`TrainingConfig`, in the place of the preset's.
    """
    preset: dict[str, Any] = {
        "damping": 1e-3,
        "relative_damping": True,
        "trust": 30.0,
        "ema_decay": 0.05,
        "unbiased": True,
        "curvature_upd_interval": 5,
        "preconditioner_upd_interval": 20,
        "early_updates": 20,
        "graft": True,
        "max_side": 1024,
    }
    return TrainingConfig(**{**preset, **options})


def refuse_training_config(*arguments: Any) -> None:
    """Raise a ValueError if one of a gradient maker's arguments is a :class:`TrainingConfig`, of
    which ASDL's own makers would read a part only.
    """
    if any(isinstance(argument, TrainingConfig) for argument in arguments):
        raise ValueError(
            "A TrainingConfig, as recommended() makes it, needs shared_dim: 'expand', 'reduce', "
            "'auto' or a list of rules. Without weight sharing all of them are the same."
        )


class _AtStep:
    """A configuration as it is at a step: functions of the step are called. Setting an option sets
    the configuration's own.
    """

    def __init__(self, config: PreconditioningConfig, step: int) -> None:
        self.__dict__.update(_config=config, _step=step)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        return value(self._step) if name in _BY_STEP and callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def at_step(config: PreconditioningConfig, step: int) -> Any:
    """The configuration itself, or a view of it in which functions of the step are numbers."""
    if any(callable(getattr(config, name, None)) for name in _BY_STEP):
        return _AtStep(config, step)
    return config


def check_training_config(config: Any) -> None:
    """Raise a ValueError for options that make no sense or not together."""
    if config.early_updates < 0:
        raise ValueError(f"early_updates has to be at least 0, got {config.early_updates!r}.")
    if config.max_side is not None and config.max_side < 1:
        raise ValueError(f"max_side has to be at least 1, got {config.max_side!r}.")
    if config.early_updates and config.num_total_steps is not None:
        raise ValueError(
            "early_updates and num_total_steps are two schedules of one thing; leave one out."
        )
    if (config.unbiased or config.relative_damping) and config.ema_decay == -1:
        raise ValueError("unbiased and relative_damping are of an average, which needs ema_decay.")
    if config.max_side is not None and not config.relative_damping:
        raise ValueError(
            "ASDL's damping is of whole factors: max_side needs relative_damping=True."
        )
    if config.trust is not None and config.trust <= 0:
        raise ValueError(f"trust has to be greater than 0, got {config.trust!r}.")
    if config.trust is not None and not config.relative_damping:
        raise ValueError("trust sets a relative damping: it needs relative_damping=True.")
    if config.second_moment is not None:
        _check_second_moment(config)
    if config.kl_clip is None:
        return
    if config.kl_clip <= 0:
        raise ValueError(f"kl_clip has to be greater than 0, got {config.kl_clip!r}.")
    if config.learning_rate is None:
        raise ValueError("kl_clip needs the optimizer's learning_rate, a number or a function.")
    if config.graft:
        raise ValueError("graft and kl_clip are two lengths of the same step; choose one.")


def _check_second_moment(config: Any) -> None:
    if not 0 <= config.second_moment < 1:
        raise ValueError(f"second_moment has to be in [0, 1), got {config.second_moment!r}.")
    if not config.relative_damping:
        raise ValueError(
            "second_moment needs relative_damping=True, for layers without Kronecker factors."
        )
    if config.kl_clip is not None:
        raise ValueError(
            "kl_clip is of steps that curvature has divided; with second_moment use graft."
        )
