"""``asdl_ws_plugin.kronecker`` against dense matrices, on factors that ASDL computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.symmatrix import Kron, SymMatrix
from oracles.autograd import assert_equal
from torch import Tensor, nn

from asdl_ws_plugin import kronecker

pytestmark = pytest.mark.usefixtures("double")
N, R, C = 12, 3, 2
POWERS = [1.0, -1.0, 0.5, -0.5, -1 / 3, 0.0]


class Model(nn.Module):
    """A layer over positions, a convolution, and a normalization between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.conv = nn.Linear(4, 5), nn.LayerNorm(5), nn.Conv2d(1, C, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.norm(self.fc(x))).unsqueeze(1)).mean((2, 3))


def compute(model: nn.Module, x: Tensor, data_size: int = N, shapes: Any = None) -> None:
    shapes = shapes or ["kron", (nn.LayerNorm, "unit_wise")]
    config = FisherConfig(
        "fisher_exact", shapes, loss_type="cross_entropy", data_size=data_size, shared_dim="expand"
    )
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, x)
    maker.forward_and_backward()


@pytest.fixture
def model() -> Model:
    model = Model()
    compute(model, torch.randn(N, R, 4))
    return model


def regular() -> Kron:
    """Factors that are not singular, as those of the model are (softmax)."""
    a, b = torch.randn(9, 4), torch.randn(9, 3)
    return Kron(a.mT @ a / 9, b.mT @ b / 9)


def dense(fisher: Any, damping: float = 0.0) -> Tensor:
    kron = fisher if isinstance(fisher, Kron) else fisher.kron
    block = torch.kron(kron.B.contiguous(), kron.A.contiguous())
    return block + damping * torch.eye(len(block))


def matrix_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0) ** power) @ vectors.mT


@pytest.mark.parametrize("decomposed", [False, True], ids=["factors", "decomposed"])
def test_trace(model: Model, decomposed: bool) -> None:
    for module in (model.fc, model.conv):
        fisher: Any = module.fisher
        given = kronecker.decompose(fisher) if decomposed else fisher
        assert_equal(kronecker.trace(given), dense(fisher).trace())
        with_bias = dense(fisher).trace() + fisher.kron.B.trace()
        assert_equal(kronecker.trace(given, bias=True), with_bias)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_logdet(damping: float) -> None:
    kron = regular()
    expected = torch.logdet(dense(kron, damping))
    of_bias = torch.logdet(kron.B + damping * torch.eye(3))
    for given in (kron, SymMatrix(kron=kron), kronecker.decompose(kron)):
        assert_equal(kronecker.logdet(given, damping), expected)
        assert_equal(kronecker.logdet(given, damping, bias=True), expected + of_bias)


def test_logdet_of_a_singular_block_with_damping(model: Model) -> None:
    fisher: Any = model.conv.fisher  # softmax: B is singular
    assert_equal(kronecker.logdet(fisher, 1e-3), torch.logdet(dense(fisher, 1e-3)))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_product_with_powers(power: float, damping: float) -> None:
    kron = regular()
    weight, bias = torch.randn(3, 4), torch.randn(3)
    expected = (matrix_power(dense(kron, damping), power) @ weight.flatten()).view(3, 4)
    of_bias = matrix_power(kron.B + damping * torch.eye(3), power) @ bias
    for given in (kron, kronecker.decompose(kron)):
        found, found_bias = kronecker.product(given, weight, bias, power=power, damping=damping)
        assert_equal(found, expected)
        assert_equal(found_bias, of_bias)
        assert_equal(kronecker.product(given, weight, power=power, damping=damping), expected)


def test_product_takes_weights_of_a_convolution_and_leading_dimensions(model: Model) -> None:
    fisher: Any = model.conv.fisher
    vectors = torch.randn(4, 3, *model.conv.weight.shape)
    expected = (vectors.flatten(2) @ dense(fisher)).view(vectors.shape)
    assert_equal(kronecker.product(fisher, vectors[0, 0]), expected[0, 0])
    assert_equal(kronecker.product(fisher, vectors.flatten(3).flatten(-1)), expected.flatten(3))
    biases = torch.randn(4, 3, C)
    _, found = kronecker.product(fisher, vectors.flatten(3), biases)
    assert_equal(found, biases @ fisher.kron.B)


def test_product_returns_the_dtype_it_is_given() -> None:
    kron, weight = regular(), torch.randn(3, 4)
    found = kronecker.product(kron, weight.float(), power=-1, damping=0.1)
    assert found.dtype == torch.float32
    assert_equal(found.double(), kronecker.product(kron, weight, power=-1, damping=0.1), 1e-6)


@pytest.mark.parametrize("root", [1, 2, 4])
def test_the_inverse_root_to_its_power_is_the_inverse(root: int) -> None:
    kron, damping = regular(), 0.2
    vectors = torch.eye(12).view(12, 3, 4)
    for _ in range(root):
        vectors = kronecker.inverse_root(kron, vectors, damping, root)
    assert_equal(vectors.flatten(1) @ dense(kron, damping), torch.eye(12))


