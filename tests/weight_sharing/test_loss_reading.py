"""What a loss is made of is read, and what is read is checked: the curvature is that of the loss.

Ground truth is ``torch.func.hessian`` of the loss with respect to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.autograd import assert_equal
from torch import Tensor, nn

import asdl_ws_plugin

pytestmark = pytest.mark.usefixtures("double")

Loss = Callable[[Tensor], Any]
N, R, D = 6, 4, 5
bce = F.binary_cross_entropy_with_logits


class Net(nn.Module):
    """A hidden layer below the logits ``(N, *, C)``; nothing mixes positions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(D, 3), nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


def compute(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    shared_dim: str = "expand",
    fisher_type: str = "fisher_exact",
    **options: Any,
) -> Any:
    config = FisherConfig(fisher_type, ["kron"], shared_dim=shared_dim, **options)
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(loss, maker.setup_model_call(model, x))
    maker.forward_and_backward()
    return maker


def positive_part(hessians: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(hessians)
    return vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT


def row_hessians(loss: Loss, logits: Tensor) -> Tensor:
    """``(rows, C, C)``, from the whole Hessian of the loss, which has to have nothing else."""
    num_classes, rows = logits.shape[-1], logits[..., 0].numel()
    whole = torch.func.hessian(loss)(logits.detach()).reshape(rows, num_classes, rows, num_classes)
    blocks = torch.stack([whole[r, :, r] for r in range(rows)])
    for r in range(rows):
        whole[r, :, r] = 0
    assert not whole.any(), "the loss mixes rows"
    return blocks


def expected_factors(model: Net, loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """B of the head and of the hidden layer: ``Σ_rows Jᵀ Λ J``, of the loss as it is."""
    hessians = positive_part(row_hessians(loss, model(x)))
    hidden = model.hidden(x).detach().reshape(-1, 3)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda h: model.head(torch.tanh(h))))(hidden)
    return hessians.sum(0), (jacobians.mT @ hessians @ jacobians).sum(0).detach()


def assert_curvature(model: Net, loss: Loss, x: Tensor) -> None:
    head, hidden = expected_factors(model, loss, x)
    assert_equal(model.head.fisher.kron.B, head)
    assert_equal(model.hidden.fisher.kron.B, hidden)


# ------------------------------------------------------------------------------- several calls


def labels(num_classes: int, *sizes: int) -> Tensor:
    return torch.randint(num_classes, sizes)


def steps(t: Tensor) -> Loss:
    return lambda z: sum(F.cross_entropy(z[:, k], t[:, k]) for k in range(R)) / R


def chunks(t: Tensor) -> Loss:
    """Pieces of different sizes, to save memory."""

    def loss(z: Tensor) -> Tensor:
        rows, flat = z.flatten(0, 1), t.flatten()
        parts = zip(rows.split([5, 12, 7]), flat.split([5, 12, 7]), strict=True)
        return sum(F.cross_entropy(a, b, reduction="sum") for a, b in parts) / len(flat)

    return loss


def unequal_steps(t: Tensor) -> Loss:
    """The later, the more a step counts; some labels are left out."""
    t = t.masked_fill(torch.rand(t.shape) < 0.3, -100)
    t[:, 0] = 1
    return lambda z: sum(
        (k + 1) * F.cross_entropy(z[:, k], t[:, k], reduction="sum") for k in range(R)
    )


SEVERAL: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Loss]]] = {
    "whole": ((N, R), 6, lambda t: lambda z: F.cross_entropy(z.flatten(0, 1), t.flatten())),
    "steps": ((N, R), 6, steps),
    "chunks": ((N, R), 6, chunks),
    "unequal steps": ((N, R), 6, unequal_steps),
    "two tasks": (
        (N,),
        6,
        lambda t: (
            lambda z: F.cross_entropy(z[:, :3], t % 3) + F.cross_entropy(z[:, 3:], t.flip(0) % 3)
        ),
    ),
    "two tasks a token": (
        (N, R),
        6,
        lambda t: (
            lambda z: (
                F.cross_entropy(z[..., :3].flatten(0, 1), t.flatten() % 3)
                + 2 * F.cross_entropy(z[..., 3:].movedim(-1, 1), t.flip(0) % 3)
            )
        ),
    ),
    "classes and outputs": (
        (N,),
        6,
        lambda t: (
            lambda z: (
                F.cross_entropy(z[:, :4], t % 4)
                + 0.1 * F.mse_loss(z[:, 4], t.double())
                + bce(z[:, 5:], (t[:, None] % 2).double(), reduction="sum")
            )
        ),
    ),
    "mixup": (
        (N,),
        6,
        lambda t: lambda z: 0.3 * F.cross_entropy(z, t) + 0.7 * F.cross_entropy(z, t.flip(0)),
    ),
    "a sum and a mean of the same logits": (
        (N,),
        6,
        lambda t: (
            lambda z: (
                F.cross_entropy(z, t, reduction="sum") + F.cross_entropy(z, t, label_smoothing=0.2)
            )
        ),
    ),
}
CASES = pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL.keys())


