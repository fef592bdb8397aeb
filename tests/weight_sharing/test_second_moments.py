"""``TrainingConfig(second_moment=β2)``: the gradient over the root of its second moment in the
eigenbasis of the layer's factors.

Ground truth is the recipe written out in float64: autograd's raw gradients, the factors of single
batches by hand, dense eigenvectors, moments that are carried to new bases through whole covariances
of vectorized gradients, and Adam's own formula.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asdl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.processes import on_ranks
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import Preconditioner, TrainingConfig, recommended
from asdl_ws_plugin.weight_sharing.second_moments import SecondMoments, eigenvectors

BETA, EPS = 0.9, 1e-8
N, R = 8, 4


@pytest.fixture(autouse=True)
def _in_double(double: None) -> Iterator[None]:
    torch.manual_seed(0)
    yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, R, 5, generator=generator)
    return x, torch.randint(3, (N, R), generator=generator)


def loss_of(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def config_of(**options: Any) -> TrainingConfig:
    """No grafting, no capped factors, an average and intervals that show in a few steps."""
    defaults = {
        "second_moment": BETA,
        "damping": 1e-2,
        "relative_damping": True,
        "unbiased": True,
        "ema_decay": 0.4,
        "curvature_upd_interval": 1,
        "preconditioner_upd_interval": 2,
    }
    return TrainingConfig(**{**defaults, **options})


def maker_of(model: nn.Module, config: Any = None, **options: Any) -> Any:
    options = {"shared_dim": "expand", "fisher_type": "fisher_emp", **options}
    return asdl.KfacGradientMaker(model, config_of() if config is None else config, **options)


def step(maker: Any, model: nn.Module, seed: int, scale: float = 1.0) -> None:
    x, y = batch(seed)
    model.zero_grad()
    out = maker.setup_model_call(model, x)
    maker.setup_loss_call(lambda p, t: scale * loss_of(p, t), out, y)
    maker.forward_and_backward()


def raw_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    x, y = batch(seed)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss_of(model(x), y), list(named.values()))
    return dict(zip(named, grads, strict=True))


# ------------------------------------------------------------------------------------- the recipe


class ByHand:
    """One layer: its moments as the diagonal of a covariance of the vectorized gradient."""

    def __init__(self) -> None:
        self.Q = torch.empty(0)
        self.diagonal = torch.empty(0)
        self.steps = 0

    def renew(self, Q: Tensor) -> None:
        """Entries that are uncorrelated in the old basis, seen in the new one."""
        if self.steps:
            covariance = self.Q @ torch.diag(self.diagonal) @ self.Q.mT
            self.diagonal = (Q.mT @ covariance @ Q).diagonal()
        self.Q = Q

    def direction(self, grad: Tensor) -> Tensor:
        turned = self.Q.mT @ grad.flatten()
        before = self.diagonal if self.steps else torch.zeros_like(turned)
        self.diagonal = BETA * before + (1 - BETA) * turned**2
        self.steps += 1
        root = (self.diagonal / (1 - BETA**self.steps)).sqrt()
        return (self.Q @ (turned / (root + EPS))).view_as(grad)


@pytest.mark.parametrize("strategy", ["expand", "reduce"])
def test_five_steps_are_those_of_the_recipe_written_out(strategy: str):
    model = network()
    maker = maker_of(model, shared_dim=strategy)
    weight, bias = ByHand(), ByHand()
    A = torch.zeros(5, 5)
    for k in range(5):
        raw = raw_gradients(model, seed=k)
        step(maker, model, seed=k)
        x, _ = batch(k)
        rows = x.flatten(0, 1) if strategy == "expand" else x.mean(1)
        weight_of_new = max(0.4, 1 / (k + 1))
        A = (1 - weight_of_new) * A + weight_of_new * rows.mT @ rows / len(rows)
        # B's definition is test_factors' affair.
        B = model[0].fisher.kron.B
        torch.testing.assert_close(model[0].fisher.kron.A, A, rtol=1e-10, atol=1e-14)
        if k % 2 == 0:
            Q_A, Q_B = (torch.linalg.eigh(factor)[1] for factor in (A, B))
            weight.renew(torch.kron(Q_B, Q_A))
            bias.renew(Q_B)
        expected = weight.direction(raw["0.weight"])
        torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-6, atol=1e-9)
        expected = bias.direction(raw["0.bias"])
        torch.testing.assert_close(model[0].bias.grad, expected, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad


def test_factors_that_are_diagonal_leave_adams_own_second_moment():
    """With inputs that are unit vectors A is a diagonal, and so is B of one output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    adam = copy.deepcopy(model)
    maker = maker_of(model, fisher_type="fisher_exact", loss_type="mse", shared_dim="reduce")
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.RMSprop(adam.parameters(), lr=0.1, alpha=BETA, eps=EPS)
    x, y = torch.diag(torch.arange(1.0, 5.0)), torch.randn(4, 1)
    for t in range(1, 5):
        maker.setup_loss_call(F.mse_loss, maker.setup_model_call(model, x), y)
        model.zero_grad()
        maker.forward_and_backward()
        adam.zero_grad()
        F.mse_loss(adam(x), y).backward()
        # RMSprop has no correction for the start.
        theirs.param_groups[0]["lr"] = 0.1 * math.sqrt(1 - BETA**t)
        theirs.step()
        ours.step()
        torch.testing.assert_close(model[0].weight, adam[0].weight, rtol=1e-6, atol=1e-7)


