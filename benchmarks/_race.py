"""Training several contenders in alternating slices, so that a slow spell of the machine meets all
of them alike, and interrupting and resuming that.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, Trainer
from _workloads import Workload

__all__ = ["Record", "Runner", "Store", "milliseconds", "race"]


@dataclass
class Record:
    """One run, finished or not.

    Attributes:
        contender, settings, seed: what ran.
        phase: ``'search'`` or ``'final'``.
        company: the contenders it alternated with.
        steps, values: of the evaluations.
        seconds, processor: wall-clock seconds and the process' CPU seconds of training alone, at
            the evaluations. On a machine that others use, the second is the steadier.
        failed: the error that ended it.
    """

    contender: str
    settings: dict[str, float]
    seed: int
    phase: str
    company: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def key(self) -> str:
        return json.dumps([self.contender, self.settings, self.seed, self.phase], sort_keys=True)

    def reached(self, target: float, lower_is_better: bool) -> int | None:
        """The index of the first evaluation that reached the target; ``None`` if none did."""
        for i, value in enumerate(self.values):
            if value <= target if lower_is_better else value >= target:
                return i
        return None


class Runner:
    """A run in progress. It has a random state of its own, so it goes the same way alone and in
    company.
    """

    def __init__(self, record: Record, workload: Workload) -> None:
        self.record, self.workload = record, workload
        self.done, self.seconds, self.processor = 0, 0.0, 0.0
        before = torch.get_rng_state()
        torch.manual_seed(record.seed)
        model = workload.model()
        self.trainer: Trainer = CONTENDERS[record.contender].make(workload, model, record.settings)
        self.trainer.switch("train")
        self._random = torch.get_rng_state()
        torch.set_rng_state(before)
        self.batches = workload.batches(record.seed)
        if not record.steps:
            self._evaluate()

    @property
    def is_finished(self) -> bool:
        return self.done >= self.workload.length.steps or bool(self.record.failed)

    def advance(self, on_step: Callable[[], None]) -> None:
        """Train up to the next evaluation, and evaluate."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            self._train(on_step)
        except (RuntimeError, ValueError) as error:  # a factor without an inverse, a loss of NaN
            self.record.failed = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(before)
        self._evaluate()

    def _train(self, on_step: Callable[[], None]) -> None:
        length = self.workload.length
        for _ in range(min(length.every, length.steps - self.done)):
            arguments, labels = next(self.batches)
            wall, processor = time.perf_counter(), time.process_time()
            loss = self.trainer.step(arguments, labels)
            self.seconds += time.perf_counter() - wall
            self.processor += time.process_time() - processor
            self.done += 1
            on_step()
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {self.done}")

    def _evaluate(self) -> None:
        value = self.trainer.evaluate()
        if not math.isfinite(value):
            value = math.inf if self.workload.lower_is_better else 0.0
        record = self.record
        record.steps.append(self.done)
        record.values.append(value)
        record.seconds.append(round(self.seconds, 4))
        record.processor.append(round(self.processor, 4))

    def state_dict(self) -> dict[str, Any]:
        return {
            "record": asdict(self.record),
            "trainer": self.trainer.state_dict(),
            "random": self._random,
            "counts": (self.done, self.seconds, self.processor),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record = Record(**state["record"])
        self.trainer.load_state_dict(state["trainer"])
        self._random = state["random"]
        self.done, self.seconds, self.processor = state["counts"]
        for _ in range(self.done):
            next(self.batches)


class Store:
    """What is on disk: finished runs and fixed targets as JSON lines, runs in progress beside them.

    Args:
        path: of the JSON lines; the runs in progress are in a file of the same name that ends in
            ``.pt``.
        experiment: what was run. It is written down first, and a file of another is refused.

    Raises:
        RuntimeError: if the file is of another experiment.
    """

    def __init__(self, path: Path, experiment: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._live, self._experiment = path, path.with_suffix(".pt"), experiment
        if not path.exists():
            self.clear()
        found = self._lines()[0].get("experiment")
        if found != experiment:
            raise RuntimeError(
                f"{path} is of another experiment ({found}, not {experiment}): move it away to run "
                "this one."
            )

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def records(self, phase: str) -> list[Record]:
        lines = [line["run"] for line in self._lines() if "run" in line]
        return [Record(**run) for run in lines if run["phase"] == phase]

    def target(self) -> float | None:
        """The target that was fixed, if one was."""
        return next((line["target"] for line in self._lines() if "target" in line), None)

    def save_live(self, runners: Sequence[Runner]) -> None:
        """Replaces what was there in one step, so that an interruption leaves one or the other."""
        part = self._live.with_suffix(".part")
        torch.save({runner.record.key: runner.state_dict() for runner in runners}, part)
        part.replace(self._live)

    def load_live(self) -> dict[str, dict[str, Any]]:
        # The optimizers' states hold objects of their libraries; the file is this command's own.
        return torch.load(self._live, weights_only=False) if self._live.exists() else {}

    def drop_live(self) -> None:
        self._live.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all runs."""
        self.path.write_text(json.dumps({"experiment": self._experiment}) + "\n")
        self.drop_live()


def race(
    workload: Workload,
    records: Sequence[Record],
    store: Store,
    progress: Any,
    save_every: float = 60.0,
) -> None:
    """Train all that is not finished yet, in slices from one evaluation to the next; the order is
    reversed from slice to slice.

    Args:
        records: what to run.
        store: takes each finished run; runs in progress are saved every ``save_every`` seconds.
        progress: of ``_report.progress_bars``.
    """
    known = {record.key for phase in ("search", "final") for record in store.records(phase)}
    live = store.load_live()
    runners = []
    for record in records:
        if record.key in known:
            continue
        record.company = [r.contender for r in records if r.key not in known]
        runners.append(Runner(record, workload))
        if record.key in live:
            runners[-1].load_state_dict(live[record.key])
    tasks = {
        id(runner): progress.add_task(
            f"{runner.record.contender}, lr {runner.record.settings['lr']:.2g}",
            total=workload.length.steps,
            completed=runner.done,
            value=runner.record.values[-1],
        )
        for runner in runners
    }
    saved = time.monotonic()
    while runners:
        for runner in runners:
            task = tasks[id(runner)]
            runner.advance(lambda task=task: progress.advance(task))  # type: ignore[misc]
            progress.update(task, value=runner.record.values[-1])
            if runner.is_finished:
                store.append({"run": asdict(runner.record)})
                progress.remove_task(task)
        runners = [runner for runner in reversed(runners) if not runner.is_finished]
        if time.monotonic() - saved > save_every:
            store.save_live(runners)
            saved = time.monotonic()
    store.drop_live()


def milliseconds(records: Sequence[Record], clock: str) -> float:
    """Of a step: the median over the slices of all runs; ``clock`` is ``seconds`` or
    ``processor``.
    """
    slices = []
    for record in records:
        times = getattr(record, clock)
        for i in range(1, len(times)):
            count = record.steps[i] - record.steps[i - 1]
            if count:
                slices.append((times[i] - times[i - 1]) / count)
    return 1e3 * statistics.median(slices) if slices else math.nan
