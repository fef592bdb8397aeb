"""Compiled models: curvature is right whenever they were compiled; scripted ones are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles.by_example import assert_factors, empirical_factors, kfac, kron, step
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch._dynamo.*:UserWarning"),
]
N, R, D, C = 4, 5, 6, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1, self.block2, self.head = Block(), Block(), nn.Linear(D, C)

    def forward(self, x):
        return self.head(self.block2(self.block1(x)).mean(1))


class Counting:
    """A backend that counts how often compiled code runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph_module, example_inputs):
        def run(*args):
            self.runs += 1
            return graph_module(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(n=N):
    return torch.randn(n, R, D), torch.randint(C, (n,))


def assert_right(model, x, target, setting="reduce"):
    plain = copy.deepcopy(model)
    for name in ("block1.fc1", "block1.fc2", "block2.fc1", "head"):
        layer = plain.get_submodule(name)

        def example(i):
            return F.cross_entropy(plain(x[i : i + 1]), target[i : i + 1])

        for a, b in zip(
            kron(model.get_submodule(name)),
            empirical_factors(layer, example, N, setting),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # inductor needs a C++ compiler
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("what", ["wrapper", "in place", "block"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_has_the_factors_of_the_plain_one(when, what, ran, backend):
    """Compiled before or after the gradient maker is made, having run or not: the wrapper, the
    module, or a part.
    """
    model, (x, target) = Model(), batch()
    options = {
        "fisher_type": "fisher_emp",
        "ema_decay": 1.0,
        "data_size": N,
        "curvature_upd_interval": 2,
    }
    maker = kfac(model, **options) if when == "after" else None
    called = model
    if what == "wrapper":
        called = torch.compile(model, backend=backend)
    elif what == "in place":
        model.compile(backend=backend)
    else:
        model.block1.compile(backend=backend)
    if ran:
        called(x)
        called(x).sum().backward()
        model.zero_grad()
    maker = kfac(model, **options) if maker is None else maker
    for i in range(4):  # steps with curvature and without
        model.zero_grad()
        dummy = maker.setup_model_call(called, x)
        maker.setup_loss_call(F.cross_entropy, dummy, target)
        maker.forward_and_backward()
        if i % 2 == 0:
            assert_right(model, x, target)


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp", "fisher_exact"])
def test_the_compiled_wrapper_may_be_the_makers_model(fisher_type):
    model, (x, target) = Model(), batch()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    gradients = []
    for m in (compiled, model):
        maker = kfac(m, fisher_type=fisher_type, seed=1, data_size=N, damping=0.1)
        names = [name.removeprefix("_orig_mod.") for name in maker.shared_dim_for]
        assert names == ["block1.fc1", "block1.fc2", "block2.fc1", "block2.fc2", "head"]
        step(maker, F.cross_entropy, target, x)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


def test_steps_without_curvature_run_compiled():
    model, (x, target), backend = Model(), batch(), Counting()
    compiled = torch.compile(model, backend=backend)
    maker = kfac(model, curvature_upd_interval=3, preconditioner_upd_interval=3, ema_decay=0.5)
    runs = []
    for _ in range(4):
        model.zero_grad()
        dummy = maker.setup_model_call(compiled, x)
        maker.setup_loss_call(F.cross_entropy, dummy, target)
        maker.forward_and_backward()
        runs.append(backend.runs)
    assert runs == [0, 1, 2, 2]


def test_inference_between_steps_stays_compiled():
    model, (x, target), backend = Model(), batch(), Counting()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
    maker = kfac(compiled, ema_decay=0.5)
    step(maker, F.cross_entropy, target, x)
    before = backend.runs
    with torch.no_grad():
        compiled(x)
    assert backend.runs == before + 1


@pytest.mark.parametrize("convert", ["script", "trace"])
def test_scripted_models_are_refused(convert):
    """Their layers are no modules of Python's, and no hook sees them."""
    model, (x, target) = Model(), batch()
    scripted = torch.jit.script(model) if convert == "script" else torch.jit.trace(model, x)
    with pytest.raises(
        (RuntimeError, ValueError, TypeError),
        match=r"no layer whose curvature|scripted by torch.jit",
    ):
        step(kfac(scripted), F.cross_entropy, target, x)
    maker = kfac(model)
    dummy = maker.setup_model_call(scripted, x)
    maker.setup_loss_call(F.cross_entropy, dummy, target)
    with pytest.raises(RuntimeError, match=r"'block1.fc1'.*scripted by torch.jit"):
        maker.forward_and_backward()


def test_a_scripted_part_is_reported_by_name():
    model, (x, target) = Model(), batch()
    scripted = torch.jit.script(model.block1)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return model.head(model.block2(scripted(x)).mean(1))

    maker = kfac(Half(), fisher_type="fisher_emp", ema_decay=1.0, data_size=N)
    with pytest.warns(
        UserWarning, match=r"'inner.block1.fc1', 'inner.block1.fc2'\): each was not called"
    ):
        step(maker, F.cross_entropy, target, x)
    assert_factors(
        model.head,
        empirical_factors(
            model.head,
            lambda i: F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]),
            N,
            "reduce",
        ),
        rtol=1e-9,
    )
