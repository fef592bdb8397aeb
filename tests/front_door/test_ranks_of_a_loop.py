"""A loop on several ranks, wrapped in DistributedDataParallel or not, has after every backward pass
and step the gradients of the same loop on one process that has the joint batch.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles.faults import FailingBackward, failing_at
from oracles.processes import on_ranks
from oracles.unequal_parts import C, D, R, batch, distance, grads, mean_loss, part_of, sum_loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asdl_ws_plugin import Preconditioner, padding

pytestmark = pytest.mark.slow
STEPS = 5
SCHEDULE = {"curvature_upd_interval": 2, "preconditioner_upd_interval": 4}
KINDS = ("plain", "ddp", "views", "around", "bare")


class Tokens(nn.Module):
    """A label for every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))))


class Outer(nn.Module):
    """As Lightning wraps modules: the wrapper is around more than the Preconditioner is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def masked_mean(y: Tensor, target: Tensor) -> Tensor:
    """The mean that users write themselves."""
    mask = target >= 0
    each = F.cross_entropy(y.flatten(0, 1), target.flatten().clamp(min=0), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def wrapped(kind: str, model: nn.Module, world: int) -> tuple[Any, Any]:
    """What the loop calls, and what the Preconditioner is given."""
    if world == 1 or kind == "plain":
        return model, model
    if kind == "around":
        return DistributedDataParallel(Outer(model)), model
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=kind == "views")
    return ddp, ddp


# ------------------------------------------------------------------------------------------- loops


def loop(
    rank: int,
    world: int,
    kind: str,
    loss: Callable[..., Tensor] = mean_loss,
    preset: bool = False,
    fisher_type: str = "fisher_emp",
    shared_dim: str = "expand",
    clip: float | None = None,
    drop: int | None = None,
    scaled: bool = False,
) -> list[Any]:
    """Gradients after each backward pass, where that has to be the joint one, and each step.

    ``drop``: the labels of all examples from that one on are left out, at steps 1 and 2.
    """
    model = Tokens()
    called, given = wrapped(kind, model, world)
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3, **SCHEDULE)
    options: dict[str, Any] = {"fisher_type": fisher_type, "shared_dim": shared_dim}
    prec = Preconditioner(given, None if preset else config, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    part, history = part_of(rank, world), []
    for step in range(STEPS):
        x, y, mask = batch(step)
        if drop is not None and step in (1, 2):
            y[drop:] = -1
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        with padding(model, mask[part]):
            value = loss(called(x[part]), y[part])
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if kind != "plain" or world == 1:
            history += grads(model)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        prec.step()
        history += grads(model)
        scaler.step(optimizer)
        scaler.update()
    return history


def accumulated(rank: int, world: int, kind: str, no_sync: bool, loss: Any = None) -> list[Any]:
    """Gradients of steps of two micro-batches; one process has the joint batch of each."""
    model = Tokens()
    called, given = wrapped(kind, model, world)
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3, **SCHEDULE)
    prec = Preconditioner(given, config, fisher_type="fisher_emp", shared_dim="reduce")
    part, history = part_of(rank, world), []
    for step in range(4):
        model.zero_grad()
        for k in range(2):
            x, y, _ = batch(10 * step + k)
            wait = no_sync and k == 0 and world > 1
            with called.no_sync() if wait else contextlib.nullcontext():
                logits = called(x[part])
                # as many terms in both micro-batches, so that all ways to weigh them agree
                (loss or mean_loss)(logits, y[part]).div(2 if loss is None else 1).backward()
        if kind != "plain" or world == 1:
            history += grads(model)
        prec.step()
        history += grads(model)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    return history


def without_step(rank: int, world: int) -> list[Any]:
    """A loop that does not call step(): the wrapper's gradients are joint all the same; and one
    that is switched off has those that the wrapper makes.
    """
    model = Tokens()
    ddp = DistributedDataParallel(model)
    prec = Preconditioner(ddp, fisher_type="fisher_emp", shared_dim="expand")
    x, y, mask = batch(0)
    part = part_of(rank, world)
    with padding(model, mask[part]):
        mean_loss(ddp(x[part]), y[part]).backward()
    first = grads(model)
    prec.close()
    model.zero_grad()
    mean_loss(ddp(x[part]), y[part]).backward()
    return [first, grads(model)]


# ---------------------------------------------------------------------------------------- failures


def failure(rank: int, world: int, kind: str, at: int, wrap: bool) -> dict[str, Any]:
    """Rank 1 fails in a step; both train on, and what they have in the end is the same."""
    model = nn.Sequential(Tokens(), FailingBackward())
    called = DistributedDataParallel(model) if wrap else model
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3, **SCHEDULE)
    prec = Preconditioner(called, config, fisher_type="fisher_emp", shared_dim="reduce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    part, told, seconds = part_of(rank, world), "", 0.0
    for step in range(4):
        x, y, _ = batch(step)
        bad = rank == 1 and step == at
        model[1].fails = bad and kind == "backward"
        x = x * float("nan") if bad and kind == "not finite" else x
        optimizer.zero_grad()
        begin = time.monotonic()
        with failing_at(kind if bad else ""):
            try:
                prec.backward(mean_loss(called(x[part]), y[part]))
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
        if step == at:
            seconds = time.monotonic() - begin
        else:
            optimizer.step()
    end = [p.tolist() for p in model.parameters()]
    return {"told": told, "seconds": seconds, "steps": prec.maker.state["step"], "end": end}


def overflow(rank: int, world: int, wrap: bool, at: int) -> dict[str, Any]:
    """The gradients of rank 1 overflow at a step; both scalers have to see it."""
    model = Tokens()
    called = DistributedDataParallel(model) if wrap else model
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3, **SCHEDULE)
    prec = Preconditioner(called, config, fisher_type="fisher_emp", shared_dim="reduce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    prec.step_before(optimizer)
    part = part_of(rank, world)
    for step in range(5):
        x, y, _ = batch(step)
        optimizer.zero_grad()
        loss = mean_loss(called(x[part]), y[part])
        if rank == 1 and step == at:
            loss = loss * 1e308
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    end = [p.tolist() for p in model.parameters()]
    return {"scale": scaler.get_scale(), "skipped": prec.num_skipped, "end": end}


def no_labels_anywhere(rank: int, world: int) -> str:
    model = Tokens()
    prec = Preconditioner(model, fisher_type="fisher_emp", shared_dim="reduce")
    x, y, _ = batch(0)
    try:
        prec.backward(mean_loss(model(x), y.fill_(-1)))
    except FloatingPointError as error:
        return str(error)
    return ""


def asdl_door(rank: int, world: int, drop: int, loss: Any, fisher_type: str) -> list[Any]:
    """Ranks without labels in ASDL's interface."""
    model = Tokens()
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3, **SCHEDULE)
    maker = asdl.KfacGradientMaker(model, config, fisher_type=fisher_type, shared_dim="expand")
    part, history = part_of(rank, world), []
    for step in range(4):
        x, y, mask = batch(step)
        if step in (1, 2):
            y[drop:] = -1
        model.zero_grad()
        with padding(model, mask[part]):
            maker.setup_loss_call(loss, maker.setup_model_call(model, x[part]), y[part])
            _, value = maker.forward_and_backward()
        assert torch.isfinite(value)
        history += grads(model)
    return history


