"""What makes ranks differ: wrappers, layers that one of them does not call, frozen layers, first
batches, seeds, groups, failures. Two ranks run all of it once; each test looks at its own part.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles.faults import FailingBackward, failing_at
from oracles.processes import on_ranks
from oracles.unequal_parts import distance, grads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import asdl_ws_plugin  # noqa: F401  (shared_dim)

pytestmark = pytest.mark.slow
N = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def make(model: nn.Module, **options: Any) -> Any:
    maker_class = options.pop("maker_class", asdl.KfacGradientMaker)
    keywords = {"fisher_type": options.pop("fisher_type", "fisher_emp"), "shared_dim": "reduce"}
    keywords |= {key: options.pop(key) for key in ("seed", "shared_dim") if key in options}
    config = asdl.PreconditioningConfig(**{"damping": 1e-2, "ema_decay": 0.3, **options})
    return maker_class(model, config, **keywords)


def batch(step: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def make_step(
    maker: Any, model_fn: Any, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = F.cross_entropy
) -> None:
    maker.model.zero_grad()
    maker.setup_loss_call(loss, maker.setup_model_call(model_fn, x), y)
    maker.forward_and_backward()


# ----------------------------------------------------------------------------------------- wrappers


def wrapped(rank: int, world: int, kind: str) -> list[Any]:
    """Gradients of twelve steps, with unequal parts of the batch."""
    model = network()
    model_fn: Any = model
    if kind != "plain":
        views = {"gradient_as_bucket_view": kind == "views"}
        ddp = DistributedDataParallel(model, **views)
        model_fn = (lambda x: ddp(x)) if kind == "lambda" else ddp
    maker, history = make(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        x, y = batch(step)
        part = slice(0, 5) if rank == 0 else slice(5, N)
        part = part if world > 1 else slice(0, N)
        optimizer.zero_grad(set_to_none=step % 3 > 0)
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model_fn, x[part]), y[part])
        maker.forward_and_backward()
        history += grads(model)
        optimizer.step()
    return history


def static_graph(rank: int, world: int) -> str:
    model = network()
    try:
        make_step(make(model), DistributedDataParallel(model, static_graph=True), *batch(0))
    except ValueError as error:
        return str(error)
    return ""


def wrapper_restored(rank: int, world: int) -> bool:
    """Outside of the gradient maker's steps, the wrapper averages as ever."""
    model = network()
    ddp = DistributedDataParallel(model)
    maker = make(model)
    make_step(maker, ddp, *(t[rank::world] for t in batch(0)))
    model.zero_grad()
    x, y = (t[rank::world] for t in batch(1))
    F.cross_entropy(ddp(x), y).backward()
    return distance(grads(model), raw(model, *batch(1))) < 1e-12


def raw(model: nn.Module, x: Tensor, y: Tensor) -> list[Any]:
    """The gradients of one process, by autograd alone."""
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return [grad.tolist() for grad in found]


def half_precision(rank: int, world: int) -> list[str]:
    model = network()
    model[2].to(torch.bfloat16)

    def call(x: Tensor) -> Tensor:
        return model[2](model[1](model[0](x)).bfloat16()).double()

    maker = make(model, ignore_modules=["2"])
    make_step(maker, call, *(t[rank::world] for t in batch(0)))
    return [str(p.grad.dtype) for p in model.parameters()]


# ------------------------------------------------------------------ layers that one rank leaves out


class Experts(nn.Module):
    """Rank r calls expert r alone. The first expert may be of another size than the second."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.rank = rank
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.experts = nn.ModuleList(
            [nn.Linear(5, 5), nn.Sequential(nn.Linear(5, width), nn.Linear(width, 5))]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts[self.rank](torch.tanh(self.body(x))))


def experts(rank: int, world: int, width: int, ignored: bool, average: bool) -> float:
    """How far each expert's gradient is from what it has to be."""
    torch.manual_seed(0)
    model = Experts(rank, width)
    x, y = (t[rank::world] for t in batch(0))
    F.cross_entropy(model(x), y).backward()
    true = []
    for p in model.parameters():
        total = torch.zeros_like(p) if p.grad is None else p.grad / world
        dist.all_reduce(total)
        true.append(total)
    options: dict[str, Any] = {"ignore_modules": ["experts"]} if ignored else {}
    options |= {"ema_decay": 1.0} if average else {"ema_decay": -1}
    maker = make(model, **options)
    make_step(maker, model, x, y)
    worst = 0.0
    for (name, p), grad in zip(model.named_parameters(), true, strict=True):
        if "experts" not in name or "bias" in name:
            continue
        expected = grad if ignored else preconditioned(model, rank, world, name, grad, x, y)
        worst = max(worst, float((p.grad - expected).norm() / expected.norm()))
    return worst


