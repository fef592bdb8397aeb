"""Ranks as real processes that meet over gloo, for tests that compare them with one process."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Long enough for a busy machine; a test that waits for it has found a hang.
TIMEOUT = datetime.timedelta(seconds=60)


def _worker(
    rank: int, world_size: int, file: str, function: Callable[..., Any], args: Any, results: Any
) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        results[rank] = function(rank, world_size, *args)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, world_size, *args)`` returns on each of so many ranks.

    It has to be importable, and what it returns made of numbers, strings, arrays and containers.
    """
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(
            _worker,
            (world_size, str(folder / "rendezvous"), function, args, results),
            nprocs=world_size,
        )
        return [results[rank] for rank in range(world_size)]
