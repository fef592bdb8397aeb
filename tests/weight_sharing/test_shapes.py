"""Every shape under weight sharing, and every natural-gradient maker's step, against autograd and
dense algebra.
"""

from __future__ import annotations

from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.vector import ParamVector
from oracles.autograd import (
    CE,
    SelfAttention,
    Tokenwise,
    assert_equal,
    assert_factors,
    computed_fisher,
    exact_block,
    example_grads,
    oracle_factors,
    rel_error,
)
from torch import Tensor, nn

from asdl_ws_plugin import convert

pytestmark = pytest.mark.usefixtures("double")

STRATEGIES = pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
N, C = 4, 3


# ------------------------------------------------------------------------------------------- models


class ConvNet(nn.Module):
    def __init__(self, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, stride=(1, 2), bias=bias)
        self.conv2 = nn.Conv2d(
            4, 4, 2, groups=groups, bias=bias, padding=1, padding_mode="reflect", dilation=(1, 2)
        )
        self.head = nn.Linear(4, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))


class Normalized(nn.Module):
    """LayerNorm over one and over two dimensions, BatchNorm of vectors, sequences and images (in
    eval mode).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.bn2 = nn.BatchNorm2d(4)
        self.bn1 = nn.BatchNorm1d(4)
        self.ln = nn.LayerNorm(4)
        self.ln2 = nn.LayerNorm((2, 4))
        self.bn_vectors = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, C)
        for module in (self.bn2, self.bn1, self.ln, self.ln2, self.bn_vectors):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            self.ln.weight[1] = 0.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn2(self.conv(x)))
        x = torch.tanh(self.bn1(x.flatten(2))).mT  # N R C
        x = torch.tanh(self.ln(x))
        x = self.ln2(x.unflatten(1, (-1, 2))).sin().flatten(1, 2).mean(1)
        return self.head(self.bn_vectors(x))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.head = nn.Linear(4, C)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).mean(1))


def cases() -> dict[str, Any]:
    """name -> () -> (model, input)"""
    return {
        "linear": lambda: (
            Tokenwise(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C), pool=True),
            torch.randn(N, 2, 3, 4),
        ),
        "linear_without_bias": lambda: (
            Tokenwise(
                nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, C, bias=False), pool=True
            ),
            torch.randn(N, 5, 4),
        ),
        "linear_without_sharing": lambda: (
            Tokenwise(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)),
            torch.randn(N, 4),
        ),
        "attention": lambda: (SelfAttention(pool=True), torch.randn(N, 5, 4)),
        "conv": lambda: (ConvNet(), torch.randn(N, 2, 5, 6)),
        "conv_without_bias": lambda: (ConvNet(bias=False), torch.randn(N, 2, 5, 6)),
        "grouped_conv": lambda: (ConvNet(groups=2), torch.randn(N, 2, 5, 6)),
        "depthwise_conv_without_bias": lambda: (
            ConvNet(groups=4, bias=False),
            torch.randn(N, 2, 5, 6),
        ),
        "normalizations": lambda: (Normalized(), torch.randn(N, 2, 4, 5)),
        "embedding": lambda: (Embedded(), torch.randint(6, (N, 7))),
    }


CASES = pytest.mark.parametrize("case", cases().values(), ids=cases().keys())
WITHOUT_EMBEDDING = pytest.mark.parametrize(
    "case",
    [c for name, c in cases().items() if name != "embedding"],
    ids=[n for n in cases() if n != "embedding"],
)


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, m) for name, m in model.named_modules() if getattr(m, "weight", None) is not None
    ]


def grads_of(model: nn.Module, name: str, x: Tensor, target: Tensor) -> Tensor:
    """Each example's gradient of a layer's weight and then bias, ``(N, numel)``."""

    def loss(y: Tensor, n: int) -> Tensor:
        return F.cross_entropy(y.reshape(-1, C), target[n : n + 1].flatten(), reduction="sum")

    parameters = [
        f"{name}.{p}"
        for p, value in model.get_submodule(name).named_parameters()
        if value is not None
    ]
    return torch.cat([example_grads(model, p, loss, x) for p in parameters], dim=1)


def emp(model: nn.Module, x: Tensor, target: Tensor, shared_dim: str, shape: Any) -> None:
    def loss(y: Tensor) -> Tensor:
        return F.cross_entropy(y.reshape(-1, C), target.flatten())

    computed_fisher(model, x, shared_dim, (loss,), shapes=shape, fisher_type="fisher_emp")


def unit_blocks(grads: Tensor, module: nn.Module) -> Tensor:
    """``(units, parameters of a unit, same)`` of the sum of outer products of gradients."""
    units = (
        module.weight.numel()
        if not isinstance(module, (nn.Linear, nn.Conv2d))
        else module.weight.shape[0]
    )
    weights = module.weight.numel()
    parts = [
        grads[:, :weights].unflatten(1, (units, -1)),
        grads[:, weights:].unflatten(1, (units, -1)),
    ]
    per_unit = torch.cat(parts, dim=2) if parts[1].numel() else parts[0]
    return torch.einsum("nui,nuj->uij", per_unit, per_unit)


# ---------------------------------------------------------------- shapes of the examples' gradients


@CASES
@STRATEGIES
def test_diag_is_the_mean_of_squared_gradients(shared_dim: str, case: Any):
    model, x = case()
    target = torch.randint(C, (N,))
    emp(model, x, target, shared_dim, "diag")
    for name, module in layers_of(model):
        squares = grads_of(model, name, x, target).square().sum(0) / N
        actual = [module.fisher.diag.weight] + (
            [module.fisher.diag.bias] if module.fisher.diag.has_bias else []
        )
        assert_equal(torch.cat([d.flatten() for d in actual]), squares)


@CASES
@STRATEGIES
def test_layer_wise_blocks_are_made_of_the_examples_gradients(shared_dim: str, case: Any):
    model, x = case()
    target = torch.randint(C, (N,))
    emp(model, x, target, shared_dim, "layer_wise")
    for name, module in layers_of(model):
        grads = grads_of(model, name, x, target)
        assert_equal(module.fisher.data, grads.T @ grads / N)


@CASES
@STRATEGIES
def test_the_full_block_is_made_of_the_examples_gradients(shared_dim: str, case: Any):
    model, x = case()
    target = torch.randint(C, (N,))
    emp(model, x, target, shared_dim, "full")
    grads = torch.cat([grads_of(model, name, x, target) for name, _ in layers_of(model)], dim=1)
    assert_equal(model.fisher.data, grads.T @ grads / N)


@WITHOUT_EMBEDDING
@STRATEGIES
def test_unit_wise_blocks_are_made_of_the_examples_gradients(shared_dim: str, case: Any):
    model, x = case()
    target = torch.randint(C, (N,))
    emp(model, x, target, shared_dim, "unit_wise")
    for name, module in layers_of(model):
        assert_equal(
            module.fisher.unit.data, unit_blocks(grads_of(model, name, x, target), module) / N
        )


def test_batchnorm_in_training_mode():
    """Its statistics are those of the batch, whose gradients autograd attributes to the examples by
    their outputs.
    """
    torch.manual_seed(1)
    model, x, target = (
        nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, C)),
        torch.randn(N, 4, 5),
        None,
    )
    nn.init.normal_(model[0].weight)
    target = torch.randint(C, (N,))
    emp(model, x, target, "reduce", "layer_wise")
    normalized = F.batch_norm(x, None, None, training=True)
    weight = model[0].weight.detach().expand(N, 4).clone().requires_grad_()
    bias = model[0].bias.detach().expand(N, 4).clone().requires_grad_()
    y = model[2]((normalized * weight.unsqueeze(2) + bias.unsqueeze(2)).flatten(1))
    grads = torch.cat(
        torch.autograd.grad(F.cross_entropy(y, target, reduction="sum"), [weight, bias]), dim=1
    )
    assert_equal(model[0].fisher.data, grads.T @ grads / N)


@pytest.mark.parametrize("shape", ["diag", "layer_wise"])
@STRATEGIES
def test_exact_in_the_expand_setting(shared_dim: str, shape: str):
    """An example's terms are kept apart: the exact block, with several backward passes."""
    model, x = SelfAttention(), torch.randn(2, 3, 4)
    computed_fisher(model, x, shared_dim, shapes=shape)
    for name in "qkv":
        block = exact_block(model, f"{name}.weight", x, CE) / 2
        fisher = model.get_submodule(name).fisher
        if shape == "diag":
            assert_equal(fisher.diag.weight.flatten(), block.diagonal())
        else:
            assert_equal(fisher.data[:16, :16], block)


