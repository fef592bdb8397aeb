"""A gradient maker's ``state_dict``: training that is interrupted anywhere goes on as if it had not
been.
"""

import copy
import io
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.symmatrix import SymMatrix
from oracles.by_example import kfac
from torch import nn

import asdl_ws_plugin

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 4, 5, 3, 2
STEPS = 7


class Model(nn.Module):
    """Layers of every kind of curvature, one of them not called on every step, and one that changes
    the layout.
    """

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.extra, self.head = (
            nn.Linear(D, D),
            nn.LayerNorm(D),
            nn.Linear(D, D),
            nn.Linear(D, C),
        )
        self.conv = nn.Conv2d(1, 2, 2)
        self.mix = nn.Linear(2, D)
        self.use_extra = True

    def forward(self, x):
        x = torch.tanh(self.norm(self.fc1(x)))
        if self.use_extra:
            x = x + self.extra(x.transpose(0, 1)).transpose(
                0, 1
            )  # sequence first, of sizes that tell
        y = torch.tanh(self.conv(x.unsqueeze(1))).mean((2, 3))
        return self.head(x.mean(1) + self.mix(y))


def batches():
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        x = torch.randn(N, R, D, generator=generator)
        yield step, x, torch.randint(C, (N,), generator=generator)


def train(model, maker, optimizer, first=0, last=STEPS):
    history = []
    for step, x, target in batches():
        if not first <= step < last:
            continue
        model.use_extra = step not in (2, 3)
        optimizer.zero_grad()
        dummy = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, dummy, target)
        _, loss = maker.forward_and_backward()
        history.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
        optimizer.step()
    return history


def make(**options):
    torch.manual_seed(0)
    model = Model()
    options = {
        "data_size": N,
        "damping": 1e-2,
        "curvature_upd_interval": 2,
        "preconditioner_upd_interval": 4,
        **options,
    }
    if options.get("ema_decay") is None:
        options.pop("curvature_upd_interval"), options.pop("ema_decay")
        options["preconditioner_upd_interval"] = 3
    maker = kfac(model, options.pop("shared_dim", "auto"), **options)
    return model, maker, torch.optim.SGD(model.parameters(), lr=0.1)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:Layer 'extra' was not called")