def preconditioned(
    model: Experts, rank: int, world: int, name: str, grad: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """By the factors of the joint batch, in which an example that does not come to a layer counts
    as zero; written out, from hooks.
    """
    layer = model.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    loss = F.cross_entropy(model(x), y, reduction="sum")
    handle.remove()
    A, B = (torch.zeros(size, size) for size in (layer.in_features, layer.out_features))
    if seen:
        (b,) = torch.autograd.grad(loss, [seen[1]])
        A, B = seen[0].detach().mT @ seen[0].detach() / N, b.mT @ b / N
    dist.all_reduce(A)
    dist.all_reduce(B)
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    A_damped = A + 0.1 * pi * torch.eye(len(A))  # the root of the damping
    B_damped = B + 0.1 / pi * torch.eye(len(B))
    return torch.linalg.solve(B_damped, torch.linalg.solve(A_damped, grad.mT).mT)


def frozen_late(rank: int, world: int) -> list[list[Any]]:
    """Gradients while two layers are frozen for a time between inversions."""
    torch.manual_seed(0)
    hidden = [z for _ in range(5) for z in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(4, 3))
    maker = make(model, curvature_upd_interval=1, preconditioner_upd_interval=10)
    history = []
    for step in range(6):
        for layer in (model[0], model[2]):
            layer.requires_grad_(not 2 <= step < 4)
        x, y = batch(step)
        make_step(maker, model, *((x, y) if world == 1 else (x[rank::world], y[rank::world])))
        history.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
    return history


# ----------------------------------------------------------------------------------------- agreeing


def failing_loss(y: Tensor, target: Tensor) -> Tensor:
    raise ZeroDivisionError("the loss failed")


def _interrupted(*args: Any) -> Any:
    raise KeyboardInterrupt


def failure(rank: int, world: int, kind: str, at: int, wrap: bool) -> dict[str, Any]:
    """Rank 1 fails in a step; both train on, and what they have in the end is the same."""
    model = nn.Sequential(network(), FailingBackward())
    model_fn = DistributedDataParallel(model) if wrap else model
    maker = make(model, curvature_upd_interval=2, preconditioner_upd_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = ""
    for step in range(4):
        x, y = (t[rank::world] for t in batch(step))
        optimizer.zero_grad()
        bad = rank == 1 and step == at
        loss: Any = failing_loss if bad and kind == "loss" else F.cross_entropy
        x = x * float("nan") if bad and kind == "not finite" else x
        x, y = (x[:0], y[:0]) if bad and kind == "empty" else (x, y)
        call = _interrupted if bad and kind == "interrupt" else model_fn
        model[1].fails = bad and kind == "backward"
        begin = time.monotonic()
        with failing_at(kind if bad else ""):
            try:
                maker.setup_loss_call(loss, maker.setup_model_call(call, x), y)
                maker.forward_and_backward()
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
        if step == at:
            seconds = time.monotonic() - begin
        else:
            optimizer.step()
    return {"told": told, "seconds": seconds, "steps": maker.state["step"], "end": state(model)}


def state(model: nn.Module) -> list[Any]:
    return [p.tolist() for p in model.parameters()]


def skipped(rank: int, world: int) -> dict[str, Any]:
    model = network()
    maker = make(model)
    maker.skip_nonfinite = True
    for step in range(3):
        x, y = (t[rank::world] for t in batch(step))
        make_step(maker, model, x * float("nan") if rank == step == 1 else x, y)
        if step == 1:
            without = [p.grad is None for p in model.parameters()]
    return {
        "skipped": maker.num_skipped,
        "steps": maker.state["step"],
        "without": all(without),
        "end": grads(model),
    }


def other_steps(rank: int, world: int) -> str:
    maker = make(network())
    maker.load_state_dict({"step": 3 + rank})
    try:
        make_step(maker, maker.model, *batch(0))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).mean(0))


def first_batches(rank: int, world: int, square: bool) -> Any:
    """``(R, N, P)``: N is R on rank 0 if it is to be square, else 1, which says nothing."""
    torch.manual_seed(0)
    model = Positions()
    maker = make(model)
    n = (5 if square else 1) if rank == 0 else 3
    x, y = torch.randn(5, n, 4), torch.arange(n) % 3
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_step(maker, model, x, y)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return maker.state_dict()["weight_sharing"]["layouts"]