def test_the_scale_of_the_loss_changes_no_direction():
    found = []
    for scale in (1.0, 1e-3):
        model = network()
        maker = maker_of(model)
        for k in range(3):
            step(maker, model, seed=k, scale=scale)
        found.append(model[3].weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_grafted_gradients_have_the_raw_norms():
    model = network()
    maker = maker_of(model, recommended(second_moment=BETA))
    for k in range(2):
        raw = raw_gradients(model, seed=k)
        step(maker, model, seed=k)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.norm(), raw[name].norm())
    assert F.cosine_similarity(p.grad.flatten(), raw[name].flatten(), dim=0) < 0.999


def test_layers_without_factors_are_preconditioned_as_ever():
    """LayerNorm has a block per unit; its gradient is that of the same preset without moments."""
    grads = []
    for moment in (BETA, None):
        model = network()
        step(maker_of(model, config_of(second_moment=moment)), model, seed=1)
        grads.append((model[2].weight.grad, model[0].weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.allclose(grads[0][1], grads[1][1])


# ------------------------------------------------------------------------------- kinds of layers


def test_a_convolution_is_turned_as_the_matrix_that_its_factors_are_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    maker = maker_of(model, shared_dim="reduce")
    x, y = torch.randn(6, 2, 3, 3), torch.randint(3, (6,))
    raw = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)[0]
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    kron = model[0].fisher.kron
    Q = torch.kron(*(torch.linalg.eigh(factor)[1] for factor in (kron.B, kron.A)))
    # After one step the corrected moment is the square of the entry: only signs are left.
    turned = Q.mT @ raw.flatten()
    expected = (Q @ (turned / (turned.abs() + EPS))).view_as(raw)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-5, atol=1e-7)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_a_tied_weight_has_one_moment_and_each_bias_its_own():
    model = Tied()
    maker = maker_of(model, config_of(preconditioner_upd_interval=1))
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    kron = model.a.fisher.kron
    Q_A, Q_B = (torch.linalg.eigh(factor)[1] for factor in (kron.A, kron.B))
    for p, raw in zip(model.parameters(), grads, strict=True):
        turned = Q_B.mT @ (raw @ Q_A if raw.ndim == 2 else raw)
        signs = Q_B @ (turned / (turned.abs() + EPS))
        torch.testing.assert_close(
            p.grad, signs @ Q_A.mT if raw.ndim == 2 else signs, rtol=1e-5, atol=1e-7
        )
    state = maker.state_dict()["training"]["second_moments"]
    assert set(state) == {"a"}
    assert set(state["a"]["moments"]) == {"a.weight", "a.bias", "b.bias"}


