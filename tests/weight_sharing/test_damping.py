"""The damping is split between A and B, and the split is one of the curvature, whatever its
scale.
"""

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.symmatrix import SymMatrix
from torch import nn

import asdl_ws_plugin

pytestmark = pytest.mark.usefixtures("double")
DAMPING = 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e8, 1e-8, 1e12])
def test_the_answer_is_the_same_for_A_times_a_number_and_B_divided_by_it(scale: float) -> None:
    """``kron(B, A)`` is the same curvature; upstream's floor below both dampings made it 17 % and
    96 % off.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    config = asdl.PreconditioningConfig(
        damping=DAMPING, ema_decay=1.0, curvature_upd_interval=2, preconditioner_upd_interval=1
    )
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    for step in range(2):
        if step == 1:
            for layer in (model[0], model[2]):
                layer.fisher.kron.A.mul_(scale)
                layer.fisher.kron.B.div_(scale)
        model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
        maker.forward_and_backward()
    found = [layer.weight.grad for layer in (model[0], model[2])]
    raw = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight, model[2].weight])
    for layer, grad, G in zip((model[0], model[2]), found, raw, strict=True):
        A, B = layer.fisher.kron.A / scale, layer.fisher.kron.B * scale
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        A_damped = A + DAMPING**0.5 * pi * torch.eye(len(A))
        B_damped = B + DAMPING**0.5 / pi * torch.eye(len(B))
        expected = torch.linalg.solve(B_damped, torch.linalg.solve(A_damped, G.mT).mT)
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-9)


def test_a_gradient_of_rounding_errors_stays_that() -> None:
    """A softmax does not feel the biases of its keys: their gradient is zero, and so is B."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    model = asdl_ws_plugin.convert(nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)))
    config = asdl.PreconditioningConfig(damping=DAMPING, ema_decay=1.0)
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    x, y = torch.randn(7, 3, 4), torch.randint(0, 3, (7,))
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    assert float(layer.self_attn.in_proj_bias.grad[4:8].abs().max()) < 1e-8
    assert float(layer.self_attn.in_proj_bias.grad[:4].abs().max()) > 1e-2


def test_without_weight_sharing_the_floor_stays() -> None:
    matrix = SymMatrix(kron_A=torch.eye(2) * 1e16, kron_B=torch.eye(2) * 1e-16)
    matrix.update_inv(DAMPING)
    assert float(matrix.kron.B_inv[0, 0]) == pytest.approx(1 / (1e-16 + 1e-7))