def first_setting(rank: int, world: int) -> Any:
    """On rank 0 each example has one position, so that its terms are as many as its examples."""
    torch.manual_seed(0)
    maker = make(nn.Sequential(nn.Linear(4, 3)), shared_dim="auto")
    x = torch.randn(2, 1 + 3 * rank, 4)
    y = torch.zeros(x.shape[:2], dtype=torch.long)
    loss = lambda p, t: F.cross_entropy(p.flatten(0, 1), t.flatten())  # noqa: E731
    make_step(maker, maker.model, x, y, loss)
    return maker.setting


def labels(rank: int, world: int, seed: int | None) -> list[Any]:
    """B of three batches, for the same input on both ranks, before it is averaged."""
    from asdl_ws_plugin.weight_sharing import joint_batches

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    maker = make(model, fisher_type="fisher_mc", seed=seed)
    seen: list[Any] = []
    original = joint_batches.joint_curvature

    def spy(ranks: Any, what: str, plan: Any, part: Any, *rest: Any) -> Any:
        seen.append(part.results[0][1].kron.B.tolist())
        return original(ranks, what, plan, part, *rest)

    joint_batches.joint_curvature = spy
    try:
        for _ in range(3):
            make_step(maker, model, *batch(0))
    finally:
        joint_batches.joint_curvature = original
    return [seen, torch.randint(2**31, ()).item()]


def resumed(rank: int, world: int, at: int, of_one: Any = None) -> list[Any]:
    """Gradients of eight steps, in two runs: the second has the state of one rank alone."""
    model = network()
    options: dict[str, Any] = {"curvature_upd_interval": 1, "preconditioner_upd_interval": 5}
    maker, history = make(model, **options), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(8):
        if step == at:
            states = [maker.state_dict()]
            if world > 1:
                dist.broadcast_object_list(states, src=1)
            maker = make(model, **options)
            maker.load_state_dict(states[0])
        x, y = batch(step)
        optimizer.zero_grad()
        make_step(maker, model, *((x, y) if world == 1 else (x[rank::world], y[rank::world])))
        history += grads(model)
        optimizer.step()
    return history


