"""A step that fails or is interrupted anywhere leaves everything as it was, and the next one trains
on.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin.weight_sharing import capture

pytestmark = pytest.mark.usefixtures("double")
SAMPLE = int(os.environ.get("INTERRUPTS", "60"))  # of a few thousand lines
WATCHED = (
    "natural_gradient.py",
    "prec_grad_maker.py",
    "nn/modules/module.py",
    "torch/overrides.py",
    "torch/autograd/grad_mode.py",
)
# The plugin's files, and those of the core, which a patched ASDL has.
OURS = tuple({str(Path(module.__file__ or "").parent) for module in (asdl_ws_plugin, capture)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x).mT).mT)).mean(1)


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"damping": 1e-2, "ema_decay": 0.3, "preconditioner_upd_interval": 2, **options}
    options.setdefault("curvature_upd_interval", None if options["ema_decay"] == -1 else 2)
    config = asdl.PreconditioningConfig(ignore_modules=["norm"], **options)
    return asdl.KfacGradientMaker(Model(), config, fisher_type="fisher_mc", shared_dim="reduce")


def make_step(maker: Any, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 5, 4, generator=generator) * scale
    y = torch.randint(0, 3, (6,), generator=generator)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, x), y)
    maker.forward_and_backward()


def everything(maker: Any) -> list[Any]:
    """What a step may change, in an order, and the ways in which it may leave something behind."""
    model = maker.model
    found: list[Any] = [p.grad for p in model.parameters()]
    found += list(model.buffers())
    for module in model.modules():
        matrix = getattr(module, "fisher", None)
        found.append(matrix is None)
        if matrix is not None:
            kron = matrix.kron
            found += [kron.A, kron.B, kron.A_inv, kron.B_inv]
    found += [maker.state["step"], maker.fisher_maker.draws, maker.fisher_maker.decay]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    tables = [len(m._forward_hooks_with_kwargs) for m in model.modules()]
    found += [hooks, tables, len(capture._records), capture.is_own_call()]
    found += [torch.is_grad_enabled(), torch._C._is_torch_function_enabled()]
    found.append(torch.overrides._len_torch_function_stack())
    found.append([p.requires_grad for p in model.parameters()])
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


class Interrupt:
    """Raises a KeyboardInterrupt at the n-th line that this package runs, as a signal would."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.place = at, 0, ""
        self.delicate: list[int] = []  # where something is half done

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *args: Any) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(OURS) or name.endswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if frame.f_code.co_name in (
                "register_forward_hook",
                "own_call",
                "__enter__",
                "__exit__",
            ):
                self.delicate.append(self.count)
            if self.count == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def places(maker: Any, step: int) -> list[int]:
    """A sample of the lines of a step, and all that are delicate."""
    with Interrupt(-1) as counter:
        make_step(maker, step)
    sample = random.Random(step).sample(range(1, int(0.95 * counter.count)), SAMPLE)
    return [*sample, *(at for at in counter.delicate if at < 0.95 * counter.count)]


@pytest.fixture
def no_leak() -> Iterator[None]:
    yield
    sys.settrace(None)


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("ema_decay", [0.3, -1])
@pytest.mark.parametrize("step", [2, 3], ids=["with curvature", "without"])
@pytest.mark.parametrize("held", [False, True], ids=["no gradients", "gradients held"])
def test_an_interrupt_between_any_two_lines(ema_decay: float, step: int, held: bool) -> None:
    """A sample of all of them; hooks on their way to be registered are the rare ones."""
    maker = make(ema_decay=ema_decay)
    for i in range(step):
        maker.model.zero_grad()
        make_step(maker, i)
    if not held:
        maker.model.zero_grad()
    chosen = places(copy.deepcopy(maker), step)
    expected = copy.deepcopy(maker)
    for p, own in zip(expected.model.parameters(), maker.model.parameters(), strict=True):
        p.grad = None if own.grad is None else own.grad.clone()  # which PyTorch does not copy
    state = torch.get_rng_state()
    make_step(expected, step)
    before = copy.deepcopy(everything(maker))
    for at in chosen:
        with Interrupt(at) as interrupt:
            try:
                make_step(maker, step)
            except KeyboardInterrupt:
                pass
            else:
                pytest.fail(f"the interrupt at {interrupt.place} was swallowed")
        assert all(map(same, before, everything(maker))), interrupt.place
    torch.set_rng_state(state)
    make_step(maker, step)
    for found, wanted in zip(maker.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


def test_a_step_that_is_not_finite_raises_unless_it_is_to_be_skipped() -> None:
    maker = make()
    make_step(maker, 0)
    before = copy.deepcopy(everything(maker))
    for times in (1, 2):
        with pytest.raises(FloatingPointError, match="The loss is nan"):
            make_step(maker, times, float("nan"))
    assert maker.num_skipped == 0 and all(map(same, before, everything(maker)))
    maker.skip_nonfinite = True
    for times in (1, 2):
        make_step(maker, times, float("nan"))
        assert maker.num_skipped == times and all(map(same, before, everything(maker)))


@pytest.mark.parametrize("step", [2, 3], ids=["with curvature", "without"])
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(step: int) -> None:
    maker, other = make(), make()
    maker.skip_nonfinite = True
    for i in range(5):
        for each in (maker, other):
            each.model.zero_grad()
        if i == step:
            maker.setup_loss_call(
                F.cross_entropy,
                maker.setup_model_call(maker.model, torch.full((6, 5, 4), float("inf"))),
                torch.zeros(6, dtype=torch.long),
            )
            output, loss = maker.forward_and_backward()
            assert output.shape == (6, 3) and not bool(torch.isfinite(loss))
            assert all(p.grad is None for p in maker.model.parameters())
        state = torch.get_rng_state()
        make_step(maker, i)
        torch.set_rng_state(state)
        make_step(other, i)
    for found, wanted in zip(maker.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)


def test_other_errors_are_not_skipped() -> None:
    maker = make()
    maker.skip_nonfinite = True

    def fail(y: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    dummy = maker.setup_model_call(maker.model, torch.randn(6, 5, 4))
    loss: Callable[..., Tensor] = fail
    maker.setup_loss_call(loss, dummy, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ZeroDivisionError):
        maker.forward_and_backward()
    assert maker.num_skipped == 0