def test_the_thirds_of_converted_attention_have_bases_of_their_own():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(4, 3))
    asdl_ws_plugin.convert(model)
    maker = maker_of(model)
    x, y = torch.randn(N, R, 4), torch.randint(3, (N, R))
    out = maker.setup_model_call(model, x)
    maker.setup_loss_call(loss_of, out, y)
    raw = torch.autograd.grad(loss_of(model(x), y), layer.self_attn.in_proj_weight)[0]
    maker.forward_and_backward()
    blocks = [
        layer
        for layer in maker.plan.layers
        if layer.module.weight.shape == (4, 4) and "out_proj" not in layer.name
    ]
    assert len(blocks) == 3
    for part, block, own in zip(
        layer.self_attn.in_proj_weight.grad.chunk(3), blocks, raw.chunk(3), strict=True
    ):
        kron = block.module.fisher.kron
        Q_A, Q_B = (torch.linalg.eigh(factor)[1] for factor in (kron.A, kron.B))
        turned = Q_B.mT @ own @ Q_A
        expected = Q_B @ (turned / (turned.abs() + EPS)) @ Q_A.mT
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_side", [4, 3])
def test_capped_factors_have_a_basis_of_blocks(max_side: int):
    """5 and 7 columns are padded to blocks; padding takes no part."""
    model = network()
    maker = maker_of(model, config_of(max_side=max_side, preconditioner_upd_interval=1))
    raw = raw_gradients(model, seed=1)["0.weight"]
    step(maker, model, seed=1)
    kron = model[0].fisher.kron
    assert kron.A.ndim == kron.B.ndim == 3
    A, B = (torch.block_diag(*factor)[:side, :side] for factor, side in ((kron.A, 5), (kron.B, 7)))

    def basis(factor: Tensor, size: int) -> Tensor:
        """Of each block without its padding."""
        side = len(factor)
        blocks = [factor[i : i + size, i : i + size] for i in range(0, side, size)]
        return torch.block_diag(*(torch.linalg.eigh(block)[1] for block in blocks))

    Q_A, Q_B = basis(A, kron.A.shape[-1]), basis(B, kron.B.shape[-1])
    turned = Q_B.mT @ raw @ Q_A
    expected = Q_B @ (turned / (turned.abs() + EPS)) @ Q_A.mT
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_padding_does_not_mix_with_a_singular_block():
    v = torch.randn(3)
    factor = torch.zeros(2, 3, 3)
    factor[0] = torch.outer(v, v)
    factor[1, :1, :1] = 0.0  # nothing but zeros, beside two rows of padding
    Q = torch.block_diag(*eigenvectors(factor, side=4))[:4, :4]
    torch.testing.assert_close(Q @ Q.mT, torch.eye(4))


def test_a_factor_of_zeros_leaves_adam_in_the_basis_of_the_parameters():
    moments = SecondMoments()
    zeros = torch.zeros(3, 3)
    moments.set_bases("layer", (eigenvectors(zeros, 3), eigenvectors(zeros, 3)))
    grad = torch.randn(3, 3)
    divided = moments.divide("layer", "layer.weight", grad, BETA)
    torch.testing.assert_close(divided.abs(), (grad / (grad.abs() + EPS)).abs())


# ------------------------------------------------------------------------------------- the state


def run(steps: range, model: nn.Module, maker: Any, optimizer: Any) -> None:
    for k in steps:
        step(maker, model, seed=k)
        optimizer.step()


def fresh(**options: Any) -> tuple[nn.Module, Any, Any]:
    model = network()
    defaults = {"second_moment": BETA, "early_updates": 3, "preconditioner_upd_interval": 4}
    config = recommended(**{**defaults, **options})
    return model, maker_of(model, config), torch.optim.NAdam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("max_side", [None, 4])