def sent(rank: int, world: int) -> dict[str, list[int]]:
    """The numbers of elements in each call of a step that exchanges tensors of the layers."""
    maker, seen = make(network()), {"all_reduce": [], "broadcast": []}

    def counting(name: str) -> Callable[..., Any]:
        exchange = getattr(dist, name)

        def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name].append(tensor.numel())
            return exchange(tensor, *args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in seen:
            patch.setattr(dist, name, counting(name))
        make_step(maker, maker.model, *(t[rank::world] for t in batch(0)))
    return seen


SCENARIOS: dict[str, tuple[Any, ...]] = {
    "sent": (sent,),
    **{f"wrapped {kind}": (wrapped, kind) for kind in ("plain", "ddp", "views", "lambda")},
    "static graph": (static_graph,),
    "wrapper restored": (wrapper_restored,),
    "half precision": (half_precision,),
    **{
        f"experts {width} {ignored} {average}": (experts, width, ignored, average)
        for width in (5, 7)
        for ignored, average in ((True, True), (False, True), (False, False))
    },
    "frozen late": (frozen_late,),
    **{
        f"failure {kind} {at} {wrap}": (failure, kind, at, wrap)
        for kind in ("loss", "not finite", "empty", "interrupt", "backward", "inverse")
        for at in ((2,) if kind == "inverse" else (1, 2))
        for wrap in (False, True)
    },
    "skipped": (skipped,),
    "other steps": (other_steps,),
    "first batches, square": (first_batches, True),
    "first batches": (first_batches, False),
    "first setting": (first_setting,),
    "labels, seed": (labels, 3),
    "labels, no seed": (labels, None),
    **{f"resumed {at}": (resumed, at) for at in (-1, 3, 5)},
}


def everything(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (function, *args) in SCENARIOS.items():
        try:
            results[name] = function(rank, world, *args)
        except Exception:
            results[name] = RuntimeError(traceback.format_exc())
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``name -> the results of both ranks``."""
    found = on_ranks(2, tmp_path_factory.mktemp("ranks"), everything)

    def look_up(name: str) -> list[Any]:
        both = [results[name] for results in found]
        for result in both:
            if isinstance(result, RuntimeError):
                raise result
        return both

    return look_up


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["plain", "ddp", "views", "lambda"])
def test_wrapped_or_not_and_with_gradients_in_the_reducers_buckets(ranks: Any, kind: str) -> None:
    expected = wrapped(0, 1, "plain")
    for found in ranks(f"wrapped {kind}"):
        assert distance(found, expected) < 1e-10


def test_a_step_sends_gradients_and_one_triangle_of_each_factor_and_inverse(ranks: Any) -> None:
    triangles = [side * (side + 1) // 2 for side in (4, 5, 5, 3)]
    num_parameters = 4 * 5 + 5 + 5 * 3 + 3
    for found in ranks("sent"):
        assert sorted(found["all_reduce"]) == sorted([num_parameters, sum(triangles)])
        assert sum(found["broadcast"]) == sum(triangles)
        assert len(found["broadcast"]) == 2  # each rank sends the inverses that it computed


def test_a_wrapper_that_cannot_be_kept_from_averaging_is_refused(ranks: Any) -> None:
    for told in ranks("static graph"):
        assert "Make it without static_graph" in told


def test_the_wrapper_averages_as_ever_outside_of_steps(ranks: Any) -> None:
    assert ranks("wrapper restored") == [True, True]


def test_gradients_keep_their_dtype(ranks: Any) -> None:
    wanted = ["torch.float64"] * 2 + ["torch.bfloat16"] * 2
    assert ranks("half precision") == [wanted, wanted]


@pytest.mark.parametrize("width", [5, 7])
@pytest.mark.parametrize(("ignored", "average"), [(True, True), (False, True), (False, False)])
def test_layers_that_one_rank_does_not_call(
    ranks: Any, width: int, ignored: bool, average: bool
) -> None:
    """By position, an expert got the other's gradient where sizes are the same; where they are not,
    the process was aborted.
    """
    assert max(ranks(f"experts {width} {ignored} {average}")) < 1e-10


@pytest.mark.usefixtures("double")
def test_freezing_and_unfreezing_between_inversions(ranks: Any) -> None:
    expected = frozen_late(0, 1)
    for found in ranks("frozen late"):
        for step, (ours, joint) in enumerate(zip(found, expected, strict=True)):
            assert distance(ours, joint) < 1e-10, step


MESSAGES = {
    "loss": "ZeroDivisionError: the loss failed",
    "not finite": "FloatingPointError: The loss is",
    "empty": "ValueError: The batch is empty",
    "interrupt": "KeyboardInterrupt",
    "backward": "ZeroDivisionError: the backward pass failed",
    "inverse": "the inverse failed",
}


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "ddp"])
@pytest.mark.parametrize(
    ("kind", "at"),
    [(kind, at) for kind in MESSAGES for at in (1, 2) if (kind, at) != ("inverse", 1)],
)
def test_a_rank_that_fails_ends_the_step_on_all_with_its_message(
    ranks: Any, kind: str, at: int, wrap: bool
) -> None:
    """At a step without curvature (1) and at one with it (2), and both train on alike."""
    first, second = ranks(f"failure {kind} {at} {wrap}")
    assert MESSAGES[kind] in second["told"] and not second["told"].startswith("Rank")
    assert MESSAGES[kind] in first["told"] and "Rank 1: " in first["told"]
    assert max(first["seconds"], second["seconds"]) < 10
    assert first["steps"] == second["steps"] == 3
    assert first["end"] == second["end"]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks: Any) -> None:
    first, second = ranks("skipped")
    assert first == second
    assert (first["skipped"], first["steps"], first["without"]) == (1, 2, True)


def test_ranks_at_different_steps_are_told_so(ranks: Any) -> None:
    for told in ranks("other steps"):
        assert told.startswith("RankFailure: The ranks are not at the same place")
        assert "rank 0: step 3" in told and "rank 1: step 4" in told


def test_what_the_first_batches_show_goes_together(ranks: Any) -> None:
    """A square batch on rank 0, which sizes would take for batch first, is read off the graph."""
    assert ranks("first batches, square") == [{"first": "sequence_first"}] * 2
    first, second = ranks("first batches")
    assert first == second == {"first": "sequence_first"}


def test_the_setting_is_that_of_the_joint_batch(ranks: Any) -> None:
    assert ranks("first setting") == ["expand", "expand"]


@pytest.mark.parametrize("name", ["labels, seed", "labels, no seed"])
def test_sampled_labels_differ_by_rank_and_batch(ranks: Any, name: str) -> None:
    (first, after_first), (second, after_second) = ranks(name)
    drawn = [*first, *second]
    assert len({str(B) for B in drawn}) == 6
    assert after_first == after_second  # the default generators go on alike


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("at", [3, 5])
def test_all_ranks_go_on_from_the_state_of_one(ranks: Any, at: int) -> None:
    """Mid-interval, and at the step of an inversion: to the last bit what it would have been."""
    uninterrupted = ranks("resumed -1")
    assert ranks(f"resumed {at}") == uninterrupted
    assert distance(uninterrupted[0], resumed(0, 1, -1)) < 1e-10
