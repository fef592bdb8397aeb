"""What is refused, by whose name, and that a failed step leaves nothing behind."""

import math
from pathlib import Path

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from oracles.by_example import assert_factors, empirical_factors, fisher, hooks_of, kfac, kron, step
from torch import nn

import asdl_ws_plugin
from asdl_ws_plugin.upstream import is_native
from asdl_ws_plugin.weight_sharing.operations import LinearReduce

pytestmark = pytest.mark.usefixtures("double")
N, R, D, C = 4, 5, 3, 2
TYPES = ["fisher_mc", "fisher_emp", "fisher_exact", "fisher_forward_only"]


class Failing(nn.Module):
    """Passes on what it gets, unless it is told to fail in the forward or the backward pass."""

    mode = ""

    def forward(self, x):
        if self.mode == "forward":
            raise RuntimeError("told to fail")
        if self.mode == "backward":
            x = x * 1
            x.register_hook(self.fail)
        return x

    @staticmethod
    def fail(grad):
        raise RuntimeError("told to fail")


class Model(nn.Module):
    """Convolution, batch statistics, tokens, a pooled head; one layer is frozen."""

    def __init__(self, pool=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, (D, 1)), nn.BatchNorm2d(6)
        self.fc1, self.frozen, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.failing, self.head, self.pool = Failing(), nn.Linear(5, C), pool
        self.frozen.requires_grad_(False)

    def forward(self, x):  # (N, R, D)
        x = self.bn(self.conv(x.mT.unsqueeze(1))).squeeze(2).mT
        x = self.failing(torch.tanh(self.frozen(torch.tanh(self.fc1(x)))))
        x = torch.tanh(self.fc2(x))
        return self.head(x.mean(1)) if self.pool else self.head(x)


def batch(n=N):
    return torch.randn(n, R, D), torch.randint(C, (n,))


def tensors(matrix, prefix=""):
    for name, value in vars(matrix).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif hasattr(value, "__dict__"):
            yield from tensors(value, f"{prefix}{name}.")