@pytest.mark.parametrize(
    ("fisher_type", "seed"), [("fisher_emp", None), ("fisher_mc", None), ("fisher_mc", 3)]
)
@pytest.mark.parametrize("ema_decay", [None, 0.3])
@pytest.mark.parametrize("interrupted_after", range(1, STEPS))
def test_it_goes_on_as_if_it_had_not_been_interrupted(
    interrupted_after, ema_decay, fisher_type, seed
):
    """Bit for bit, from any step of an interval."""
    options = {"ema_decay": ema_decay, "fisher_type": fisher_type, "seed": seed}
    model, maker, optimizer = make(**options)
    expected = train(model, maker, optimizer)

    model, maker, optimizer = make(**options)
    train(model, maker, optimizer, last=interrupted_after)
    state = through_a_file(
        {"model": model.state_dict(), "maker": maker.state_dict(), "rng": torch.get_rng_state()}
    )

    model, maker, optimizer = make(**options)
    model.load_state_dict(state["model"])
    maker.load_state_dict(state["maker"])
    torch.set_rng_state(state["rng"])
    resumed = train(model, maker, optimizer, first=interrupted_after)
    for found, want in zip(resumed, expected[interrupted_after:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.filterwarnings("ignore:Layer 'extra' was not called")
def test_what_batches_have_settled():
    model, maker, optimizer = make(ema_decay=0.3)
    train(model, maker, optimizer, last=3)
    state = maker.state_dict()
    assert state["weight_sharing"]["setting"] == "reduce" and state["step"] == 3
    assert state["weight_sharing"]["layouts"]["extra"] == "sequence_first"
    assert list(state["weight_sharing"]["unseen"]) == ["extra"]
    other, other_maker, _ = make(ema_decay=0.3)
    other_maker.load_state_dict(state)
    assert (
        other_maker.setting == "reduce"
        and other_maker.state_dict()["weight_sharing"] == state["weight_sharing"]
    )
    assert other.extra in other_maker.fisher_maker.unseen


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("full", ["data", "inv"]),
        ("layer_wise", ["data", "inv"]),
        ("unit_wise", ["unit.data", "unit.inv"]),
        ("diag", ["diag.weight", "diag.weight_inv"]),
        ("kron", ["kron.A", "kron.A_inv", "kron.B", "kron.B_inv"]),
    ],
)
def test_every_shape_is_resumed(shape, parts):
    from asdl import PreconditioningConfig
    from asdl.precondition.natural_gradient import NaturalGradientMaker

    def run(state=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C))
        maker = NaturalGradientMaker(
            model,
            PreconditioningConfig(damping=0.1, ema_decay=0.5, curvature_upd_interval=2),
            fisher_shape=shape,
            fisher_type="fisher_emp",
            shared_dim="expand",
        )
        if state is not None:
            maker.load_state_dict(state)
        x, target = torch.randn(2, N, D), torch.randint(C, (2, N))
        for i in range(state is not None, 2):
            model.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x[i]), target[i])
            maker.forward_and_backward()
            if i == 0:
                first = copy.deepcopy(maker.state_dict())
        return (None if state is not None else first), [p.grad for p in model.parameters()]

    state, expected = run()
    (first, *_) = state["curvature"].values()
    assert set(parts) <= set(first)
    _, found = run(state)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_eigenbasis_of_ekfac_is_resumed():
    from asdl import EkfacGradientMaker, PreconditioningConfig

    grads = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, C))
        config = PreconditioningConfig(damping=0.1, preconditioner_upd_interval=2)
        maker = EkfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
        x, target = torch.randn(2, N, D), torch.randint(C, (2, N))
        for i in range(2):
            if resumed and i == 1:
                state = through_a_file(maker.state_dict())
                del model[0].fisher
                maker = EkfacGradientMaker(
                    model, config, fisher_type="fisher_emp", shared_dim="reduce"
                )
                maker.load_state_dict(state)
            model.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x[i]), target[i])
            maker.forward_and_backward()
        grads.append(model[0].weight.grad)
    assert torch.equal(*grads)


