"""Both doors end with the same bits, whoever calls the model and the backward pass."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import asdl_ws_plugin
from asdl_ws_plugin import Preconditioner

FISHER_TYPES = ("fisher_emp", "fisher_mc", "fisher_exact", "fisher_forward_only")
SCHEDULE = {
    "damping": 1e-2,
    "ema_decay": 0.3,
    "curvature_upd_interval": 2,
    "preconditioner_upd_interval": 4,
}


@pytest.fixture(autouse=True)
def in_double(double: None) -> Iterator[None]:
    yield


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(seed: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def num_modes() -> int:
    return torch.overrides._len_torch_function_stack()


def asdl_step(gm: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, x), y)
    gm.forward_and_backward()


def test_a_gradient_is_preconditioned_once() -> None:
    """On steps with and without curvature: a second step() without a backward pass is refused, and
    of several optimizers the first that steps does it for all.
    """
    by_one, by_two = mlp(), mlp()
    for zero_between in (False, True):
        alone, together = (Preconditioner(m, **SCHEDULE) for m in (by_one, by_two))
        parts = [torch.optim.SGD(layer.parameters(), 0.1) for layer in (by_two[0], by_two[2])]
        handles = [together.step_before(optimizer) for optimizer in parts]
        whole = torch.optim.SGD(by_one.parameters(), 0.1)
        for seed in range(5):
            x, y = batch(seed)
            for model in (by_one, by_two):
                model.zero_grad()
                torch.manual_seed(seed)
                F.cross_entropy(model(x), y).backward()
            torch.manual_seed(seed)
            alone.step()
            left = [p.grad.clone() for p in by_one.parameters()]
            with pytest.raises(RuntimeError, match="no backward pass since"):
                alone.step()
            for p, grad in zip(by_one.parameters(), left, strict=True):
                assert torch.equal(p.grad, grad)
            whole.step()
            torch.manual_seed(seed)
            for optimizer in parts:
                optimizer.step()
                if zero_between:
                    optimizer.zero_grad()
            for p, q in zip(by_one.parameters(), by_two.parameters(), strict=True):
                assert torch.equal(p, q)
        for handle in handles:
            handle.remove()
        for prec in (alone, together):
            prec.close()


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("with_average", [True, False])
@pytest.mark.parametrize("by", ["step", "backward", "hook"])
def test_both_doors_give_equal_bits(fisher_type: str, with_average: bool, by: str) -> None:
    config = asdl.PreconditioningConfig(**(SCHEDULE if with_average else {"damping": 1e-2}))
    options = {"fisher_type": fisher_type, "shared_dim": "auto"}
    ours, theirs = mlp(), mlp()
    gm = asdl.KfacGradientMaker(theirs, config, **options)
    prec = Preconditioner(ours, config, **options)
    optimizers = [torch.optim.NAdam(model.parameters(), lr=0.01) for model in (ours, theirs)]
    if by == "hook":
        prec.step_before(optimizers[0])
    for i in range(7):
        x, y = batch(i)
        torch.manual_seed(i)
        optimizers[1].zero_grad()
        asdl_step(gm, theirs, x, y)
        torch.manual_seed(i)
        optimizers[0].zero_grad()
        loss = F.cross_entropy(ours(x), y)
        if by == "backward":
            prec.backward(loss)
        else:
            loss.backward()
        if by == "step":
            prec.step()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), i  # type: ignore[arg-type]
            assert torch.equal(p, q), i
    assert prec.maker.setting == gm.setting == "reduce"


def test_no_hook_is_called_on_steps_without_curvature() -> None:
    model = mlp()
    prec = Preconditioner(model, **SCHEDULE, early_updates=0)
    assert num_hooks(model) > 0
    for i in range(4):
        x, y = batch(i)
        loss = F.cross_entropy(model(x), y)
        assert num_hooks(model) == (2 if i % 2 == 0 else 0), "the two of the model itself"
        assert num_modes() == (1 if i % 2 == 0 else 0)
        prec.backward(loss)
        assert num_modes() == 0
    prec.close()
    assert num_hooks(model) == 0


def test_evaluation_is_not_recorded() -> None:
    model = mlp()
    prec = Preconditioner(model, damping=1e-2, curvature_upd_interval=1)
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    model.eval()
    model(batch(1)[0])
    model.train()
    with torch.no_grad():
        model(batch(2)[0])
    prec.backward(loss)
    a = torch.cat([x[:, :0], x], 1)
    expected = a.T @ a / len(x)  # the preset's average has no bias
    assert torch.allclose(model[0].fisher.kron.A, expected, rtol=1e-12)  # type: ignore[index]


def test_a_loss_computed_inside_of_the_model() -> None:
    """As Hugging Face's models do with ``labels``; the logits are the output's ``logits``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    ours, theirs = Net(), mlp()
    options: dict[str, Any] = {"fisher_type": "fisher_exact", "shared_dim": "reduce"}
    config = asdl.PreconditioningConfig(damping=1e-2)
    prec = Preconditioner(ours, config, **options)
    gm = asdl.KfacGradientMaker(theirs, config, **options)
    x, y = batch(0)
    prec.backward(ours(x, labels=y)["loss"])
    asdl_step(gm, theirs, x, y)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", ["compiled", "plain"])
