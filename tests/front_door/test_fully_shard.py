"""A model that ``fully_shard`` (FSDP2) has divided among ranks ends each step with the gradients of
one process that has the whole model and the joint batch, divided as they were.
"""

from __future__ import annotations

import io
import re
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from oracles.processes import on_ranks
from oracles.unequal_parts import (
    C,
    D,
    N,
    batch,
    distance,
    grads,
    mean_loss,
    part_of,
    sum_loss,
    whole,
)
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin import Preconditioner, padding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.distributed.fsdp, "fully_shard"), reason="PyTorch 2.6 has fully_shard"
    ),
]
STEPS = 4
OWN = {"damping": 1e-2, "ema_decay": 0.3, "curvature_upd_interval": 2}


class Tokens(nn.Module):
    """A label for every token. Its first layer's gradient has fewer rows than three ranks need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(D, 5), nn.LayerNorm(5)
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
        self.head = nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.norm(self.first(x))))) * 1)


class Attending(nn.Module):
    """Fused projections, of which a rank's part has rows of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, 4)
        self.middle = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(4, C)
        asdl_ws_plugin.convert(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x))) * 1


class Tied(nn.Module):
    """One weight in two layers of one unit, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, 4), nn.Linear(4, C)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.middle[2].weight = self.middle[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x))) * 1


def shard(model: nn.Module, way: str = "") -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if way == "not after forward":
        options["reshard_after_forward"] = False
    if way == "layers":
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(layer, **options)
    if way != "root":
        fully_shard(model.middle, **options)
    fully_shard(model, **options)
    if way == "not after backward":
        model.set_reshard_after_backward(False)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------- loops


def loop(
    rank: int,
    world: int,
    model_class: Any = Tokens,
    way: str = "",
    config: dict[str, Any] | None = None,
    loss: Callable[..., Tensor] = mean_loss,
    clip: float | None = None,
    drop: int | None = None,
    scaled: bool = False,
    evaluates: bool = False,
    frozen: str | None = None,
    micro: int = 1,
    **options: Any,
) -> list[Any]:
    """Gradients after each backward pass and each step, and the norms that statistics tell.

    Args:
        drop: the labels of all examples from that one on are left out, at steps 1 and 2.
        evaluates: between a step's backward pass and the preconditioning, too.
        micro: how many backward passes there are in a step.
    """
    model = model_class()
    if frozen is not None:
        model.get_parameter(frozen).requires_grad_(False)
    if world > 1:
        shard(model, way)
    own = None if config is None else asdl.PreconditioningConfig(**config)
    options = {"fisher_type": "fisher_emp", "shared_dim": "expand", **options}
    prec = Preconditioner(model, own, statistics=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    part, history = part_of(rank, world), []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for k in range(micro):
            x, y, mask = batch(10 * step + k)
            if drop is not None and step in (1, 2):
                y[drop:] = -1
            with padding(model, mask[part]):
                value = loss(model(x[part]), y[part])
            scaler.scale(value).backward()
            if evaluates:
                with torch.no_grad():
                    model(x[part])
        scaler.unscale_(optimizer)
        if not evaluates:  # which leaves whole Parameters in the model
            history += grads(model)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        prec.step()
        history += grads(model)
        history += [[prec.last_step[f"norm_{when}"]] for when in ("before", "after")]
        scaler.step(optimizer)
        scaler.update()
    if world > 1:
        assert all(p.grad is None or p.grad.placements == p.placements for p in model.parameters())
    return [entry for entry in history if entry is not None]


def asdl_door(rank: int, world: int, accumulate: bool = False, **config: Any) -> list[Any]:
    model = Tokens()
    if world > 1:
        shard(model)
    config = {**OWN, **config}
    gm = asdl_ws_plugin.KfacGradientMaker(
        model, asdl.PreconditioningConfig(**config), shared_dim="expand", fisher_type="fisher_emp"
    )
    part, history = part_of(rank, world), []
    for step in range(4):
        model.zero_grad()
        for k in range(1 + accumulate):
            x, y, mask = batch(10 * step + k)
            with padding(model, mask[part]):
                gm.setup_loss_call(mean_loss, gm.setup_model_call(model, x[part]), y[part])
                gm.forward_and_backward(accumulate=accumulate and k == 0)
        history += grads(model)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    return history


def resumed(rank: int, world: int) -> list[Any]:
    """A state that rank 0 alone has taken goes on in another gradient maker of all."""
    model = Tokens()
    if world > 1:
        shard(model)
    states: list[Any] = []
    prec = Preconditioner(model, fisher_type="fisher_emp", shared_dim="expand")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    part, history = part_of(rank, world), []
    for step in range(6):
        if step in (2, 4):
            file = io.BytesIO()
            if rank == 0:
                torch.save(prec.state_dict(), file)
            states = [file.getvalue()]
            if world > 1:
                dist.broadcast_object_list(states)
            prec.close()
            prec = Preconditioner(model, fisher_type="fisher_emp", shared_dim="expand")
            prec.load_state_dict(torch.load(io.BytesIO(states[0]), weights_only=True))
        x, y, _ = batch(step)
        optimizer.zero_grad()
        prec.backward(mean_loss(model(x[part]), y[part]))
        history += grads(model)
        optimizer.step()
    return history


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "preset": (loop, {}),
    "own": (loop, {"config": OWN}),
    "no average": (loop, {"config": {"damping": 1e-2}}),
    "reduce": (loop, {"shared_dim": "reduce"}),
    "exact": (loop, {"fisher_type": "fisher_exact"}),
    "forward only": (loop, {"fisher_type": "fisher_forward_only"}),
    "exact, no average": (loop, {"fisher_type": "fisher_exact", "config": {"damping": 1e-2}}),
    "sum": (loop, {"loss": sum_loss}),
    "kl_clip": (loop, {"graft": False, "kl_clip": 1e-8, "learning_rate": 0.05}),
    "clipped": (loop, {"clip": 0.05}),
    "scaled": (loop, {"scaled": True}),
    "scaled sum": (loop, {"scaled": True, "loss": sum_loss}),
    "evaluates": (loop, {"evaluates": True}),
    "frozen weight": (loop, {"frozen": "first.weight"}),
    "micro-batches": (loop, {"micro": 2, "loss": sum_loss}),
    "micro-batches of one unit": (loop, {"micro": 2, "loss": sum_loss, "way": "root"}),
    "attention": (loop, {"model_class": Attending}),
    "attention kl_clip": (
        loop,
        {"model_class": Attending, "graft": False, "kl_clip": 1e-8, "learning_rate": 0.05},
    ),
    "attention keys": (
        loop,
        {"model_class": Attending, "shared_dim": "reduce", "trust": None, "damping": 1e-2},
    ),
    "tied": (loop, {"model_class": Tied}),
    **{
        f"way {way}": (loop, {"way": way})
        for way in ("root", "layers", "not after forward", "not after backward")
    },
    **{
        f"dropped {fisher_type} {loss.__name__}": (
            loop,
            {"drop": 3, "fisher_type": fisher_type, "loss": loss},
        )
        for fisher_type in ("fisher_emp", "fisher_exact")
        for loss in (mean_loss, sum_loss)
    },
    "resumed": (resumed, {}),
    "asdl": (asdl_door, {}),
    "asdl, no average": (asdl_door, {"ema_decay": -1}),
    "asdl micro-batches": (asdl_door, {"accumulate": True}),
}


# Of three ranks, what depends on how many there are; the rest would take a minute more.
OF_THREE = [
    "preset",
    "exact",
    "kl_clip",
    "scaled",
    "micro-batches",
    "attention",
    "dropped fisher_emp mean_loss",
    "resumed",
]


# --------------------------------------------------------------------------------- everything else


def sampled(rank: int, world: int) -> list[Any]:
    """Two samples of labels, other ones on each rank; all ranks have the same gradient."""
    return loop(rank, world, fisher_type="fisher_mc", n_mc_samples=2)


def failure(rank: int, world: int, door: str) -> dict[str, Any]:
    """The loss of rank 1 is not finite; both train on, and have the same in the end."""
    model = Tokens()
    shard(model)
    prec = Preconditioner(model, fisher_type="fisher_emp", shared_dim="expand")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    part, told, seconds = part_of(rank, world), "", 0.0
    for step in range(8):
        x, y, _ = batch(step)
        at = step == {"curvature": 5, "plain": 6}[door]
        optimizer.zero_grad()
        begin = time.monotonic()
        loss = mean_loss(model(x[part]), y[part])
        try:
            prec.backward(loss * float("nan") if at and rank == 1 else loss)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        if at:
            seconds = time.monotonic() - begin
            empty = all(p.grad is None for p in model.parameters())
            told += "" if empty else " (gradients are left)"
        else:
            optimizer.step()
    end = [whole(p).tolist() for p in model.parameters()]
    return {"told": told, "seconds": seconds, "steps": prec.maker.state["step"], "end": end}


def mixed_precision(rank: int, world: int) -> list[Any]:
    """Gradients of float32 Parameters, with passes in bfloat16 where there are several ranks."""
    model = Tokens().float()
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.middle, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    options: dict[str, Any] = {"fisher_type": "fisher_emp", "shared_dim": "expand"}
    prec = Preconditioner(model, damping=0.1, trust=None, **options)
    x, y, _ = batch(0)
    part = part_of(rank, world)
    prec.backward(mean_loss(model(x[part].float()).float(), y[part]))
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return [torch.cat([torch.tensor(grad).flatten() for grad in grads(model)]).tolist()]


def memory_is_let_go_of(rank: int, world: int) -> list[int]:
    """How many elements whole tensors have after a step, and the model's Parameters."""
    model = Tokens()
    shard(model)
    prec = Preconditioner(model, fisher_type="fisher_emp", shared_dim="expand")
    x, y, _ = batch(0)
    part = part_of(rank, world)
    prec.backward(mean_loss(model(x[part]), y[part]))
    parts = [p.to_local().numel() for p in model.parameters()]  # type: ignore[attr-defined]
    return [sum(parts), sum(p.numel() for p in Tokens().parameters())]