def test_monte_carlo_in_the_expand_setting_is_unbiased():
    model, x = SelfAttention(), torch.randn(2, 3, 4)
    samples = []
    for _ in range(400):
        computed_fisher(model, x, "reduce", shapes="layer_wise", fisher_type="fisher_mc")
        samples.append(model.v.fisher.data[:16, :16])
    mean, error = torch.stack(samples).mean(0), torch.stack(samples).std(0) / 20
    expected = exact_block(model, "v.weight", x, CE) / 2
    assert error.norm() < 0.1 * expected.norm()
    assert ((mean - expected).abs() < 5 * error).all()


def test_full_covers_all_layers_in_the_order_of_the_parameters():
    model, x, target = SelfAttention(), torch.randn(N, 5, 4), torch.randint(C, (N, 5))
    emp(model, x, target, "expand", "full")
    grads = torch.cat([grads_of(model, name, x, target) for name, _ in layers_of(model)], dim=1)
    assert model.fisher.data.shape[0] == sum(p.numel() for p in model.parameters())
    assert_equal(model.fisher.data, grads.T @ grads / N)


# --------------------------------------------------------------------------------- Kronecker shapes


@pytest.mark.parametrize("case", ["linear", "attention", "conv"])
@STRATEGIES
def test_swift_kron_has_the_factors_of_kron(shared_dim: str, case: str):
    model, x = cases()[case]()
    computed_fisher(model, x, shared_dim, shapes="swift_kron")
    for _, module in layers_of(model):
        expected = oracle_factors(model, module, x, shared_dim)
        assert_factors(module, expected, N)


