"""The gradient before preconditioning, and the loss, are those of the loss as it was passed, on
every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from oracles.autograd import BCE, CE, MSE, SelfAttention
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")

N, R, C = 3, 4, 3


class Model(SelfAttention):
    """With a parameter that belongs to no layer, a layer that is ignored, and one whose bias is
    frozen.
    """

    def __init__(self, pool: bool) -> None:
        super().__init__(pool=pool)
        self.position = nn.Parameter(torch.randn(R, 4))
        self.norm = nn.LayerNorm(4)
        self.v.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x + self.position))


class CustomLoss:
    """A callable object without ``reduction``."""

    def __call__(self, y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y.reshape(-1, C), t.flatten()) + 0.5 * y.square().sum()


def rows(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of logits ``(N, C)`` or ``(N, R, C)`` as one of rows."""
    return lambda y, t: function(y.reshape(-1, C), t.flatten())


def weighted_mean(y: Tensor, t: Tensor) -> Tensor:
    mask = (t != 1).double().flatten()
    terms = F.cross_entropy(y.reshape(-1, C), t.flatten(), reduction="none")
    return (terms * mask).sum() / mask.sum()


WEIGHT = [0.5, 2.0, 1.0]

# name -> (loss type, () -> loss)
LOSSES: dict[str, tuple[str, Callable[[], Any]]] = {
    "mean": (CE, lambda: rows(F.cross_entropy)),
    "sum": (CE, lambda: rows(functools.partial(F.cross_entropy, reduction="sum"))),
    "module": (CE, lambda: rows(nn.CrossEntropyLoss())),
    "module_sum": (CE, lambda: rows(nn.CrossEntropyLoss(reduction="sum"))),
    "ignore_index": (CE, lambda: rows(nn.CrossEntropyLoss(ignore_index=1))),
    "label_smoothing": (CE, lambda: rows(nn.CrossEntropyLoss(label_smoothing=0.1))),
    "class_weights": (CE, lambda: rows(nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT)))),
    "everything": (
        CE,
        lambda: rows(
            nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT), label_smoothing=0.2, ignore_index=2)
        ),
    ),
    "over_accumulation_steps": (CE, lambda: lambda y, t: rows(F.cross_entropy)(y, t) / 4),
    "masked_mean": (CE, lambda: weighted_mean),
    "custom": (CE, CustomLoss),
    "nll": (CE, lambda: lambda y, t: F.nll_loss(y.log_softmax(-1).reshape(-1, C), t.flatten())),
    "mse": (MSE, lambda: F.mse_loss),
    "mse_sum": (MSE, lambda: functools.partial(F.mse_loss, reduction="sum")),
    "mse_module": (MSE, nn.MSELoss),
    "bce": (BCE, lambda: F.binary_cross_entropy_with_logits),
    "bce_weights": (
        BCE,
        lambda: nn.BCEWithLogitsLoss(weight=torch.tensor(WEIGHT), pos_weight=torch.tensor(WEIGHT)),
    ),
}


def target_for(loss_type: str, pool: bool) -> Tensor:
    sizes = (N,) if pool else (N, R)
    if loss_type == CE:
        target = torch.randint(C, sizes)
        target.view(-1)[:3] = torch.arange(3)
        return target
    return torch.rand(*sizes, C)


def make(
    model: nn.Module, maker: Any = asdl.KfacGradientMaker, raw: bool = True, **options: Any
) -> Any:
    """A gradient maker; ``raw``: without its last step, the preconditioning of the gradient."""
    settings = {"data_size": N, "damping": 0.1, "ema_decay": 0.5, "ignore_modules": ["norm"]}
    settings |= {
        key: options.pop(key) for key in list(options) if hasattr(asdl.PreconditioningConfig, key)
    }
    options = {"shared_dim": "reduce", "fisher_type": "fisher_mc", **options}
    gm = maker(model, asdl.PreconditioningConfig(**settings), **options)
    if raw:
        gm.precondition = lambda *args, **kwargs: None
    return gm


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(model: nn.Module, expected: dict[str, Tensor], names: Any = None) -> None:
    for name in names or expected:
        torch.testing.assert_close(
            model.get_parameter(name).grad, expected[name], rtol=1e-12, atol=1e-14
        )
    assert model.v.bias.grad is None