@CASES
@pytest.mark.parametrize("shared_dim", ["expand", "auto"])
def test_several_calls_add_up(case: Any, shared_dim: str):
    sizes, num_classes, make = case
    model, x = Net(num_classes), torch.randn(*sizes, D)
    loss = make(labels(num_classes, *sizes))
    maker = compute(model, loss, x, shared_dim)
    assert maker.plan.setting in (None, "expand" if len(sizes) > 1 else "reduce")
    if shared_dim == "expand":
        assert_curvature(model, loss, x)


@pytest.mark.parametrize("name", ["steps", "two tasks", "classes and outputs", "mixup"])
def test_samples_of_several_calls_are_unbiased(name: str):
    sizes, num_classes, make = SEVERAL[name]
    model, x = Net(num_classes), torch.randn(*sizes, D)
    loss = make(labels(num_classes, *sizes))
    assert_unbiased(model, loss, x)


def assert_unbiased(model: Net, loss: Loss, x: Tensor, count: int = 200) -> None:
    config = FisherConfig("fisher_mc", ["kron"], shared_dim="expand")
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(loss, maker.setup_model_call(model, x))
    samples = []
    for _ in range(count):
        maker.forward_and_backward()
        samples.append(model.hidden.fisher.kron.B)
    _, expected = expected_factors(model, loss, x)
    stacked = torch.stack(samples)
    error = stacked.std(0) / count**0.5
    assert error.norm() < 0.25 * expected.norm(), "too few samples to tell"
    assert ((stacked.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_the_empirical_fisher_of_mixed_labels_is_that_of_soft_ones():
    """Two calls of the same logits are one term with the sum of their weights."""
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    soft = 0.3 * F.one_hot(t, 6).double() + 0.7 * F.one_hot(t.flip(0), 6).double()
    compute(model, SEVERAL["mixup"][2](t), x, fisher_type="fisher_emp")
    z = model(x)
    g = z.softmax(-1) - soft
    assert_equal(model.head.fisher.kron.B, (g.mT @ g / N).detach())


@pytest.mark.parametrize("name", ["steps", "chunks"])
def test_the_empirical_fisher_of_pieces_is_that_of_the_whole(name: str):
    sizes, num_classes, make = SEVERAL[name]
    model, x, t = Net(num_classes), torch.randn(*sizes, D), labels(6, *sizes)
    z = model(x)
    g = (z.softmax(-1) - F.one_hot(t, 6)).flatten(0, 1).detach()
    compute(model, make(t), x, fisher_type="fisher_emp")
    assert_equal(model.head.fisher.kron.B, g.mT @ g / len(g))


def test_an_explicit_data_size_counts_examples_for_several_calls_as_for_one():
    model, x, t = Net(6), torch.randn(N, R, D), labels(6, N, R)
    found = []
    for name in ("whole", "steps", "chunks"):
        compute(model, SEVERAL[name][2](t), x, data_size=N)
        found.append(model.hidden.fisher.kron.B)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


# ------------------------------------------------------------------- what is none of torch's three

T, ALPHA = 2.0, 0.9


def distillation(t: Tensor) -> Loss:
    teacher = torch.randn(len(t), 6)

    def loss(z: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(z / T, 1), F.softmax(teacher / T, 1), reduction="batchmean")
        return ALPHA * T * T * soft + (1 - ALPHA) * F.cross_entropy(z, t)

    return loss


def focal(t: Tensor) -> Loss:
    def loss(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1).gather(-1, t[:, None])
        return -((1 - log_p.exp()) ** 2 * log_p).mean()

    return loss


def by_hand_with_padding(t: Tensor) -> Loss:
    kept = torch.rand(len(t), 6) < 0.5
    kept[4:] = False
    y = torch.randint(2, (len(t), 6)).double()

    def loss(z: Tensor) -> Tensor:
        terms = z.relu() - z * y + torch.log(1 + torch.exp(-z.abs()))
        return torch.where(kept, terms, 0.0).sum() / kept.sum()

    return loss


def policy_gradient(t: Tensor) -> Loss:
    """Advantages of both signs, and a bonus for entropy: the Hessians are not all positive."""
    advantages = torch.randn(len(t))

    def loss(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)
        bonus = 0.1 * (log_p.exp() * log_p).sum(-1)
        return (bonus - advantages * log_p.gather(-1, t[:, None])[:, 0]).mean()

    return loss


UNREAD: dict[str, Callable[[Tensor], Loss]] = {
    "distillation": distillation,
    "focal": focal,
    "by hand, with padding": by_hand_with_padding,
    "policy gradient": policy_gradient,
    "z-loss": lambda t: lambda z: F.cross_entropy(z, t) + 0.1 * z.logsumexp(-1).square().mean(),
    "penalty": lambda t: lambda z: F.cross_entropy(z, t) + z.square().mean(),
    "huber": lambda t: lambda z: F.huber_loss(z, t[:, None].expand_as(z).double()),
    "poisson": lambda t: lambda z: F.poisson_nll_loss(z, t[:, None].expand_as(z).double()),
    "labels computed from the logits": lambda t: lambda z: F.cross_entropy(z, (z / T).softmax(-1)),
    "nll of what is no log-probability": lambda t: (
        lambda z: F.nll_loss(z.square() / -2, t) + F.nll_loss(z.log_softmax(-1), t)
    ),
    "one call and itself by hand": lambda t: (
        lambda z: F.cross_entropy(z, t) - z.log_softmax(-1).gather(-1, t[:, None]).mean()
    ),
}


@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD.keys())
@pytest.mark.parametrize("loss_type", ["auto", "cross_entropy"])
def test_a_part_that_is_not_read_has_the_hessian_of_the_loss(
    make: Callable[[Tensor], Loss], loss_type: str
):
    model, x = Net(6), torch.randn(N, D)
    loss = make(labels(6, N))
    compute(model, loss, x, loss_type=loss_type)
    assert_curvature(model, loss, x)


@pytest.mark.parametrize("name", ["distillation", "by hand, with padding", "policy gradient"])
def test_samples_of_a_part_that_is_not_read_are_unbiased(name: str):
    model, x = Net(6), torch.randn(N, D)
    assert_unbiased(model, UNREAD[name](labels(6, N)), x)


@pytest.mark.parametrize("sizes", [(N, R), (R, N, 2)], ids=str)
def test_hessians_of_tokens(sizes: tuple[int, ...]):
    """Each row is of its own position of its example."""
    model, x, t = Net(6), torch.randn(*sizes, D), labels(6, *sizes)

    def loss(z: Tensor) -> Tensor:
        return -z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).mean()

    assert compute(model, loss, x, "auto").plan.setting == "expand"
    compute(model, loss, x)
    assert_curvature(model, loss, x)


