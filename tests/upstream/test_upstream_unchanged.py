"""``shared_dim=None`` is upstream, bit for bit, with the plugin imported: gradients and Fisher of
every maker.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asdl_ws_plugin

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, warnings

warnings.simplefilter("ignore")
path, plugin = sys.argv[1], sys.argv[2] == "with"
import asdl, torch, torch.nn.functional as F
from asdl import FisherConfig, PreconditioningConfig, get_fisher_maker
from asdl.precondition import natural_gradient as ng
from torch import nn

if plugin:
    import asdl_ws_plugin

    assert "shared_dim" in FisherConfig.__dataclass_fields__
else:
    # Upstream's moving average needs NVTX, which a CPU-only build of torch does not have.
    import contextlib, types

    ng.nvtx = types.SimpleNamespace(range=lambda *a, **k: contextlib.nullcontext())
torch.use_deterministic_algorithms(True)


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def tokens():  # upstream's own flattening of (N, R, D)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Flatten(), nn.Linear(24, 3)
    )


INPUTS = {"mlp": (mlp, (6, 5)), "cnn": (cnn, (6, 2, 5, 5)), "tokens": (tokens, (6, 6, 5))}
SHAPES = {
    "Kfac": None,
    "Ekfac": None,
    "Full": None,
    "LayerWise": None,
    "UnitWise": None,
    "Diag": None,
    "Emp": None,
    "Natural": ["kron", (nn.LayerNorm, "diag"), (nn.BatchNorm2d, "unit_wise")],
}


def tensors_of(matrix, prefix):
    for name, value in sorted(vars(matrix).items()):
        if isinstance(value, torch.Tensor):
            yield f"{prefix}.{name}", value.detach().clone()
        elif isinstance(value, tuple):
            yield from (
                (f"{prefix}.{name}.{i}", v.detach().clone())
                for i, v in enumerate(value)
                if isinstance(v, torch.Tensor)
            )
        elif value is not None and hasattr(value, "__dict__"):
            yield from tensors_of(value, f"{prefix}.{name}")


def record(out, key, model, *values):
    for i, value in enumerate(values):
        out[f"{key}/value{i}"] = value.detach().clone()
    for name, p in model.named_parameters():
        out[f"{key}/grad/{name}"] = (
            p.grad.detach().clone() if p.grad is not None else torch.zeros(0)
        )
        assert p.requires_grad
    for name, buffer in model.named_buffers():
        out[f"{key}/buffer/{name}"] = buffer.clone()
    for name, module in model.named_modules():
        for attr in ("fisher", "fvp"):
            if getattr(module, attr, None) is not None:
                out.update(tensors_of(getattr(module, attr), f"{key}/{attr}/{name}"))


out = {}
for data, (make, sizes) in INPUTS.items():
    for prefix, shapes in SHAPES.items():
        maker_class = getattr(ng, f"{prefix}NaturalGradientMaker", None) or getattr(
            ng, f"{prefix}GradientMaker"
        )
        for fisher_type in ("fisher_mc", "fisher_emp", "fisher_exact"):
            for ema_decay in (-1, 0.7):
                key = f"{data}/{prefix}/{fisher_type}/{ema_decay}"
                torch.manual_seed(0)
                model = make()
                try:
                    options = {} if prefix == "Emp" else {"fisher_type": fisher_type}
                    if shapes is not None or prefix == "Emp":
                        options["fisher_shape"] = shapes or "kron"
                    config = PreconditioningConfig(
                        data_size=6,
                        damping=1e-2,
                        ema_decay=ema_decay,
                        preconditioner_upd_interval=2,
                        curvature_upd_interval=1,
                    )
                    maker = maker_class(model, config, **options)
                    optimizer = torch.optim.SGD(model.parameters(), 0.1)
                    for step in range(3):
                        x, target = torch.randn(*sizes), torch.randint(3, (6,))
                        optimizer.zero_grad()
                        dummy = maker.setup_model_call(model, x)
                        maker.setup_loss_call(F.cross_entropy, dummy, target)
                        y, loss = maker.forward_and_backward()
                        record(out, f"{key}/{step}", model, y, loss)
                        optimizer.step()
                except (
                    Exception
                ) as error:  # what upstream cannot do, it still cannot, for the same reason
                    out[f"{key}/error"] = f"{type(error).__name__}: {error}"[:60]
    for shape in ("kron", "swift_kron", "kfe", "unit_wise", "diag", "layer_wise", "full"):
        for fisher_type in ("fisher_mc", "fisher_emp", "fisher_exact"):
            for loss_type in ("cross_entropy", "mse"):
                key = f"{data}/config/{shape}/{fisher_type}/{loss_type}"
                torch.manual_seed(0)
                model = make()
                x = torch.randn(*sizes)
                target = (
                    torch.randint(3, (6,)) if loss_type == "cross_entropy" else torch.randn(6, 3)
                )
                try:
                    maker = get_fisher_maker(
                        model,
                        FisherConfig(
                            fisher_type,
                            [shape],
                            loss_type=loss_type,
                            seed=1,
                            n_mc_samples=2,
                            data_size=6,
                        ),
                    )
                    dummy = maker.setup_model_call(model, x)
                    loss = F.cross_entropy if loss_type == "cross_entropy" else F.mse_loss
                    maker.setup_loss_call(loss, dummy, target)
                    maker.forward_and_backward(calc_loss_grad=True)
                    record(out, key, model)
                except Exception as error:
                    out[f"{key}/error"] = f"{type(error).__name__}: {error}"[:60]
out["rng"] = torch.get_rng_state()
torch.save(out, path)
"""


def outcome(path, plugin):
    root = Path(asdl_ws_plugin.__file__).parents[1]
    python_path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), plugin],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    return outcome(folder / "without.pt", "without"), outcome(folder / "with.pt", "with")


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("data", ["mlp", "cnn", "tokens"])
def test_the_makers_do_what_they_did(outcomes, data):
    without, with_plugin = outcomes
    assert without.keys() == with_plugin.keys()
    compared = [key for key in without if key.startswith(f"{data}/")]
    different = [key for key in compared if not same(without[key], with_plugin[key])]
    assert not different, f"{len(different)} of {len(compared)} differ, the first is {different[0]}"
    # The comparison is of numbers: gradients of several steps, and curvature, of most makers.
    assert sum("/grad/" in key for key in compared) > 150
    assert sum("/fisher/" in key for key in compared) > 150
    for maker in (
        "Kfac/fisher_mc/-1",
        "Kfac/fisher_emp/0.7",
        "Diag/fisher_mc/-1",
        "Natural/fisher_mc/0.7",
    ):
        assert any(key.startswith(f"{data}/{maker}/2/grad/") for key in compared), maker


def test_the_generator_is_where_it_was(outcomes):
    assert torch.equal(outcomes[0]["rng"], outcomes[1]["rng"])
