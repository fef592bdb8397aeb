"""Mixed precision: factors are finite, float32, close to those of float32, and free of the loss
scale.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import empirical_factors, kfac, kron, step
from torch import nn

N, R, D, C = 8, 6, 16, 4
HALF = [torch.bfloat16, torch.float16]
TYPES = ["fisher_mc", "fisher_emp", "fisher_exact", "fisher_forward_only"]


class Model(nn.Module):
    """Convolution, LayerNorm, tokens; ``half`` opens autocast inside of the forward pass."""

    def __init__(self, half=None):
        super().__init__()
        self.lower = half
        self.conv, self.norm = nn.Conv2d(1, D, (D, 1)), nn.LayerNorm(D)
        self.fc1, self.fc2, self.head = (
            nn.Linear(D, 2 * D),
            nn.Linear(2 * D, D, bias=False),
            nn.Linear(D, C),
        )

    def forward(self, x):  # (N, R, D)
        with torch.autocast("cpu", self.lower or torch.bfloat16, enabled=self.lower is not None):
            x = self.conv(x.mT.unsqueeze(1)).squeeze(2).mT
            x = x + self.fc2(torch.tanh(self.fc1(self.norm(x))))
            return self.head(x.mean(1))


def batch():
    return torch.randn(N, R, D), torch.randint(C, (N,))


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def matrices_of(model):
    norm = (
        [model.norm.fisher.unit.data] if hasattr(model.norm, "fisher") else []
    )  # not for fisher_forward_only
    return [t for layer in layers_of(model) for t in kron(layer)] + norm


def close(found, expected, tol):
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tol, f"relative error {error:.2e}"


@pytest.mark.parametrize("where", ["inside the model", "around the step"])
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", TYPES)
def test_factors_under_autocast(fisher_type, setting, half, where):
    """Upstream's are bfloat16, of which there is no Cholesky factor, or float16 and infinite."""
    torch.manual_seed(1)
    model, (x, target) = Model(half if where == "inside the model" else None), batch()
    reference = copy.deepcopy(model)
    reference.lower = None
    options = {
        "fisher_type": fisher_type,
        "ema_decay": 1.0,
        "data_size": N,
        "damping": 0.1,
        "seed": 3,
    }
    maker = kfac(model, setting, **options)
    with torch.autocast("cpu", half, enabled=where == "around the step"):
        step(maker, F.cross_entropy, target, x)
    step(kfac(reference, setting, **options), F.cross_entropy, target, x)
    for found, expected in zip(matrices_of(model), matrices_of(reference), strict=True):
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        close(found, expected, 0.05)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        close(p.grad, q.grad, 0.15)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_factors_around_the_step_are_not_computed_in_half_precision(setting, half):
    """With a float32 model inside autocast, the products of the rows that the layers saw are
    float32 products.
    """
    model, x, target = nn.Sequential(nn.Linear(D, C)), torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, setting, fisher_type="fisher_emp", ema_decay=1.0, data_size=N)
    with torch.autocast("cpu", half):
        step(maker, lambda y, t: F.cross_entropy(y.mean(1).float(), t, reduction="sum"), target, x)
    A, _ = empirical_factors(
        model[0],
        lambda i: F.cross_entropy(model(x[i : i + 1]).mean(1), target[i : i + 1]),
        N,
        setting,
    )
    close(kron(model[0])[0], A, 1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_a_model_of_half_precision(dtype):
    """Pure bfloat16 or float16, without autocast: float32 factors, gradients of the parameters'
    dtype.
    """
    torch.manual_seed(1)
    reference = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, C))
    model = copy.deepcopy(reference).to(dtype)
    x, target = torch.randn(N, D), torch.randint(C, (N,))
    for m, inputs in ((model, x.to(dtype)), (reference, x)):
        maker = kfac(m, fisher_type="fisher_emp", ema_decay=1.0, data_size=N, damping=0.1)
        step(maker, F.cross_entropy, target, inputs)
    for i in (0, 3):
        for found, expected in zip(kron(model[i]), kron(reference[i]), strict=True):
            assert found.dtype == torch.float32
            close(found, expected, 0.05)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad.dtype == dtype and torch.isfinite(p.grad).all()
        close(p.grad, q.grad, 0.2)


