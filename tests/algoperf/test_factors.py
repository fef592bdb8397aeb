"""What the submission computes is right: every layer's factors are those of the examples, one by
one and without their padding.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from oracles.every_layer import Sums, every_layers_factors, joint_factors, worst_layer
from torch import Tensor, nn

from algoperf import spec
from algoperf.runner import Run, settings_of
from algoperf.workloads import WORKLOADS, Batch, ImagenetResnet, Workload

pytestmark = pytest.mark.filterwarnings("ignore:.*behind a zero-initialised head:UserWarning")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Everything of a batch that the model computes with; weights stay in float32."""
    if isinstance(value, dict):
        return {name: v if name == "weights" else cast(v, dtype) for name, v in value.items()}
    if isinstance(value, tuple):
        parts = [cast(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.to(dtype) if value.is_floating_point() else value


def workload_in(name: str, dtype: torch.dtype) -> Workload:
    workload = WORKLOADS[name]()
    batch = workload.batch
    workload.batch = lambda step: cast(batch(step), dtype)
    return workload


def summed_loss(workload: Workload, model: nn.Module, batch: Batch) -> Tensor:
    logits, _ = workload.model_fn(model, batch, None, spec.ForwardPassMode.TRAIN, [0], True)
    return workload.loss_fn(batch["targets"], logits, batch.get("weights"))["summed"]


def factors_one_by_one(
    workload: Workload, model: nn.Module, layers: dict[str, list[nn.Module]], batch: Batch
) -> dict[str, Sums]:
    if isinstance(workload, ImagenetResnet):  # BatchNorm
        return joint_factors(
            layers, lambda: summed_loss(workload, model, batch), workload.num_examples
        )
    return every_layers_factors(
        layers,
        lambda n: summed_loss(workload, model, workload.example(batch, n)),
        workload.num_examples,
        ragged=True,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared_dim", ["auto", "expand", "reduce"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_layers_factors_are_those_of_the_examples(
    submission: ModuleType, name: str, shared_dim: str, dtype: torch.dtype
):
    workload = workload_in(name, dtype)
    settings = settings_of(
        shared_dim=shared_dim, ema_decay=1.0, label_smoothing=0.0, learning_rate=1e-2
    )
    run = Run(submission, workload, settings, lambda model: model.to(dtype))
    for step in range(2):  # until the zero-initialised head is zero no more
        run.step(step)
    before = copy.deepcopy(run.params)
    run.step(2)

    kfac, batch = run.state["kfac"], workload.batch(2)
    unseen = kfac.fisher_maker.unseen
    names = [layer.name for layer in kfac.plan.layers if layer.module not in unseen]
    alone = {name: [before.get_submodule(name)] for name in names}
    expected = factors_one_by_one(workload, before, alone, batch)
    logits, _ = workload.model_fn(before, batch, None, spec.ForwardPassMode.EVAL, [0], False)
    loss = workload.loss_fn(batch["targets"], logits, batch.get("weights"))

    assert {*expected} == {
        name for name, module in before.named_modules() if type(module) in (nn.Linear, nn.Conv2d)
    }
    modules = {name: run.params.get_submodule(name) for name in names}
    strategy = kfac.setting if shared_dim == "auto" else shared_dim
    scale_B = workload.num_examples / float(loss["n_valid_examples"])
    error, where = worst_layer(modules, expected, strategy, scale_B)
    assert error < TOLERANCE[dtype], f"{where} is off by {error:.2e}"