# ----------------------------------------------------------------------------------------- refusals


def _make(model: nn.Module, **options: Any) -> Preconditioner:
    return Preconditioner(model, **{"fisher_type": "fisher_emp", "shared_dim": "expand", **options})


def _mesh(*sizes: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard")[: len(sizes)] if len(sizes) > 1 else None
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def root_is_not_sharded(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Tokens()
    fully_shard(model.middle, mesh=_mesh(world))
    _make(model)


def replicated_parts(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Tokens()
    fully_shard(model, mesh=_mesh(1, world))
    _make(model)


def on_fewer_ranks(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Tokens()
    fully_shard(model, mesh=_mesh(world, 1)["shard"])
    _make(model)


def tensor_parallel(rank: int, world: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = Tokens()
    parallelize_module(model, _mesh(world), {"first": ColwiseParallel()})
    _make(model)


def full_shape(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    _make(model, maker=asdl_ws_plugin.FullNaturalGradientMaker)


def lent_bias(rank: int, world: int) -> None:
    model = Tokens()
    bias = nn.Parameter(torch.zeros(C))
    model.head.__dict__["bias"], model.outer_bias = bias, bias
    del model.head._parameters["bias"]
    shard(model)
    _make(model)


def sharded_afterwards(rank: int, world: int) -> None:
    model = Tokens()
    prec = _make(model)
    shard(model)
    x, y, _ = batch(0)
    prec.backward(mean_loss(model(x), y))


def without_sync(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    prec = _make(model)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    x, y, _ = batch(0)
    mean_loss(model(x), y).backward()
    prec.step()


def another_factor(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    prec = _make(model)
    for unit in (model, model.middle):
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    x, y, _ = batch(0)
    mean_loss(model(x), y).backward()
    prec.step()


def other_vectors(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    prec = _make(model)
    x, y, _ = batch(0)
    prec.backward(mean_loss(model(x), y))
    prec.maker._precondition_module(model.head, "kron", vec_weight=torch.ones(C, 2))


def fisher_matrix(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    config = asdl_ws_plugin.FisherConfig("fisher_exact", ["kron"], data_size=N, shared_dim="expand")
    maker = asdl_ws_plugin.get_fisher_maker(model, config)
    maker.setup_model_call(model, batch(0)[0])
    maker.forward_and_backward()


def statistics_of_one(rank: int, world: int) -> None:
    model = Tokens()
    shard(model)
    _make(model, statistics=rank == 0)


REFUSALS: dict[Callable[..., None], str] = {
    root_is_not_sharded: r"'first\.weight' is trained and not sharded.*fully_shard\(model\) after",
    replicated_parts: "'first.weight' is divided as .* over a mesh of 2 dimensions.*one dimension",
    on_fewer_ranks: "sharded over 1 processes, and 2 train together",
    tensor_parallel: "'first.weight' is a DTensor that fully_shard has not made",
    full_shape: "'full' is of all parameters together",
    lent_bias: "'head'.*its bias is held by the module around it",
    sharded_afterwards: "sharded after the gradient maker was made. Make it afterwards",
    without_sync: "left no gradient.*set_requires_gradient_sync",
    another_factor: "set_gradient_divide_factor.*multiply the loss",
    other_vectors: "gradients in .grad are preconditioned alone",
    fisher_matrix: "Compute Fisher matrices and their products with a whole copy",
    statistics_of_one: "not at the same place.*statistics=True.*statistics=False",
}


def refusals(rank: int, world: int) -> dict[str, str]:
    told = {}
    for refused in REFUSALS:
        try:
            refused(rank, world)
            told[refused.__name__] = "nothing"
        except (ValueError, NotImplementedError, RuntimeError) as error:
            told[refused.__name__] = str(error)
        dist.barrier()
    return told


# -------------------------------------------------------------------------------------------- tests

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sampled": (sampled, {}),
    "failure, curvature": (failure, {"door": "curvature"}),
    "failure, plain": (failure, {"door": "plain"}),
    "mixed precision": (mixed_precision, {}),
    "memory": (memory_is_let_go_of, {}),
    "refusals": (refusals, {}),
}
ALL = {**CASES, **OTHERS}


def everything(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
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
    return on_ranks(3, tmp_path_factory.mktemp("three"), everything, OF_THREE)


def look_up(found: list[dict[str, Any]], name: str) -> list[Any]:
    for results in found:
        if isinstance(results[name], RuntimeError):
            raise results[name]
    return [results[name] for results in found]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("world", "name"), [*(("two", name) for name in CASES), *(("three", name) for name in OF_THREE)]
)
def test_a_sharded_model_has_the_gradients_of_one_process(
    request: pytest.FixtureRequest, name: str, world: str
) -> None:
    found = look_up(request.getfixturevalue(world), name)
    function, options = CASES[name]
    expected = function(0, 1, **options)
    for ours in found:
        assert distance(ours, expected) < 1e-10


def test_all_ranks_have_one_gradient_though_each_draws_its_labels(two: Any) -> None:
    first, second = look_up(two, "sampled")
    assert first == second


@pytest.mark.parametrize("door", ["curvature", "plain"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_the_step_on_all(two: Any, door: str) -> None:
    first, second = look_up(two, f"failure, {door}")
    assert "FloatingPointError: The loss is" in second["told"]
    assert "Rank 1: FloatingPointError: The loss is" in first["told"]
    assert "gradients are left" not in first["told"] + second["told"]
    assert max(first["seconds"], second["seconds"]) < 10
    assert first["steps"] == second["steps"] == 7
    assert first["end"] == second["end"]


@pytest.mark.usefixtures("double")
def test_passes_in_bfloat16_have_nearly_the_gradients_of_float32(two: Any) -> None:
    (expected,) = mixed_precision(0, 1)
    for (ours,) in look_up(two, "mixed precision"):
        assert distance([ours], [expected]) < 0.05


def test_a_rank_keeps_its_part_of_the_parameters(two: Any) -> None:
    for part, all_of_them in look_up(two, "memory"):
        assert part < 0.6 * all_of_them


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda refused: refused.__name__)
def test_what_is_not_supported_is_refused_with_what_to_do(two: Any, refused: Any) -> None:
    for told in look_up(two, "refusals"):
        assert re.search(REFUSALS[refused], told[refused.__name__], re.DOTALL), told