def state_of(maker):
    """Everything that a step could change, copied."""
    model = maker.model
    state = {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    state |= {f"requires_grad {name}": p.requires_grad for name, p in model.named_parameters()}
    state |= {
        f"grad {name}": None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    state |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    for name, module in model.named_modules():
        matrix = getattr(module, "fisher", None)
        state[f"fisher {name}"] = matrix is not None
        if matrix is not None:
            state |= {f"fisher {name} {key}": value.clone() for key, value in tensors(matrix)}
        state[f"mode {name}"] = module.training
    return state | {
        "hooks": hooks_of(model),
        "step": maker.state["step"],
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert isinstance(found[key], torch.Tensor) and torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


FAILURES = {  # what goes wrong, and what it is refused with
    "NaN input": (FloatingPointError, "loss is nan"),
    "infinite loss": (FloatingPointError, "loss is inf"),
    "empty batch": ((ValueError, RuntimeError), "empty|more than 1 value per channel"),
    "forward": (RuntimeError, "told to fail"),
    "backward": (RuntimeError, "told to fail"),
    "loss": (RuntimeError, "told to fail"),
    "interrupt": (KeyboardInterrupt, None),
}


def failing_step(maker, failure):
    """A step without clearing ``.grad``: there may be gradients that it must not touch."""
    model, (x, target), loss = maker.model, batch(), F.cross_entropy
    if failure == "NaN input":
        x[0, 0, 0] = torch.nan
    elif failure == "empty batch":
        x, target = x[:0], target[:0]
    elif failure == "infinite loss":

        def loss(y, t):
            return F.cross_entropy(y, t) + torch.inf
    elif failure == "loss":

        def loss(y, t):
            raise RuntimeError("told to fail")
    elif failure == "interrupt":

        def loss(y, t):
            raise KeyboardInterrupt

    model.failing.mode = failure if failure in ("forward", "backward") else ""
    try:
        dummy = maker.setup_model_call(model, x)
        maker.setup_loss_call(loss, dummy, target)
        maker.forward_and_backward()
    finally:
        model.failing.mode = ""


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("failure", list(FAILURES))
@pytest.mark.parametrize("ema_decay", [-1, 0.3])
@pytest.mark.parametrize("when", ["first", "later", "between"])
def test_a_failed_step_leaves_everything_as_it_was(fisher_type, failure, ema_decay, when):
    """... and the next good batch trains on as if it had not been. ``between``: a step without
    curvature.
    """
    batches = [batch() for _ in range(4)]

    def trained(fail):
        torch.manual_seed(1)
        model = Model()
        maker = kfac(
            model,
            fisher_type=fisher_type,
            ema_decay=ema_decay,
            curvature_upd_interval=2,
            seed=5,
            preconditioner_upd_interval=2,
            data_size=N,
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for i, (x, target) in enumerate(batches):
            if fail and i == {"first": 0, "later": 2, "between": 1}[when]:
                before = state_of(maker)
                error, message = FAILURES[failure]
                with pytest.raises(error, match=message):
                    failing_step(maker, failure)
                assert_same(state_of(maker), before)
            step(maker, F.cross_entropy, target, x)
            optimizer.step()
        return state_of(maker)

    assert_same(trained(fail=True), trained(fail=False))


def test_existing_gradients_survive_a_failed_step_and_are_added_to_by_a_good_one():
    torch.manual_seed(1)
    model = Model()
    maker = kfac(model, ema_decay=0.5, seed=3, data_size=N)
    x, target = batch()
    step(maker, F.cross_entropy, target, x)
    step(maker, F.cross_entropy, target, x)
    held = {p: torch.randn_like(p) for p in model.parameters() if p.grad is not None}
    for p, grad in held.items():
        p.grad = grad.clone()
    objects = {p: p.grad for p in held}
    with pytest.raises(FloatingPointError):
        failing_step(maker, "NaN input")
    assert all(p.grad is objects[p] and torch.equal(p.grad, held[p]) for p in held)
    dummy = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, dummy, target)
    maker.forward_and_backward()
    assert all(p.grad is objects[p] for p in held)
    added = {p: p.grad - held[p] for p in held}
    for module in model.modules():
        if hasattr(module, "fisher"):
            del module.fisher
    other = kfac(model, ema_decay=0.5, seed=3, data_size=N)
    for _ in range(3):  # a third step on the same batch
        step(other, F.cross_entropy, target, x)
    for p, grad in added.items():
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_failed_batch_through_get_fisher_maker(fisher_type):
    model = Model()
    maker = get_fisher_maker(
        model,
        FisherConfig(
            fisher_type,
            ["kron", (nn.BatchNorm2d, "diag")],
            loss_type="cross_entropy",
            shared_dim="reduce",
            data_size=N,
        ),
    )
    if fisher_type == "fisher_forward_only":
        return  # below, by the makers: there is no backward pass to fail in

    def compute(x, target):
        dummy = maker.setup_model_call(model, x)
        maker.setup_loss_call(F.cross_entropy, dummy, target)
        maker.forward_and_backward()

    x, target = batch()
    compute(x, target)
    before = {
        name: (module.fisher, dict(tensors(module.fisher)))
        for name, module in model.named_modules()
        if hasattr(module, "fisher")
    }
    hooks = hooks_of(model)
    for mode in ("forward", "backward"):
        model.failing.mode = mode
        with pytest.raises(RuntimeError, match="told to fail"):
            compute(x, target)
    model.failing.mode = ""
    with pytest.raises(FloatingPointError):
        compute(torch.full_like(x, torch.nan), target)
    assert hooks_of(model) == hooks
    assert all(p.grad is None for p in model.parameters())
    for name, (matrix, values) in before.items():
        assert model.get_submodule(name).fisher is matrix
        assert all(torch.equal(value, values[key]) for key, value in tensors(matrix))


def test_factors_that_are_not_finite_name_the_layer():
    """A finite loss with a gradient that is not: sqrt at 0."""
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    maker = kfac(model, fisher_type="fisher_emp")

    def loss(y, target):
        return F.cross_entropy(y, target) + (0 * y).abs().sqrt().sum()

    with pytest.raises(
        FloatingPointError, match=r"Layer '\d': its curvature is not finite; nothing was updated"
    ):
        step(maker, loss, torch.randint(C, (N,)), torch.randn(N, D))
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------ logits and the loss


@pytest.mark.parametrize("fisher_type", TYPES)
def test_logits_with_channels_first_are_refused(fisher_type):
    class ChannelsFirst(Model):
        def forward(self, x):
            return super().forward(x).mT

    maker = kfac(ChannelsFirst(pool=False), "expand", fisher_type=fisher_type)
    with pytest.raises(
        ValueError, match=rf"\({N}, {C}, {R}\).*{C} classes in the second.*setup_logits_repr"
    ):
        step(maker, F.cross_entropy, torch.randint(C, (N, R)), torch.randn(N, R, D))


def test_logits_with_channels_first_may_be_turned_around():
    class ChannelsFirst(Model):
        def forward(self, x):
            return super().forward(x).mT

    model, x, target = (
        ChannelsFirst(pool=False).eval(),
        torch.randn(N, R, D),
        torch.randint(C, (N, R)),
    )
    fisher(
        model,
        "expand",
        lambda y, t: F.cross_entropy(y.mT, t, reduction="sum"),
        target,
        x,
        call=lambda x: model(x).mT,
        data_size=N,
        shapes=["kron", (nn.BatchNorm2d, "diag")],
    )
    assert_factors(
        model.fc2,
        empirical_factors(
            model.fc2,
            lambda i: F.cross_entropy(model(x[i : i + 1]), target[i : i + 1], reduction="sum"),
            N,
            "expand",
        ),
    )


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_exact", "fisher_forward_only"])
def test_a_loss_of_another_type_is_refused(fisher_type):
    x = torch.randn(N, R, D)
    cases = [
        (
            "mse",
            F.cross_entropy,
            torch.randint(C, (N,)),
            "loss_type is 'mse'.*loss_type='cross_entropy'",
        ),
        (
            "cross_entropy",
            F.mse_loss,
            torch.randn(N, C),
            "loss_type is 'cross_entropy'.*loss_type='mse'",
        ),
        (
            "cross_entropy",
            F.binary_cross_entropy_with_logits,
            torch.rand(N, C),
            "loss_type='binary_cross_entropy'",
        ),
    ]
    for loss_type, loss, target, message in cases:
        with pytest.raises(ValueError, match=message):
            step(kfac(Model(), fisher_type=fisher_type, loss_type=loss_type), loss, target, x)


def test_fisher_emp_takes_any_type_of_loss():
    """``loss_type`` is not looked at: the curvature is that of the loss's own gradients."""
    model, (x, target) = Model(), batch()
    grads = []
    for loss_type in ("mse", "cross_entropy"):
        step(kfac(model, fisher_type="fisher_emp", loss_type=loss_type), F.cross_entropy, target, x)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(grad.any() for grad in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("output", [lambda y: {"logits": y}, lambda y: None, lambda y: [[y]]])
def test_logits_that_are_no_tensor_are_refused(fisher_type, output):
    class Wrapped(Model):
        def forward(self, x):
            return output(super().forward(x))

    model = Wrapped()
    maker = kfac(model, fisher_type=fisher_type)
    dummy = maker.setup_model_call(model, torch.randn(N, R, D))
    maker.setup_loss_call(lambda y: model.head.weight.sum(), dummy)
    with pytest.raises(TypeError, match=r"logits have to be a tensor, got \w+.*setup_logits_repr"):
        maker.forward_and_backward()


def test_no_loss_and_no_model_are_refused():
    maker = kfac(Model())
    maker.setup_model_call(maker.model, torch.randn(N, R, D))
    with pytest.raises((ValueError, TypeError), match="loss"):
        maker.forward_and_backward()
    with pytest.raises(ValueError, match="setup_model_call"):
        other = kfac(Model())
        other.setup_loss_call(F.cross_entropy, 1, 2)
        other.forward_and_backward()
    config = FisherConfig("fisher_emp", ["kron", (nn.BatchNorm2d, "diag")], shared_dim="reduce")
    maker = get_fisher_maker(Model(), config)
    maker.setup_model_call(maker.model, torch.randn(N, R, D))
    with pytest.raises(ValueError, match="setup_loss_call"):
        maker.forward_and_backward()
    assert hooks_of(maker.model) == hooks_of(Model())


class TwoHeads(Model):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(5, C)

    def forward(self, x):
        x = torch.tanh(self.fc1(self.bn(self.conv(x.mT.unsqueeze(1))).squeeze(2).mT)).mean(1)
        return self.head(x), self.second(x)


def test_several_losses_of_different_logits():
    """The curvature is of the loss of the logits; a loss that ignores them altogether is not
    guessed at.
    """
    model, (x, target) = TwoHeads().eval(), batch()

    def loss(outputs, target):
        return F.cross_entropy(outputs[0], target, reduction="sum") + F.mse_loss(
            outputs[1], torch.zeros(N, C)
        )

    rules = {"ignore_modules": ["bn", "fc2"]}
    maker = kfac(model, fisher_type="fisher_mc", data_size=N, ema_decay=1.0, **rules)
    with pytest.warns(UserWarning, match="'second' does not influence the logits"):
        step(maker, loss, target, x)
    assert not hasattr(model.second, "fisher")
    # 'second' has the gradient of the loss all the same, not preconditioned
    (expected,) = torch.autograd.grad(loss(model(x), target), model.second.weight)
    torch.testing.assert_close(model.second.weight.grad, expected)
    maker = kfac(TwoHeads(), fisher_type="fisher_mc", data_size=N, **rules)
    dummy = maker.setup_model_call(maker.model, x)
    maker.setup_logits_repr(dummy[0].exp())
    maker.setup_loss_call(loss, dummy, target)
    with pytest.raises(ValueError, match=r"2 calls of torch's loss functions.*setup_logits_repr"):
        maker.forward_and_backward()


def test_logits_without_parameters_are_refused():
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C))

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).detach()

    for fisher_type in ("fisher_mc", "fisher_exact"):
        maker = kfac(Detached(), fisher_type=fisher_type)
        with pytest.raises(RuntimeError, match=r"logits, of .*, do not depend.*setup_logits_repr"):
            step(maker, F.cross_entropy, torch.randint(C, (N,)), torch.randn(N, D))


# ------------------------------------------------------------------------------------------ factors


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_emp", "fisher_exact"])
def test_a_factor_of_zeros(fisher_type, ema_decay):
    """Behind a zero-initialised head nothing below it has curvature, nor a gradient, for a step."""
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    nn.init.zeros_(model[2].weight)
    maker = kfac(model, fisher_type=fisher_type, ema_decay=ema_decay, damping=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, target = torch.randn(N, D), torch.randint(C, (N,))
    with pytest.warns(
        UserWarning, match=r"curvature of 1 layers \(the first is '0'\) is exactly zero"
    ):
        step(maker, F.cross_entropy, target, x)
    assert torch.equal(model[0].weight.grad, torch.zeros(4, D))
    assert model[2].weight.grad.abs().sum() > 0
    optimizer.step()
    step(maker, F.cross_entropy, target, x)
    (raw,) = torch.autograd.grad(F.cross_entropy(model(x), target), model[0].weight)
    assert torch.isfinite(model[0].weight.grad).all() and not torch.allclose(
        model[0].weight.grad, raw
    )


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
def test_an_input_of_zeros(ema_decay):
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    maker = kfac(model, ema_decay=ema_decay, fisher_type="fisher_emp")
    with pytest.warns(UserWarning, match="'0'.*exactly zero"):
        step(maker, F.cross_entropy, torch.randint(C, (N,)), torch.zeros(N, D))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    step(maker, F.cross_entropy, torch.randint(C, (N,)), torch.randn(N, D))


@pytest.mark.parametrize("ema_decay", [-1, 0.5])
def test_a_factor_that_is_not_positive_definite_names_the_layer(ema_decay):
    """Without damping a factor of fewer rows than columns has no Cholesky factor: B of the second
    layer.
    """
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, C))
    maker = kfac(
        model, "reduce", ema_decay=ema_decay, damping=0.0, fisher_type="fisher_emp", scale=1e8
    )
    x, target = torch.randn(N, 2), torch.randint(C, (N,))
    before = state_of(maker)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"Layer '2': its curvature plus damping 0.0 is not positive"
    ):
        step(maker, F.cross_entropy, target, x)
    assert_same(state_of(maker), before)
    maker.config.damping = 1e10
    step(maker, F.cross_entropy, target, x)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "interval", [1, 2]
)  # an inversion on a step with new curvature, and on one without
def test_a_later_inversion_that_fails_leaves_averages_and_inverses(interval):
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, C))
    maker = kfac(
        model,
        ema_decay=0.5,
        damping=1e10,
        fisher_type="fisher_emp",
        scale=1e8,
        curvature_upd_interval=interval,
    )
    x, target = torch.randn(N, 2), torch.randint(C, (N,))
    step(maker, F.cross_entropy, target, x)
    matrices = [layer.fisher for layer in (model[0], model[2], model[4])]
    model.zero_grad()
    before = state_of(maker)
    assert "fisher 2 kron.B_inv" in before
    maker.config.damping = 0.0
    with pytest.raises(torch.linalg.LinAlgError, match="Layer '2'"):
        step(maker, F.cross_entropy, target, x)
    assert_same(state_of(maker), before)
    assert all(
        layer.fisher is matrix
        for layer, matrix in zip((model[0], model[2], model[4]), matrices, strict=True)
    )
    assert maker.fisher_maker.draws == 1