def test_tensors_that_layers_share_stay_shared():
    """The blocks of a fused layer have one A; a copy for each would be inverted once for each."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    A = torch.eye(D)
    maker = kfac(model, "expand", ema_decay=0.5)
    maker.setup_loss_call(
        F.cross_entropy, maker.setup_model_call(model, torch.randn(N, D)), torch.arange(N) % D
    )
    maker.forward_and_backward()
    for layer in model:
        layer.fisher = SymMatrix(kron_A=A, kron_B=torch.eye(D))
    maker.load_state_dict(through_a_file(maker.state_dict()))
    assert (
        len({id(layer.fisher.kron.A) for layer in model}) == 1 and model[0].fisher.kron.A is not A
    )
    assert len({id(layer.fisher.kron.B) for layer in model}) == 3


def test_a_state_with_the_step_alone_still_loads():
    """What ASDL 0.1a5 wrote."""
    model, maker, optimizer = make(ema_decay=0.3)
    train(model, maker, optimizer, last=1)
    before = model.fc1.fisher
    maker.load_state_dict({"step": 8})
    assert maker.state["step"] == 8 and model.fc1.fisher is before


@pytest.mark.filterwarnings("ignore:Layer 'extra' was not called")
def test_loading_a_state_copies_it():
    model, maker, optimizer = make(ema_decay=0.3)
    train(model, maker, optimizer, last=1)
    state = maker.state_dict()
    before = copy.deepcopy(state["curvature"]["fc1"])
    other, other_maker, other_optimizer = make(ema_decay=0.3)
    other_maker.load_state_dict(state)
    assert other.fc1.fisher.kron.A is not model.fc1.fisher.kron.A
    train(other, other_maker, other_optimizer, first=1, last=3)
    assert all(
        torch.equal(state["curvature"]["fc1"][key], value)
        for key, value in before.items()
        if key != "trained"
    )


def test_the_state_of_another_model_is_refused():
    model, maker, optimizer = make(ema_decay=0.3)
    train(model, maker, optimizer, last=1)
    state, before = maker.state_dict(), model.fc1.fisher
    with pytest.raises(ValueError, match="'missing'"):
        maker.load_state_dict({**state, "curvature": {"missing": state["curvature"]["fc1"]}})
    with pytest.raises(ValueError, match=r"kron.A of sizes \(2, 2\) for the module 'fc1'"):
        maker.load_state_dict({**state, "curvature": {"fc1": state["curvature"]["mix"]}})
    assert model.fc1.fisher is before


def test_a_state_of_other_strategies_or_of_something_else_is_refused():
    model = nn.Sequential(nn.Linear(D, C))
    makers = [kfac(model, shared_dim, ema_decay=0.5) for shared_dim in ("expand", "reduce")]
    with pytest.raises(
        ValueError,
        match="Layer '0': the state has its curvature under 'expand', not under 'reduce'",
    ):
        makers[1].load_state_dict(makers[0].state_dict())
    with pytest.raises(ValueError, match="no 'step'"):
        makers[1].load_state_dict({})


# ------------------------------------------------------------------ states with blocks of a factor


def saved_with(max_side: int | None, **options: Any) -> tuple[nn.Module, Any]:
    """A convolution whose channels no number of blocks divides, and a layer that is wide."""
    torch.manual_seed(0)
    layers = nn.Conv2d(10, 8, 3), nn.Flatten(), nn.Linear(32, 9), nn.Tanh(), nn.Linear(9, 3)
    model = nn.Sequential(*layers)
    config = asdl_ws_plugin.recommended(max_side=max_side, **options)
    return model, asdl.KfacGradientMaker(model, config, "fisher_mc", shared_dim="expand")


def one_step(model: nn.Module, maker: Any) -> list[torch.Tensor]:
    x = torch.sin(torch.arange(6 * 160.0, dtype=torch.double)).view(6, 10, 4, 4)
    model.zero_grad()
    dummy = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, dummy, torch.arange(6) % 3)
    torch.manual_seed(1)  # of Monte-Carlo labels
    maker.forward_and_backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_side", [None, 40, 20, 4])
def test_blocks_of_whole_channels_are_resumed(max_side: int | None):
    model, maker = saved_with(max_side)
    one_step(model, maker)
    resumed, other = saved_with(max_side)
    other.load_state_dict(maker.state_dict())
    found, want = one_step(resumed, other), one_step(model, maker)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("second_moment", [None, 0.95])
@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (40, 20, "'0': .* kron.A as 3 blocks of 36 rows, .*max_side=20 it is 5 blocks of 18 rows"),
        (None, 20, "'0': .* kron.A as one matrix of 90 rows, .* it is 5 blocks of 18 rows"),
        (20, None, "'0': .* kron.A as 5 blocks of 18 rows, .*=None it is one matrix of 90 rows"),
        (8, 7, "'0': .* kron.B as one matrix of 8 rows, .* it is 2 blocks of 4 rows"),
        (1, 8, "'0': .* kron.B as 8 diagonal entries, but .* it is one matrix of 8 rows"),
    ],
)
def test_a_state_with_other_blocks_is_refused_with_the_reason(
    saved: int | None, loaded: int | None, message: str, second_moment: float | None
):
    model, maker = saved_with(saved, second_moment=second_moment)
    one_step(model, maker)
    resumed, other = saved_with(loaded, second_moment=second_moment)
    with pytest.raises(ValueError, match=message) as error:
        other.load_state_dict(maker.state_dict())
    assert "do not load this state" in str(error.value)
    fresh, its_maker = saved_with(loaded, second_moment=second_moment)
    found, want = one_step(resumed, other), one_step(fresh, its_maker)  # the remedy
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(ValueError, match="estimated anew"):  # nor in the middle of a training
        other.load_state_dict(maker.state_dict())