def masks(rank: int, world: int) -> Any:
    """Only the first batch of rank 0 has padding, so only it can tell which mask is the layers'."""
    from asdl_ws_plugin import attach_padding

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(D, 5), nn.Linear(5, C)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = torch.tanh(self.first(x)) * mask.unsqueeze(-1)
            return self.head(h.sum(1) / mask.sum(1, keepdim=True))

    model = Net()
    attach_padding(model, "auto")
    config = asdl.PreconditioningConfig(damping=1e-2)
    prec = Preconditioner(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    x, y = torch.randn(4, R, D), torch.randint(0, C, (4,))
    mask = torch.ones(4, R, dtype=torch.bool)
    if rank == 0:
        mask = torch.arange(R) < torch.tensor([6, 3, 2, 4])[:, None]
    prec.backward(F.cross_entropy(model(x, mask), y))
    return sorted(str(entry) for entry in prec.state_dict()["weight_sharing"]["graph"]["masks"])


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"loss": sum_loss},
    "masked mean": {"loss": masked_mean},
    "preset": {"preset": True},
    "exact": {"fisher_type": "fisher_exact"},
    "scaled": {"scaled": True},
    "scaled sum": {"scaled": True, "loss": sum_loss},
}
CASES: dict[str, tuple[Any, ...]] = {
    **{f"loop {kind}": (loop, {"kind": kind}) for kind in KINDS},
    **{
        f"loop {kind} {name}": (loop, {"kind": kind, **options})
        for kind in ("plain", "ddp")
        for name, options in OPTIONS.items()
    },
    "loop ddp clip": (loop, {"kind": "ddp", "clip": 0.05}),
    **{
        f"dropped {kind} {fisher_type} {loss.__name__}": (
            loop,
            {"kind": kind, "drop": 3, "fisher_type": fisher_type, "loss": loss},
        )
        for kind in ("plain", "ddp")
        for fisher_type in ("fisher_emp", "fisher_exact", "fisher_forward_only")
        for loss in (mean_loss, masked_mean, sum_loss)
    },
    **{
        f"asdl {fisher_type} {loss.__name__}": (
            asdl_door,
            {"drop": 3, "fisher_type": fisher_type, "loss": loss},
        )
        for fisher_type in ("fisher_emp", "fisher_exact")
        for loss in (mean_loss, masked_mean)
    },
    "accumulated plain": (accumulated, {"kind": "plain", "no_sync": False}),
    "accumulated ddp": (accumulated, {"kind": "ddp", "no_sync": False}),
    "accumulated ddp no_sync": (accumulated, {"kind": "ddp", "no_sync": True}),
    **{
        f"accumulated sum {wait}": (
            accumulated,
            {"kind": "ddp", "no_sync": wait, "loss": sum_loss},
        )
        for wait in (False, True)
    },
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "without step": (without_step, {}),
    **{
        f"failure {kind} {at} {wrap}": (failure, {"kind": kind, "at": at, "wrap": wrap})
        for kind in ("not finite", "backward", "inverse", "precondition")
        for at in ((0,) if kind == "inverse" else (1, 2))
        for wrap in (False, True)
    },
    **{
        f"overflow {wrap} {at}": (overflow, {"wrap": wrap, "at": at})
        for wrap in (False, True)
        for at in (1, 2)
    },
    "no labels anywhere": (no_labels_anywhere, {}),
    "masks": (masks, {}),
}