def test_a_training_that_is_interrupted_goes_on_bit_for_bit(max_side: int | None, tmp_path: Path):
    parts = fresh(max_side=max_side)
    run(range(7), *parts)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    run(range(7, 20), *parts)
    resumed = fresh(max_side=max_side)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    run(range(7, 20), *resumed)
    for a, b in zip(parts[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_goes_on_like_the_original():
    parts = fresh()
    run(range(5), *parts)
    model, maker = copy.deepcopy(parts[:2])
    for own, own_maker in ((parts[0], parts[1]), (model, maker)):
        step(own_maker, own, seed=5)
    for a, b in zip(parts[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_state_of_other_options_or_sizes_is_refused_and_nothing_is_changed():
    with_moments, without = fresh(), fresh(second_moment=None)
    for parts in (with_moments, without):
        run(range(3), *parts)
    state = with_moments[1].state_dict()
    with pytest.raises(ValueError, match="of training with second_moment"):
        without[1].load_state_dict(state)
    with pytest.raises(ValueError, match="of training without second_moment"):
        with_moments[1].load_state_dict(without[1].state_dict())
    damaged = copy.deepcopy(state)
    layer = damaged["training"]["second_moments"]["0"]
    layer["moments"]["0.weight"] = (torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match=r"'0.weight' have to be finite and of sizes \(7, 5\)"):
        with_moments[1].load_state_dict(damaged)
    damaged = copy.deepcopy(state)
    damaged["training"]["second_moments"]["other"] = layer
    with pytest.raises(ValueError, match="'other', which is no layer here"):
        with_moments[1].load_state_dict(damaged)
    damaged = copy.deepcopy(state)
    layer = damaged["training"]["second_moments"]["0"]
    layer["bases"] = (torch.eye(2), layer["bases"][1])
    with pytest.raises(ValueError, match=r"kron.A of sizes \(2, 2\)"):
        with_moments[1].load_state_dict(damaged)
    for key, value in with_moments[1].state_dict()["training"]["second_moments"]["0"].items():
        assert str(value) == str(state["training"]["second_moments"]["0"][key])


def test_a_step_that_fails_leaves_the_moments_as_they_were(monkeypatch: pytest.MonkeyPatch):
    parts, spared = fresh(), fresh()
    for other in (parts, spared):
        run(range(4), *other)
    model, maker, _ = parts
    divide = SecondMoments.divide

    def fails(self: SecondMoments, layer: str, *arguments: Any) -> Tensor:
        if layer == "3":  # the first layer's moments have been renewed by then
            raise RuntimeError("interrupted")
        return divide(self, layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SecondMoments, "divide", fails)
        with pytest.raises(RuntimeError, match="interrupted"):
            step(maker, model, seed=77)
    for other in (parts, spared):
        run(range(4, 9), *other)
    for a, b in zip(model.parameters(), spared[0].parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- both doors


def test_both_doors_give_equal_bits():
    model, maker, optimizer = fresh()
    run(range(6), model, maker, optimizer)
    own = network()
    config = recommended(second_moment=BETA, early_updates=3, preconditioner_upd_interval=4)
    prec = Preconditioner(own, config, shared_dim="expand", fisher_type="fisher_emp")
    optimizer = torch.optim.NAdam(own.parameters(), lr=1e-2)
    for k in range(6):
        x, y = batch(k)
        optimizer.zero_grad()
        prec.backward(loss_of(own(x), y))
        optimizer.step()
    for a, b in zip(model.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)


def _on_rank(rank: int, world_size: int) -> list[np.ndarray]:
    model = network()
    maker = maker_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    part = slice(rank * N // world_size, (rank + 1) * N // world_size)
    for k in range(5):
        x, y = batch(k)
        optimizer.zero_grad()
        maker.setup_loss_call(loss_of, maker.setup_model_call(model, x[part]), y[part])
        maker.forward_and_backward()
        optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


@pytest.mark.slow
def test_two_ranks_train_like_one_process(tmp_path: Path):
    alone = _on_rank(0, 1)
    for found in on_ranks(2, tmp_path, _on_rank):
        for a, b in zip(alone, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moment": 1.0}, r"second_moment has to be in \[0, 1\)"),
        ({"second_moment": -0.1}, r"second_moment has to be in \[0, 1\)"),
        ({"relative_damping": False}, "second_moment needs relative_damping=True"),
        ({"kl_clip": 1e-3, "learning_rate": 0.1}, "with second_moment use graft"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        maker_of(network(), config_of(**options))


def test_vectors_other_than_gradients_are_refused():
    model = network()
    maker = maker_of(model)
    step(maker, model, seed=0)
    vectors = asdl.ParamVector(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    with pytest.raises(NotImplementedError, match=r"gradients in \.grad alone"):
        maker.precondition(vectors=vectors)