def test_damping_leaves_the_averages_to_the_last_bit():
    """Upstream adds it to the factor in place and takes it away again, which rounds."""
    torch.set_default_dtype(torch.float32)
    x, target, found = torch.randn(N, D), torch.randint(C, (N,)), []
    for damping in (1e-6, 1e6):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Linear(4, C))
        maker = kfac(model, ema_decay=0.5, damping=damping, fisher_type="fisher_emp")
        for _ in range(2):
            step(maker, F.cross_entropy, target, x)
        found.append([*kron(model[0]), *kron(model[2]), model[1].fisher.unit.data])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"damping": -1.0}, "damping.*-1.0"),
        ({"data_size": 0}, "data_size.*0"),
        ({"data_size": -3}, "data_size.*-3"),
        ({"ema_decay": 0.0}, "ema_decay.*0.0"),
        ({"ema_decay": 1.5}, "ema_decay.*1.5"),
        ({"curvature_upd_interval": 0}, "curvature_upd_interval.*0"),
        ({"preconditioner_upd_interval": -1}, "preconditioner_upd_interval.*-1"),
    ],
)
def test_values_that_make_no_sense_are_refused_where_they_enter(option, message):
    with pytest.raises(ValueError, match=message):
        kfac(Model(), **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"data_size": 0}, "data_size.*0"),
        ({"data_size": -2}, "data_size.*-2"),
        ({"n_mc_samples": 0}, "n_mc_samples"),
        ({"var": 0.0}, "var is the variance.*0.0"),
        ({"var": -1}, "var is the variance.*-1"),
        ({"var": math.nan}, "var is the variance"),
        ({"var": torch.tensor([1.0, 0.0])}, "var is the variance"),
        ({"var": torch.ones(2, 3)}, r"var.*\(2, 3\)"),
        ({"var": torch.ones(2, 2, 2)}, r"var.*\(2, 2, 2\)"),
        ({"var": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "var.*positive definite"),
        ({"var": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "var.*symmetric"),
    ],
)
def test_values_of_a_fisher_config_that_make_no_sense_are_refused_where_they_enter(option, message):
    options = {"fisher_type": "fisher_mc", "loss_type": "mse", "fisher_shapes": ["kron"], **option}
    with pytest.raises(ValueError, match=message):
        get_fisher_maker(Model(), FisherConfig(**options, shared_dim="reduce"))


