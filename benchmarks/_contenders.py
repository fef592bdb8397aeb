"""The optimizers that ``time_to_target.py`` compares, each a recipe for a :class:`Trainer`.

The peers are taken from libraries as they are, at their own defaults but for what the search sets.
K-FAC preconditions the gradient in front of the very NAdamW that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asdl
import torch
from _workloads import Workload
from torch import Tensor, nn
from torch.optim import Optimizer

import asdl_ws_plugin  # makes ASDL accept shared_dim

__all__ = ["BASELINE", "CONTENDERS", "Contender", "Trainer"]

Settings = Mapping[str, float]

BASELINE = "NAdamW"
IGNORED = [nn.LayerNorm, nn.BatchNorm1d, nn.Embedding]


class Trainer:
    """A model in training: one step at a time, with all that is needed to interrupt and go on.

    Args:
        workload: for the loss.
        model: in training mode.
        optimizers: make their step one after the other.
        schedules: of the learning rates.
        maker: ASDL's gradient maker, or ``None`` for the plain gradient.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        schedules: Sequence[torch.optim.lr_scheduler.LRScheduler],
        maker: Any = None,
    ) -> None:
        self.workload, self.model = workload, model
        self.optimizers, self.schedules, self.maker = optimizers, schedules, maker

    def step(self, arguments: tuple[Any, ...], labels: Tensor) -> float:
        """Train on one batch, and return its loss."""
        if self.maker is None:
            loss = self.workload.loss(self.model(*arguments), labels)
            loss.backward()
        else:
            output = self.maker.setup_model_call(self.model, *arguments)
            self.maker.setup_loss_call(self.workload.loss, output, labels)
            _, loss = self.maker.forward_and_backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> float:
        """The workload's metric. Schedule-Free keeps other weights for it than for training."""
        self.switch("eval")
        value = self.workload.evaluate(self.model)
        self.switch("train")
        return value

    def switch(self, mode: str) -> None:
        getattr(self.model, mode)()
        for optimizer in self.optimizers:
            getattr(optimizer, mode, lambda: None)()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "maker": None if self.maker is None else self.maker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for mine, theirs in zip(
            [*self.optimizers, *self.schedules],
            [*state["optimizers"], *state["schedules"]],
            strict=True,
        ):
            mine.load_state_dict(theirs)
        if self.maker is not None:
            self.maker.load_state_dict(state["maker"])


Make = Callable[[Workload, nn.Module, Settings], Trainer]


