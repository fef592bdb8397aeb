"""Ranks as real processes that meet over gloo, for tests that compare them with one process."""

from __future__ import annotations

import datetime
import faulthandler
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Long enough for a busy machine; a test that waits for it has found a hang.
TIMEOUT = datetime.timedelta(seconds=60)


def _worker(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Any, results: Any
) -> None:
    # What a crash leaves, such as the stack of a SIGABRT in one of gloo's threads, is shown by
    # on_ranks: pytest cannot capture the error stream of a process that it did not start.
    stream = open(f"{folder}/rank-{rank}.txt", "w", buffering=1)  # noqa: SIM115
    os.dup2(stream.fileno(), 2)
    faulthandler.enable(stream)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
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

    A rank that is ended by a signal is no answer, neither of right nor of wrong numbers, so all
    ranks start once more, with a warning that shows where each was. If that happens again, it is
    an error. What Python raises on a rank is raised here at once.
    """
    try:
        return _once(world_size, folder, function, args)
    except RuntimeError as error:
        if not isinstance(error.__cause__, mp.ProcessExitedException):
            raise
        warnings.warn(f"Ranks crashed and start again: {error}", stacklevel=2)
        again = folder / "again"
        again.mkdir()
        return _once(world_size, again, function, args)


def _once(world_size: int, folder: Path, function: Callable[..., Any], args: Any) -> list[Any]:
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        try:
            mp.spawn(_worker, (world_size, str(folder), function, args, results), nprocs=world_size)
        except mp.ProcessExitedException as error:
            left = [f"{f.stem}:\n{f.read_text()}" for f in sorted(folder.glob("rank-*.txt"))]
            done = f"Ranks with results: {sorted(results.keys())}."
            raise RuntimeError("\n".join([str(error), done, *left])) from error
        return [results[rank] for rank in range(world_size)]
