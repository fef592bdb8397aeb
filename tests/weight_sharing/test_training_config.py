"""What the preset promises: an average without bias, damping and step lengths that hold, capped
factors, failures that do not end a training, and a state that goes on exactly.

Ground truth are NumPy-like formulas in float64 on the factors of single batches, autograd's raw
gradient, and for the trust the exact solution of a quadratic.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin.upstream import is_native
from asdl_ws_plugin.weight_sharing.capped import capped, identity, multiply
from asdl_ws_plugin.weight_sharing.inverses import update_inverses
from asdl_ws_plugin.weight_sharing.schedule import is_due
from asdl_ws_plugin.weight_sharing.trust import StepTrust


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, 5, generator=generator)
    return x, torch.randint(3, (8, 4), generator=generator)


def maker_of(model: nn.Module, config: Any = None, **options: Any) -> Any:
    config = asdl_ws_plugin.recommended() if config is None else config
    options = {"shared_dim": "expand", "fisher_type": "fisher_emp", **options}
    return asdl.KfacGradientMaker(model, config, **options)


def step(maker: Any, model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    x, y = batch(seed)
    model.zero_grad()
    out = maker.setup_model_call(model, x)
    maker.setup_loss_call(
        lambda p, t: scale * F.cross_entropy(p.flatten(0, 1), t.flatten()), out, y
    )
    return maker.forward_and_backward()[1]


def raw_gradients(model: nn.Module, seed: int) -> list[Tensor]:
    x, y = batch(seed)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    return list(torch.autograd.grad(loss, list(model.parameters())))


# ---------------------------------------------------------------------------------- the average


def factor_of_batch(seed: int, model: nn.Module) -> Tensor:
    x, _ = batch(seed)
    return torch.einsum("nri,nrj->ij", x, x) / (8 * 4)


@pytest.mark.parametrize("decay", [0.05, 0.6])
def test_the_kth_update_has_the_weight_max_of_decay_and_one_over_k(decay: float):
    model = network()
    maker = maker_of(
        model, asdl_ws_plugin.TrainingConfig(damping=1e-2, ema_decay=decay, unbiased=True)
    )
    expected = torch.zeros(5, 5)
    for k in range(1, 6):
        step(maker, model, seed=k)
        weight = max(decay, 1 / k)
        expected = (1 - weight) * expected + weight * factor_of_batch(k, model)
        torch.testing.assert_close(model[0].fisher.kron.A, expected, rtol=1e-12, atol=0)


def test_without_unbiased_the_average_is_upstreams():
    runs = []
    for config in (
        asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3),
        asdl_ws_plugin.TrainingConfig(damping=1e-2, ema_decay=0.3),
    ):
        torch.manual_seed(0)
        model = network()
        maker = maker_of(model, config)
        for k in range(3):
            step(maker, model, seed=k)
        runs.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ----------------------------------------------------------------------------------- the schedule


def test_early_updates_are_frequent_and_grow_to_the_interval():
    updates: list[int] = []
    for t in range(400):
        if is_due(t, updates[-1] if updates else None, interval=10, early_updates=20):
            updates.append(t)
    assert updates[:20] == list(range(20))
    gaps = [b - a for a, b in itertools.pairwise(updates)]
    assert gaps == sorted(gaps) and gaps[-1] == 10


def test_without_early_updates_the_schedule_is_upstreams():
    updates: list[int] = []
    for t in range(40):
        if is_due(t, updates[-1] if updates else None, interval=7, early_updates=0):
            updates.append(t)
    assert updates == list(range(0, 40, 7))


def test_damping_decay_and_intervals_may_be_functions_of_the_step():
    seen: list[int] = []

    def damping(t: int) -> float:
        seen.append(t)
        return 0.1 / (t + 1)

    config = asdl_ws_plugin.TrainingConfig(
        damping=damping,
        ema_decay=lambda t: 1.0 if t < 2 else 0.5,
        curvature_upd_interval=lambda t: 1,
        preconditioner_upd_interval=lambda t: 1 if t < 3 else 2,
    )
    model = network()
    maker = maker_of(model, config)
    inverses = []
    for k in range(6):
        step(maker, model, seed=k)
        inverses.append(model[0].fisher.kron.A_inv.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(inverses)]
    assert changed == [True, True, False, True, False]
    assert set(seen) >= {0, 1, 2, 4}


# ---------------------------------------------------------------------------- inverses and damping


def split(damping: float) -> float:
    """δ with ((1 + δ) / δ)² = (1 + damping) / damping."""
    return 1 / (math.sqrt(1 + 1 / damping) - 1)


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue_whatever_the_scale():
    model = network()
    config = asdl_ws_plugin.TrainingConfig(damping=0.04, ema_decay=1.0, relative_damping=True)
    maker = maker_of(model, config)
    for scale in (1.0, 1e-6):
        step(maker, model, seed=1, scale=scale)
        kron = model[0].fisher.kron
        for factor, inverse in ((kron.A, kron.A_inv), (kron.B, kron.B_inv)):
            mean = torch.linalg.eigvalsh(factor).mean()
            expected = torch.linalg.inv(factor + split(0.04) * mean * torch.eye(len(factor)))
            torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=0)


def matrix(*factors: Tensor) -> asdl.SymMatrix:
    return asdl.SymMatrix(kron_A=factors[0], kron_B=factors[1])


def test_equal_sizes_are_inverted_like_single_ones_and_the_data_stay():
    def spd(size: int) -> Tensor:
        x = torch.randn(size, 2 * size)
        return x @ x.mT

    matrices = [matrix(spd(4), spd(6)), matrix(spd(6), spd(4)), matrix(spd(4), spd(4))]
    before = copy.deepcopy(matrices)
    damping = torch.tensor(0.09)
    assert update_inverses([(str(i), m, damping) for i, m in enumerate(matrices)]).kept == []
    for m, old in zip(matrices, before, strict=True):
        for name in ("A", "B"):
            data = getattr(m.kron, name)
            assert torch.equal(data, getattr(old.kron, name))
            shifted = data + split(0.09) * data.diagonal().mean() * torch.eye(len(data))
            expected = torch.linalg.inv(shifted)
            torch.testing.assert_close(getattr(m.kron, f"{name}_inv"), expected, rtol=1e-9, atol=0)


def test_a_factor_of_zeros_has_no_inverse():
    m = matrix(torch.eye(3), torch.zeros(2, 2))
    updated = update_inverses([("layer", m, torch.tensor(1e-2))])
    assert (updated.kept, updated.zero) == ([], ["layer"])
    assert m.kron.A_inv is not None and m.kron.B_inv is None


class Attention(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.x, self.y = torch.randn(8, length, 6), torch.randint(3, (8,))

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x)
        return self.head((z + self.attention(z, z, z, need_weights=False)[0]).mean(1))


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_keys_whose_reduced_gradients_cancel_keep_their_raw_gradient(
    dtype: torch.dtype, graft: bool
):
    model = asdl_ws_plugin.convert(Attention(64).to(dtype))
    x, y = model.x.to(dtype), model.y
    F.cross_entropy(model(x), y).backward()
    raw_query, raw_key, _ = model.attention.in_proj_weight.grad.double().chunk(3)
    config = asdl_ws_plugin.recommended(trust=None, damping=1e-2, graft=graft)
    maker = maker_of(model, config, shared_dim="reduce")
    model.zero_grad()
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    query, key, _ = model.attention.in_proj_weight.grad.double().chunk(3)
    assert float(raw_key.norm()) > 0
    torch.testing.assert_close(key, raw_key, rtol=1e-5, atol=0)
    direction = F.cosine_similarity(query.flatten(), raw_query.flatten(), dim=0)
    assert float(direction) < 0.99  # these are preconditioned


def test_what_float32_cannot_invert_is_inverted_in_float64():
    # Rounded to float32, the smallest eigenvalue of this one is negative.
    x = torch.randn(40, 3, dtype=torch.float64)
    data = (x @ x.mT).float()
    m = matrix(data, torch.eye(2, dtype=torch.float32))
    damping = torch.tensor(1e-14, dtype=torch.float32)
    shifted = data + 1e-7 * data.diagonal().mean() * torch.eye(40, dtype=torch.float32)
    assert int(torch.linalg.cholesky_ex(shifted)[1]) != 0
    kept = update_inverses([("layer", m, damping)]).kept
    exact = torch.linalg.cholesky_ex(shifted.double())[1]
    assert (m.kron.A_inv is not None) == (int(exact) == 0) == (kept == [])


def test_what_cannot_be_inverted_keeps_its_old_inverse_with_one_warning():
    model = network()
    config = asdl_ws_plugin.recommended(early_updates=0, preconditioner_upd_interval=1, trust=None)
    maker = maker_of(model, config)
    step(maker, model, seed=1)
    kron = model[0].fisher.kron
    old = kron.A_inv
    for k in (2, 3):
        model[0].fisher.kron.A.copy_(-1e3 * torch.eye(5)).diagonal()[0] = 1e5
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(maker, model, seed=k)
        assert len([w for w in caught if "not positive definite" in str(w.message)]) == (k == 2)
        assert torch.equal(model[0].fisher.kron.A_inv, old)


# ---------------------------------------------------------------------------------- step lengths


def test_grafted_gradients_have_the_norms_of_the_raw_ones_and_another_direction():
    model = network()
    maker = maker_of(model, asdl_ws_plugin.recommended(trust=None))
    raw = raw_gradients(model, seed=1)
    step(maker, model, seed=1)
    for p, g in zip(model.parameters(), raw, strict=True):
        torch.testing.assert_close(p.grad.norm(), g.norm(), rtol=1e-12, atol=0)
    assert F.cosine_similarity(model[0].weight.grad.flatten(), raw[0].flatten(), dim=0) < 0.999


@pytest.mark.parametrize("bound", [1e-6, 1e6])
def test_kl_clip_bounds_what_a_step_changes(bound: float):
    options = {"damping": 1e-2, "ema_decay": 1.0, "relative_damping": True}
    model = network()
    plain = maker_of(model, asdl_ws_plugin.TrainingConfig(**options))
    raw = raw_gradients(model, seed=1)
    step(plain, model, seed=1)
    newton = [p.grad.clone() for p in model.parameters()]
    product = sum((g * p).sum() for g, p in zip(raw, newton, strict=True))
    clipped = maker_of(
        model, asdl_ws_plugin.TrainingConfig(**options, kl_clip=bound, learning_rate=0.1)
    )
    step(clipped, model, seed=1)
    factor = min(1.0, float((bound / (0.01 * product)).sqrt()))
    for p, expected in zip(model.parameters(), newton, strict=True):
        torch.testing.assert_close(p.grad, factor * expected, rtol=1e-9, atol=1e-15)


def test_trust_finds_the_damping_of_the_step_that_was_made():
    """On a quadratic, the step ``-(F + λ)⁻¹ g`` leaves a slope that tells λ."""
    layer = nn.Linear(4, 3, bias=False)
    x, z = torch.randn(20, 4), torch.randn(20, 3)
    A, B = x.mT @ x / 20, z.mT @ z / 20
    m, damping = matrix(A, B), 0.7
    curvature = torch.kron(B, A)
    shifted = curvature + damping * torch.eye(12)
    trust = StepTrust()
    for _ in range(4):
        gradient = torch.randn(12)
        step_made = -torch.linalg.solve(shifted, gradient)
        layer.weight.grad = gradient.view(3, 4)
        trust.note([layer])
        with torch.no_grad():
            layer.weight.add_(step_made.view(3, 4))
        layer.weight.grad = (gradient + curvature @ step_made).view(3, 4)
        # every step the same length, so that the mean of slopes has no error but that of λ
        trust.measure()
    slope, square, length = trust._averages[layer]
    assert float(slope / length) == pytest.approx(damping, rel=1e-9)
    mean = float(A.diagonal().mean() * B.diagonal().mean())
    error = float(((square - slope.square()) / 4).sqrt())
    expected = (float(slope) + 2 * error) / float(length) / mean
    assert float(trust.dampings([(layer, m)], 1e-3, 1.0)) == pytest.approx(expected, rel=1e-9)
    assert float(trust.dampings([(layer, m)], 1e3, 1.0)) == 1e3


def test_a_layer_of_which_nothing_is_known_keeps_the_direction_of_its_gradient():
    model = network()
    maker = maker_of(model)
    raw = raw_gradients(model, seed=1)
    step(maker, model, seed=1)
    for p, g in zip(model.parameters(), raw, strict=True):
        assert F.cosine_similarity(p.grad.flatten(), g.flatten(), dim=0) > 0.9999


# -------------------------------------------------------------------------------- capped factors


def gram(_: Any, data: Tensor) -> Tensor:
    rows = data.reshape(-1, data.shape[-1])
    return rows.mT @ rows


def dense(blocks: Tensor, side: int) -> Tensor:
    return torch.block_diag(*blocks)[:side, :side]


@pytest.mark.parametrize(("side", "max_side", "count"), [(6, 8, 1), (10, 4, 3), (40, 2, 40)])
def test_a_wide_factor_is_the_block_diagonal_of_the_whole_one(side: int, max_side: int, count: int):
    data = torch.randn(5, 3, side)
    whole = gram(None, data)
    factor = capped(gram, max_side)(None, data)
    if count == 1:
        assert torch.equal(factor, whole)
        return
    assert factor.shape[0] == count
    size = factor.shape[-1]
    mask = torch.block_diag(*[torch.ones(size, size)] * count)[:side, :side]
    torch.testing.assert_close(dense(factor, side), whole * mask)
    vectors = torch.randn(side, 2)
    torch.testing.assert_close(multiply(factor, vectors), (whole * mask) @ vectors)
    assert torch.equal(dense(identity(side, max_side), side), torch.eye(side))


def test_a_model_with_capped_factors_is_preconditioned_by_their_blocks():
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    config = asdl_ws_plugin.TrainingConfig(
        damping=0.04, ema_decay=1.0, relative_damping=True, max_side=4
    )
    maker = maker_of(model, config)
    raw = raw_gradients(model, seed=1)
    step(maker, model, seed=1)
    kron = model[0].fisher.kron
    assert kron.A.shape == (2, 3, 3) and kron.B.shape == (3, 3, 3)

    def inverse(blocks: Tensor, side: int) -> Tensor:
        shift = split(0.04) * blocks.diagonal(dim1=-2, dim2=-1).mean()
        return torch.linalg.inv(dense(blocks, side) + shift * torch.eye(side))

    expected = inverse(kron.B, 9) @ raw[0] @ inverse(kron.A, 5)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(model[0].bias.grad, inverse(kron.B, 9) @ raw[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("channels", "shape"), [(32, (3, 99, 99)), (11, (2, 54, 54))])
def test_a_wide_convolution_has_blocks_of_whole_channels(channels: int, shape: tuple[int, ...]):
    model = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Flatten(1), nn.Linear(24, 3))
    max_side = 98 if channels == 11 else 99
    config = asdl_ws_plugin.TrainingConfig(
        damping=0.04, ema_decay=1.0, relative_damping=True, max_side=max_side
    )
    maker = maker_of(model, config)
    x, y = torch.randn(8, channels, 4, 4), torch.randint(3, (8,))
    raw = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].parameters())
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    kron, side = model[0].fisher.kron, 9 * channels
    rows = F.unfold(x, 3).mT.flatten(0, 1)
    mask = torch.block_diag(*[torch.ones(shape[1:])] * shape[0])[:side, :side]
    whole = rows.mT @ rows / (8 * 4)
    assert kron.A.shape == shape
    torch.testing.assert_close(dense(kron.A, side), whole * mask)
    mean = kron.A.diagonal(dim1=-2, dim2=-1).mean()
    A_inv = torch.linalg.inv(whole * mask + split(0.04) * mean * torch.eye(side))
    B_inv = torch.linalg.inv(kron.B + split(0.04) * kron.B.diagonal().mean() * torch.eye(6))
    torch.testing.assert_close(
        model[0].weight.grad.flatten(1), B_inv @ raw[0].flatten(1) @ A_inv, rtol=1e-8, atol=1e-12
    )


def test_the_outputs_of_a_wide_convolution_are_blocks_whatever_the_fisher_type():
    for fisher_type in ("fisher_emp", "fisher_forward_only"):
        model = nn.Sequential(nn.Conv2d(2, 300, 3), nn.Conv2d(300, 300, 1), nn.Flatten(1))
        maker = maker_of(model, asdl_ws_plugin.recommended(), fisher_type=fisher_type)
        x, y = torch.randn(2, 2, 3, 3), torch.randint(300, (2,))
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
        maker.forward_and_backward()
        # a kernel of one entry makes a linear layer
        assert model[0].fisher.kron.B.shape == (2, 150, 150)
        assert model[1].fisher.kron.B.shape == (300, 300)


# ------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("max_side", [None, 4])
def test_a_training_that_is_interrupted_goes_on_exactly(max_side: int | None, tmp_path: Any):
    def run(steps: range, model: nn.Module, maker: Any, optimizer: Any) -> None:
        for k in steps:
            step(maker, model, seed=k)
            optimizer.step()

    def fresh() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = network()
        config = asdl_ws_plugin.recommended(
            early_updates=3, preconditioner_upd_interval=4, max_side=max_side
        )
        return model, maker_of(model, config), torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, maker, optimizer = fresh()
    run(range(7), model, maker, optimizer)
    torch.save([part.state_dict() for part in (model, maker, optimizer)], tmp_path / "state.pt")
    run(range(7, 20), model, maker, optimizer)

    resumed = fresh()
    for part, state in zip(
        resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    run(range(7, 20), *resumed)
    for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_updates": -1}, "early_updates has to be at least 0"),
        ({"max_side": 0}, "max_side has to be at least 1"),
        ({"kl_clip": 1e-3}, "kl_clip needs the optimizer's learning_rate"),
        ({"kl_clip": -1.0, "learning_rate": 0.1}, "kl_clip has to be greater than 0"),
        ({"kl_clip": 1e-3, "learning_rate": 0.1}, "two lengths of the same step"),
        ({"ema_decay": -1}, "which needs ema_decay"),
        ({"num_total_steps": 10, "preconditioner_upd_interval": 1}, "two schedules"),
        ({"trust": 0.0}, "trust has to be greater than 0"),
        ({"relative_damping": False, "trust": None}, "max_side needs"),
        ({"relative_damping": False, "max_side": None}, "trust .* needs relative_damping"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        maker_of(network(), asdl_ws_plugin.recommended(**options))


@pytest.mark.skipif(is_native(), reason="a patched ASDL has a constructor of its own")
def test_the_options_need_shared_dim():
    with pytest.raises(ValueError, match="needs shared_dim"):
        asdl.KfacGradientMaker(network(), asdl_ws_plugin.recommended())
