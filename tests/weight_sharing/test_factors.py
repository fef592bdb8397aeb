"""A and B as the tables of the factors define them, for linear layers and convolutions, against
brute force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import (
    BCE,
    CE,
    MSE,
    Factors,
    SelfAttention,
    Tokenwise,
    assert_equal,
    assert_factors,
    computed_fisher,
    factor_A,
    layer_inputs,
    oracle_factors,
)
from torch import Tensor, nn

from asdl_ws_plugin.weight_sharing.factors import expand_factor_B

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])


# ------------------------------------------------------------------------------------ linear layers


@pytest.mark.parametrize("loss_type", [CE, MSE, BCE])
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@pytest.mark.parametrize("sharing", [(1,), (5,), (2, 3), (2, 1, 3), (2, 1, 2, 2)])
@STRATEGIES
def test_factors_of_linear_layers(
    shared_dim: str, sharing: tuple[int, ...], pool: bool, loss_type: str
):
    model = Tokenwise(
        nn.Linear(4, 5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=False),
        nn.Tanh(),
        nn.Linear(3, 3),
        pool=pool,
    )
    x = torch.randn(4, *sharing, 4)
    computed_fisher(model, x, shared_dim, loss_type=loss_type, data_size=7)
    for module in list(model.layers)[::2]:
        assert_factors(module, oracle_factors(model, module, x, shared_dim, loss_type), 7)


@pytest.mark.parametrize("loss_type", [CE, MSE, BCE])
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@STRATEGIES
def test_factors_of_attention(shared_dim: str, pool: bool, loss_type: str):
    """Where positions depend on each other, products of different terms must not enter B (section
    5).
    """
    model, x = SelfAttention(pool=pool), torch.randn(3, 5, 4)
    computed_fisher(model, x, shared_dim, loss_type=loss_type)
    for module in (model.q, model.k, model.v, model.out):
        assert_factors(module, oracle_factors(model, module, x, shared_dim, loss_type), 3)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)).mean(1)


def test_reduce_sees_nothing_of_the_keys_of_a_softmax():
    """A softmax ignores what all keys have in common, so their gradients sum to zero: reduce's B
    vanishes.
    """
    model, x = _Attention(), torch.randn(3, 5, 4)
    computed_fisher(model, x, "reduce")
    assert model.k.fisher.kron.B.norm() < 1e-20 * model.q.fisher.kron.B.norm()
    computed_fisher(model, x, "expand")
    assert_factors(model.k, oracle_factors(model, model.k, x, "expand"), 3)


class CalledThrice(nn.Module):
    """One layer called on inputs of different sizes, and on its own output."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.fc, self.head, self.pool = nn.Linear(4, 4), nn.Linear(4, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x)) + torch.tanh(self.fc(x[:, :2])).mean(1, keepdim=True)
        y = self.head(torch.tanh(self.fc(y)))
        return y.mean(1) if self.pool else y


@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@STRATEGIES
def test_further_calls_are_further_positions(shared_dim: str, pool: bool):
    model, x = CalledThrice(pool), torch.randn(3, 5, 4)
    computed_fisher(model, x, shared_dim)
    expected = oracle_factors(model, model.fc, x, shared_dim)
    assert layer_inputs(model, model.fc, x).shape == (3, 5 + 2 + 5, 4)
    assert_factors(model.fc, expected, 3)


class Tied(nn.Module):
    """Two modules that hold one weight; ``once`` is the same function with one module in both
    places.
    """

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if once else nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))))).mean(1)


@STRATEGIES
def test_linear_layers_with_a_tied_weight_are_one_layer(shared_dim: str):
    tied, once, x = Tied(once=False), Tied(once=True), torch.randn(3, 5, 4)
    once.load_state_dict(tied.state_dict(), strict=False)
    computed_fisher(tied, x, shared_dim)
    assert_factors(tied.first, oracle_factors(once, once.first, x, shared_dim), 3)
    assert not hasattr(tied.second, "fisher")


# ------------------------------------------------------------------------------------- convolutions

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "patch_embedding": {"kernel_size": 2, "stride": 2},
    "1x1": {"kernel_size": 1},
    "rectangular": {"kernel_size": (3, 2), "stride": (1, 2)},
    "padding": {"padding": (1, 2)},
    "same": {"padding": "same"},
    "same_even_kernel": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate_same": {"padding": "same", "padding_mode": "replicate"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "dilation": {"dilation": (2, 1)},
    "all": {
        "padding": 2,
        "stride": (2, 1),
        "dilation": (1, 2),
        "kernel_size": (2, 3),
        "padding_mode": "reflect",
    },
}


