"""The little of the benchmark's runner that a submission meets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from algoperf import spec
from algoperf.workloads import Workload

EXAMPLE = Path(__file__).parents[2] / "examples" / "algoperf"
SETTINGS = json.loads((EXAMPLE / "tuning_search_space.json").read_text())
NUM_BATCHES = 3  # of an epoch


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
        queue = iter([self.workload.batch(step % NUM_BATCHES)])
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
        """The mean loss of some batches."""
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