def test_products_that_overflow_half_precision():
    """Σ a aᵀ exceeds float16's 65504 although no input does."""
    model = nn.Sequential(nn.Linear(D, C))
    x, target = 300 * torch.randn(N, R, D), torch.randint(C, (N,))
    maker = kfac(model, "expand", fisher_type="fisher_mc", ema_decay=1.0, data_size=N)
    with torch.autocast("cpu", torch.float16):
        step(maker, lambda y, t: F.cross_entropy(y.float().mean(1), t), target, x)
    assert kron(model[0])[0].diagonal().max() > 65504
    close(kron(model[0])[0], sum(a.mT @ a for a in x) / (N * R), 1e-2)


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", TYPES)
def test_the_loss_scale_of_a_grad_scaler_stays_out_of_the_factors(fisher_type, setting, ema_decay):
    """``scaler.scale(loss)``: gradients are scaled, and unscaled by the scaler; curvature is of the
    loss without it.
    """
    torch.manual_seed(1)
    scale, (x, target) = 2.0**12, batch()
    first = Model()
    found = []
    for factor in (1.0, scale):
        model = copy.deepcopy(first).double()
        maker = kfac(
            model,
            setting,
            fisher_type=fisher_type,
            ema_decay=ema_decay,
            data_size=N,
            seed=2,
            damping=0.1,
        )
        for _ in range(2):
            loss = step(
                maker,
                lambda y, t, factor=factor: factor * F.cross_entropy(y, t),
                target,
                x.double(),
            )
        found.append(
            (
                loss.detach() / factor,
                [p.grad / factor for p in model.parameters()],
                matrices_of(model) if ema_decay == 0.5 else [],
            )
        )
    (loss, grads, matrices), (scaled_loss, scaled_grads, scaled_matrices) = found
    torch.testing.assert_close(loss, scaled_loss)
    for pair in zip([*grads, *matrices], [*scaled_grads, *scaled_matrices], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("half", HALF)
def test_training_with_a_grad_scaler(half):
    """The scaler's loop, as its documentation has it, around the gradient maker."""
    torch.manual_seed(1)
    model, (x, target) = Model(half), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    maker = kfac(model, ema_decay=0.5, data_size=N, damping=0.1, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        dummy = maker.setup_model_call(model, x)
        maker.setup_loss_call(
            lambda y, t: scaler.scale(F.cross_entropy(y.float(), t)), dummy, target
        )
        _, loss = maker.forward_and_backward()
        losses.append(float(loss.detach()) / scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("half", HALF)
def test_more_terms_than_half_precision_can_count(half, fisher_type):
    """float16 ends at 65504, and bfloat16 counts to 256."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, C)), torch.randn(70001, 4)
    target = torch.randint(C, (len(x),))
    options = {"fisher_type": fisher_type, "ema_decay": 1.0, "seed": 3}
    step(kfac(model, **options), F.cross_entropy, target, x)
    A, B = kron(model[0])
    with torch.autocast("cpu", half):
        step(kfac(model, **options), F.cross_entropy, target, x)
    for found, expected in zip(kron(model[0]), (A, B), strict=True):
        close(found, expected, 2e-2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: F.cross_entropy(y.float().flatten(0, 1), t.flatten()),
        lambda y, t: F.nll_loss(F.log_softmax(y, -1).flatten(0, 1), t.flatten()),
        lambda y, t: F.cross_entropy(y[:, 1:].flatten(0, 1), t[:, 1:].flatten()),
    ],
    ids=["cast", "log_softmax", "selected"],
)
@pytest.mark.parametrize("half", HALF)
def test_exact_of_more_rows_than_bfloat16_can_number(half, loss):
    torch.manual_seed(1)
    model, x, target = (
        nn.Sequential(nn.Linear(4, C)),
        torch.randn(40, 10, 4),
        torch.randint(C, (40, 10)),
    )
    options = {"shared_dim": "expand", "fisher_type": "fisher_exact", "ema_decay": 1.0}
    step(kfac(model, **options), loss, target, x)
    _, B = kron(model[0])
    with torch.autocast("cpu", half):
        step(kfac(model, **options), loss, target, x)
    close(kron(model[0])[1], B, 2e-2)
