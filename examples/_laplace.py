"""What the examples of Laplace approximations share: the posterior, how well calibrated it is, and
the figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _report
import torch
import torch.nn.functional as F
from rich.table import Table
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401  # makes ASDL accept shared_dim
from asdl_ws_plugin._torchvision import make_importable

make_importable()  # torchmetrics, which laplace-torch needs, looks for torchvision
from laplace import Laplace  # noqa: E402
from laplace.curvature import CurvlinopsGGN  # noqa: E402
from torchmetrics.functional.classification import multiclass_calibration_error  # noqa: E402

from asdl_ws_plugin.laplace import AsdlGGN  # noqa: E402

__all__ = [
    "Scores",
    "evaluate",
    "figure",
    "fit",
    "freeze_others",
    "largest_difference_from_curvlinops",
    "out_of_distribution",
    "predict",
    "table",
]


class Quiet(AsdlGGN):
    """The same. laplace-torch warns that a backend with ASDL in its name predicts slowly, which
    this package's do not.
    """


def freeze_others(model: nn.Module) -> None:
    """Leave only linear layers and convolutions free: laplace-torch knows no curvature of the
    parameters of normalizations and no position embeddings.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.requires_grad_(True)


def fit(model: nn.Module, data: Any, shared_dim: str, validation: Any) -> tuple[Any, float]:
    """The Kronecker posterior around the trained weights, and its log evidence.

    The evidence is the largest over the prior precisions. Predictions are made with the precision
    that the validation data's likelihood is largest for: that of the evidence assumes trained
    weights that are a mode under the prior, which early stopping and decoupled weight decay do not
    lead to.
    """
    posterior = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=Quiet,
        asdl_fisher_kwargs={"shared_dim": shared_dim},  # this line switches
    )
    posterior.fit(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx` is `probit`")  # as predict's
        posterior.optimize_prior_precision(method="marglik")
        evidence = float(posterior.log_marginal_likelihood())
        posterior.optimize_prior_precision(
            method="gridsearch",
            val_loader=validation,
            grid_size=9,  # from 1 to 10,000
            log_prior_prec_min=0,
            log_prior_prec_max=4,
        )
    return posterior, evidence


def largest_difference_from_curvlinops(posterior: Any, data: Any, shared_dim: str) -> float:
    """The largest relative difference of a factor from that of laplace-torch's curvlinops
    backend.
    """
    other = Laplace(
        posterior.model,
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=CurvlinopsGGN,
        asdl_fisher_kwargs={"kfac_approx": shared_dim},
    )
    other.fit(data)
    pairs = zip(posterior.H_facs.kfacs, other.H_facs.kfacs, strict=True)
    return max(
        float((ours - theirs).norm() / theirs.norm())
        for factors in pairs
        for ours, theirs in zip(*factors, strict=True)
    )


@torch.no_grad()
def predict(model: Any, batches: Iterable[Any]) -> Tensor:
    """Class probabilities ``(N, C)`` of a posterior (linearized, probit), or of a module."""
    if isinstance(model, nn.Module):
        return torch.cat([torch.softmax(model(x), -1) for x in batches])
    return torch.cat([model(x, pred_type="glm", link_approx="probit") for x in batches])


@dataclass
class Scores:
    """How one model predicts.

    Attributes:
        name: of the model.
        evidence: the log marginal likelihood; NaN without a posterior.
        accuracy, nll, ece: on the test set; the error of calibration is over 10 bins.
        confidence, correct: of every test prediction, ``(N,)``.
        detection: name of shifted data -> the area under the ROC of the predictive entropy, which
            is 0.5 where it does not tell the data from the test set.
    """

    name: str
    evidence: float
    accuracy: float
    nll: float
    ece: float
    confidence: Tensor
    correct: Tensor
    detection: dict[str, float] = field(default_factory=dict)


def evaluate(name: str, probs: Tensor, y: Tensor, evidence: float) -> Scores:
    """Score the probabilities ``(N, C)`` by the labels ``(N,)``."""
    confidence, predicted = probs.max(1)
    ece = multiclass_calibration_error(probs, y, probs.shape[1], n_bins=10)
    nll = F.nll_loss(probs.log(), y)
    correct = predicted == y
    return Scores(
        name, evidence, float(correct.double().mean()), float(nll), float(ece), confidence, correct
    )


def entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(1)


def out_of_distribution(probs: Tensor, shifted: Tensor) -> float:
    """How well the entropy tells shifted data from the test set: the area under the ROC."""
    labels = torch.cat([torch.zeros(len(probs)), torch.ones(len(shifted))])
    return float(roc_auc_score(labels.numpy(), entropy(torch.cat([probs, shifted])).numpy()))


def table(scores: Sequence[Scores], title: str, shifts: Sequence[str]) -> Table:
    result = Table(title=title)
    result.add_column("")
    headers = ("log evidence", "accuracy", "NLL", "ECE", *(f"AUROC, {name}" for name in shifts))
    for header in headers:
        result.add_column(header, justify="right")
    for score in scores:
        evidence = "" if score.evidence != score.evidence else f"{score.evidence:.1f}"
        result.add_row(
            score.name,
            evidence,
            f"{score.accuracy:.2%}",
            f"{score.nll:.4f}",
            f"{score.ece:.4f}",
            *(f"{score.detection[name]:.3f}" for name in shifts),
        )
    return result


def figure(scores: Sequence[Scores], path: Path, title: str) -> None:
    """A reliability diagram, and the detection of shifted data where there are several shifts."""
    several = len(scores[0].detection) > 1
    drawing, axes = _report.pyplot().subplots(
        1, 1 + several, figsize=(5 + 5 * several, 4.2), squeeze=False, layout="constrained"
    )
    reliability = axes[0, 0]
    for score in scores:
        accuracy, confidence = calibration_curve(
            score.correct.numpy(), score.confidence.numpy(), n_bins=8, strategy="quantile"
        )
        reliability.plot(confidence, accuracy, "o-", label=f"{score.name}, ECE {score.ece:.3f}")
    lowest = min(reliability.get_xlim()[0], reliability.get_ylim()[0])
    reliability.plot([lowest, 1], [lowest, 1], color="0.5", linewidth=0.8, linestyle="--")
    reliability.set(xlabel="confidence", ylabel="accuracy")
    reliability.legend(loc="lower right")
    reliability.grid(alpha=0.3)
    if several:
        for score in scores:
            axes[0, 1].plot(
                list(score.detection), list(score.detection.values()), "o-", label=score.name
            )
        axes[0, 1].set(xlabel="rotation", ylabel="AUROC of the entropy")
        axes[0, 1].grid(alpha=0.3)
    drawing.suptitle(title)
    _report.save(drawing, path)