KFE_CASES = pytest.mark.parametrize(
    "case",
    [
        "linear",
        "linear_without_bias",
        "linear_without_sharing",
        "attention",
        "conv",
        "conv_without_bias",
    ],
)


@KFE_CASES
@STRATEGIES
def test_kfe_is_the_eigenbasis_with_the_second_moments_in_it(shared_dim: str, case: str):
    """Eigenvectors of the factors; second moments of the examples' gradients in that basis."""
    model, x = cases()[case]()
    target = torch.randint(C, (N,))
    emp(model, x, target, shared_dim, "kron")
    factors = {name: (m.fisher.kron.A, m.fisher.kron.B) for name, m in layers_of(model)}
    emp(model, x, target, shared_dim, "kfe")
    for name, module in layers_of(model):
        kfe = module.fisher.kfe
        for U, factor in zip((kfe.Ua, kfe.Ub), factors[name], strict=True):
            assert_equal(U.T @ U, torch.eye(len(U)))
            rotated = U.T @ factor @ U
            assert (rotated - rotated.diag().diag()).norm() < 1e-10 * factor.norm()
        grads = grads_of(model, name, x, target)
        weights = grads[:, : module.weight.numel()].unflatten(1, (module.weight.shape[0], -1))
        assert_equal(kfe.scale[0], (kfe.Ub.T @ weights @ kfe.Ua).square().sum(0) / N)
        if module.bias is not None:
            assert_equal(
                kfe.scale[1], (grads[:, module.weight.numel() :] @ kfe.Ub).square().sum(0) / N
            )


