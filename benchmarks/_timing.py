"""Measuring: parts of a step, kinds of steps alternated between contenders, peak memory, and tables
of the results.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CLOCKS",
    "Parts",
    "alternate",
    "in_fresh_process",
    "peak_memory_mib",
    "resident",
    "seconds",
    "weighted",
]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], clock: Callable[[], float] | None = None) -> float:
    """The time of one call, of the wall clock if of no other. ``time.process_time``, with one
    thread, leaves out what other programs took meanwhile.
    """
    clock = clock or time.perf_counter
    _synchronize()
    start = clock()
    step()
    _synchronize()
    return clock() - start


class Parts:
    """Wall-clock time by part. A part inside another one is not counted as part of the outer one.

    Switched off (as it is until :meth:`recording`), entering a part costs less than a microsecond.
    """

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._active = False
        self._stack: list[str] = []
        self._current: dict[str, float] = defaultdict(float)
        self._since = 0.0

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._part(name) if self._active else _NOTHING

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return wrapped

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._tick()
        self._stack.append(name)
        try:
            yield
        finally:
            self._tick()
            self._stack.pop()

    def _tick(self) -> None:
        _synchronize()
        now = time.perf_counter()
        self._current[self._stack[-1] if self._stack else "other"] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record one step; its parts become samples when the context closes."""
        self._active, self._since = True, time.perf_counter()
        self._current.clear()
        try:
            yield
            self._tick()
        finally:
            self._active = False
        for name, value in self._current.items():
            self.samples[name].append(value)

    def medians(self) -> dict[str, float]:
        """Part -> seconds, the median over the recorded steps."""
        return {name: statistics.median(values) for name, values in self.samples.items()}


_NOTHING = contextlib.nullcontext()


def alternate(
    contenders: Mapping[str, Mapping[str, Callable[[], Any]]],
    rounds: int,
    on_step: Callable[[str], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Time every kind of step of every contender once a round, so that a slow spell of the machine
    hits all alike.

    Args:
        contenders: name -> kind of step -> function that makes such a step.
        rounds: how often; the order of the contenders is reversed every other round.
        on_step: called with the contender's name after each step.
        clock: of :func:`seconds`.

    Returns:
        name -> kind -> seconds, one number a round.
    """
    times: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in kinds} for name, kinds in contenders.items()
    }
    names = list(contenders)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            for kind, step in contenders[name].items():
                times[name][kind].append(seconds(step, clock))
                if on_step is not None:
                    on_step(name)
    return times


def weighted(times: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> float:
    """Seconds of an average step: the kinds' medians, weighted with how often each kind occurs."""
    return sum(weights[kind] * statistics.median(times[kind]) for kind in times) / sum(
        weights[kind] for kind in times
    )


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a Python process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory_mib(prepare: Callable[[], Callable[[], Any]], steps: int) -> float:
    """How far the peak of some steps is above what the process (or the GPU) held before the first,
    in MiB.

    On the CPU this is of the whole process, so it has to be a fresh one (:func:`in_fresh_process`).
    """
    step = prepare()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    for _ in range(steps):
        step()
    return (resident("VmHWM") - before) / 2**20


def resident(what: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # getrusage would count what the parent process held when it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