def test_results_can_be_differentiated_with_respect_to_the_damping() -> None:
    kron, damping = regular(), torch.tensor(0.3, requires_grad=True)
    (found,) = torch.autograd.grad(kronecker.logdet(kron, damping), damping)
    assert_equal(found, torch.linalg.inv(dense(kron, 0.3)).trace())


def test_added_factors_are_those_of_the_joint_batch() -> None:
    model, x = Model(), torch.randn(N, R, 4)
    parts = []
    for part in x.split(N // 2):
        compute(model, part)
        parts.append({m: copy.deepcopy(m.fisher) for m in (model.fc, model.conv)})
    compute(model, x)
    for module in (model.fc, model.conv):
        first, second = (part[module] for part in parts)
        before = first.kron.A.clone()
        found = kronecker.add(first, second)
        assert_equal(found.kron.A, module.fisher.kron.A)
        assert_equal(found.kron.B, module.fisher.kron.B)
        found.kron.A.zero_()
        assert torch.equal(first.kron.A, before)  # not a view of what was added


# ------------------------------------------------------------------------------- saving and loading


def test_what_is_saved_is_loaded_to_the_last_bit(model: Model, tmp_path: Path) -> None:
    model.fc.fisher.update_inv(0.1)
    kronecker.save(model, tmp_path / "curvature.pt")
    other = Model()
    kronecker.load(other, tmp_path / "curvature.pt")
    for name in ("A", "B", "A_inv", "B_inv"):
        assert torch.equal(getattr(other.fc.fisher.kron, name), getattr(model.fc.fisher.kron, name))
    assert torch.equal(other.conv.fisher.kron.B, model.conv.fisher.kron.B)
    assert torch.equal(other.norm.fisher.unit.data, model.norm.fisher.unit.data)
    weight = torch.randn(5, 4)
    assert torch.equal(
        kronecker.product(other.fc.fisher, weight), kronecker.product(model.fc.fisher, weight)
    )


def test_a_file_of_another_model_changes_nothing(model: Model, tmp_path: Path) -> None:
    kronecker.save(model, tmp_path / "curvature.pt")
    model.fc = nn.Linear(7, 5)
    before = model.conv.fisher
    with pytest.raises(ValueError, match=r"'fc', whose weight is of sizes \(5, 7\)"):
        kronecker.load(model, tmp_path / "curvature.pt")
    assert model.conv.fisher is before


def test_saving_without_curvature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no curvature to save"):
        kronecker.save(Model(), tmp_path / "curvature.pt")
    assert not (tmp_path / "curvature.pt").exists()


# ---------------------------------------------------------------------------------------- bad input


def test_singular_factors_without_damping_are_refused(model: Model) -> None:
    for refused in (
        lambda: kronecker.logdet(model.conv.fisher),
        lambda: kronecker.inverse_root(model.conv.fisher, model.conv.weight),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match=r"singular.*prior precision"):
            refused()


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_a_negative_damping_is_refused(damping: float) -> None:
    for refused in (
        lambda: kronecker.logdet(regular(), damping),
        lambda: kronecker.product(regular(), torch.randn(3, 4), damping=damping),
    ):
        with pytest.raises(ValueError, match="damping has to be a number that is not negative"):
            refused()


def test_sizes_that_do_not_fit_are_refused() -> None:
    for weight in (torch.randn(4, 3), torch.randn(12), torch.randn(4, 3, 4, 1)):
        with pytest.raises(ValueError, match=r"4 inputs and 3 outputs. Give it as \(\*, 3, 4\)"):
            kronecker.product(regular(), weight)
    with pytest.raises(ValueError, match="B is 3 x 3"):
        kronecker.product(regular(), torch.randn(3, 4), torch.randn(4))
    with pytest.raises(ValueError, match="of different layers"):
        kronecker.add(regular(), Kron(torch.eye(1), torch.eye(3)))
    with pytest.raises(ValueError, match="root has to be positive"):
        kronecker.inverse_root(regular(), torch.randn(3, 4), root=0)


def test_curvature_without_kronecker_factors_is_refused(model: Model) -> None:
    config = asdl.PreconditioningConfig(damping=0.1, ignore_modules=["norm"])
    maker = asdl.KfacGradientMaker(model, config, shared_dim="reduce")
    x, y = torch.randn(N, R, 4), torch.randint(C, (N,))
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    for fisher in (model.fc.fisher, SymMatrix(), Kron(None, torch.eye(2)), None):
        with pytest.raises(ValueError, match="There are no Kronecker factors in"):
            kronecker.trace(fisher)
    with pytest.raises(ValueError, match="'swift_kron', which keeps the rows"):
        kronecker.trace(Kron(torch.randn(4, 9), torch.eye(2)))