@KFE_CASES
@STRATEGIES
def test_kfe_mvp_is_the_damped_inverse(shared_dim: str, case: str):
    model, x = cases()[case]()
    emp(model, x, torch.randint(C, (N,)), shared_dim, "kfe")
    for _, module in layers_of(model):
        kfe = module.fisher.kfe
        weight, bias = torch.randn_like(module.weight), torch.randn(module.weight.shape[0])
        basis = torch.kron(kfe.Ub, kfe.Ua)
        dense = basis @ kfe.scale[0].flatten().diag() @ basis.T + 0.01 * torch.eye(weight.numel())
        expected = torch.linalg.solve(dense, weight.flatten()).view_as(weight)
        if module.bias is None:
            actual = kfe.mvp(weight, eps=0.01, inplace=True)
        else:
            dense_bias = kfe.Ub @ kfe.scale[1].diag() @ kfe.Ub.T + 0.01 * torch.eye(len(bias))
            expected_bias = torch.linalg.solve(dense_bias, bias)
            actual, actual_bias = kfe.mvp(weight, bias, eps=0.01, inplace=True)
            assert_equal(actual_bias, expected_bias)
            assert torch.equal(bias, actual_bias)
        assert_equal(actual, expected)
        assert torch.equal(weight, actual)


@pytest.mark.parametrize(
    ("fisher_type", "options"), [("fisher_exact", {}), ("fisher_mc", {"n_mc_samples": 2})]
)
def test_kfe_of_several_backward_passes_is_refused(fisher_type: str, options: dict[str, Any]):
    model = SelfAttention()
    with pytest.raises(ValueError, match="single backward pass"):
        computed_fisher(
            model, torch.randn(N, 5, 4), "reduce", shapes="kfe", fisher_type=fisher_type, **options
        )


# -------------------------------------------------------------------------- the makers' first steps

DAMPING = 0.03