@pytest.mark.parametrize(
    "fisher_type", ["fisher_mc", "fisher_exact", "fisher_emp", "fisher_forward_only"]
)
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
def test_every_step_has_the_gradient_of_the_loss(case: Any, pool: bool, fisher_type: str):
    """Steps 0 and 2 update the curvature, steps 1 and 3 do not."""
    loss_type, build = case
    model, loss_fn = Model(pool), build()
    gm = make(
        model,
        fisher_type=fisher_type,
        loss_type=loss_type,
        curvature_upd_interval=2,
        preconditioner_upd_interval=2,
    )
    for step in range(4):
        x, target = torch.randn(N, R, 4), target_for(loss_type, pool)
        expected_loss = loss_fn(model(x), target)
        expected = gradients(model, expected_loss)
        model.zero_grad()
        updates = gm.do_update_curvature()
        assert updates == (step % 2 == 0)
        gm.setup_loss_call(loss_fn, gm.setup_model_call(model, x), target)
        out, loss = gm.forward_and_backward()
        assert torch.equal(loss, expected_loss) and loss.shape == ()
        assert torch.equal(out, model(x))
        assert_same(model, expected)


@pytest.mark.parametrize(
    ("maker", "options"),
    [
        (asdl.KfacGradientMaker, {"swift": True}),
        (asdl.EkfacGradientMaker, {"fisher_type": "fisher_emp", "ema_decay": -1}),
        (asdl.FullNaturalGradientMaker, {"ignore_modules": None}),
        (asdl.LayerWiseNaturalGradientMaker, {}),
        (asdl.UnitWiseNaturalGradientMaker, {}),
        (asdl.DiagNaturalGradientMaker, {}),
        (asdl.NaturalGradientMaker, {"fisher_shape": ["diag", (nn.Linear, "kron")]}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("shared_dim", ["expand", "reduce", "auto"])
def test_every_maker_has_the_gradient_of_the_loss(
    shared_dim: str, maker: Any, options: dict[str, Any]
):
    model = Model(pool=False)
    gm = make(
        model,
        maker,
        shared_dim=shared_dim,
        curvature_upd_interval=2,
        preconditioner_upd_interval=2,
        **options,
    )
    for _ in range(3):
        x, target = torch.randn(N, R, 4), target_for(CE, pool=False)
        expected_loss = rows(F.cross_entropy)(model(x), target)
        expected = gradients(model, expected_loss)
        model.zero_grad()
        gm.setup_loss_call(rows(F.cross_entropy), gm.setup_model_call(model, x), target)
        assert torch.equal(gm.forward_and_backward()[1], expected_loss)
        assert_same(model, expected)


FORMS: dict[str, Callable[[Any, Any, Tensor], None]] = {
    "function": lambda gm, y, t: gm.setup_loss_call(
        F.cross_entropy, y.flatten(0, 1), t.flatten(), reduction="sum"
    ),
    "module": lambda gm, y, t: gm.setup_loss_call(
        nn.CrossEntropyLoss(reduction="sum"), y.flatten(0, 1), t.flatten()
    ),
    "lambda": lambda gm, y, t: gm.setup_loss_call(
        lambda a, b: F.cross_entropy(a.movedim(-1, 1), b, reduction="sum"), y, t
    ),
    "partial": lambda gm, y, t: gm.setup_loss_call(
        functools.partial(F.cross_entropy, reduction="sum"), y.flatten(0, 1), t.flatten()
    ),
    "partial_target": lambda gm, y, t: gm.setup_loss_call(
        functools.partial(F.cross_entropy, target=t.flatten(), reduction="sum"), y.flatten(0, 1)
    ),
    "keywords": lambda gm, y, t: gm.setup_loss_call(
        F.cross_entropy, input=y.flatten(0, 1), target=t.flatten(), reduction="sum"
    ),
    "sum_of_terms": lambda gm, y, t: gm.setup_loss_call(
        lambda a, b: F.cross_entropy(a, b, reduction="none").sum(), y.flatten(0, 1), t.flatten()
    ),
}


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_exact", "fisher_emp"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms_of_a_loss(form: Any, fisher_type: str):
    model, x, target = Model(pool=False), torch.randn(N, R, 4), target_for(CE, pool=False)
    expected_loss = F.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum")
    expected = gradients(model, expected_loss)
    gm = make(model, fisher_type=fisher_type, curvature_upd_interval=2)
    for _ in range(2):
        model.zero_grad()
        form(gm, gm.setup_model_call(model, x), target)
        torch.testing.assert_close(gm.forward_and_backward()[1], expected_loss, rtol=1e-14, atol=0)
        assert_same(model, expected)


class WithLoss(Model):
    """Computes its loss itself, and returns it beside the logits."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        y = super().forward(x)
        if target is None:
            return y
        return y, F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=1)


@pytest.mark.parametrize(
    "fisher_type", ["fisher_mc", "fisher_exact", "fisher_emp", "fisher_forward_only"]
)
@pytest.mark.parametrize("scale", [1, 3])
def test_a_loss_given_by_setup_loss_repr_has_its_gradient(scale: int, fisher_type: str):
    model, x, target = WithLoss(pool=False), torch.randn(N, R, 4), target_for(CE, pool=False)
    expected_loss = model(x, target)[1] * scale
    expected = gradients(model, expected_loss)
    gm = make(model, fisher_type=fisher_type, curvature_upd_interval=2)
    for _ in range(2):
        model.zero_grad()
        y = gm.setup_model_call(model, x, target=target)
        gm.setup_logits_repr(y[0])
        gm.setup_loss_repr(y[1].mul(scale))
        assert torch.equal(gm.forward_and_backward()[1], expected_loss)
        assert_same(model, expected)


def test_a_module_keeps_its_reduction_and_keywords_are_left_alone():
    """Upstream sets ``reduction`` to ``'sum'``."""
    model, loss, kwargs = Model(pool=True), nn.CrossEntropyLoss(), {"label_smoothing": 0.1}
    gm = make(model)
    for setup in (
        lambda y, t: gm.setup_loss_call(loss, y, t),
        lambda y, t: gm.setup_loss_call(F.cross_entropy, y, t, **kwargs),
    ):
        setup(gm.setup_model_call(model, torch.randn(N, R, 4)), target_for(CE, pool=True))
        gm.forward_and_backward()
        assert loss.reduction == "mean" and gm._loss_fn_kwargs in ({}, kwargs)


# ------------------------------------------------------------------------- gradients that are there


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp"])
def test_an_existing_gradient_is_added_to(fisher_type: str):
    """Only the step's own gradient is preconditioned: the result is the old one plus that of a step
    from zero.
    """
    model, x, target = Model(pool=False), torch.randn(N, R, 4), target_for(CE, pool=False)

    def run(existing: float | None) -> list[dict[str, Tensor]]:
        gm = make(model, raw=False, fisher_type=fisher_type, curvature_upd_interval=2, seed=3)
        results = []
        for _ in range(2):
            for p in model.parameters():
                p.grad = (
                    None
                    if existing is None or not p.requires_grad
                    else torch.full_like(p, existing)
                )
            gm.setup_loss_call(rows(F.cross_entropy), gm.setup_model_call(model, x), target)
            gm.forward_and_backward()
            results.append(
                {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            )
        for module in model.modules():
            if hasattr(module, "fisher"):
                del module.fisher
        return results

    for new, sums in zip(run(None), run(2.0), strict=True):
        for name, grad in new.items():
            torch.testing.assert_close(sums[name], grad + 2.0, rtol=1e-10, atol=1e-12)


def test_gradients_of_micro_batches_add_up():
    """What a user does who accumulates gradients of a loss divided by the number of
    micro-batches.
    """
    model, x, target = Model(pool=True), torch.randn(2 * N, R, 4), torch.randint(C, (2 * N,))
    expected = gradients(model, F.cross_entropy(model(x), target))
    gm = make(model)
    for part in (slice(0, N), slice(N, 2 * N)):
        gm.setup_loss_call(
            lambda y, t: F.cross_entropy(y, t) / 2,
            gm.setup_model_call(model, x[part]),
            target[part],
        )
        gm.forward_and_backward()
    assert_same(model, expected)


@pytest.mark.parametrize(
    "fisher_type", ["fisher_mc", "fisher_exact", "fisher_emp", "fisher_forward_only"]
)
def test_parameters_without_curvature_keep_the_raw_gradient(fisher_type: str):
    """With preconditioning: a parameter of no layer, an ignored layer; the others' gradients do
    change.
    """
    model, x, target = Model(pool=False), torch.randn(N, R, 4), target_for(CE, pool=False)
    expected = gradients(model, rows(F.cross_entropy)(model(x), target))
    gm = make(model, raw=False, fisher_type=fisher_type, curvature_upd_interval=3)
    for _ in range(4):
        model.zero_grad()
        gm.setup_loss_call(rows(F.cross_entropy), gm.setup_model_call(model, x), target)
        gm.forward_and_backward()
        assert_same(model, expected, ["position", "norm.weight", "norm.bias"])
        for name in ("q.weight", "q.bias", "k.weight", "v.weight", "out.weight", "out.bias"):
            assert not torch.allclose(model.get_parameter(name).grad, expected[name], rtol=1e-2)


def test_fisher_maker_with_calc_loss_grad():
    """The Fisher maker itself, as ASDL's other users call it."""
    from asdl.fisher import FisherConfig, get_fisher_maker

    model, x, target = Model(pool=False), torch.randn(N, R, 4), target_for(CE, pool=False)
    loss = rows(F.cross_entropy)(model(x), target)
    expected = gradients(model, loss)
    for fisher_type in ("fisher_mc", "fisher_emp", "fisher_exact"):
        maker = get_fisher_maker(
            model,
            FisherConfig(
                fisher_type, ["kron"], CE, data_size=7, shared_dim="expand", ignore_modules=["norm"]
            ),
        )
        for calc_loss_grad in (True, False):
            model.zero_grad()
            maker.setup_loss_call(rows(F.cross_entropy), maker.setup_model_call(model, x), target)
            _, returned = maker.forward_and_backward(calc_loss_grad=calc_loss_grad)
            if calc_loss_grad:
                assert torch.equal(returned, loss)
                assert_same(model, expected)
            else:
                assert all(p.grad is None for p in model.parameters())


ADVANTAGES = torch.tensor([1.5, -2.0, 0.25])
NEGATIVE: dict[str, Any] = {
    "advantages": lambda y, t: (F.cross_entropy(y, t, reduction="none") * ADVANTAGES).mean(),
    "zero on average": lambda y, t: (
        F.cross_entropy(y, t, reduction="none") * (ADVANTAGES - ADVANTAGES.mean())
    ).mean(),
    "maximized": lambda y, t: -F.cross_entropy(y, t),
    "class weights": lambda y, t: F.cross_entropy(
        y, t, torch.tensor([1.0, -1.0, 1.0]), reduction="sum"
    ),
}


@pytest.mark.parametrize("loss", NEGATIVE.values(), ids=NEGATIVE.keys())
def test_terms_with_negative_weights(loss: Any):
    """Their Hessian is negative, so it is refused; the empirical Fisher is a second moment, and has
    none of it.
    """
    model, x, target = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)),
        torch.randn(N, 4),
        torch.arange(N),
    )
    config = asdl.PreconditioningConfig(damping=1e-3, ema_decay=1.0)
    for fisher_type in ("fisher_mc", "fisher_exact"):
        gm = asdl.KfacGradientMaker(model, config, fisher_type=fisher_type, shared_dim="reduce")
        gm.setup_loss_call(loss, gm.setup_model_call(model, x), target)
        with pytest.raises(ValueError, match=r"weighs terms negatively.*fisher_emp"):
            gm.forward_and_backward()
    gm = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    gm.setup_loss_call(loss, gm.setup_model_call(model, x), target)
    gm.forward_and_backward()
    (b,) = torch.autograd.grad(loss(y := model(x), target), y)
    B = b.mT @ b
    found = model[2].fisher.kron.B
    torch.testing.assert_close(found / found.trace(), B / B.trace(), rtol=1e-10, atol=1e-14)
    assert torch.isfinite(found).all() and found.trace() > 0
