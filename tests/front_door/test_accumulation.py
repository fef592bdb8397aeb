"""k micro-batches and one step are the joint batch, in both doors and for any interval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asdl_ws_plugin import Preconditioner, convert


@pytest.fixture(autouse=True)
def in_double(double: None) -> Iterator[None]:
    yield


class Tokens(nn.Module):
    """Attention over tokens, ``(N, R, 4)`` to ``(N, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return convert(Tokens())


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 7, 4, generator=generator), torch.randint(3, (12,), generator=generator)


@pytest.mark.parametrize("door", ["asdl", "preconditioner"])
@pytest.mark.parametrize("fisher_type", ["fisher_emp", "fisher_exact", "fisher_forward_only"])
@pytest.mark.parametrize("shared_dim", ["expand", "reduce"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"ema_decay": 0.3, "curvature_upd_interval": 1, "preconditioner_upd_interval": 2},
        {"ema_decay": 0.3, "curvature_upd_interval": 3, "preconditioner_upd_interval": 3},
        {},
    ],
)
def test_micro_batches_are_the_joint_batch(
    door: str, fisher_type: str, shared_dim: str, schedule: dict[str, Any]
) -> None:
    config = asdl.PreconditioningConfig(damping=1e-2, **schedule)
    options = {"fisher_type": fisher_type, "shared_dim": shared_dim}
    joint, parts = model(), model()
    reference = asdl.KfacGradientMaker(joint, config, **options)
    ours: Any = (
        asdl.KfacGradientMaker(parts, config, **options)
        if door == "asdl"
        else Preconditioner(parts, config, **options)
    )
    sizes = [5, 4, 3]
    for i in range(4):
        x, y = batch(i)
        joint.zero_grad()
        parts.zero_grad()
        reference.setup_loss_call(F.cross_entropy, reference.setup_model_call(joint, x), y)
        reference.forward_and_backward()
        chunks = zip(x.split(sizes), y.split(sizes), strict=True)
        for k, (part, labels) in enumerate(chunks):

            def loss_of(z: Tensor, t: Tensor) -> Tensor:
                return F.cross_entropy(z, t, reduction="sum") / 12

            if door == "asdl":
                ours.setup_loss_call(loss_of, ours.setup_model_call(parts, part), labels)
                ours.forward_and_backward(accumulate=k < 2)
            else:
                ours.backward(loss_of(parts(part), labels), accumulate=k < 2)
        for (name, p), q in zip(parts.named_parameters(), joint.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert (p.grad - q.grad).norm() < 1e-10 * q.grad.norm(), (i, name)
        with torch.no_grad():
            for p, q in zip(parts.parameters(), joint.parameters(), strict=True):
                q -= 0.1 * q.grad  # type: ignore[operator]
                p.copy_(q)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_identical_micro_batches_do_not_change_the_gradient(k: int) -> None:
    x, y = batch(0)
    norms = []
    for count in (1, k):
        net = model()
        prec = Preconditioner(
            net, asdl.PreconditioningConfig(damping=1e-3), fisher_type="fisher_emp"
        )
        for j in range(count):
            prec.backward(F.cross_entropy(net(x), y) / count, accumulate=j < count - 1)
        norms.append(torch.stack([p.grad.norm() for p in net.parameters()]).norm())  # type: ignore[union-attr]
    assert norms[1] == pytest.approx(float(norms[0]), rel=1e-10)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_micro_batch_that_fails_leaves_the_others(at: int) -> None:
    x, y = batch(0)
    results = []
    for fails in (False, True):
        net = model()
        prec = Preconditioner(
            net, asdl.PreconditioningConfig(damping=1e-2), fisher_type="fisher_emp"
        )
        for k in range(3):
            if fails and k == at:
                with pytest.raises(FloatingPointError):
                    prec.backward(F.cross_entropy(net(x * torch.nan), y), accumulate=True)
            part = slice(4 * k, 4 * k + 4)
            prec.backward(F.cross_entropy(net(x[part]), y[part]) / 3, accumulate=k < 2)
        results.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
    for grad, expected in zip(*results, strict=True):
        assert torch.equal(grad, expected)
