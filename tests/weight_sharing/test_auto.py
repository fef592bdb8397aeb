"""``shared_dim='auto'``: what the loss has a term for decides the setting, once, and nothing else
changes.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.by_example import assert_factors, empirical_factors, fisher, kfac, step
from torch import nn

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 4, 5, 3, 2


class Model(nn.Module):
    """``(N, R, D)`` to ``(N, C)``, ``(N, R, C)`` or rows ``(N·R, C)``."""

    def __init__(self, out="pooled", dropout=0.0):
        super().__init__()
        self.out = out
        self.fc1, self.fc2, self.head = nn.Linear(D, 6), nn.Linear(6, 6), nn.Linear(6, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.fc1(x)))
        x = torch.tanh(self.fc2(x + x.mean(1, keepdim=True)))
        if self.out == "pooled":
            return self.head(x.mean(1))
        return self.head(x.flatten(0, 1) if self.out == "rows" else x)


def sum_loss(y, target):
    return F.cross_entropy(y.reshape(-1, C), target.reshape(-1), reduction="sum")


def channels_second(y, target):
    return F.cross_entropy(y.mT, target)


def mse(y, target):
    return F.mse_loss(y, target)


def labels(*sizes):
    return torch.randint(C, sizes)


CASES = {
    "pooled": (Model(), F.cross_entropy, labels(N), "reduce"),
    "pooled mse": (Model(), mse, torch.randn(N, C), "reduce"),
    "flattened by the loss": (Model("tokens"), sum_loss, labels(N, R), "expand"),
    "transposed by the loss": (Model("tokens"), channels_second, labels(N, R), "expand"),
    "flattened by the model": (Model("rows"), F.cross_entropy, labels(N * R), "expand"),
    "tokens mse": (Model("tokens"), mse, torch.randn(N, R, C), "expand"),
    "labels ignored": (
        Model("tokens"),
        sum_loss,
        torch.tensor([-100, -100, 1, -100, -100]).repeat(N, 1),
        "expand",
    ),
    "labels picked": (
        Model("tokens"),
        lambda y, t: F.cross_entropy(y[:, 0], t),
        labels(N),
        "reduce",
    ),
}


@pytest.mark.parametrize(
    "fisher_type", ["fisher_mc", "fisher_emp", "fisher_exact", "fisher_forward_only"]
)
@pytest.mark.parametrize("case", list(CASES))
def test_the_terms_of_the_loss_decide(case, fisher_type):
    model, loss, target, setting = CASES[case]
    model = copy.deepcopy(model).double()
    target = target.double() if target.is_floating_point() else target
    maker = kfac(
        model,
        "auto",
        fisher_type=fisher_type,
        loss_type="mse" if "mse" in case else "cross_entropy",
    )
    assert maker.setting is None
    assert maker.shared_dim_for == dict.fromkeys(["fc1", "fc2", "head"])
    step(maker, loss, target, torch.randn(N, R, D))
    assert maker.setting == setting
    assert maker.shared_dim_for == dict.fromkeys(["fc1", "fc2", "head"], setting)


@pytest.mark.parametrize(
    ("out", "setting"), [("pooled", "reduce"), ("tokens", "expand"), ("rows", "expand")]
)
def test_the_factors_are_those_of_the_setting(out, setting):
    model, x = Model(out), torch.randn(N, R, D)
    target = labels(N) if out == "pooled" else labels(N, R)
    fisher(model, "auto", sum_loss, target, x, data_size=N)
    for layer in (model.fc1, model.fc2, model.head):
        expected = empirical_factors(
            layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
        )
        assert_factors(layer, expected)


def test_it_is_decided_by_setup_loss_repr_too():
    class WithLoss(Model):
        def forward(self, x, target):
            y = super().forward(x)
            return {"logits": y, "loss": F.cross_entropy(y.flatten(0, 1), target.flatten())}

    model = WithLoss("tokens")
    maker = kfac(model, "auto")
    dummy = maker.setup_model_call(model, torch.randn(N, R, D), labels(N, R))
    maker.setup_loss_repr(dummy["loss"])
    maker.setup_logits_repr(dummy["logits"])
    maker.forward_and_backward()
    assert maker.setting == "expand"


def test_without_a_loss_the_logits_decide():
    """fisher_mc through get_fisher_maker needs no loss."""
    for out, setting in (("pooled", "reduce"), ("tokens", "expand"), ("rows", "expand")):
        maker = fisher(
            Model(out),
            "auto",
            None,
            None,
            torch.randn(N, R, D),
            fisher_type="fisher_mc",
            data_size=N,
        )
        assert maker.plan.setting == setting


def test_it_is_decided_once_and_logged_once(caplog):
    model = Model("tokens")
    maker = kfac(model, "auto", ema_decay=0.5)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            step(maker, sum_loss, labels(N, R), torch.randn(N, R, D))
        step(
            maker, sum_loss, labels(N, 1), torch.randn(N, 1, D)
        )  # sequences of length 1 do not turn it over
    (record,) = [record for record in caplog.records if "auto" in record.getMessage()]
    assert (
        "expand" in record.getMessage() and f"{N * R} terms for {N} examples" in record.getMessage()
    )
    assert maker.setting == "expand"


def test_a_failing_first_batch_decides_nothing():
    maker = kfac(Model("tokens"), "auto", fisher_type="fisher_emp")
    with pytest.raises(FloatingPointError):
        step(maker, sum_loss, labels(N, R), torch.full((N, R, D), torch.nan))
    x = torch.randn(N, R, D)
    with pytest.raises(FloatingPointError):  # a finite loss, with a gradient that is not
        step(maker, lambda y, t: sum_loss(y, t) + (0 * y).abs().sqrt().sum(), labels(N, R), x)
    assert maker.setting is None
    maker.model.out = "pooled"
    step(maker, F.cross_entropy, labels(N), x)
    assert maker.setting == "reduce"


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp", "fisher_forward_only"])
def test_auto_changes_nothing_but_the_setting(fisher_type):
    """Buffers, generator state, gradient and factors of the first step are those of the setting
    named outright.
    """
    state, found = torch.get_rng_state(), []
    for shared_dim in ("auto", "reduce"):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, C)
        )
        maker = kfac(model, shared_dim, fisher_type=fisher_type, data_size=N, ema_decay=0.9)
        calls: list[int] = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        step(maker, F.cross_entropy, labels(N), torch.randn(N, 2, 4, 4))
        found.append(
            [
                torch.get_rng_state(),
                len(calls),
                *(b.clone() for b in model.buffers()),
                *(p.grad.clone() for p in model.parameters()),
                model[0].fisher.kron.A,
                model[0].fisher.kron.B,
                model[4].fisher.kron.B,
            ]
        )
        assert model[1].num_batches_tracked == 1
    for auto, named in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(auto), torch.as_tensor(named))
    torch.set_rng_state(state)


def test_auto_may_be_one_of_several_rules():
    model, x, target = Model("tokens"), torch.randn(N, R, D), labels(N, R)
    maker = kfac(
        model,
        ["auto", ("fc2", "reduce"), (model.head, "auto", "batch_first")],
        fisher_type="fisher_emp",
        data_size=N,
        ema_decay=1.0,
    )
    assert maker.shared_dim_for == {"fc1": None, "fc2": "reduce", "head": None}
    step(maker, sum_loss, target, x)
    assert maker.shared_dim_for == {"fc1": "expand", "fc2": "reduce", "head": "expand"}
    for name, setting in maker.shared_dim_for.items():
        layer = model.get_submodule(name)
        assert_factors(
            layer,
            empirical_factors(
                layer, lambda i: sum_loss(model(x[i : i + 1]), target[i : i + 1]), N, setting
            ),
        )


def test_the_setting_stays_none_where_nothing_is_auto():
    maker = kfac(Model(), "reduce")
    step(maker, F.cross_entropy, labels(N), torch.randn(N, R, D))
    assert maker.setting is None and maker.shared_dim_for["fc1"] == "reduce"


def test_auto_is_taken_from_a_fisher_configuration():
    config = FisherConfig(
        "fisher_mc", ["kron"], loss_type="cross_entropy", shared_dim="auto", data_size=N
    )
    maker = get_fisher_maker(Model("tokens"), config)
    maker.setup_model_call(maker.model, torch.randn(N, R, D))
    maker.forward_and_backward()
    assert maker.plan.setting == "expand"