@pytest.mark.parametrize("fisher_type", ["fisher_mc", "fisher_exact"])
def test_data_size_and_var_that_do_not_fit_are_refused_by_the_step(fisher_type):
    x, target = torch.randn(N, D), torch.randn(N, C)
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C))
    maker = get_fisher_maker(
        model,
        FisherConfig(
            fisher_type, ["kron"], loss_type="mse", shared_dim="reduce", var=torch.ones(C + 1)
        ),
    )
    maker.setup_loss_call(F.mse_loss, maker.setup_model_call(model, x), target)
    with pytest.raises(ValueError, match=rf"var has sizes \({C + 1},\), but there are {C} outputs"):
        maker.forward_and_backward()
    with pytest.raises(ValueError, match=r"data_size.*0"):
        maker.forward_and_backward(data_size=0)
    assert not hasattr(model[0], "fisher")


def test_a_loss_that_no_layer_reaches_is_refused():
    """As where the loss is given an output of the model instead of what setup_model_call
    returned.
    """
    model, x, target = (
        nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C)),
        torch.randn(N, D),
        torch.randint(C, (N,)),
    )
    maker = kfac(model, fisher_type="fisher_emp")
    maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, model(x), target)
    with pytest.raises(
        RuntimeError,
        match=r"None of the 2 layers .*'0'.* influences .*setup_model_call\(\) returned",
    ):
        maker.forward_and_backward()
    assert all(p.grad is None for p in model.parameters()) and not hasattr(model[0], "fisher")
    step(maker, F.cross_entropy, target, x)