class ConvNet(nn.Module):
    """Two convolutions, and a mean over the positions or a prediction for each of them."""

    def __init__(self, options: dict[str, Any], pool: bool, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, **{"kernel_size": 3, **options})
        self.conv2 = nn.Conv2d(4, 4, 2, groups=groups)
        self.head = nn.Linear(4, 3)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(x.mean((2, 3)) if self.pool else x.movedim(1, -1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@STRATEGIES
def test_factors_of_convolutions(shared_dim: str, options: dict[str, Any]):
    model, x = ConvNet(options, pool=True), torch.randn(3, 2, 6, 5)
    computed_fisher(model, x, shared_dim)
    for module in (model.conv1, model.conv2):
        assert_factors(module, oracle_factors(model, module, x, shared_dim), 3)


@STRATEGIES
def test_convolution_in_the_expand_setting(shared_dim: str):
    """The receptive fields of different terms overlap, so products of different terms matter here
    as well.
    """
    model, x = ConvNet({"stride": 2, "padding": 1}, pool=False), torch.randn(3, 2, 6, 5)
    computed_fisher(model, x, shared_dim)
    for module in (model.conv1, model.conv2, model.head):
        assert_factors(module, oracle_factors(model, module, x, shared_dim), 3)


@STRATEGIES
def test_factors_of_channels_last_convolutions(shared_dim: str):
    model, x = ConvNet({"padding": 1}, pool=True), torch.randn(3, 2, 6, 5)
    expected = {m: oracle_factors(model, m, x, shared_dim) for m in (model.conv1, model.conv2)}
    model.to(memory_format=torch.channels_last)
    computed_fisher(model, x.to(memory_format=torch.channels_last), shared_dim)
    for module, factors in expected.items():
        assert_factors(module, factors, 3)


@STRATEGIES
def test_grouped_convolutions_have_no_kronecker_factors(shared_dim: str):
    model = ConvNet({}, pool=True, groups=2)
    for shape in ("kron", "swift_kron", "kfe"):
        with pytest.raises(ValueError, match=r"'conv2'.*2 groups.*ignore_modules"):
            computed_fisher(model, torch.randn(3, 2, 6, 5), shared_dim, shapes=shape)


@STRATEGIES
def test_a_1x1_convolution_is_a_linear_layer(shared_dim: str):
    linear = Tokenwise(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), pool=True)
    conv = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for a, b in ((linear.layers[0], conv[0]), (linear.layers[2], conv[2])):
        b.load_state_dict({"weight": a.weight[:, :, None, None], "bias": a.bias})
    x = torch.randn(4, 3, 2, 5)
    computed_fisher(conv, x, shared_dim)
    computed_fisher(linear, x.movedim(1, -1), shared_dim)
    for a, b in ((linear.layers[0], conv[0]), (linear.layers[2], conv[2])):
        assert_factors(b, Factors(a.fisher.kron.A, a.fisher.kron.B), 1)


# ----------------------------------------------------------------------- averages over the examples


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp"])
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@STRATEGIES
def test_factors_are_additive_over_micro_batches(shared_dim: str, pool: bool, fisher_type: str):
    """With the total data_size, also where the loss is a mean over each micro-batch."""
    model, x = SelfAttention(pool=pool), torch.randn(5, 4, 4)
    target = torch.randint(3, (5,) if pool else (5, 4))
    maker = get_fisher_maker(
        model, FisherConfig(fisher_type, ["kron"], CE, data_size=5, shared_dim=shared_dim)
    )

    def step(part: slice, accumulate: bool) -> None:
        logits = maker.setup_model_call(model, x[part])
        y = logits if pool else logits.flatten(0, 1)
        maker.setup_loss_call(F.cross_entropy, y, target[part].flatten())
        maker.forward_and_backward(accumulate=accumulate)

    step(slice(None), accumulate=False)
    joint = {
        m: Factors(m.fisher.kron.A.clone(), m.fisher.kron.B.clone())
        for m in (model.q, model.k, model.v, model.out)
    }
    step(slice(0, 2), accumulate=False)
    step(slice(2, 5), accumulate=True)
    for module, factors in joint.items():
        assert_factors(module, factors, 1)
    if fisher_type == "fisher_exact":
        assert_factors(model.q, oracle_factors(model, model.q, x, shared_dim), 5)


@pytest.mark.filterwarnings(
    "ignore:Using a non-full backward hook:FutureWarning"
)  # upstream's hooks
@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp"])
@STRATEGIES
def test_agrees_with_upstream_without_sharing(shared_dim: str, fisher_type: str):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    factors = []
    for option in (None, shared_dim):
        computed_fisher(model, x, option, (F.cross_entropy, target), fisher_type=fisher_type)
        factors.append([Factors(m.fisher.kron.A, m.fisher.kron.B) for m in list(model)[::2]])
        for m in list(model)[::2]:
            del m.fisher
    for upstream, module in zip(*factors, strict=True):
        assert_equal(module.A, upstream.A, 1e-12)
        assert_equal(module.B, upstream.B, 1e-12)


# ------------------------------------------------------------------------- labels that are left out


@pytest.mark.parametrize("ignore_index", [-100, 0])
@STRATEGIES
def test_ignored_labels_contribute_nothing_to_B(shared_dim: str, ignore_index: int):
    """Labels are compared with ``ignore_index``, sampled classes are not: class 0 still is a
    class.
    """
    model, x = SelfAttention(), torch.randn(3, 5, 4)
    target = torch.randint(1, 3, (3, 5))
    target[torch.rand(3, 5) < 0.4] = ignore_index
    target[1] = ignore_index  # an example without any label
    used = (target != ignore_index).double()
    assert 0 < used.sum() < 15

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), t.flatten(), ignore_index=ignore_index)

    for data_size, divisor_B in ((3, 3.0), (-1, used.sum())):
        computed_fisher(model, x, shared_dim, (loss, target), data_size=data_size)
        for module in (model.q, model.v, model.out):
            expected = oracle_factors(model, module, x, shared_dim, weight=used)
            assert_factors(module, (expected.A / 3, expected.B / divisor_B))