def test_a_wrapped_model(wrap: str) -> None:
    model = mlp()
    called = torch.compile(model, backend="eager") if wrap == "compiled" else model
    prec = Preconditioner(called, damping=1e-2)  # type: ignore[arg-type]
    x, y = batch(0)
    prec.backward(F.cross_entropy(called(x), y))
    reference = mlp()
    other = Preconditioner(reference, damping=1e-2)
    torch.manual_seed(0)
    other.backward(F.cross_entropy(reference(x), y))
    assert torch.allclose(model[0].fisher.kron.A, reference[0].fisher.kron.A)  # type: ignore[index]


def test_another_models_backward_pass_is_left_alone() -> None:
    model, critic = mlp(), nn.Linear(4, 1)
    prec = Preconditioner(model, damping=1e-2, fisher_type="fisher_emp")
    x, y = batch(0)
    logits = model(x)
    critic(x).square().mean().backward()
    assert critic.weight.grad is not None and model[0].weight.grad is None  # type: ignore[index]
    prec.backward(F.cross_entropy(logits, y))
    assert model[0].weight.grad is not None  # type: ignore[index]


def test_two_calls_of_the_model_in_one_loss_are_refused() -> None:
    model = mlp()
    Preconditioner(model, damping=1e-2)
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(-x), y)
    with pytest.raises(ValueError, match="depends on 2 calls of the model"):
        loss.backward()


