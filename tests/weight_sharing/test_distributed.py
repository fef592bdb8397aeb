"""Sharded parameters are refused: a rank has a part of them, but curvature is of whole layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.distributed as dist
from torch import nn

import asdl_ws_plugin

pytestmark = pytest.mark.slow


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process is the only one of its group."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def make(model: nn.Module) -> Any:
    config = asdl.PreconditioningConfig(damping=1e-2, ema_decay=0.3)
    return asdl.KfacGradientMaker(model, config, shared_dim="reduce")


@pytest.mark.usefixtures("alone")
def test_fully_shard() -> None:
    """A converted model, too, has the forward pass and the gradients that it had."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("PyTorch 2.6 has fully_shard")
    plain = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)
    model = copy.deepcopy(plain)
    x = torch.randn(2, 3, 4)
    plain(x).cos().sum().backward()
    fsdp.fully_shard(asdl_ws_plugin.convert(model), mesh=init_device_mesh("cpu", (1,)))
    model(x).cos().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)
    assert len(make(model).plan.layers) == 8  # tests/front_door/test_fully_shard.py trains one


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_fully_sharded_data_parallel(use_orig_params: bool, inner: bool) -> None:
    """The wrapper of before ``fully_shard``, and the model within, whose layers look untouched."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    match = "sharded by FullyShardedDataParallel"
    with pytest.raises(ValueError, match=match):
        make(model if inner else wrapped)