# ------------------------------------------------------------------------------ without a data_size

CLASS_WEIGHTS = [0.5, 2.0, 1.0]


def _weights(target: Tensor) -> Tensor:
    return torch.tensor(CLASS_WEIGHTS)[target]


def _mask(target: Tensor) -> Tensor:
    return (target != 1).double()


def _terms(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return y.reshape(-1, y.shape[-1]), t.flatten()


# name -> (loss, T of a target, weights of the terms of a target)
LOSSES: dict[
    str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Any], Callable[[Tensor], Any]]
] = {
    "mean": (lambda y, t: F.cross_entropy(*_terms(y, t)), lambda t: t.numel(), lambda t: None),
    "sum": (
        lambda y, t: F.cross_entropy(*_terms(y, t), reduction="sum"),
        lambda t: 1,
        lambda t: None,
    ),
    "nll_of_log_softmax": (
        lambda y, t: F.nll_loss(y.log_softmax(-1).reshape(-1, 3), t.flatten(), reduction="sum"),
        lambda t: 1,
        lambda t: None,
    ),
    "mean_over_k": (
        lambda y, t: F.cross_entropy(*_terms(y, t)) / 4,
        lambda t: 4 * t.numel(),
        lambda t: None,
    ),
    "sum_over_examples": (
        lambda y, t: F.cross_entropy(*_terms(y, t), reduction="sum") / len(y),
        lambda t: len(t),
        lambda t: None,
    ),
    "class_weights": (
        lambda y, t: F.cross_entropy(*_terms(y, t), weight=torch.tensor(CLASS_WEIGHTS)),
        lambda t: _weights(t).sum(),
        _weights,
    ),
    "class_weights_sum": (
        lambda y, t: F.cross_entropy(
            *_terms(y, t), weight=torch.tensor(CLASS_WEIGHTS), reduction="sum"
        ),
        lambda t: 1,
        _weights,
    ),
    "masked_mean": (
        lambda y, t: (
            (F.cross_entropy(*_terms(y, t), reduction="none") * _mask(t).flatten()).sum()
            / _mask(t).sum()
        ),
        lambda t: _mask(t).sum(),
        _mask,
    ),
    "indexed_mean": (
        lambda y, t: F.cross_entropy(*_terms(y, t), reduction="none")[
            _mask(t).flatten().bool()
        ].mean(),
        lambda t: _mask(t).sum(),
        _mask,
    ),
    "selected_rows": (
        lambda y, t: F.cross_entropy(y[_mask(t).bool()], t[_mask(t).bool()]),
        lambda t: _mask(t).sum(),
        _mask,
    ),
}


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
@STRATEGIES
def test_without_data_size_it_is_the_curvature_of_the_loss(shared_dim: str, pool: bool, case: Any):
    """A with D = N, and B with 1/T, T the number of terms that the loss averages over (section
    2).
    """
    loss, num_terms, weights = case
    model, x = SelfAttention(pool=pool), torch.randn(4, 5, 4)
    target = torch.randint(3, (4,) if pool else (4, 5))
    target.view(-1)[:3] = torch.arange(3)
    computed_fisher(model, x, shared_dim, (loss, target), data_size=-1)
    for module in (model.q, model.v, model.out):
        expected = oracle_factors(model, module, x, shared_dim, weight=weights(target))
        assert_factors(module, (expected.A / 4, expected.B / num_terms(target)))


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
@STRATEGIES
def test_a_given_data_size_does_not_depend_on_the_loss_reduction(shared_dim: str, case: Any):
    """The weights of the terms stay, relative to each other; what the loss divides by does not
    enter.
    """
    loss, _, weights = case
    model, x, target = SelfAttention(), torch.randn(3, 4, 4), torch.randint(3, (3, 4))
    target.view(-1)[:3] = torch.arange(3)
    computed_fisher(model, x, shared_dim, (loss, target), data_size=11)
    assert_factors(
        model.k, oracle_factors(model, model.k, x, shared_dim, weight=weights(target)), 11
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_type", [MSE, BCE])
@pytest.mark.parametrize("pool", [True, False], ids=["reduce_setting", "expand_setting"])
def test_terms_of_elementwise_losses_are_rows(pool: bool, loss_type: str, reduction: str):
    """PyTorch's mean of an MSE or BCE divides by N·R·C; T counts terms, which are vectors of C
    outputs.
    """
    model, x = SelfAttention(pool=pool), torch.randn(4, 5, 4)
    target = torch.rand(4, 3) if pool else torch.rand(4, 5, 3)
    function = F.mse_loss if loss_type == MSE else F.binary_cross_entropy_with_logits
    for reshape in (lambda z: z, torch.flatten):

        def loss(y: Tensor, t: Tensor, reshape: Any = reshape) -> Tensor:
            return function(reshape(y), reshape(t), reduction=reduction)

        computed_fisher(model, x, "reduce", (loss, target), loss_type=loss_type, data_size=-1)
        expected = oracle_factors(model, model.q, x, "reduce", loss_type)
        assert_equal(model.q.fisher.kron.A, expected.A / 4)
        assert_equal(
            model.q.fisher.kron.B,
            expected.B / (target[..., 0].numel() if reduction == "mean" else 1),
        )


def test_frozen_and_ignored_layers_have_no_factors():
    model, x = SelfAttention(), torch.randn(3, 5, 4)
    model.k.requires_grad_(False)
    computed_fisher(model, x, "expand", ignore_modules=["v"])
    assert not hasattr(model.k, "fisher") and not hasattr(model.v, "fisher")
    assert_factors(model.q, oracle_factors(model, model.q, x, "expand"), 3)


def test_every_layer_has_the_factors_of_its_rule():
    model, x = SelfAttention(pool=True), torch.randn(3, 5, 4)
    computed_fisher(model, x, ["reduce", ("q", "expand"), (model.v, "expand")])
    for name, strategy in {"q": "expand", "k": "reduce", "v": "expand", "out": "reduce"}.items():
        module = model.get_submodule(name)
        assert_factors(module, oracle_factors(model, module, x, strategy), 3)


@STRATEGIES
def test_the_moving_average_is_of_the_oracles_factors(shared_dim: str):
    """Upstream's: ``ema_decay`` weighs the new value, and the average starts from zero; A and B
    each.
    """
    model, target = SelfAttention(pool=True), torch.randint(3, (3,))
    config = asdl.PreconditioningConfig(data_size=3, damping=1.0, ema_decay=0.25)
    gm = asdl.KfacGradientMaker(model, config, fisher_type="fisher_exact", shared_dim=shared_dim)
    expected_A, expected_B = torch.zeros(4, 4), torch.zeros(4, 4)
    for _ in range(3):
        x = torch.randn(3, 5, 4)
        gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), target)
        gm.forward_and_backward()
        new = oracle_factors(model, model.q, x, shared_dim)
        expected_A = 0.75 * expected_A + 0.25 * new.A / 3
        expected_B = 0.75 * expected_B + 0.25 * new.B / 3
        assert_factors(model.q, (expected_A, expected_B))


def test_oracle_of_A_sees_a_convolutions_padding():
    """The oracle itself: its patches, times the weight, are the convolution."""
    conv, x = (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False),
        torch.randn(2, 2, 4, 5),
    )
    a = layer_inputs(conv, conv, x)
    torch.testing.assert_close(a @ conv.weight.flatten(1).T, conv(x).flatten(2).mT)
    assert factor_A(a, "reduce").shape == (18, 18)


@pytest.mark.parametrize("size", [100, 128, 130, 192, 300, 577])
@pytest.mark.parametrize("num_rows", [5, 1024, 2050])
def test_large_products_are_the_whole_symmetric_matrix(size, num_rows):
    x = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0))
    factor = expand_factor_B(x.unsqueeze(1))
    exact = torch.einsum("ni,nj->ij", x.double(), x.double())
    torch.testing.assert_close(factor.double(), exact, rtol=1e-5, atol=1e-2)