def test_layers_left_out_for_one_reason_get_one_warning():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (
                nn.Linear(D, D),
                nn.Linear(D, D),
                nn.Linear(D, D),
                nn.Linear(D, C),
            )

        def forward(self, x):
            self.b(x), self.c(x)
            return self.head(x)

    x, target = torch.randn(N, D), torch.randint(C, (N,))
    with pytest.warns(UserWarning) as caught:
        step(kfac(Model(), fisher_type="fisher_emp"), F.cross_entropy, target, x)
    uncalled, without_influence = (str(w.message) for w in caught)
    assert uncalled.startswith("Layer 'a' was not called in this step")
    assert without_influence.startswith("2 layers ('b', 'c'): each does not influence the logits")


@pytest.mark.parametrize(
    "freeze", [lambda m: m.requires_grad_(False), lambda m: torch.jit.trace(m, torch.ones(1, D))]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_model_without_layers_says_what_may_be_the_reason(freeze):
    torch.set_default_dtype(torch.float32)
    model = freeze(nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C)))
    reasons = (
        "" if is_native() else ".*frozen.*traced.*convert"
    )  # an ASDL with the patches knows nothing of convert
    with pytest.raises(ValueError, match=f"no layer whose curvature{reasons}"):
        kfac(model)
    with pytest.raises(ValueError, match=r"no layer whose curvature.*frozen.*traced.*convert"):
        get_fisher_maker(model, FisherConfig("fisher_emp", ["kron"], shared_dim="reduce"))