ALL = {**CASES, **OTHERS}


def everything(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        function, options = ALL[name]
        try:
            results[name] = function(rank, world, **options)
        except Exception:
            results[name] = RuntimeError(f"rank {rank}, {name}: {traceback.format_exc()}")
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("two"), everything, [*CASES, *OTHERS])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(3, tmp_path_factory.mktemp("three"), everything, [*CASES])


def look_up(found: list[dict[str, Any]], name: str) -> list[Any]:
    for results in found:
        if isinstance(results[name], RuntimeError):
            raise results[name]
    return [results[name] for results in found]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", ["two", "three"])
def test_the_loop_has_the_gradients_of_one_process(
    request: pytest.FixtureRequest, name: str, world: str
) -> None:
    found = look_up(request.getfixturevalue(world), name)
    function, options = CASES[name]
    expected = function(0, 1, **options)
    if options.get("kind") == "plain":  # only after the step
        size = len(list(Tokens().parameters()))
        blocks = [expected[i : i + size] for i in range(0, len(expected), size)]
        expected = [grad for block in blocks[1::2] for grad in block]
    for ours in found:
        assert distance(ours, expected) < 1e-10


@pytest.mark.usefixtures("double")
def test_gradients_are_joint_without_a_step_and_the_wrappers_own_when_closed(two: Any) -> None:
    model = Tokens()
    x, y, _ = batch(0)
    mean_loss(model(x), y).backward()
    joint = grads(model)
    parts = []
    for rank in range(2):
        part = part_of(rank, 2)
        parts.append(torch.autograd.grad(mean_loss(model(x[part]), y[part]), model.parameters()))
    means = [((a + b) / 2).tolist() for a, b in zip(*parts, strict=True)]
    assert distance(means, joint) > 1e-2
    for found in look_up(two, "without step"):
        assert distance(found[0], joint) < 1e-10
        assert distance(found[1], means) < 1e-10


MESSAGES = {
    "not finite": "FloatingPointError: The loss is",
    "backward": "ZeroDivisionError: the backward pass failed",
    "inverse": "the inverse failed",
    "precondition": "the precondition failed",
}


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("failure")])
def test_a_rank_that_fails_ends_the_step_on_all_with_its_message(two: Any, name: str) -> None:
    message = next(message for kind, message in MESSAGES.items() if kind in name)
    first, second = look_up(two, name)
    assert message in second["told"] and "Rank" not in second["told"]
    assert message in first["told"] and "Rank 1: " in first["told"]
    assert max(first["seconds"], second["seconds"]) < 10
    assert first["steps"] == second["steps"] == 3
    assert first["end"] == second["end"]


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("overflow")])
def test_all_scalers_skip_a_step_that_overflows_on_one_rank(two: Any, name: str) -> None:
    first, second = look_up(two, name)
    assert first == second
    assert (first["scale"], first["skipped"]) == (2.0**7, 1)


def test_labels_that_are_left_out_on_all_ranks_are_an_error_on_all(two: Any) -> None:
    for told in look_up(two, "no labels anywhere"):
        assert "Every label is left out on every rank" in told


def test_a_padding_mask_that_one_rank_has_found_is_that_of_all(two: Any) -> None:
    first, second = look_up(two, "masks")
    assert first == second and "first" in first[0] and "mask" in first[0]