def step(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    maker: Any,
    shared_dim: str,
    ema: bool,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step. Returns the raw and the preconditioned gradients of all layers, weight and bias in
    one vector.
    """

    def loss(y: Tensor) -> Tensor:
        return F.cross_entropy(y.reshape(-1, C), target.flatten())

    config = asdl.PreconditioningConfig(
        data_size=N, damping=DAMPING, **({"ema_decay": 1.0} if ema else {})
    )
    gm = maker(model, config, shared_dim=shared_dim, **options)
    raw = torch.autograd.grad(loss(model(x)), list(model.parameters()))
    named = dict(zip((name for name, _ in model.named_parameters()), raw, strict=True))
    gm.setup_loss_call(loss, gm.setup_model_call(model, x))
    gm.forward_and_backward()

    def vectors(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat([grads[f"{name}.{p}"].flatten() for p, _ in module.named_parameters()])
            for name, module in layers_of(model)
        }

    return vectors(named), vectors({name: p.grad for name, p in model.named_parameters()})


def damped_solve(matrix: Tensor, vector: Tensor, damping: float = DAMPING) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), vector)


EMA = pytest.mark.parametrize("ema", [True, False], ids=["ema", "no_ema"])


@pytest.mark.parametrize(
    "case", ["linear", "attention", "conv", "grouped_conv", "normalizations", "embedding"]
)
@pytest.mark.parametrize("maker", [asdl.LayerWiseNaturalGradientMaker, asdl.NaturalGradientMaker])
@EMA
def test_a_layer_wise_step_is_the_damped_inverse_times_the_gradient(
    ema: bool, maker: Any, case: str
):
    model, x = cases()[case]()
    target = torch.randint(C, (N,))
    options = (
        {} if maker is asdl.LayerWiseNaturalGradientMaker else {"fisher_shape": ["layer_wise"]}
    )
    raw, preconditioned = step(
        model, x, target, maker, "reduce", ema, fisher_type="fisher_emp", **options
    )
    for name, _ in layers_of(model):
        grads = grads_of(model, name, x, target)
        assert_equal(preconditioned[name], damped_solve(grads.T @ grads / N, raw[name]))


@pytest.mark.parametrize("case", ["linear", "attention", "conv", "grouped_conv", "normalizations"])
@pytest.mark.parametrize("maker", [asdl.FullNaturalGradientMaker, asdl.EmpNaturalGradientMaker])
@EMA
def test_a_full_step_is_the_damped_inverse_times_the_gradient(ema: bool, maker: Any, case: str):
    model, x = cases()[case]()
    target = torch.randint(C, (N,))
    options = {"fisher_type": "fisher_emp"} if maker is asdl.FullNaturalGradientMaker else {}
    raw, preconditioned = step(model, x, target, maker, "expand", ema, **options)
    names = [name for name, _ in layers_of(model)]
    grads = torch.cat([grads_of(model, name, x, target) for name in names], dim=1)
    expected = damped_solve(grads.T @ grads / N, torch.cat([raw[name] for name in names]))
    assert_equal(torch.cat([preconditioned[name] for name in names]), expected)


@pytest.mark.parametrize(
    "case",
    [
        "linear",
        "linear_without_bias",
        "attention",
        "conv",
        "grouped_conv",
        "depthwise_conv_without_bias",
        "normalizations",
    ],
)
@EMA
def test_a_unit_wise_step_is_the_damped_inverse_times_the_gradient(ema: bool, case: str):
    model, x = cases()[case]()
    target = torch.randint(C, (N,))
    raw, preconditioned = step(
        model, x, target, asdl.UnitWiseNaturalGradientMaker, "reduce", ema, fisher_type="fisher_emp"
    )
    for name, module in layers_of(model):
        blocks = unit_blocks(grads_of(model, name, x, target), module) / N
        units, size, _ = blocks.shape
        weights = module.weight.numel()
        vector = torch.cat(
            [raw[name][:weights].view(units, -1), raw[name][weights:].view(units, -1)], dim=1
        )
        solved = torch.stack(
            [damped_solve(block, v) for block, v in zip(blocks, vector, strict=True)]
        )
        per_unit = weights // units
        expected = torch.cat([solved[:, :per_unit].flatten(), solved[:, per_unit:].flatten()])
        assert size == vector.shape[1]
        assert_equal(preconditioned[name], expected)


@CASES
@EMA
def test_a_diagonal_step_is_the_gradient_over_the_damped_diagonal(ema: bool, case: Any):
    model, x = case()
    target = torch.randint(C, (N,))
    raw, preconditioned = step(
        model, x, target, asdl.DiagNaturalGradientMaker, "reduce", ema, fisher_type="fisher_emp"
    )
    for name, _ in layers_of(model):
        squares = grads_of(model, name, x, target).square().sum(0) / N
        assert_equal(preconditioned[name], raw[name] / (squares + DAMPING))


@pytest.mark.parametrize("case", ["linear", "linear_without_bias", "attention", "conv"])
@pytest.mark.parametrize("swift", [False, True], ids=["kron", "swift"])
@STRATEGIES
@EMA
def test_a_kfac_step_is_the_damped_inverses_times_the_gradient(
    ema: bool, shared_dim: str, swift: bool, case: str
):
    """``(B + r/π I)⁻¹ G (A + r π I)⁻¹`` with ASDL's π, r the root of the damping; the bias by B
    alone.
    """
    model, x = cases()[case]()
    raw, preconditioned = step(
        model,
        x,
        torch.randint(C, (N,)),
        asdl.KfacGradientMaker,
        shared_dim,
        ema,
        fisher_type="fisher_exact",
        swift=swift,
    )
    for name, module in layers_of(model):
        factors = oracle_factors(model, module, x, shared_dim)
        A, B = factors.A / N, factors.B / N
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt().item()
        weights = module.weight.numel()
        G = raw[name][:weights].view(len(B), -1)
        expected = damped_solve(B, G, DAMPING**0.5 / pi)
        expected = damped_solve(A, expected.T, DAMPING**0.5 * pi).T.flatten()
        assert_equal(preconditioned[name][:weights], expected)
        if module.bias is not None:
            assert_equal(
                preconditioned[name][weights:],
                damped_solve(B, raw[name][weights:], DAMPING**0.5 / pi),
            )


@EMA
def test_kfac_preconditions_normalization_layers_by_units(ema: bool):
    model, x = cases()["normalizations"]()
    target = torch.randint(C, (N,))
    raw, preconditioned = step(
        model, x, target, asdl.KfacGradientMaker, "reduce", ema, fisher_type="fisher_emp"
    )
    for name in ("bn2", "bn1", "ln", "ln2", "bn_vectors"):
        blocks = unit_blocks(grads_of(model, name, x, target), model.get_submodule(name)) / N
        vector = raw[name].view(2, -1).T
        solved = torch.stack(
            [damped_solve(block, v) for block, v in zip(blocks, vector, strict=True)]
        )
        assert_equal(preconditioned[name], solved.T.flatten())


@KFE_CASES
@STRATEGIES
def test_an_ekfac_step_is_the_damped_inverse_in_the_eigenbasis(shared_dim: str, case: str):
    model, x = cases()[case]()
    target = torch.randint(C, (N,))
    raw, preconditioned = step(
        model, x, target, asdl.EkfacGradientMaker, shared_dim, False, fisher_type="fisher_emp"
    )
    for name, module in layers_of(model):
        Ua, Ub = module.fisher.kfe.Ua, module.fisher.kfe.Ub  # test_kfe has compared them
        basis, weights = torch.kron(Ub, Ua), module.weight.numel()
        grads = grads_of(model, name, x, target)
        scale = (grads[:, :weights] @ basis).square().sum(0) / N
        expected = basis @ ((basis.T @ raw[name][:weights]) / (scale + DAMPING))
        assert_equal(preconditioned[name][:weights], expected)
        if module.bias is not None:
            scale = (grads[:, weights:] @ Ub).square().sum(0) / N
            expected = Ub @ ((Ub.T @ raw[name][weights:]) / (scale + DAMPING))
            assert_equal(preconditioned[name][weights:], expected)


def test_several_shapes_in_one_model():
    model, x = cases()["conv"]()
    target = torch.randint(C, (N,))
    raw, preconditioned = step(
        model,
        x,
        target,
        asdl.NaturalGradientMaker,
        "reduce",
        True,
        fisher_type="fisher_emp",
        fisher_shape=["layer_wise", (nn.Conv2d, "diag"), ("conv2", "kron")],
    )
    squares = grads_of(model, "conv1", x, target).square().sum(0) / N
    assert_equal(preconditioned["conv1"], raw["conv1"] / (squares + DAMPING))
    grads = grads_of(model, "head", x, target)
    assert_equal(preconditioned["head"], damped_solve(grads.T @ grads / N, raw["head"]))
    assert model.conv2.fisher.has_kron and rel_error(preconditioned["conv2"], raw["conv2"]) > 0.1


# --------------------------------------------------------------------------- Fisher-vector products


class Pooled(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("shape", ["full", "layer_wise"])
def test_fisher_vector_products_are_those_of_the_blocks(shape: str) -> None:
    model = Tokenwise(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C), pool=True)
    x, y = torch.randn(N, 6, 3), torch.randint(C, (N,))
    params = list(model.parameters())
    vector = ParamVector(params, [torch.randn_like(p) for p in params])
    maker = fisher_vector_products(model, x, y, shape, vector)
    grads = [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        for i in range(N)
    ]
    layers = [[0, 1], [2, 3]] if shape == "layer_wise" else [[0, 1, 2, 3]]
    found = maker.load_fvp(shape).vectors
    for layer in layers:
        products = [sum((g[k] * vector.vectors[params[k]]).sum() for k in layer) for g in grads]
        for k in layer:
            assert_equal(
                found[params[k]], sum(s * g[k] for s, g in zip(products, grads, strict=True)) / N
            )


def fisher_vector_products(
    model: nn.Module, x: Tensor, y: Tensor, shape: str, vector: ParamVector
) -> Any:
    config = FisherConfig("fisher_emp", [shape], loss_type=CE, data_size=N, shared_dim="reduce")
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward(fvp=True, vec=vector)
    return maker


@pytest.mark.parametrize("shape", ["full", "layer_wise"])
def test_fisher_vector_products_of_blocks_are_refused(shape: str) -> None:
    """A vector's parts are whole Parameters, in the order of ``parameters()``, which is not that of
    the blocks.
    """
    model = convert(Pooled(nn.MultiheadAttention(4, 2, batch_first=True)))
    params = list(model.parameters())
    vector = ParamVector(params, [torch.randn_like(p) for p in params])
    with pytest.raises(
        ValueError,
        match=r"'attention.q_proj': there are no Fisher-vector products.*revert\(model\)",
    ):
        fisher_vector_products(model, torch.randn(N, 6, 4), torch.randint(C, (N,)), shape, vector)