def test_a_step_that_was_forgotten_is_said_once() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    prec = Preconditioner(model, **SCHEDULE)
    x, y = batch(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert [str(w.message)[:26] for w in said] == ["An optimizer has stepped, "]
    prec.step_before(optimizer)  # from here on as it is meant
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert prec.maker.state["step"] == 1


@pytest.mark.parametrize("way", ["eval", "autograd.backward", "parts", "made late"])
def test_a_step_that_step_before_did_not_see_is_said_once(way: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prec = Preconditioner(model, **SCHEDULE)
    prec.step_before(optimizer)
    x, y = batch(0)
    model.train(way != "eval")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            logits = model[2](model[1](model[0](x))) if way == "parts" else model(x)  # type: ignore[index]
            loss = F.cross_entropy(logits, y)
            if way == "autograd.backward":
                torch.autograd.backward(loss)
            else:
                loss.backward()
            if way == "made late" and prec.maker.state["step"] == 0:
                prec = Preconditioner(model, **SCHEDULE)
                prec.step_before(optimizer)
            optimizer.step()
            if way == "made late":
                break
    assert [str(w.message)[:34] for w in said] == ["The gradient is not preconditioned"]
    optimizer.zero_grad()
    model.train()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert prec.maker.state["step"] == 1


def test_a_forgotten_step_of_a_fused_optimizer_is_said_after_some() -> None:
    """Fused kernels leave no trace in the parameters; dropping gradients is what remains."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    Preconditioner(model, **SCHEDULE)
    x, y = batch(0)
    with pytest.warns(UserWarning, match="An optimizer has stepped"):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_a_step_after_the_optimizers_is_refused(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    steps = optimizer(model.parameters(), lr=0.1)
    prec = Preconditioner(model, **SCHEDULE)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    steps.step()
    with pytest.raises(RuntimeError, match="Parameters have changed since loss"):
        prec.step()


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_the_closure_of_an_optimizer(inside: bool) -> None:
    """It makes the gradient after what is hooked in front of ``optimizer.step()``."""
    model, reference = mlp(), mlp()
    options: Any = {**SCHEDULE, "fisher_type": "fisher_emp"}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    prec, other = (Preconditioner(m, **options) for m in (model, reference))
    x, y = batch(0)

    def closure() -> Tensor:
        optimizers[0].zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if inside:
            prec.step()
        return loss

    if not inside:
        prec.step_before(optimizers[0])
        optimizers[0].step(closure)
        with pytest.raises(RuntimeError, match="In the closure"):
            optimizers[0].step(closure)
        return
    other.step_before(optimizers[1])
    for _ in range(3):
        optimizers[0].step(closure)
        optimizers[1].zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizers[1].step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_batch_that_is_let_go_of_is_no_forgotten_step() -> None:
    """Its gradients are dropped before the optimizer steps, once, twice, and now and then."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    prec = Preconditioner(model, **SCHEDULE)
    prec.step_before(optimizer)
    x, y = batch(0)
    for skips in (False, True, True, False, True, False):
        F.cross_entropy(model(x), y).backward()
        if not skips:
            optimizer.step()
        optimizer.zero_grad()
    assert prec.maker.state["step"] == 3


@pytest.mark.parametrize("to_none", [True, False])
def test_a_backward_pass_whose_gradients_are_dropped_is_no_micro_batch(to_none: bool) -> None:
    """As that of a generator's loss through a discriminator is none of the discriminator's."""
    model, reference = mlp(), mlp()
    options: Any = {**SCHEDULE, "fisher_type": "fisher_emp"}
    prec, other = (Preconditioner(m, **options) for m in (model, reference))
    x, y = batch(0)
    for _ in range(3):
        F.cross_entropy(3 * model(x + 1), y).backward()
        model.zero_grad(set_to_none=to_none)
        reference.zero_grad()
        prec.backward(F.cross_entropy(model(x), y))
        other.backward(F.cross_entropy(reference(x), y))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        model.zero_grad(set_to_none=to_none)


def test_a_step_that_saw_nothing_is_an_error() -> None:
    model = mlp()
    prec = Preconditioner(model, damping=1e-2)
    with pytest.raises(RuntimeError, match="no call of the model in training mode was seen"):
        prec.step()
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match=r"no loss\.backward\(\) on what it returned"):
        prec.step()
    prec.backward(loss)


def test_an_error_leaves_nothing_behind() -> None:
    model = mlp()
    prec = Preconditioner(model, damping=1e-2, curvature_upd_interval=1)
    x, y = batch(0)
    prec.backward(F.cross_entropy(model(x), y))
    before = [model[0].fisher.kron.A.clone(), prec.maker.state["step"]]  # type: ignore[index]
    model.zero_grad()
    loss = F.cross_entropy(model(x * torch.nan), y)
    with pytest.raises(FloatingPointError):
        prec.backward(loss)
    assert torch.equal(model[0].fisher.kron.A, before[0])  # type: ignore[index]
    assert prec.maker.state["step"] == before[1]
    assert all(p.grad is None for p in model.parameters())
    prec.backward(F.cross_entropy(model(x), y))  # and the next step trains on
    assert prec.maker.state["step"] == before[1] + 1
    assert num_modes() == 0


def test_a_forward_pass_that_fails_is_forgotten() -> None:
    model = mlp()
    prec = Preconditioner(model, damping=1e-2)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert all(not layer.module._forward_hooks for layer in prec.maker.plan.layers)
    x, y = batch(0)
    prec.backward(F.cross_entropy(model(x), y))


class OwnMode(TorchFunctionMode):
    """A mode of the user's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


MODES = {"own": OwnMode, "device": lambda: torch.device("cpu"), "default device": default_device}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("around", ["forward", "loss", "backward", "step", "two steps"])
def test_function_modes_are_left_as_they_were_entered(mode: Any, around: str) -> None:
    """That of the preconditioner stays from the forward pass on, those of the user may not."""

    def of(*places: str) -> Any:
        return mode() if around in places else contextlib.nullcontext()

    model, reference = mlp(), mlp()
    options: Any = {**SCHEDULE, "fisher_type": "fisher_emp"}
    prec, other = (Preconditioner(m, **options) for m in (model, reference))
    x, y = batch(0)
    with of("two steps"):
        for _ in range(2):
            with of("forward"):
                logits = model(x)
            with of("loss"):
                loss = F.cross_entropy(logits, y)
            with of("backward"):
                loss.backward()
            with of("step"):
                prec.step()
    assert num_modes() == 0
    for _ in range(2):
        other.backward(F.cross_entropy(reference(x), y))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("interval", [1, 2])
def test_what_others_call_is_no_forward_pass_of_the_loop(interval: int) -> None:
    """A gradient maker, with curvature and without, and a survey, between two steps of a loop."""
    model = mlp()
    prec = Preconditioner(model, **SCHEDULE)
    config = asdl.PreconditioningConfig(damping=1e-2, curvature_upd_interval=interval)
    gm = asdl.KfacGradientMaker(model, config, shared_dim="expand")
    x, y = batch(0)
    for _ in range(2):
        asdl_step(gm, model, x, y)
        asdl_ws_plugin.inspect(model, x)
        assert num_modes() == 0
        with pytest.raises(RuntimeError, match="no call of the model in training mode was seen"):
            prec.step()
    prec.backward(F.cross_entropy(model(x), y))


def test_a_model_that_is_dropped_within_a_step_is_let_go_of() -> None:
    model = mlp()
    prec = Preconditioner(model, **SCHEDULE)
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    assert num_modes() == 1
    gone = weakref.ref(prec)
    del model, prec, loss
    gc.collect()
    assert gone() is None and num_modes() == 0


def test_making_another_one_closes_the_one_before() -> None:
    """As a cell of a notebook does that runs again."""
    model, reference = mlp(), mlp()
    options: Any = {**SCHEDULE, "fisher_type": "fisher_emp"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Preconditioner(model, **options)
    first.step_before(optimizer)
    x, y = batch(0)
    F.cross_entropy(model(x), y)  # a step that was interrupted
    prec = Preconditioner(model, **options)
    prec.step_before(optimizer)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    Preconditioner(reference, **options).backward(F.cross_entropy(reference(x), y))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert num_modes() == 0
    with pytest.raises(RuntimeError, match="Another Preconditioner was made of this model"):
        first.step()
    prec.close()
    assert num_hooks(model) == 0
    prec.step()  # closed, and not in anybody's place


def test_resumed_training_goes_on_bit_for_bit() -> None:
    def run(resume_at: int | None) -> list[Tensor]:
        model = mlp()
        prec = Preconditioner(model, **SCHEDULE, fisher_type="fisher_emp")
        for i in range(8):
            if i == resume_at:
                state = prec.state_dict()
                prec.close()
                prec = Preconditioner(model, **SCHEDULE, fisher_type="fisher_emp")
                prec.load_state_dict(state)
            x, y = batch(i)
            prec.backward(F.cross_entropy(model(x), y))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad  # type: ignore[operator]
                    p.grad = None
        return list(model.parameters())

    expected = run(None)
    for resume_at in (1, 2, 5):
        for p, q in zip(run(resume_at), expected, strict=True):
            assert torch.equal(p, q)


def test_param_groups_say_which_parameters_are_preconditioned() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": mlp()})
    prec = Preconditioner(model, damping=1e-2)
    inside, outside = prec.param_groups()
    assert inside["preconditioned"] and not outside["preconditioned"]
    assert {id(p) for p in inside["params"]} == {id(p) for p in model["body"].parameters()}
    assert [p is model["embed"].weight for p in outside["params"]] == [True]
    torch.optim.AdamW([{**inside, "lr": 1e-2}, {**outside, "lr": 1e-3}])


def test_statistics_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    prec = Preconditioner(model, **SCHEDULE, early_updates=0, statistics=True)
    with caplog.at_level(logging.INFO, "asdl_ws_plugin"):
        for i in range(4):
            model.zero_grad()
            loss = F.cross_entropy(model(batch(i)[0]), batch(i)[1])
            loss.backward()
            raw = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
            prec.step()
            after = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
            step = prec.last_step
            assert step["step"] == i
            assert step["norm_before"] == pytest.approx(float(raw))
            assert step["norm_after"] == pytest.approx(float(after))
            assert step["curvature_age"] == i % 2 and step["inverse_age"] == i
            assert step["damping"] == 1e-2 and step["left_out"] == {}
            assert step["seconds"]["step"] > 0
            assert ("curvature" in step["seconds"]) == (i % 2 == 0)
    assert sum("norm_before" in record.message for record in caplog.records) == 4


def test_segments_and_padding_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 7, 4), torch.randint(3, (6, 7))
    mask = torch.rand(6, 7) < 0.7
    mask[:, 0] = True
    y[~mask] = -100
    prec = Preconditioner(
        model, asdl.PreconditioningConfig(damping=1e-2, ema_decay=1.0), shared_dim="expand"
    )
    with asdl_ws_plugin.padding(model, mask):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        prec.backward(loss)
    rows = x[mask]
    expected = rows.T @ rows / len(rows)
    assert torch.allclose(model[0].fisher.kron.A, expected, rtol=1e-12)


def trained(door: str, config: Any, **options: Any) -> list[Tensor]:
    """Weights after twelve steps."""
    model = mlp()
    if door == "asdl":
        gm = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="auto")
    else:
        prec = Preconditioner(model, config, fisher_type="fisher_emp", **options)
    for i in range(12):
        x, y = batch(i)
        model.zero_grad()
        if door == "asdl":
            asdl_step(gm, model, x, y)
        else:
            prec.backward(F.cross_entropy(model(x), y))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad  # type: ignore[operator]
    return list(model.parameters())


@pytest.mark.parametrize(
    ("config", "options", "as_asdl"),
    [
        (None, {}, asdl_ws_plugin.recommended()),
        (
            None,
            {"damping": 0.3, "trust": None, "curvature_upd_interval": 3},
            asdl_ws_plugin.recommended(damping=0.3, trust=None, curvature_upd_interval=3),
        ),
        (
            asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3),
            {},
            asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3),
        ),
    ],
    ids=["preset", "keywords", "asdl's config"],
)
def test_the_default_is_the_preset_and_a_config_is_taken_as_it_is(
    config: Any, options: dict[str, Any], as_asdl: Any
) -> None:
    found, expected = trained("ours", config, **options), trained("asdl", as_asdl)
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"damping": -1.0}, ValueError, "damping"),
        ({"shared_dim": "sum"}, ValueError, "shared_dim"),
        ({"early_updates": -1}, ValueError, "early_updates"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
        (
            {"config": asdl.PreconditioningConfig(), "damping": 1.0},
            TypeError,
            "Give damping in the config",
        ),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = mlp()
    with pytest.raises(error, match=match):
        Preconditioner(model, **options)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("when", [0, 1])
def test_gradients_that_zero_grad_took_before_the_step_are_missed(when: int) -> None:
    model = mlp()
    prec = Preconditioner(model, asdl.PreconditioningConfig(**SCHEDULE))
    for step in range(when + 1):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        if step < when:
            prec.step()
            model.zero_grad()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\), loss.backward\(\), prec.step\(\), opt"):
        prec.step()
    F.cross_entropy(model(x), y).backward()
    prec.step()  # the next one goes on
    assert all(p.grad is not None for p in model.parameters())


def test_mistyped_options_and_arguments_are_named() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"'dampening'\. Did you mean 'damping'"):
        Preconditioner(model, dampening=1e-2)
    with pytest.raises(TypeError, match=r"'zzzz'\. There are \['curvature_upd_interval'"):
        Preconditioner(model, zzzz=1)
    with pytest.raises(TypeError, match=r"of a model, got a generator\. Pass the nn.Module"):
        Preconditioner(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes an optimizer, got a Sequential"):
        Preconditioner(model).step_before(model)  # type: ignore[arg-type]
    assert Preconditioner(model, fisher_type="fisher_emp", damping=1e-2, seed=1).enabled
