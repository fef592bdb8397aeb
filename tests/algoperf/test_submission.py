"""The AlgoPerf submission on a stand-in for every shape of task: it trains, and resumes bit for
bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf.runner import EXAMPLE, NUM_BATCHES, SETTINGS, Run, settings_of
from algoperf.workloads import WORKLOADS

NAMES = pytest.mark.parametrize("name", WORKLOADS)
pytestmark = pytest.mark.filterwarnings("ignore:.*behind a zero-initialised head:UserWarning")


def parameters(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.params.named_parameters()}


@NAMES
def test_it_trains(submission: ModuleType, name: str):
    settings = settings_of(learning_rate=2e-2, label_smoothing=0.0, weight_decay=0.0)
    run = Run(submission, WORKLOADS[name](), settings)
    before = run.evaluate(range(NUM_BATCHES))
    for step in range(WORKLOADS[name].step_hint):
        run.step(step)
    assert run.evaluate(range(NUM_BATCHES)) < 0.8 * before
    assert run.state["kfac"].setting == WORKLOADS[name].setting


@NAMES
def test_it_resumes_bit_for_bit(submission: ModuleType, name: str):
    """In the middle of an interval, with dropout and the schedule where they were."""
    settings = settings_of(dropout_rate=0.1, curvature_interval=2, inverse_interval=4)
    whole = Run(submission, WORKLOADS[name](), settings)
    for step in range(5):
        whole.step(step)
    checkpoint = whole.checkpoint()
    resumed = Run(submission, WORKLOADS[name](), settings)
    resumed.load(checkpoint)
    for step in range(5, 10):
        whole.step(step)
        resumed.step(step)
    for parameter, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[parameter], value), parameter
    assert whole.state["lr"].get_last_lr() == resumed.state["lr"].get_last_lr()


def test_without_hyperparameters_it_tunes_itself(submission: ModuleType):
    run = Run(submission, WORKLOADS["Criteo"](), None)
    before = parameters(run)
    run.step(0)
    assert all(not torch.equal(p, before[name]) for name, p in parameters(run).items())


def test_every_point_of_the_search_space_has_what_the_submission_reads(submission: ModuleType):
    for point in range(len(SETTINGS)):
        run = Run(submission, WORKLOADS["Wmt"](), settings_of(point))
        run.step(0)
    assert {*SETTINGS[0]} == {*vars(submission.SELF_TUNED)}


def test_it_fits_on_a_page_and_names_nothing(submission: ModuleType):
    text = (EXAMPLE / "submission.py").read_text()
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 100
    names = json.loads((EXAMPLE / "batch_sizes.json").read_text())
    assert not [name for name in names if name in text]
    assert submission.get_batch_size("wmt") == names["wmt"]
    assert submission.get_batch_size("a workload of another year") == 128


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["ImagenetVit", "Wmt", "Ogbg"])
def test_compiled_models_and_losses_take_the_same_steps(submission: ModuleType, name: str):
    torch._dynamo.reset()
    plain, other = WORKLOADS[name](), WORKLOADS[name]()
    other.loss_fn = torch.compile(other.loss_fn, backend="eager")
    settings = settings_of(curvature_interval=2)
    runs = [Run(submission, plain, settings), Run(submission, other, settings, compiled)]
    for step in range(4):
        for run in runs:
            run.step(step)
    torch._dynamo.reset()
    for p, q in zip(*(run.params.parameters() for run in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["ImagenetVit", "Wmt", "Ogbg"])
def test_ddp_wrapped_models_take_the_same_steps(
    submission: ModuleType, name: str, process_group: None
):
    def wrapped(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    settings = settings_of(curvature_interval=2)
    runs = [Run(submission, WORKLOADS[name](), settings, wrap) for wrap in (None, wrapped)]
    for step in range(4):
        for run in runs:
            run.step(step)
    for p, q in zip(*(run.params.parameters() for run in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
