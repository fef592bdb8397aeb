"""Autocast, GradScaler and models in bfloat16, in the loop that users have."""

from __future__ import annotations

import warnings
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asdl_ws_plugin import Preconditioner

CONFIG = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.5)


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def scaler(scale: float = 2.0**10) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact", "fisher_forward_only"])
@pytest.mark.parametrize("by", ["hook", "step", "asdl"])
def test_the_scale_of_the_loss_is_no_part_of_the_curvature(fisher_type: str, by: str) -> None:
    x, y = batch()
    plain, scaled = mlp(), mlp()
    options = {"fisher_type": fisher_type, "shared_dim": "reduce"}
    reference = Preconditioner(plain, CONFIG, **options)
    reference.backward(F.cross_entropy(plain(x), y))
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.0)
    amp = scaler()
    if by == "asdl":
        gm = asdl.KfacGradientMaker(scaled, CONFIG, **options)
        gm.setup_loss_call(
            lambda z, t: amp.scale(F.cross_entropy(z, t)), gm.setup_model_call(scaled, x), y
        )
        gm.forward_and_backward()
        amp.unscale_(optimizer)
    else:
        prec = Preconditioner(scaled, CONFIG, **options)
        if by == "hook":
            prec.step_before(optimizer)
        amp.scale(F.cross_entropy(scaled(x), y)).backward()
        amp.unscale_(optimizer)
        if by == "step":
            prec.step()
        amp.step(optimizer)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)
    for i in (0, 2):
        ours, theirs = scaled[i].fisher.kron, plain[i].fisher.kron
        assert torch.allclose(ours.A, theirs.A, rtol=1e-5)
        assert torch.allclose(ours.B, theirs.B, rtol=1e-5)


@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_mc"])
@pytest.mark.parametrize("by", ["hook", "step"])
def test_a_step_that_overflows_is_skipped_as_the_scaler_expects(fisher_type: str, by: str) -> None:
    x, y = batch()
    model = mlp()
    prec = Preconditioner(model, CONFIG, fisher_type=fisher_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if by == "hook":
        prec.step_before(optimizer)
    amp = scaler()

    def train() -> None:
        optimizer.zero_grad()
        amp.scale(8 * F.cross_entropy(model(x), y)).backward()
        if by == "step":
            amp.unscale_(optimizer)
            prec.step()
        amp.step(optimizer)
        amp.update()

    train()
    factors = [model[i].fisher.kron.A.clone() for i in (0, 2)]
    weights = [p.detach().clone() for p in model.parameters()]
    amp.update(2.0**127)
    train()
    assert prec.num_skipped == 1
    assert amp.get_scale() == 2.0**126
    assert all(torch.equal(model[i].fisher.kron.A, factors[k]) for k, i in enumerate((0, 2)))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    amp.update(2.0**10)
    train()
    assert not all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("by", ["nothing", "unscale_", "step_before", "a scale of 1", "no trust"])
def test_gradients_that_are_still_scaled_are_said(by: str) -> None:
    x, y = batch()
    model = mlp()
    options: Any = {"trust": None} if by == "no trust" else {}
    prec = Preconditioner(model, fisher_type="fisher_emp", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amp = scaler(1.0 if by == "a scale of 1" else 2.0**10)
    if by == "step_before":
        prec.step_before(optimizer)
    said = []
    for _ in range(3):
        optimizer.zero_grad()
        amp.scale(F.cross_entropy(model(x), y)).backward()
        if by == "unscale_":
            amp.unscale_(optimizer)
        if by != "step_before":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                prec.step()
            said += [str(w.message)[:41] for w in caught]
        amp.step(optimizer)
        amp.update()
    expected = ["The gradients are still multiplied by the"] if by == "nothing" else []
    assert said == expected
    assert prec.maker.state["step"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, y = batch()
    model, reference = mlp(), mlp()
    prec, other = (Preconditioner(m, CONFIG, fisher_type="fisher_emp") for m in (model, reference))
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), y)
    prec.backward(loss)
    other.backward(F.cross_entropy(reference(x), y))
    for i in (0, 2):
        assert model[i].fisher.kron.A.dtype == torch.float32
        error = (model[i].fisher.kron.B - reference[i].fisher.kron.B).norm()
        assert error < 0.05 * reference[i].fisher.kron.B.norm()


def test_a_model_in_bfloat16_trains() -> None:
    x, y = batch()
    model = mlp().to(torch.bfloat16)
    prec = Preconditioner(model, CONFIG, fisher_type="fisher_emp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x.bfloat16()), y)
        optimizer.zero_grad()
        prec.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert losses[-1] < 0.7 * losses[0]
