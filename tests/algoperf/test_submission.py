"""The AlgoPerf submission on a stand-in for every shape of task: it trains, and resumes bit for
bit.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algoperf import spec
from algoperf.workloads import WORKLOADS, Workload

EXAMPLE = Path(__file__).parents[2] / "examples" / "algoperf"
NAMES = pytest.mark.parametrize("name", WORKLOADS)
SETTINGS = json.loads((EXAMPLE / "tuning_search_space.json").read_text())


@pytest.fixture(scope="module")
def submission() -> Iterator[ModuleType]:
    description = importlib.util.spec_from_file_location("submission", EXAMPLE / "submission.py")
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    yield module
    sys.modules.pop("submission", None)


class Run:
    """What the benchmark's runner does: it holds the model and the state of the optimizer."""

    def __init__(
        self, submission: ModuleType, workload: Workload, settings: Any, wrap: Any = None
    ) -> None:
        self.submission, self.workload, self.settings = submission, workload, settings
        model, self.model_state = workload.init_model_fn(0)
        self.params = model if wrap is None else wrap(model)
        self.state = submission.init_optimizer_state(
            workload, self.params, self.model_state, settings, rng=[0, 1]
        )

    def step(self, step: int) -> None:
        torch.manual_seed(step)  # of dropout
        queue = iter([self.workload.batch(step)])
        args = (self.params, self.model_state, self.settings, step)
        batch = self.submission.data_selection(self.workload, queue, self.state, *args, [0, step])
        self.state, self.params, self.model_state = self.submission.update_params(
            workload=self.workload,
            current_param_container=self.params,
            current_params_types=None,
            model_state=self.model_state,
            hyperparameters=self.settings,
            batch=batch,
            loss_type=None,
            optimizer_state=self.state,
            eval_results=[],
            global_step=step,
            rng=[0, step],
        )

    def evaluate(self, steps: range) -> float:
        """The loss of batches that are not trained on."""
        self.state, self.params, self.model_state = self.submission.prepare_for_eval(
            self.workload, self.params, None, self.model_state, self.settings, None, self.state,
            [], 0, [0]
        )  # fmt: skip
        losses = []
        for step in steps:
            batch = self.workload.batch(step)
            logits, _ = self.workload.model_fn(
                self.params, batch, self.model_state, spec.ForwardPassMode.EVAL, [0], False
            )
            found = self.workload.loss_fn(batch["targets"], logits, batch.get("weights"))
            losses.append(float(found["summed"] / found["n_valid_examples"]))
        return sum(losses) / len(losses)

    def checkpoint(self) -> bytes:
        """As the benchmark saves it: whatever has a ``state_dict``."""
        file = io.BytesIO()
        optimizer_state = {key: value.state_dict() for key, value in self.state.items()}
        torch.save(
            {"model_params": self.params.state_dict(), "optimizer_state": optimizer_state}, file
        )
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.params.load_state_dict(saved["model_params"])
        for key, value in saved["optimizer_state"].items():
            self.state[key].load_state_dict(value)


def settings_of(point: int = 0, **changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**SETTINGS[point], **changed})


def parameters(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.params.named_parameters()}


@NAMES
def test_it_trains(submission: ModuleType, name: str):
    settings = settings_of(learning_rate=2e-2, label_smoothing=0.0, weight_decay=0.0)
    run = Run(submission, WORKLOADS[name](), settings)
    before = run.evaluate(range(1000, 1010))
    for step in range(WORKLOADS[name].step_hint):
        run.step(step)
    assert run.evaluate(range(1000, 1010)) < 0.8 * before
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


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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