class Unfinished(asdl.Operation):
    """A user's operation with a mistake in it."""

    supported_operations = LinearReduce.supported_operations

    @staticmethod
    def cov_kron_A(module, in_data):
        n, _p = in_data.shape
        return in_data.mT @ in_data / n

    @staticmethod
    def cov_kron_B(module, out_grads):
        return out_grads.sum(1).mT @ out_grads.sum(1)


def test_a_failing_operation_of_the_users_names_the_layer_and_the_sizes():
    model, x, target = (
        nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C)),
        torch.randn(N, D),
        torch.randint(C, (N,)),
    )
    asdl_ws_plugin.register_operation(nn.Linear, Unfinished, shared_dim="mine")
    with pytest.raises(
        RuntimeError, match=r"'0': Unfinished failed with in_data of sizes \(4, 1, 3\): ValueError"
    ):
        step(
            kfac(model, ["reduce", ("0", "mine")], fisher_type="fisher_emp"),
            F.cross_entropy,
            target,
            x,
        )


def test_auto_needs_an_operation_for_each_setting():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(C, D)), None

        def forward(self, x):
            return F.linear(x, self.weight)

    asdl_ws_plugin.register_operation(Own, LinearReduce, shared_dim="reduce")
    with pytest.raises(
        ValueError, match=r"'0': there is no operation for Own under .*'expand', as 'auto' may"
    ):
        kfac(nn.Sequential(Own()), "auto")
    kfac(nn.Sequential(Own()), "reduce")