@pytest.mark.parametrize("sizes", [(N,), (N, 1)])
def test_hessians_of_a_single_output(sizes: tuple[int, ...]):
    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(-1, *sizes[1:])

    model, x, y = Single(1), torch.randn(N, D), torch.rand(sizes)
    compute(model, lambda z: F.huber_loss(z, y), x, "reduce")
    second = torch.func.hessian(lambda z: F.huber_loss(z, y))(model(x).detach())
    assert_equal(model.head.fisher.kron.B, second.sum().reshape(1, 1))


def test_the_empirical_fisher_of_a_distillation_has_the_scale_of_a_mean_over_rows():
    model, x = Net(6), torch.randn(N, D)
    loss = distillation(labels(6, N))
    compute(model, loss, x, fisher_type="fisher_emp")
    z = model(x)
    (g,) = torch.autograd.grad(loss(z), z)
    assert_equal(model.head.fisher.kron.B, N * g.mT @ g)


@pytest.mark.filterwarnings("ignore:The loss calls none of torch's")
def test_the_empirical_fisher_by_hand_is_that_by_torch():
    """Rows and labels that are left out do not count in the scale."""
    model, x = Net(6), torch.randn(N, D)
    kept, y = torch.rand(N, 6) < 0.5, torch.randint(2, (N, 6)).double()
    kept[4:] = False
    terms: list[Callable[[Tensor], Tensor]] = [
        lambda z: bce(z, y, reduction="none"),
        lambda z: z.relu() - z * y + torch.log(1 + torch.exp(-z.abs())),
    ]
    found = []
    for term in terms:
        compute(
            model,
            lambda z, term=term: torch.where(kept, term(z), 0.0).sum() / kept.sum(),
            x,
            fisher_type="fisher_emp",
        )
        found.append(model.hidden.fisher.kron.B)
    assert_equal(found[1], found[0])


