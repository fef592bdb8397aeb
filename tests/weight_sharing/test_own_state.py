"""State belongs to the gradient maker: others on the same model, copies, and states that are not
its own.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.precondition.natural_gradient import NaturalGradientMaker
from torch import Tensor, nn

import asdl_ws_plugin

pytestmark = pytest.mark.usefixtures("double")
N, D, C = 6, 4, 3


def network(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [z for _ in range(depth - 1) for z in (nn.Linear(D, D), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(D, C))


def make(model: nn.Module, shared_dim: Any = "reduce", **options: Any) -> Any:
    keywords = {"fisher_type": options.pop("fisher_type", "fisher_emp"), "shared_dim": shared_dim}
    shape = options.pop("shape", None)
    config = asdl.PreconditioningConfig(**{"damping": 1e-2, "ema_decay": 0.3, **options})
    if shape is not None:
        return NaturalGradientMaker(model, config, fisher_shape=shape, **keywords)
    return asdl.KfacGradientMaker(model, config, **keywords)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(N, 5, D, generator=generator), torch.randint(0, C, (N,), generator=generator)


def pooled(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.mean(1), target)


def make_step(maker: Any, step: int) -> list[Tensor]:
    """The gradients of a step; the parameters stay as they are."""
    x, y = batch(step)
    maker.model.zero_grad()
    maker.setup_loss_call(pooled, maker.setup_model_call(maker.model, x), y)
    maker.forward_and_backward()
    return [p.grad.clone() for p in maker.model.parameters() if p.grad is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------- other makers


@pytest.mark.parametrize("shared_dim", ["reduce", "expand"])
def test_a_second_maker_starts_afresh(shared_dim: str) -> None:
    """It went on with the average of the first, even one of another strategy."""
    model = network()
    first: Any = make(model, "reduce")
    for step in range(3):
        make_step(first, step)
    expected = make_step(make(network(), shared_dim), 7)
    assert_same(make_step(make(model, shared_dim), 7), expected)
    del first
    gc.collect()
    assert_same(make_step(make(model, shared_dim), 7), expected)


def test_two_live_makers_do_not_share() -> None:
    model = network()
    options = {"curvature_upd_interval": 1, "preconditioner_upd_interval": 3}
    first, second = make(model, "reduce", **options), make(model, "expand", **options)
    alone = make(network(), "reduce", **options), make(network(), "expand", **options)
    for step in range(5):
        for maker, other in ((first, alone[0]), (second, alone[1])):
            if maker is second and step % 2:
                continue
            assert_same(make_step(maker, step), make_step(other, step))
    assert set(first.state_dict()["curvature"]) == set(second.state_dict()["curvature"])
    A, B = (m.state_dict()["curvature"]["0"]["kron.A"] for m in (first, second))
    assert not torch.equal(A, B)
    make_step(first, 9)
    assert model[0].fisher.kron.A is first.state_dict()["curvature"]["0"]["kron.A"]


def test_a_step_that_fails_leaves_the_other_makers_curvature_where_it_was() -> None:
    model = network()
    first, second = make(model), make(model)
    make_step(first, 0)
    make_step(second, 1)
    shown, state = model[0].fisher, copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match="empty"):
        dummy = first.setup_model_call(model, torch.randn(0, 5, D))
        first.setup_loss_call(lambda y: y.sum(), dummy)
        first.forward_and_backward()
    assert torch.equal(
        second.state_dict()["curvature"]["0"]["kron.A"], state["curvature"]["0"]["kron.A"]
    )
    make_step(second, 2)
    assert shown is not model[0].fisher


def test_fisher_matrices_of_a_model_in_training_are_not_its_average() -> None:
    model, other = network(), network()
    maker, alone = make(model), make(other)
    make_step(maker, 0), make_step(alone, 0)
    config = FisherConfig("fisher_emp", ["kron"], data_size=N, shared_dim="expand")
    fisher_maker = get_fisher_maker(model, config)
    x, y = batch(5)
    for _ in range(2):
        fisher_maker.setup_loss_call(pooled, fisher_maker.setup_model_call(model, x), y)
        fisher_maker.forward_and_backward(accumulate=True)
    reference = network()
    once = get_fisher_maker(reference, config)
    once.setup_loss_call(pooled, once.setup_model_call(reference, x), y)
    once.forward_and_backward()
    torch.testing.assert_close(model[0].fisher.kron.A, 2 * reference[0].fisher.kron.A)
    assert_same(make_step(maker, 1), make_step(alone, 1))


# ------------------------------------------------------------------------------------------- copies


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])


@COPIES
@pytest.mark.parametrize("shape", [None, "full", "layer_wise", "diag"])
def test_a_copy_goes_on_by_itself(copied: Callable[[Any], Any], shape: Any) -> None:
    model = network()
    options = {"curvature_upd_interval": 1, "preconditioner_upd_interval": 3, "shape": shape}
    maker, alone = make(model, **options), make(network(), **options)
    for step in range(2):
        make_step(maker, step), make_step(alone, step)
    other = copied(maker)
    assert type(other) is type(maker) and other.model is not model
    assert other.state == maker.state
    for step in range(2, 5):
        expected = make_step(alone, step)
        assert_same(make_step(other, step), expected)
        assert_same(make_step(maker, step), expected)
    assert other.model[0].weight.grad is not model[0].weight.grad


@COPIES
def test_a_copy_of_a_class_of_this_package(copied: Callable[[Any], Any]) -> None:
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3)
    maker = asdl_ws_plugin.makers.KfacGradientMaker(network(), config, fisher_type="fisher_emp")
    make_step(maker, 0)
    other = copied(maker)
    assert type(other) is type(maker)
    assert_same(make_step(other, 1), make_step(maker, 1))


@COPIES
def test_a_copy_beside_its_model_and_another_maker(copied: Callable[[Any], Any]) -> None:
    model = asdl_ws_plugin.convert(
        nn.Sequential(nn.TransformerEncoderLayer(D, 2, 6, 0.0, batch_first=True), nn.Linear(D, C))
    )
    first, second = make(model), make(model, "expand")
    make_step(first, 0), make_step(second, 0)
    other_model, other = copied((model, first))
    assert other.model is other_model
    assert_same(make_step(other, 1), make_step(first, 1))


def test_a_copy_keeps_which_logits_were_chosen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, C)

        def forward(self, x: Tensor) -> Any:
            return {"hidden": x, "logits": self.first(x)}

    maker = make(Two())
    dummy = maker.setup_model_call(maker.model, batch(0)[0])
    maker.setup_logits_repr(dummy["logits"])
    other = copy.deepcopy(maker)
    for each in (maker, other):
        x, y = batch(0)
        each.setup_loss_call(pooled, each.setup_model_call(each.model, x)["logits"], y)
        each.forward_and_backward()
    assert torch.equal(maker.model.first.weight.grad, other.model.first.weight.grad)


# ------------------------------------------------------------------------------------------- states


def trained(**options: Any) -> Any:
    maker = make(network(), **options)
    make_step(maker, 0)
    return maker


def changed(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at ``a/b/c``; without it if that is ``None``."""
    state = copy.deepcopy(state)
    *inner, last = path.split("/")
    place = state
    for key in inner:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return state