def test_warnings_point_at_the_users_line():
    model = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Linear(4, C))
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning) as caught:
        config = FisherConfig("fisher_emp", ["kron"], shared_dim="reduce", ignore_modules=["typo"])
        get_fisher_maker(model, config)
        maker = kfac(model, fisher_type="fisher_emp")
        step(
            maker, lambda y, target: (y - target).abs().mean(), torch.randn(N, C), torch.randn(N, D)
        )
    for message in (
        "no Kronecker factors",
        "'typo' matches no module",
        "exactly zero",
        "calls none of torch's",
    ):
        (found,) = (w for w in caught if message in str(w.message))
        assert Path(__file__).parents[1] in Path(found.filename).parents, message


def test_an_input_modified_in_place_is_refused():
    class Shifted(nn.Module):
        """The input of the first layer is overwritten after the layer was called."""

        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(D, C, bias=False), nn.Linear(D, C)

        def forward(self, x):
            y = self.embed(x.detach())
            x += 1
            return y + self.head(x)

    for fisher_type in TYPES:
        with pytest.raises(RuntimeError, match=r"'embed'.*modified in place.*ignore_modules"):
            step(
                kfac(Shifted(), fisher_type=fisher_type),
                F.cross_entropy,
                torch.randint(C, (N,)),
                torch.randn(N, D),
            )


# -------------------------------------------------------------------- models whose hooks never fire


@pytest.mark.parametrize("fisher_type", TYPES)
def test_another_model_than_the_makers_is_refused(fisher_type):
    maker = kfac(nn.Sequential(nn.Linear(D, C)), fisher_type=fisher_type)
    other = nn.Sequential(nn.Linear(D, C))
    dummy = maker.setup_model_call(other, torch.randn(N, D))
    maker.setup_loss_call(F.cross_entropy, dummy, torch.randint(C, (N,)))
    with pytest.raises(
        RuntimeError,
        match=r"None of the model's layers \(the first is '0'\) was called as a module",
    ):
        maker.forward_and_backward()


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer whose curvature"):
        get_fisher_maker(
            nn.Sequential(nn.Tanh()), FisherConfig("fisher_emp", ["kron"], shared_dim="reduce")
        )
    with pytest.raises(ValueError, match="no layer whose curvature"):
        kfac(nn.Sequential(nn.Tanh(), nn.PReLU()))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(ValueError, match="no layer whose curvature"):
        get_fisher_maker(model, FisherConfig("fisher_emp", ["kron"], shared_dim="reduce"))


class Keys(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys = nn.Linear(D, C)

    def forward(self, x):
        return self.keys(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(D, C), "The model is itself a layer.*Sequential"),
        (Keys, "a layer called 'keys'.*Sequential"),
    ],
)
def test_names_that_upstream_has_no_room_for_are_refused(make, message):
    """It keeps layers in an nn.ModuleDict: a KeyError, unless the model is wrapped."""
    with pytest.raises(ValueError, match=message):
        kfac(make())
    model, x = nn.Sequential(make()), torch.randn(N, D)
    target = torch.randint(C, (N,))
    step(kfac(model, fisher_type="fisher_emp", ema_decay=1.0), F.cross_entropy, target, x)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    (b,) = torch.autograd.grad(F.cross_entropy(y := model(x), target, reduction="sum"), y)
    assert_factors(layer, (x.mT @ x / N, b.mT @ b / N))


def test_no_grad_is_refused():
    maker = kfac(Model())
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"'fc1'.*without an autograd graph: under no_grad"),
    ):
        step(maker, F.cross_entropy, *reversed(batch()))
