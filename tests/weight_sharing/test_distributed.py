"""Two data-parallel ranks (gloo, CPU) give the gradients of one process on the joint batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import asdl_ws_plugin

pytestmark = pytest.mark.slow

STEPS = 5


class Pooled(nn.Module):
    """Shared layers, a layer norm, and a raw parameter that no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.first(x + self.position))).mean(1))


def train(
    rank: int, world_size: int, options: dict[str, Any], resume_at: int | None = None
) -> list[torch.Tensor]:
    """Several steps. With ``resume_at``, every rank goes on there with a new maker that has rank
    0's state.
    """
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Pooled()
    config = asdl.PreconditioningConfig(
        data_size=8 // world_size, damping=1e-2, ema_decay=0.3, ignore_modules=["norm"], **options
    )
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp", shared_dim="reduce")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        if step == resume_at:
            state = [maker.state_dict()]
            if world_size > 1:
                dist.broadcast_object_list(state, src=0)
            maker = asdl.KfacGradientMaker(
                model, config, fisher_type="fisher_emp", shared_dim="reduce"
            )
            maker.load_state_dict(state[0])
        x, y = torch.randn(8, 3, 4), torch.randint(0, 3, (8,))
        part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        optimizer.zero_grad()
        logits = maker.setup_model_call(model, x[part])
        maker.setup_loss_call(F.cross_entropy, logits, y[part])
        maker.forward_and_backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _worker(
    rank: int, file: str, options: dict[str, Any], resume_at: int | None, results: Any
) -> None:
    # A layer that another rank inverts has no inverse here, and is not one whose curvature is zero.
    warnings.filterwarnings("error", ".*exactly zero")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        results[rank] = [p.numpy() for p in train(rank, 2, options, resume_at)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "options, resume_at",
    [
        ({}, None),
        ({"curvature_upd_interval": 2, "preconditioner_upd_interval": 2}, None),
        ({"curvature_upd_interval": 1, "preconditioner_upd_interval": 3}, None),
        ({"curvature_upd_interval": 2, "preconditioner_upd_interval": 2}, 3),
    ],
    ids=[
        "every step",
        "every second step",
        "inverse every third step",
        "resumed from the state of rank 0",
    ],
)
def test_two_ranks_train_like_one_process_on_the_joint_batch(
    options: dict[str, Any], resume_at: int | None, tmp_path: Path
) -> None:
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (str(tmp_path / "store"), options, resume_at, results), nprocs=2)
        ranks = [[torch.from_numpy(p) for p in results[rank]] for rank in range(2)]
    for joint, first, second in zip(train(0, 1, options), *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, joint, rtol=1e-9, atol=1e-12)


def test_distributed_without_a_moving_average_is_refused() -> None:
    """Upstream would average the owner's preconditioned gradients with the other ranks' raw
    ones.
    """
    maker = asdl.KfacGradientMaker(
        Pooled(), asdl.PreconditioningConfig(data_size=8), shared_dim="reduce"
    )
    maker.world_size = 2
    from asdl_ws_plugin.upstream import is_native
    from asdl_ws_plugin.weight_sharing.grad_maker import check

    if is_native():  # an ASDL with the patches averages before it inverts
        check(maker)
        return
    with pytest.raises(NotImplementedError, match="ema_decay"):
        check(maker)


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    """Also those of a converted model, whose forward pass and gradients are right all the same."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("PyTorch 2.6 has fully_shard")
    plain = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    model = copy.deepcopy(plain)
    x = torch.randn(2, 3, 4)
    plain(x).cos().sum().backward()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        fsdp.fully_shard(asdl_ws_plugin.convert(model), mesh=init_device_mesh("cpu", (1,)))
        model(x).cos().sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad)
        with pytest.raises(ValueError, match=r"'self_attn\.in_proj_weight' is a DTensor"):
            asdl.KfacGradientMaker(
                model, asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3), shared_dim="reduce"
            )
    finally:
        dist.destroy_process_group()