def test_a_scale_that_is_assumed_is_said():
    model, x = Net(6), torch.randn(N, D)
    with pytest.warns(UserWarning, match="what it averages over is not known"):
        compute(model, focal(labels(6, N)), x, fisher_type="fisher_emp")


def test_a_part_that_comes_to_nothing_is_no_part():
    """The graph has a way around the call, but no gradient comes along it: the call is read."""
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    plain = compute(model, lambda z: F.cross_entropy(z, t), x, data_size=1)
    expected = model.hidden.fisher.kron.B
    compute(model, lambda z: F.cross_entropy(z, t) + 0 * z.sum(), x, data_size=1)
    assert torch.equal(model.hidden.fisher.kron.B, expected)
    assert plain.plan.setting is None


ORDER = torch.tensor([0, 0, 1, 2, 5, 5])


OF_LOGITS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Loss]]] = {
    "temperature": ((N,), lambda t: lambda z: F.cross_entropy(z / T, t)),
    "soft cap": ((N,), lambda t: lambda z: F.cross_entropy(3 * z / 3, t)),
    "in float32 and back": ((N,), lambda t: lambda z: F.cross_entropy(z.clone() * 1.0, t)),
    "rows twice": ((N,), lambda t: lambda z: F.cross_entropy(z[ORDER], t)),
    "tasks as rows": (
        (N,),
        lambda t: lambda z: F.cross_entropy(z.unflatten(1, (2, 3)).flatten(0, 1), t.repeat(2) % 3),
    ),
}


@pytest.mark.parametrize("case", OF_LOGITS.values(), ids=OF_LOGITS.keys())
def test_a_call_of_what_is_computed_from_the_logits(case: Any):
    """Each logit may be a part of one term; where it is one of several, the Hessian decides."""
    sizes, make = case
    model, x = Net(6), torch.randn(*sizes, D)
    loss = make(labels(6, *sizes))
    assert_unbiased(model, loss, x, 100)
    if make is not OF_LOGITS["tasks as rows"][1]:  # several terms of a row
        compute(model, loss, x)
        assert_curvature(model, loss, x)