NAN = torch.full((D, D), float("nan"))
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "step": ("step", -3, "step has to be a number of steps, got -3"),
    "step of another type": ("step", 1.5, "step has to be a number of steps"),
    "version": ("version", 1, "of version 1, this gradient maker's of version 2"),
    "no version": ("version", None, "The state lacks 'version'"),
    "key": ("weight_sharing", None, "The state lacks 'weight_sharing'"),
    "more": ("speed", 3, "The state has 'speed'"),
    "inner key": ("weight_sharing/layouts", None, "'weight_sharing' lacks 'layouts'"),
    "factor": ("curvature/0/kron.B", None, "Layer '0': the state lacks kron.B"),
    "NaN": ("curvature/0/kron.A", NAN, "kron.A of '0' is not finite"),
    "NaN in an inverse": ("curvature/0/kron.A_inv", NAN, "kron.A_inv of '0' is not finite"),
    "no tensor": ("curvature/0/kron.A", 3.0, "kron.A of '0' is no tensor, but float"),
    "sizes": ("curvature/0/kron.A", torch.eye(2), r"kron.A of sizes \(2, 2\) for the module '0'"),
    "layer": ("curvature/2", None, "has lost the curvature of '2'"),
    "another shape": ("curvature/0", {"data": torch.eye(20)}, "not of the shape 'kron'"),
    "unknown module": ("weight_sharing/unseen", {"9": "was not called"}, "the modules '9'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_and_nothing_is_changed(what: str) -> None:
    path, value, message = DAMAGE[what]
    state = changed(trained().state_dict(), path, value)
    maker, alone = trained(), trained()
    with pytest.raises(ValueError, match=message):
        maker.load_state_dict(state)
    assert maker.state["step"] == 1
    assert_same(make_step(maker, 1), make_step(alone, 1))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "deeper": (lambda: make(network(3)), "another model: it has the layers '4'"),
    "shallower": (lambda: make(network(1)), "another model: it lacks the layers '2'"),
    "strategy": (lambda: make(network(), "expand"), "'0': the state has its curvature under 'exp"),
    "Fisher type": (lambda: make(network(), fisher_type="fisher_mc"), "of fisher_type='fisher_mc'"),
    "no average": (lambda: make(network(), ema_decay=-1), "without a moving average"),
    "shape": (lambda: make(network(), shape="layer_wise"), "not of the shape 'kron'"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_state_of_another_maker_is_refused(what: str) -> None:
    other, message = OTHERS[what][0](), OTHERS[what][1]
    make_step(other, 0)
    maker, alone = trained(), trained()
    with pytest.raises(ValueError, match=message):
        maker.load_state_dict(other.state_dict())
    assert_same(make_step(maker, 1), make_step(alone, 1))


@pytest.mark.parametrize("shape", ["full", "layer_wise", "unit_wise", "diag", "kron", "swift_kron"])
@pytest.mark.parametrize("ema_decay", [0.3, -1])
def test_its_own_state_is_not(shape: str, ema_decay: float) -> None:
    """Whatever was frozen, and with layers that are not called."""
    options = {"shape": shape, "ema_decay": ema_decay, "preconditioner_upd_interval": 2}

    def two_steps(resumed: bool) -> list[Tensor]:
        model = network(3)
        model[2].bias.requires_grad_(False)
        if shape != "full":
            model[0].requires_grad_(False)
        maker = make(model, **options)
        make_step(maker, 0)
        if resumed:
            file = io.BytesIO()
            torch.save(maker.state_dict(), file)
            file.seek(0)
            maker = make(model, **options)
            maker.load_state_dict(torch.load(file, weights_only=True))
        return make_step(maker, 1)

    assert_same(two_steps(True), two_steps(False))


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable)", "ignore:TypedStorage is deprecated"
)
def test_a_distributed_checkpoint(tmp_path: Any) -> None:
    """``torch.distributed.checkpoint`` takes the state apart and puts it together."""
    import torch.distributed.checkpoint as dcp

    maker, alone = trained(), trained()
    dcp.save({"maker": maker.state_dict()}, checkpoint_id=tmp_path)
    other = trained()
    make_step(other, 5)
    state = {"maker": other.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["maker"])
    assert_same(make_step(other, 1), make_step(alone, 1))
