"""The gradient makers as classes of their own, with and without a registered ASDL."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin

ROOT = Path(asdl_ws_plugin.__file__).parents[1]
NAMES = [
    "DiagNaturalGradientMaker",
    "EkfacGradientMaker",
    "EmpNaturalGradientMaker",
    "FullNaturalGradientMaker",
    "KfacGradientMaker",
    "LayerWiseNaturalGradientMaker",
    "NaturalGradientMaker",
    "UnitWiseNaturalGradientMaker",
]


def run(code: str, **environment: str) -> tuple[int, str]:
    """Run code in a fresh interpreter; returns its exit status, and output with errors."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout + process.stderr


def two_steps(maker_class: Any, **options: Any) -> list[Tensor]:
    """The preconditioned gradients of two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if maker_class.__name__.startswith("Ekfac"):
        options["fisher_type"] = "fisher_emp"
    config = asdl.PreconditioningConfig(damping=1e-2)
    maker = maker_class(model, config, **options)
    assert isinstance(maker, maker_class)
    grads = []
    for _ in range(2):
        model.zero_grad()
        dummy = maker.setup_model_call(model, torch.randn(5, 6, 3))
        labels = torch.randint(2, (5, 6))
        maker.setup_loss_call(lambda z, y: F.cross_entropy(z.mT, y), dummy, labels)
        maker.forward_and_backward()
        grads += [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    return grads


@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_its_own_is_asdls_with_the_keyword(name: str, double: None) -> None:
    """Whichever way ``shared_dim`` came in, the steps are the same to the last bit."""
    upstream, ours = getattr(asdl, name), getattr(asdl_ws_plugin, name)
    assert issubclass(ours, upstream)
    by_keyword = two_steps(upstream, shared_dim="expand")
    by_class = two_steps(ours, shared_dim="expand")
    assert all(torch.equal(a, b) for a, b in zip(by_class, by_keyword, strict=True))


def test_every_natural_gradient_maker_of_asdl_has_a_class_here() -> None:
    found = {
        name
        for name, value in vars(asdl).items()
        if inspect.isclass(value) and issubclass(value, asdl.NaturalGradientMaker)
    }
    assert found == set(NAMES)
    assert found <= set(asdl_ws_plugin.__all__)


def test_left_out_shared_dim_is_auto() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    maker = asdl_ws_plugin.KfacGradientMaker(model, asdl.PreconditioningConfig(damping=1e-2))
    assert maker.setting is None
    dummy = maker.setup_model_call(model, torch.randn(5, 6, 3))
    maker.setup_loss_call(lambda z, y: F.cross_entropy(z.mean(1), y), dummy, torch.zeros(5).long())
    maker.forward_and_backward()
    assert maker.setting == "reduce"


def test_shared_dim_none_is_refused_with_the_class_that_it_means() -> None:
    model, config = nn.Sequential(nn.Linear(3, 2)), asdl.PreconditioningConfig()
    with pytest.raises(ValueError, match=r"asdl\.KfacGradientMaker, or choose 'expand'"):
        asdl_ws_plugin.KfacGradientMaker(model, config, shared_dim=None)


def test_options_are_refused_as_by_the_keyword() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="damping has to be"):
        asdl_ws_plugin.KfacGradientMaker(model, asdl.PreconditioningConfig(damping=-1.0))
    with pytest.raises(ValueError, match="layer"):
        asdl_ws_plugin.KfacGradientMaker(
            nn.Sequential(nn.Tanh()), asdl.PreconditioningConfig(), shared_dim="reduce"
        )
    with pytest.raises(TypeError, match="shard_dim"):
        asdl_ws_plugin.KfacGradientMaker(model, asdl.PreconditioningConfig(), shard_dim="reduce")


def test_a_subclass_of_ones_own_keeps_its_methods() -> None:
    class Mine(asdl_ws_plugin.KfacGradientMaker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = True

    model = nn.Sequential(nn.Linear(3, 2))
    maker = Mine(model, asdl.PreconditioningConfig(damping=1.0), shared_dim="reduce")
    assert type(maker) is Mine and maker.mine
    assert maker.shared_dim_for == {"0": "reduce"}


# ------------------------------------------------------------------------------ an untouched ASDL

WITHOUT_REGISTRATION = """
import inspect, sys, asdl
import torch, torch.nn.functional as F
from torch import nn

def everything():
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name == "asdl" or name.startswith("asdl."):
            for key, value in vars(module).items():
                found[name, key] = value
                if inspect.isfunction(value):
                    found[name, key, "code"] = value.__code__
                if inspect.isclass(value) and value.__module__.startswith("asdl."):
                    found |= {(name, key, a): v for a, v in vars(value).items()
                              if a not in ("__dict__", "__weakref__", "_abc_impl")}
    return found

before = everything()
import asdl_ws_plugin
"""


def test_the_environment_leaves_asdl_untouched_and_the_classes_work() -> None:
    if asdl_ws_plugin.upstream.is_native():
        pytest.skip("this ASDL has shared_dim by itself: nothing is ever registered")
    code = WITHOUT_REGISTRATION + textwrap.dedent(
        """
        config = asdl.PreconditioningConfig(
            damping=1e-2, ema_decay=.5, curvature_upd_interval=1, preconditioner_upd_interval=2)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        maker = asdl_ws_plugin.KfacGradientMaker(
            model, config, fisher_type="fisher_forward_only", shared_dim="reduce")
        for _ in range(3):
            dummy = maker.setup_model_call(model, torch.randn(5, 6, 3))
            maker.setup_loss_call(
                lambda z, y: F.cross_entropy(z.mean(1), y), dummy, torch.zeros(5).long())
            maker.forward_and_backward()
        assert maker.state["step"] == 3 and model[0].weight.grad.abs().sum() > 0

        fisher = asdl_ws_plugin.FisherConfig(
            "fisher_exact", ["kron"], loss_type="cross_entropy", data_size=5, shared_dim="expand")
        maker = asdl_ws_plugin.get_fisher_maker(model, fisher)
        maker.setup_model_call(model, torch.randn(5, 6, 3))
        maker.forward_and_backward()
        stock = asdl_ws_plugin.get_fisher_maker(model, asdl.FisherConfig("fisher_emp", ["kron"]))
        assert type(stock).__name__ == "FisherEmp", type(stock)
        labels = torch.zeros(4).long()
        asdl_ws_plugin.approximation_error(model[2:], "cross_entropy", (torch.randn(4, 4), labels))

        after = everything()
        new = {key for key in before if after.get(key) is not before[key]}
        assert not new, new
        try:
            asdl.KfacGradientMaker(model, config, shared_dim="reduce")
        except TypeError as error:
            print(error)
        asdl_ws_plugin.register()
        assert asdl.KfacGradientMaker(model, config, shared_dim="reduce").shared_dim_for
        """
    )
    status, output = run(code, ASDL_WS_PLUGIN_REGISTER="0")
    assert status == 0, output
    assert "unexpected keyword argument 'shared_dim'" in output


def test_the_environment_accepts_nothing_but_0_and_1() -> None:
    status, output = run("import asdl_ws_plugin", ASDL_WS_PLUGIN_REGISTER="off")
    assert status == 1 and "ImportError" in output
    assert "ASDL_WS_PLUGIN_REGISTER has to be 0" in output and "'off'" in output
    status, output = run(
        """
        import asdl, asdl_ws_plugin
        assert "shared_dim" in asdl.FisherConfig.__dataclass_fields__
        """,
        ASDL_WS_PLUGIN_REGISTER="1",
    )
    assert status == 0, output
