"""The benchmark of steps and seconds to a target: fair by construction, resumable, and complete."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import asdl_ws_plugin

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PEERS = {"NAdamW", "SOAP", "Distributed Shampoo", "Muon", "Schedule-Free AdamW"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS.parent / "examples")
    import time_to_target

    threads = torch.get_num_threads()
    yield time_to_target
    torch.set_num_threads(threads)


@pytest.fixture
def parts(bench: ModuleType) -> SimpleNamespace:
    import _contenders
    import _race
    import _workloads

    return SimpleNamespace(contenders=_contenders, race=_race, workloads=_workloads)


@pytest.fixture
def gpt(parts: SimpleNamespace) -> Any:
    return parts.workloads.SourceCode("tiny")


def record(bench: ModuleType, name: str, lr: float, values: list[float], **more: Any) -> Any:
    """A finished run that was evaluated every ten steps of half a second each."""
    steps = [10 * i for i in range(len(values))]
    seconds = [0.5 * step for step in steps]
    found = bench.Record(name, {"lr": lr}, 0, "search", [], steps, values, seconds, seconds)
    return replace(found, **more)


# --------------------------------------------------------------------------- the protocol


def test_every_contender_gets_the_same_number_of_trials(bench: ModuleType, gpt: Any) -> None:
    for count in (1, 3, 4, 20):
        for name, contender in bench.CONTENDERS.items():
            trials = contender.trials(gpt, count)
            assert len(trials) == count, name
            assert len({trial["lr"] for trial in trials}) == count
            assert trials == contender.trials(gpt, count)  # the same when resumed
            assert all(set(trial) == set(trials[0]) for trial in trials)
    dimensions = {len(contender.space) for contender in bench.CONTENDERS.values()}
    assert len(dimensions) == 1


def test_a_small_search_is_over_the_learning_rate_alone(bench: ModuleType, gpt: Any) -> None:
    nadamw = bench.CONTENDERS["NAdamW"]
    trials = nadamw.trials(gpt, 3)
    assert [trial["lr"] for trial in trials] == [1.5e-3, 3e-3, 6e-3]
    assert {tuple((k, v) for k, v in t.items() if k != "lr") for t in trials} == {
        tuple(nadamw.defaults.items())
    }
    large = nadamw.trials(gpt, 16)
    for name, (low, high) in nadamw.space.items():
        assert low <= min(t[name] for t in large) < max(t[name] for t in large) <= high
        assert len({t[name] for t in large}) == 16


def test_the_target_is_what_the_tuned_baseline_reaches_at_three_quarters(
    bench: ModuleType, gpt: Any
) -> None:
    gpt.length = replace(gpt.length, steps=40)
    search = [
        record(bench, "NAdamW", 1.0, [5.0, 2.0, 1.9, 1.8, 1.7]),
        record(bench, "NAdamW", 2.0, [5.0, 4.0, 2.5, 2.6, 1.0]),  # ends best
        record(bench, "NAdamW", 4.0, [5.0, 0.1, 0.1], failed="ValueError"),
        record(bench, "SOAP", 1.0, [5.0, 0.5, 0.4, 0.3, 0.2]),
    ]
    assert bench.target_of(search, gpt) == 2.5
    gpt.lower_is_better = False
    assert bench.target_of(search, gpt) == 5.0  # of the run that ends at 1.7


def test_a_contender_takes_the_trial_with_the_fewest_steps_to_the_target(
    bench: ModuleType, gpt: Any
) -> None:
    search = [
        record(bench, "SOAP", 1.0, [5.0, 3.0, 2.0, 0.1]),
        record(bench, "SOAP", 2.0, [5.0, 2.0, 1.9, 1.8]),
        record(bench, "SOAP", 3.0, [5.0, 2.0, 1.9, 1.5]),  # as fast, and ends better
        record(bench, "SOAP", 4.0, [5.0, 1.0], failed="LinAlgError"),
        record(bench, "Muon", 1.0, [5.0, 0.0, 0.0, 0.0]),
    ]
    best = bench.chosen(search, "SOAP", 2.0, gpt)
    assert best.settings == {"lr": 3.0} and not bench.is_on_the_edge(search, best)
    assert bench.is_on_the_edge(search, search[0]) and not bench.is_on_the_edge(search, search[1])
    assert bench.chosen(search, "SOAP", 0.01, gpt) is search[0]  # none reaches it


def test_the_table_tells_steps_and_seconds_and_who_did_not_reach_the_target(
    bench: ModuleType, gpt: Any
) -> None:
    final = [
        record(bench, "NAdamW", 1.0, [5.0, 3.0, 2.0], seed=1, company=["NAdamW", "SOAP"]),
        record(bench, "NAdamW", 1.0, [5.0, 2.0, 1.0], seed=2, company=["NAdamW", "SOAP"]),
        record(bench, "SOAP", 1.0, [5.0, 2.0, 2.0], seed=1, company=["NAdamW", "SOAP"]),
        record(bench, "SOAP", 1.0, [5.0, 9.0, math.inf], seed=2, failed="ValueError: no"),
    ]
    console = bench.Console(width=200)
    with console.capture() as capture:
        console.print(bench.results(final, [], 2.0, gpt))
    lines = {line.split()[1]: line for line in capture.get().splitlines() if "of 2" in line}
    assert "2 of 2" in lines["NAdamW"] and "15 ± 7" in lines["NAdamW"]
    assert "1 of 2" in lines["SOAP"] and "0.67" in lines["SOAP"] and "ValueError" in lines["SOAP"]
    assert bench.ratio([1.0], []) == bench.ratio([], [1.0]) == bench.ratio([1.0], [0.0]) == "-"


# --------------------------------------------------------------------------- running a race


def run_to_the_end(runner: Any) -> Any:
    while not runner.is_finished:
        runner.advance(lambda: None)
    return runner.record


def every_contender() -> list[str]:
    kinds = ("K-FAC-reduce", "K-FAC-expand", "K-FAC forward-only", "K-FAC empirical")
    presets = ["K-FAC preset", "K-FAC preset, forward-only"]
    presets += ["K-FAC-reduce, second moment", "K-FAC-expand, second moment"]
    presets += ["K-FAC forward-only, Muon"]
    return (
        sorted(PEERS)
        + presets
        + [f"{kind} {i}" for kind in kinds for i in ("1/10", "5/20", "10/100")]
    )


def test_all_contenders_are_there(bench: ModuleType) -> None:
    has_muon = hasattr(torch.optim, "Muon")
    absent = set() if has_muon else {name for name in every_contender() if "Muon" in name}
    if not hasattr(asdl_ws_plugin, "recommended"):
        absent |= {name for name in every_contender() if "preset" in name or "moment" in name}
    assert set(bench.CONTENDERS) == set(every_contender()) - absent


@pytest.mark.parametrize("name", [n for n in every_contender() if "1" not in n or "1/10" in n])
def test_a_run_goes_the_same_way_alone_in_company_and_interrupted(
    bench: ModuleType, parts: SimpleNamespace, gpt: Any, tmp_path: Path, name: str
) -> None:
    if name not in bench.CONTENDERS:
        pytest.skip("this version has none")
    settings = bench.CONTENDERS[name].trials(gpt, 1)[0]

    def runner() -> Any:
        return parts.race.Runner(bench.Record(name, settings, 3, "final"), gpt)

    alone = run_to_the_end(runner())
    assert not alone.failed and alone.steps == [0, 3, 6]
    assert alone.values[-1] < alone.values[0]  # it learns
    first, second = runner(), runner()
    first.advance(lambda: None)
    torch.rand(7)  # others draw random numbers
    store = parts.race.Store(tmp_path / "x.jsonl", "this")
    store.save_live([first])
    second.load_state_dict(store.load_live()[first.record.key])
    assert run_to_the_end(second).values == alone.values == run_to_the_end(first).values


def test_results_of_another_experiment_are_refused(parts: SimpleNamespace, tmp_path: Path) -> None:
    store = parts.race.Store(tmp_path / "x.jsonl", "this")
    store.append({"target": 1.0})
    assert parts.race.Store(tmp_path / "x.jsonl", "this").target() == 1.0
    with pytest.raises(RuntimeError, match=r"x.jsonl is of another experiment \(this, not that\)"):
        parts.race.Store(tmp_path / "x.jsonl", "that")


def test_contenders_alternate_in_slices(
    bench: ModuleType, parts: SimpleNamespace, gpt: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    order: list[str] = []
    original = parts.race.Runner.advance

    def advance(self: Any, on_step: Any) -> None:
        order.append(self.record.contender)
        original(self, on_step)

    monkeypatch.setattr(parts.race.Runner, "advance", advance)
    arguments = ["--budget", "tiny", "--trials", "1", "--threads", "1", "--out", str(tmp_path)]
    bench.main(["gpt", *arguments, "--only", "SOAP"])
    assert order == ["NAdamW", "SOAP", "SOAP", "NAdamW"] * 2  # the search, then the final runs


def test_times_are_those_of_training_alone(
    bench: ModuleType, parts: SimpleNamespace, gpt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"wall": 0.0, "processor": 0.0}
    clock = SimpleNamespace(perf_counter=lambda: now["wall"], process_time=lambda: now["processor"])
    monkeypatch.setattr(parts.race, "time", clock)

    class Fake:
        def switch(self, mode: str) -> None: ...

        def step(self, arguments: Any, labels: Any) -> float:
            now["wall"] += 2.0
            now["processor"] += 1.0
            return 1.0

        def evaluate(self) -> float:
            now["wall"] += 1000.0
            now["processor"] += 1000.0
            return 1.0

    fake = SimpleNamespace(make=lambda *_: Fake())
    monkeypatch.setitem(bench.CONTENDERS, "fake", fake)
    found = run_to_the_end(parts.race.Runner(bench.Record("fake", {}, 0, "final"), gpt))
    assert found.seconds == [0.0, 6.0, 12.0] and found.processor == [0.0, 3.0, 6.0]
    assert parts.race.milliseconds([found], "seconds") == 2000.0


def test_a_run_that_breaks_is_reported_and_ends_worst(
    bench: ModuleType, parts: SimpleNamespace, gpt: Any
) -> None:
    settings = {**bench.CONTENDERS["NAdamW"].defaults, "lr": math.inf}
    runner = parts.race.Runner(bench.Record("NAdamW", settings, 0, "search"), gpt)
    found = run_to_the_end(runner)
    assert found.failed.startswith("ValueError: the loss is nan at step 2")
    assert found.values[-1] == math.inf and found.reached(1e9, True) == 0


@pytest.mark.parametrize("when", [4, 8, 12])  # in the first trial, the second, the final runs
def test_an_interrupted_command_goes_on_and_ends_the_same(
    bench: ModuleType,
    parts: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: int,
) -> None:
    arguments = ["gpt", "--budget", "tiny", "--only", "K-FAC-reduce 1/10", "--threads", "1"]
    whole = bench.main([*arguments, "--out", str(tmp_path / "whole")])

    original, calls = parts.race.Runner.advance, []

    def advance(self: Any, on_step: Any) -> None:
        calls.append(self)
        if len(calls) == when:
            raise KeyboardInterrupt
        original(self, on_step)

    race = parts.race.race
    monkeypatch.setattr(bench, "race", lambda *args: race(*args, save_every=0.0))
    monkeypatch.setattr(parts.race.Runner, "advance", advance)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        bench.main([*arguments, "--out", str(out)])
    assert len(list(out.glob("*.pt"))) == 1
    resumed = bench.main([*arguments, "--out", str(out)])
    assert [r.values for r in resumed] == [r.values for r in whole]
    assert not list(out.glob("*.pt"))
    # Two contenders, two trials and a final run of two slices each: 12. The slice that was cut off
    # comes twice.
    assert len(calls) == 13
    lines = [json.loads(line) for line in next(out.glob("*.jsonl")).read_text().splitlines()]
    assert (
        sum("run" in line for line in lines) == 6 and sum("target" in line for line in lines) == 1
    )
    assert bench.main([*arguments, "--out", str(out)]) == resumed
    assert len(calls) == 13  # all of it was there


# --------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("workload", ["vit", "molecules", "translation", "gpt"])
def test_one_command_makes_table_and_figure(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], workload: str
) -> None:
    ours = "K-FAC-reduce 1/10"
    quick = ["--budget", "tiny", "--trials", "1", "--threads", "1", "--only", ours, "SOAP"]
    final = bench.main([workload, *quick, "--out", str(tmp_path)])
    assert {r.contender for r in final} == {"NAdamW", "SOAP", ours}
    assert not any(r.failed for r in final)
    printed = capsys.readouterr().out
    assert ours in printed and "torch" in printed
    assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")


def test_the_demo_trains_two_contenders_afresh(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import demo

    runs = [demo.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) for _ in range(2)]
    assert {run.contender for run in runs[1]} == set(demo.LEARNING_RATES) and len(runs[1]) == 2
    assert not any(run.failed for run in runs[1])
    assert [run.values for run in runs[0]] == [run.values for run in runs[1]]
    printed = capsys.readouterr().out
    assert all(name in printed for name in demo.LEARNING_RATES)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["time_to_target", "demo", "factors", "gpu"])
def test_a_command_starts_in_a_process_of_its_own(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert f"python benchmarks/{script}.py" in found.stdout


def test_refuses_what_it_does_not_know(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["imagenet"], ["vit", "--only", "Adam"], ["vit", "--budget", "huge"]):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert "invalid choice" in capsys.readouterr().err


# --------------------------------------------------------------------------- the workloads


def test_images_are_shifted_by_at_most_two_pixels_and_do_not_overlap(
    parts: SimpleNamespace,
) -> None:
    work = parts.workloads.Handwriting("full")
    x, y = work.train
    assert len(y) == 4000 and len(work.validation[1]) == 1000
    both = torch.cat([x, work.validation[0]]).flatten(1)
    assert len(both.unique(dim=0)) == 5000
    (images,), labels = next(work.batches(0))
    assert images.shape == (128, 1, 28, 28) and labels.shape == (128,)
    border = float(x.min())
    # MNIST leaves a margin of four pixels, so that all of an image's ink is there after a shift.
    ink = {round(float((image - border).sum()), 1) for image in x}
    assert {round(float((image - border).sum()), 1) for image in images} <= ink
    again, other = next(work.batches(0))[0][0], next(work.batches(1))[0][0]
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_text_is_of_the_standard_library_and_held_out_at_the_end(parts: SimpleNamespace) -> None:
    work = parts.workloads.SourceCode("tiny")
    assert len(work.train) + len(work.validation) == 20_000
    text = "".join(chr(i) for i in work.train.tolist())
    assert "import" in text and "def " in text
    assert int(work.train.min()) >= 0 and int(work.train.max()) <= 127
    (ids,), labels = next(work.batches(0))
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    with pytest.raises(RuntimeError, match=r"characters of Python sources, not"):
        parts.workloads.standard_library(10**10)


def test_the_gpt_does_not_see_the_future(parts: SimpleNamespace, double: None) -> None:
    model = parts.workloads.CharacterGPT(128, 8, 2, 16)
    ids = torch.randint(128, (3, 8))
    before = model(ids)
    ids[:, 5] = (ids[:, 5] + 1) % 128
    after = model(ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
    assert (after[:, 5:] - before[:, 5:]).abs().amin((0, 2)).gt(0).all()