@pytest.mark.parametrize("positions", [0, 1])
def test_a_loss_that_pools_positions_has_a_term_for_each_example(positions: int):
    """With the batch first, or second."""
    model, x, t = Net(6), torch.randn((N, R, D) if positions else (R, N, D)), labels(6, N)
    rules = "reduce" if positions else ["reduce", ("", "reduce", "sequence_first")]
    config = FisherConfig("fisher_mc", ["kron"], shared_dim=rules, n_mc_samples=150)
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(
        lambda z: F.cross_entropy(z.mean(positions), t), maker.setup_model_call(model, x)
    )
    maker.forward_and_backward()
    z = model(x).mean(positions)
    expected = row_hessians(lambda z: F.cross_entropy(z, t), z).sum(0)
    assert (model.head.fisher.kron.B - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_mc"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z.mean(0), torch.zeros(6)),
        lambda z: F.cross_entropy(z[::2] + z[1::2], torch.zeros(N // 2, dtype=torch.long)),
        lambda z: bce(z[:3, 0] - z[3:, 0], torch.ones(3)),
    ],
    ids=["moments of a batch", "sums of two", "ranking"],
)
def test_a_term_of_several_examples_is_refused(loss: Loss, fisher_type: str):
    with pytest.raises(ValueError, match=r"mixes rows.*fisher_emp"):
        compute(Net(6), loss, torch.randn(N, D), fisher_type=fisher_type)


def contrastive(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z @ z.mT / 0.1, torch.arange(len(z)).roll(1))


def ctc(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1).transpose(0, 1)
    lengths = torch.full((N,), R), torch.full((N,), 2)
    return F.ctc_loss(log_p, torch.ones(N, 2, dtype=torch.long) + torch.arange(2), *lengths)


class Once(torch.autograd.Function):
    """A fused loss, whose backward pass autograd does not see into."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.exp().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].exp()


REFUSED: dict[str, tuple[tuple[int, ...], Loss, str]] = {
    "rows of examples": ((N,), lambda z: z.softmax(0).square().sum(), "mixes rows"),
    "rows of positions": ((N, R), lambda z: z.softmax(1).square().sum(), "mixes rows"),
    "ctc": ((N, R), ctc, "differentiated twice|mixes rows"),
    "piecewise linear": ((N,), lambda z: z.abs().mean(), "piecewise linear"),
    "once differentiable": ((N,), Once.apply, "cannot differentiate twice"),
    "no number": (
        (N,),
        lambda z: (
            F.cross_entropy(z, z.detach().argmax(-1)) + (z - z.detach()).square().sum() ** 0.5
        ),
        "not finite",
    ),
}


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_mc"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_hessian_of_rows_is_refused(case: Any, fisher_type: str):
    sizes, loss, message = case
    model = Net(6)
    with pytest.raises((ValueError, FloatingPointError), match=f"(?s)({message}).*fisher_emp"):
        compute(model, loss, torch.randn(*sizes, D), fisher_type=fisher_type)
    assert not hasattr(model.head, "fisher")


def test_a_contrastive_loss_is_refused_but_by_the_empirical_fisher():
    """Its call of cross_entropy is of similarities, a function of the logits that mixes rows."""
    model, x = Net(6), torch.randn(N, D)
    compute(model, contrastive, x, fisher_type="fisher_emp")
    z = model(x)
    (g,) = torch.autograd.grad(contrastive(z), z)
    assert_equal(model.head.fisher.kron.B, N * g.mT @ g)
    for fisher_type in ("fisher_exact", "fisher_mc"):
        with pytest.raises(ValueError, match=r"mixes rows.*fisher_emp"):
            compute(model, contrastive, x, fisher_type=fisher_type)


def test_hessians_that_are_too_large_are_refused():
    model, x = nn.Sequential(nn.Linear(D, 3000)), torch.randn(16, D)
    with pytest.raises(ValueError, match=r"16 rows with 3000 classes.*144,000,000.*fisher_emp"):
        compute(model, lambda z: z.logsumexp(-1).square().mean(), x)


def test_a_variance_needs_a_squared_error_that_is_read():
    with pytest.raises(ValueError, match="var is the variance of the Gaussian"):
        compute(Net(6), lambda z: z.square().mean(), torch.randn(N, D), var=0.5)


# ------------------------------------------------------------------------------- forms of a loss


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch._dynamo.*:UserWarning")
@pytest.mark.parametrize("how", ["compiled", "compiled inside", "module"])
def test_a_compiled_loss_is_read_as_any_other(fisher_type: str, how: str):
    """Padding, which the labels leave out, does not enter B."""
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    t[4:] = -100
    compute(model, lambda z: F.cross_entropy(z, t), x, fisher_type=fisher_type)
    expected = model.hidden.fisher.kron.B
    compiled = torch.compile(
        nn.CrossEntropyLoss() if how == "module" else lambda z, t: F.cross_entropy(z, t),
        backend="eager",
    )
    compiled(torch.randn(N, 6), t)
    loss = (lambda z: 1.0 * compiled(z, t)) if how == "compiled inside" else None
    config = FisherConfig(fisher_type, ["kron"], shared_dim="expand")
    maker = get_fisher_maker(model, config)
    dummy = maker.setup_model_call(model, x)
    if loss is None:
        maker.setup_loss_call(compiled, dummy, t)
    else:
        maker.setup_loss_call(loss, dummy)
    maker.forward_and_backward()
    assert_equal(model.hidden.fisher.kron.B, expected, 1e-14)
    torch._dynamo.reset()


def algoperf(t: Tensor, weights: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
    def loss(z: Tensor) -> dict[str, Tensor]:
        per_example = F.cross_entropy(z, t, reduction="none") * weights
        summed, count = per_example.sum(), weights.sum()
        return {"summed": summed, "n_valid_examples": count, "per_example": per_example}

    return loss


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp"])
def test_a_dictionary_is_the_mean_over_the_valid_examples(fisher_type: str):
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    weights = torch.tensor([1.0, 1, 1, 0, 1, 0])
    plain = t.masked_fill(weights == 0, -100)
    compute(model, lambda z: F.cross_entropy(z, plain), x, fisher_type=fisher_type)
    expected = model.hidden.fisher.kron.B
    compute(model, algoperf(t, weights), x, fisher_type=fisher_type)
    assert_equal(model.hidden.fisher.kron.B, expected)


def test_a_dictionary_says_what_a_loss_by_hand_averages_over():
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)

    def loss(z: Tensor) -> dict[str, Any]:
        terms = -z.log_softmax(-1).gather(-1, t[:, None])
        return {"summed": terms.sum(), "n_valid_examples": 2 * N}

    compute(model, loss, x, fisher_type="fisher_emp")
    g = (model(x).softmax(-1) - F.one_hot(t, 6)).detach()
    assert_equal(model.head.fisher.kron.B, g.mT @ g / (2 * N))


def test_training_with_a_dictionary_has_the_loss_and_the_gradient_of_the_mean():
    """On steps with curvature and without."""
    model, x, t, weights = Net(6), torch.randn(N, D), labels(6, N), torch.rand(N)
    mean = F.cross_entropy(model(x), t, reduction="none") @ weights / weights.sum()
    expected = torch.autograd.grad(mean, model.head.weight)[0]
    config = asdl.PreconditioningConfig(
        damping=1e-3, curvature_upd_interval=2, ignore_modules=["head"]
    )
    gm = asdl.KfacGradientMaker(model, config, shared_dim="reduce")
    for _ in range(3):
        model.zero_grad()
        gm.setup_loss_call(algoperf(t, weights), gm.setup_model_call(model, x))
        _, loss = gm.forward_and_backward()
        assert_equal(loss.detach().reshape(1), mean.detach().reshape(1), 1e-14)
        assert_equal(model.head.weight.grad, expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda loss: (loss, 1.0), r"a tuple of \(Tensor, float\).*\[0\]"),
        (lambda loss: [loss], r"a list of \(Tensor\)"),
        (lambda loss: {"loss": loss}, "a dict with the keys 'loss'"),
        (lambda loss: None, "a value of the type NoneType"),
        (lambda loss: loss.item(), "a value of the type float"),
    ],
)
def test_what_is_no_loss_is_refused_by_its_name(value: Callable[[Tensor], Any], message: str):
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    config = asdl.PreconditioningConfig(damping=1e-3, curvature_upd_interval=2)
    gm = asdl.KfacGradientMaker(model, config, shared_dim="reduce")
    for of in (value, lambda loss: loss, value):  # on steps with curvature and without
        gm.setup_loss_call(
            lambda z, of=of: of(F.cross_entropy(z, t)), gm.setup_model_call(model, x)
        )
        if of is value:
            with pytest.raises(TypeError, match=message):
                gm.forward_and_backward()
        else:
            gm.forward_and_backward()


@pytest.mark.parametrize("fisher_type", ["fisher_exact", "fisher_emp"])
@pytest.mark.parametrize("where", ["loss", "model"])
@pytest.mark.parametrize("by", ["torch", "hand"])
@pytest.mark.filterwarnings("ignore:The loss calls none of torch's")
def test_a_squeezed_tail_batch_of_one(where: str, by: str, fisher_type: str):
    class Squeezing(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z.squeeze() if where == "model" else z

    model, x, y = Squeezing(1), torch.randn(1, D), torch.ones(())

    def loss(z: Tensor) -> Tensor:
        z = z.squeeze()
        return bce(z, y) if by == "torch" else z.relu() - z * y + torch.log1p(torch.exp(-z.abs()))

    compute(model, loss, x, "reduce", fisher_type)
    p = model(x).detach().sigmoid().reshape(1, 1)
    expected = p * (1 - p) if fisher_type == "fisher_exact" else (p - 1) ** 2
    assert_equal(model.head.fisher.kron.B, expected)


def test_a_number_that_is_not_the_logits_of_one_example_is_refused():
    class LossFirst(Net):
        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)
            return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long)), z

    model = LossFirst(6)
    maker = get_fisher_maker(model, FisherConfig("fisher_exact", ["kron"], shared_dim="expand"))
    maker.setup_loss_repr(maker.setup_model_call(model, torch.randn(N, D))[0])
    with pytest.raises(ValueError, match=r"single number.*setup_logits_repr"):
        maker.forward_and_backward()


# ----------------------------------------------------------------------------- the type of the loss


@pytest.mark.parametrize("positional", [False, True])
def test_a_makers_type_that_is_left_out_is_read(positional: bool):
    """ASDL's default, cross-entropy, is no claim of the user's; the same word, given, is one."""
    model, x, y = Net(3), torch.randn(N, D), torch.rand(N, 3)
    config = asdl.PreconditioningConfig(damping=1e-3, ema_decay=1.0)
    for maker_class in (asdl.KfacGradientMaker, asdl_ws_plugin.KfacGradientMaker):
        gm = maker_class(model, config, "fisher_exact", shared_dim="reduce")
        for loss in (F.mse_loss, bce):
            gm.setup_loss_call(loss, gm.setup_model_call(model, x), y)
            gm.forward_and_backward()
            second = row_hessians(lambda z, loss=loss: loss(z, y), model(x)).sum(0)
            assert_equal(model.head.fisher.kron.B, second)
        args, kwargs = ("cross_entropy",), {}
        if not positional:
            args, kwargs = (), {"loss_type": "cross_entropy"}
        gm = maker_class(model, config, "fisher_exact", *args, shared_dim="reduce", **kwargs)
        gm.setup_loss_call(F.mse_loss, gm.setup_model_call(model, x), y)
        with pytest.raises(
            ValueError, match=r"loss_type is 'cross_entropy', but the loss is 'mse'"
        ):
            gm.forward_and_backward()


def test_a_type_that_is_only_one_of_several_is_refused():
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    loss = SEVERAL["classes and outputs"][2](t)
    with pytest.raises(
        ValueError, match=r"loss is 'cross_entropy' and 'mse' and 'binary_cross_entropy'\. Leave it"
    ):
        compute(model, loss, x, loss_type="cross_entropy")


def test_without_a_loss_the_type_has_to_be_given():
    model = Net(6)
    config = FisherConfig("fisher_exact", ["kron"], shared_dim="expand", data_size=N)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, torch.randn(N, D))
    with pytest.raises(ValueError, match="no loss to read the type from"):
        maker.forward_and_backward()


def test_types_that_are_none():
    with pytest.raises(ValueError, match=r"loss_type has to be one of .*auto.*'hinge'"):
        get_fisher_maker(Net(6), FisherConfig("fisher_mc", ["kron"], "hinge", shared_dim="expand"))
    with pytest.raises(ValueError, match="'auto' needs shared_dim"):
        get_fisher_maker(Net(6), FisherConfig("fisher_mc", ["kron"], "auto"))


# ---------------------------------------------------------------------------- the scale of a mean


@pytest.mark.parametrize("num_outputs", [1, 3, 55])
@pytest.mark.parametrize("function", [bce, F.mse_loss], ids=["bce", "mse"])
@pytest.mark.parametrize("how", ["mean", "sum", "masked mean", "masked sum", "masked by index"])
def test_the_product_of_the_factors_is_the_hessian_of_the_loss(
    num_outputs: int, function: Any, how: str
):
    """Of a single linear layer and a single example, where the product is exact; and B of several
    examples is the sum of their Hessians.
    """
    model = nn.Sequential(nn.Linear(D, num_outputs, bias=False))
    kept = torch.rand(1, num_outputs) < 0.5
    kept[0, 0] = True
    x, y = torch.randn(1, D), torch.rand(1, num_outputs)

    def loss(z: Tensor) -> Tensor:
        if how in ("mean", "sum"):
            return function(z, y, reduction=how)
        if how == "masked by index":
            return function(z[kept], y[kept])
        terms = torch.where(kept, function(z, y, reduction="none"), 0.0).sum()
        return terms / kept.sum() if how == "masked mean" else terms

    compute(model, loss, x)
    A, B = model[0].fisher.kron.A, model[0].fisher.kron.B
    if how == "masked by index":  # boolean indices do not go through torch.func
        weight = function(model(x).detach(), y, reduction="none").numel() and kept / kept.sum()
        second = torch.func.hessian(
            lambda w: (function(x @ w.mT, y, reduction="none") * weight).sum()
        )(model[0].weight.detach())
    else:
        second = torch.func.hessian(lambda w: loss(x @ w.mT))(model[0].weight.detach())
    size = num_outputs * D
    assert_equal(torch.kron(B, A), second.reshape(size, size))


@pytest.mark.parametrize("function", [bce, F.mse_loss], ids=["bce", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_over_outputs_has_the_curvature_of_the_loss_for_every_fisher_type(
    function: Any, reduction: str
):
    """Monte-Carlo samples are unbiased; the empirical Fisher has the scale of the same terms."""
    model, x, y = Net(3), torch.randn(N, D), torch.rand(N, 3)

    def loss(z: Tensor) -> Tensor:
        return function(z, y, reduction=reduction)

    compute(model, loss, x)
    assert_curvature(model, loss, x)
    assert_unbiased(model, loss, x)
    compute(model, loss, x, fisher_type="fisher_emp")
    z = model(x)
    (g,) = torch.autograd.grad(loss(z), z)
    num_terms = 3 * N if reduction == "mean" else 1
    assert_equal(model.head.fisher.kron.B, num_terms * g.mT @ g)


@pytest.mark.parametrize("var", [0.25, torch.tensor([0.5, 1.0, 3.0])], ids=["number", "vector"])
def test_a_variance_divides_the_curvature_of_a_squared_error(var: Any):
    model, x, y = Net(3), torch.randn(N, D), torch.rand(N, 3)
    compute(model, lambda z: F.mse_loss(z, y), x, var=var)
    precision = torch.eye(3) / var
    assert_equal(model.head.fisher.kron.B, 2 / 3 * precision)


def test_an_explicit_data_size_means_what_it_meant():
    """Examples, and ASDL's half of a squared error."""
    model, x, y = Net(3), torch.randn(N, D), torch.rand(N, 3)
    compute(model, lambda z: F.mse_loss(z, y), x, data_size=2 * N)
    assert_equal(model.head.fisher.kron.B, torch.eye(3) / 2)


# --------------------------------------------------------------------------- products, and the cost


@pytest.mark.parametrize("seed", [1, None])
def test_labels_are_held_while_products_are_taken(seed: int | None):
    """Power iteration has one matrix, which is that of the curvature of the same draw."""
    model, x, t = nn.Sequential(nn.Linear(D, 3)), torch.randn(N, D), labels(3, N)
    config = FisherConfig("fisher_mc", ["layer_wise"], shared_dim="reduce", seed=seed, data_size=N)
    maker = get_fisher_maker(model, config)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
    torch.manual_seed(3)
    found = []
    for _ in range(2 if seed else 1):
        found.append(maker.fisher_eig(max_iters=2000, tol=1e-13)[0][0])
    if seed:
        maker.forward_and_backward()
        expected = torch.linalg.eigvalsh(model[0].fisher.data)[-1]
        assert found == pytest.approx([float(expected)] * 2, rel=1e-5)
        first = model[0].fisher.data
        maker.forward_and_backward()
        assert not torch.equal(model[0].fisher.data, first)  # a batch has labels of its own
        density, _ = maker.fisher_esd(num_iter=4)
        assert torch.isfinite(torch.as_tensor(density)).all()


@pytest.mark.parametrize("form", ["call", "lambda", "scaled"])
def test_a_plain_loss_costs_no_further_pass(form: str, monkeypatch: pytest.MonkeyPatch):
    """One pass for the curvature; a loss that is not the call itself needs one of its own graph."""
    model, x, t = Net(6), torch.randn(N, D), labels(6, N)
    forms: dict[str, Any] = {
        "call": F.cross_entropy,
        "lambda": lambda z, t: F.cross_entropy(z, t),
        "scaled": lambda z, t: 0.5 * F.cross_entropy(z, t),
    }
    maker = get_fisher_maker(model, FisherConfig("fisher_mc", ["kron"], shared_dim="expand"))
    maker.setup_loss_call(forms[form], maker.setup_model_call(model, x), t)
    for _ in range(4):  # the first batches settle layouts
        maker.forward_and_backward()
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(a) or grad(*a, **k))
    maker.forward_and_backward()
    assert len(passes) == (2 if form == "scaled" else 1)