@dataclass(frozen=True)
class Contender:
    """A recipe.

    Attributes:
        make: ``make(workload, model, settings)``.
        defaults: settings where the search sets none.
        lr: the centre of its learning rates, as a multiple of the workload's.
        space: what a search over more than the learning rate varies: setting -> lowest and highest
            value, on a logarithmic scale.
        is_ours: whether it is K-FAC.
    """

    make: Make
    defaults: Settings = field(default_factory=dict)
    lr: float = 1.0
    space: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    is_ours: bool = False

    def trials(self, workload: Workload, count: int) -> list[dict[str, float]]:
        """The settings that the search tries.

        Up to four trials differ in the learning rate alone, by factors of two around the centre.
        More are points of a scrambled Sobol sequence over the whole space, with learning rates up
        to a factor of eight from the centre.
        """
        centre = self.lr * workload.lr
        if count <= 4:
            return [
                {**self.defaults, "lr": centre * 2.0 ** (i - (count - 1) // 2)}
                for i in range(count)
            ]
        space = {"lr": (centre / 8, centre * 8), **self.space}
        points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(count)
        return [
            {
                **self.defaults,
                **{
                    name: low * (high / low) ** float(x)
                    for (name, (low, high)), x in zip(space.items(), point, strict=True)
                },
            }
            for point in points
        ]


def scheduled(
    optimizer: Optimizer, workload: Workload, warmup: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up over that share of the steps, then a cosine to zero at the last."""
    steps = workload.length.steps
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def nadamw_of(parameters: Any, settings: Settings) -> Optimizer:
    return torch.optim.NAdam(
        parameters,
        lr=settings["lr"],
        betas=(1 - settings["1-beta1"], 1 - settings["1-beta2"]),
        weight_decay=settings["weight_decay"],
        decoupled_weight_decay=True,
    )


def nadamw(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
    optimizer = nadamw_of(model.parameters(), settings)
    schedule = scheduled(optimizer, workload, settings["warmup"])
    return Trainer(workload, model, [optimizer], [schedule])


def soap(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        model.parameters(),
        lr=settings["lr"],
        betas=(1 - settings["1-beta1"], 1 - settings["1-beta2"]),
        weight_decay=settings["weight_decay"],
        precondition_frequency=10,
    )
    schedule = scheduled(optimizer, workload, settings["warmup"])
    return Trainer(workload, model, [optimizer], [schedule])


def shampoo(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
    """Google's Distributed Shampoo, as pytorch_optimizer has it, with the step lengths of
    RMSProp.
    """
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        model.parameters(),
        lr=settings["lr"],
        betas=(1 - settings["1-beta1"], 1 - settings["1-beta2"]),
        moving_average_for_momentum=True,
        weight_decay=settings["weight_decay"],
        decoupled_weight_decay=True,
        decoupled_learning_rate=False,
        graft_type=LayerWiseGrafting.RMSPROP,
        start_preconditioning_step=20,
        preconditioning_compute_steps=20,
    )
    schedule = scheduled(optimizer, workload, settings["warmup"])
    return Trainer(workload, model, [optimizer], [schedule])


def muon(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
    """Muon for the matrices inside of the network, NAdamW for embeddings, outputs and vectors; the
    update's size matched to Adam's, so that both take the same learning rate.
    """
    inner, rest = [], []
    for name, p in model.named_parameters():
        is_inner = p.ndim == 2 and not name.startswith(workload.outer)
        (inner if is_inner else rest).append(p)
    optimizers = [
        torch.optim.Muon(
            inner,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            momentum=1 - settings["1-momentum"],
            adjust_lr_fn="match_rms_adamw",
        ),
        nadamw_of(rest, settings),
    ]
    schedules = [scheduled(o, workload, settings["warmup"]) for o in optimizers]
    return Trainer(workload, model, optimizers, schedules)


def schedule_free(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(
        model.parameters(),
        lr=settings["lr"],
        betas=(1 - settings["1-beta1"], 1 - settings["1-beta2"]),
        weight_decay=settings["weight_decay"],
        warmup_steps=max(1, round(settings["warmup"] * workload.length.steps)),
    )
    return Trainer(workload, model, [optimizer], [])


def kfac(
    strategy: str | None,
    fisher_type: str,
    config_of: Callable[[Settings], Any],
    behind: Make | None = None,
) -> Make:
    """K-FAC in front of NAdamW, or of the optimizers that ``behind`` makes. ``strategy=None`` is
    that of the workload's setting; ``config_of`` makes the configuration of the settings.
    """

    def make(workload: Workload, model: nn.Module, settings: Settings) -> Trainer:
        workload.prepare(model)
        config = config_of(settings)
        maker = asdl.KfacGradientMaker(
            model,
            config,
            fisher_type=fisher_type,
            loss_type=workload.loss_type,
            shared_dim=strategy or workload.setting,
        )
        # Converted attention has parameters of its own, so the optimizer is made after it.
        trainer = (behind or nadamw)(workload, model, settings)
        trainer.maker = maker
        return trainer

    return make


def every(curvature: int, inverse: int) -> Callable[[Settings], Any]:
    """ASDL's own configuration, with these intervals."""
    return lambda settings: asdl.PreconditioningConfig(
        damping=settings["damping"],
        ema_decay=settings["ema_decay"],
        curvature_upd_interval=curvature,
        preconditioner_upd_interval=inverse,
        ignore_modules=IGNORED,
    )


def preset(settings: Settings) -> Any:
    """What the README shows. Nothing of it is ever tuned."""
    return asdl_ws_plugin.recommended(ignore_modules=IGNORED)


def preset_64(settings: Settings) -> Any:
    """The preset, with A and its inverse renewed every 64 steps."""
    return asdl_ws_plugin.recommended(
        curvature_upd_interval=64, preconditioner_upd_interval=64, ignore_modules=IGNORED
    )


def second_moment(settings: Settings) -> Any:
    """The preset with Adam's second moment in the eigenbasis of the factors, at 0.95."""
    return asdl_ws_plugin.recommended(second_moment=0.95, ignore_modules=IGNORED)


ADAM = {"weight_decay": 0.03, "1-beta1": 0.1, "1-beta2": 0.01, "warmup": 0.1}
ADAM_SPACE = {
    "weight_decay": (1e-3, 0.3),
    "1-beta1": (0.02, 0.2),
    "1-beta2": (0.003, 0.1),
    "warmup": (0.02, 0.2),
}
# The same number of dimensions: what K-FAC has of its own in place of two of Adam's.
KFAC_SPACE = {
    "weight_decay": (1e-3, 0.3),
    "1-beta2": (0.003, 0.1),
    "damping": (1e-5, 1e-2),
    "warmup": (0.02, 0.2),
}
INTERVALS = {(1, 10): 0.05, (5, 20): 0.1, (10, 100): 0.2}  # -> weight of the new curvature
KINDS = {
    "K-FAC-reduce": ("reduce", "fisher_mc"),
    "K-FAC-expand": ("expand", "fisher_mc"),
    "K-FAC forward-only": (None, "fisher_forward_only"),
    "K-FAC empirical": (None, "fisher_emp"),
}


def _contenders() -> dict[str, Contender]:
    result = {
        BASELINE: Contender(nadamw, ADAM, space=ADAM_SPACE),
        "SOAP": Contender(
            soap, {**ADAM, "1-beta1": 0.05, "1-beta2": 0.05, "weight_decay": 0.01}, 1.0, ADAM_SPACE
        ),
        "Distributed Shampoo": Contender(shampoo, ADAM, 1.0, ADAM_SPACE),
        "Muon": Contender(
            muon,
            {**ADAM, "1-momentum": 0.05},
            space={name.replace("beta1", "momentum"): of for name, of in ADAM_SPACE.items()},
        ),
        "Schedule-Free AdamW": Contender(schedule_free, ADAM, 2.0, ADAM_SPACE),
    }
    for name, (strategy, fisher_type) in KINDS.items():
        for (curvature, inverse), decay in INTERVALS.items():
            result[f"{name} {curvature}/{inverse}"] = Contender(
                kfac(strategy, fisher_type, every(curvature, inverse)),
                {**ADAM, "damping": 1e-3, "ema_decay": decay},
                space=KFAC_SPACE,
                is_ours=True,
            )
    for name, fisher_type in {
        "K-FAC preset": "fisher_mc",
        "K-FAC preset, forward-only": "fisher_forward_only",
    }.items():
        make = kfac(None, fisher_type, preset)
        result[name] = Contender(make, ADAM, space=ADAM_SPACE, is_ours=True)
    for name, strategy in {"K-FAC-reduce": "reduce", "K-FAC-expand": "expand"}.items():
        make = kfac(strategy, "fisher_mc", second_moment)
        result[f"{name}, second moment"] = Contender(make, ADAM, space=ADAM_SPACE, is_ours=True)
    result["K-FAC forward-only, Muon"] = Contender(
        kfac(None, "fisher_forward_only", preset_64, behind=muon),
        dict(result["Muon"].defaults),
        space=result["Muon"].space,
        is_ours=True,
    )
    if not hasattr(asdl_ws_plugin, "recommended"):  # a version without the preset
        result = {n: c for n, c in result.items() if "preset" not in n and "moment" not in n}
    if not hasattr(torch.optim, "Muon"):  # before torch 2.9
        result = {n: c for n, c in result.items() if "Muon" not in n}
    return result


CONTENDERS = _contenders()
