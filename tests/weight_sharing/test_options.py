"""Numbers that make no sense are refused at construction, by name."""

from __future__ import annotations

import math
from typing import Any

import asdl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import asdl_ws_plugin  # noqa: F401

NAN, INF = math.nan, math.inf


def maker_with(options: dict[str, Any], **others: Any) -> Any:
    model = nn.Sequential(nn.Linear(3, 2))
    config = asdl.PreconditioningConfig(**{"damping": 1e-3, **options})
    return asdl.KfacGradientMaker(model, config, shared_dim="reduce", **others)


@pytest.mark.parametrize("value", [NAN, INF, -INF, -1e-3])
def test_damping_that_is_no_finite_number_from_0_on_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^damping has to be .*at least 0, got {value}\.$"):
        maker_with({"damping": value})


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("curvature_upd_interval", 1),
        ("preconditioner_upd_interval", 1),
        ("curvature_warmup_steps", 0),
        ("preconditioner_warmup_steps", 0),
    ],
)
def test_intervals_and_warmups_that_are_no_whole_numbers_are_refused(name: str, least: int) -> None:
    for value in (least - 1, least + 0.5, NAN, INF):
        with pytest.raises(
            ValueError, match=rf"^{name} has to be a whole number, at least {least}, got {value}\.$"
        ):
            maker_with({name: value})


@pytest.mark.parametrize("value", [NAN, 0.0, -0.1, 1.1])
def test_a_weight_of_the_new_curvature_outside_of_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^ema_decay weighs .*got {value}\.$"):
        maker_with({"ema_decay": value})


@pytest.mark.parametrize("value", [NAN, INF, 0.0, -1.0])
def test_a_scale_of_the_curvature_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^scale has to be .*got {value}\.$"):
        maker_with({}, scale=value)


def test_whole_numbers_of_any_type_are_accepted_and_train() -> None:
    maker = maker_with(
        {
            "damping": np.float32(0.5),
            "curvature_upd_interval": 1e1,
            "preconditioner_upd_interval": np.int64(10),
        }
    )
    dummy = maker.setup_model_call(maker.model, torch.randn(4, 3))
    maker.setup_loss_call(F.cross_entropy, dummy, torch.tensor([0, 1, 1, 0]))
    maker.forward_and_backward()
    assert maker.model[0].weight.grad.isfinite().all()
