"""What the import does to ASDL, that it can be undone, and what it refuses."""

import copy
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import asdl
import pytest
import torch
import torch.nn.functional as F
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

import asdl_ws_plugin
from asdl_ws_plugin import upstream as registration
from asdl_ws_plugin.weight_sharing import nvtx

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using a non-full backward hook:FutureWarning"
)  # upstream's own
ROOT = Path(asdl_ws_plugin.__file__).parents[1]
NATIVE = registration.is_native()  # this ASDL carries the patches


def run(code, *paths, expect=0):
    """Run code in a fresh interpreter; returns its output and errors."""
    path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:`torch.jit.script` is deprecated",
            "-c",
            textwrap.dedent(code),
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == expect, process.stderr
    return process.stdout + process.stderr


def train_once(maker_class=asdl.KfacGradientMaker, **options):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    maker = maker_class(model, asdl.PreconditioningConfig(data_size=5, damping=1e-2), **options)
    dummy = maker.setup_model_call(model, torch.randn(5, 3))
    maker.setup_loss_call(F.cross_entropy, dummy, torch.randint(2, (5,)))
    maker.forward_and_backward()
    return maker


# ------------------------------------------------------------------------------------- import order


def test_names_bound_before_the_import_accept_shared_dim():
    run("""
        from asdl import (
            EkfacGradientMaker,
            FisherConfig as Config,
            KfacGradientMaker,
            PreconditioningConfig,
        )
        from asdl import get_fisher_maker as top_level
        from asdl.fisher import FisherConfig, get_fisher_maker
        from asdl.precondition.natural_gradient import (
            KfacGradientMaker as Kfac,
            NaturalGradientMaker,
        )

        early = FisherConfig("fisher_emp", ["kron"])


        class Mine(KfacGradientMaker):
            def __init__(self, model, config, **kwargs):
                super().__init__(model, config, **kwargs)


        import torch, torch.nn.functional as F
        from torch import nn

        before = torch.random.get_rng_state()
        import asdl_ws_plugin

        assert torch.equal(before, torch.random.get_rng_state())

        for make in (get_fisher_maker, top_level):
            config = FisherConfig(
                "fisher_mc", ["kron"], loss_type="cross_entropy", shared_dim="reduce"
            )
            assert (
                type(make(nn.Sequential(nn.Linear(2, 2)), config)).__name__
                == "WeightSharingFisherMaker"
            )
        assert Config is FisherConfig and early.shared_dim is None
        assert type(get_fisher_maker(nn.Linear(2, 2), early)).__name__ == "FisherEmp"

        for maker_class in (
            KfacGradientMaker,
            Kfac,
            Mine,
            EkfacGradientMaker,
            NaturalGradientMaker,
        ):
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            maker = maker_class(
                model,
                PreconditioningConfig(damping=0.1),
                fisher_type="fisher_emp",
                shared_dim="reduce",
            )
            assert isinstance(maker, maker_class) and maker.shared_dim_for == {
                "0": "reduce",
                "2": "reduce",
            }
            dummy = maker.setup_model_call(model, torch.randn(4, 6, 3))
            maker.setup_loss_call(
                lambda y, t: F.cross_entropy(y.mean(1), t), dummy, torch.tensor([0, 1, 1, 0])
            )
            maker.forward_and_backward()
            assert model[0].weight.grad.abs().sum() > 0
        """)


def test_the_import_is_quiet_and_draws_in_neither_timm_nor_curvlinops():
    output = run("""
        import asdl_ws_plugin, sys

        assert not {"timm", "torchvision", "curvlinops", "matplotlib", "rich", "sklearn"} & set(
            sys.modules
        )
        """)
    assert output == ""


# -------------------------------------------------------------------------- idempotence and undoing


def everything_in_asdl():
    """Identity of every attribute of every module of ASDL and of its classes."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name == "asdl" or name.startswith("asdl."):
            for key, value in vars(module).items():
                found[name, key] = value
                if inspect.isclass(value) and value.__module__.startswith("asdl."):
                    found.update(
                        {
                            (name, key, attr): v
                            for attr, v in vars(value).items()
                            if attr not in ("__dict__", "__weakref__", "_abc_impl")
                        }
                    )
                if inspect.isfunction(value):
                    found[name, key, "__code__"] = value.__code__
    return found


def differences(before, after):
    missing = object()
    return {
        key
        for key in before.keys() | after.keys()
        if before.get(key, missing) is not after.get(key, missing)
    }


@pytest.fixture
def registered():
    asdl_ws_plugin.register()
    yield
    asdl_ws_plugin.register()


def test_register_is_idempotent(registered):
    before = everything_in_asdl()
    asdl_ws_plugin.register()
    assert differences(before, everything_in_asdl()) == set()
    asdl_ws_plugin.unregister()
    asdl_ws_plugin.unregister()
    asdl_ws_plugin.register()
    assert train_once(shared_dim="reduce").shared_dim_for


def test_unregister_restores_every_place(registered):
    preamble = (
        "import inspect, sys, asdl\n"
        + inspect.getsource(everything_in_asdl)
        + inspect.getsource(differences)
    )
    if NATIVE:  # there is nothing to register, and nothing to undo
        run(
            preamble
            + textwrap.dedent("""
            import asdl.weight_sharing, importlib, pkgutil

            for module in pkgutil.iter_modules(asdl.weight_sharing.__path__):
                importlib.import_module(f"asdl.weight_sharing.{module.name}")
            before = everything_in_asdl()
            import asdl_ws_plugin

            assert differences(before, everything_in_asdl()) == set(), differences(
                before, everything_in_asdl()
            )
            asdl_ws_plugin.unregister()
            asdl_ws_plugin.register()
            assert differences(before, everything_in_asdl()) == set()
            """)
        )
        return
    output = run(
        preamble
        + textwrap.dedent("""
        before = everything_in_asdl()
        import asdl_ws_plugin

        changed = differences(before, everything_in_asdl())
        assert changed, "the import did nothing"
        asdl_ws_plugin.unregister()
        assert differences(before, everything_in_asdl()) == set(), differences(
            before, everything_in_asdl()
        )
        try:
            asdl.FisherConfig("fisher_emp", ["kron"], shared_dim="reduce")
        except TypeError:
            pass
        else:
            raise AssertionError
        asdl_ws_plugin.register()
        assert differences(before, everything_in_asdl()) == changed
        print(sorted({key[-1] if len(key) == 2 else ".".join(key[1:]) for key in changed}))
        """)
    )
    assert set(eval(output)) == {
        "get_fisher_maker.__code__",
        "nvtx",
        "KfacGradientMaker.__init__",
        "NaturalGradientMaker.__init__",
        *(
            f"FisherConfig.{name}"
            for name in (
                "__init__",
                "__repr__",
                "__eq__",
                "__dataclass_fields__",
                "__match_args__",
                "shared_dim",
            )
        ),
    } - ({"nvtx"} if nvtx.has_nvtx() else set())


def test_makers_that_exist_keep_working_after_unregister(registered):
    maker = train_once(shared_dim="reduce")
    asdl_ws_plugin.unregister()
    maker.forward_and_backward()
    assert maker.state["step"] == 2
    if NATIVE:
        assert train_once(shared_dim="reduce").shared_dim_for
    else:
        with pytest.raises(TypeError, match="shared_dim"):
            train_once(shared_dim="reduce")
    assert type(train_once().fisher_maker).__name__ == "FisherMCCrossEntropy"


# ---------------------------------------------------------------------------------- what is refused


def test_an_unrelated_package_named_asdl_is_refused(tmp_path):
    """The registry's ``asdl`` is a parser of grammars; whoever installed it is told which package
    to install.
    """
    (tmp_path / "asdl").mkdir()
    (tmp_path / "asdl" / "__init__.py").write_text(
        "def parse(file):\n    'Parse an ASDL grammar.'\n"
    )
    output = run("import asdl_ws_plugin", tmp_path, expect=1)
    assert "ImportError" in output and "pip install asdfghjkl" in output and str(tmp_path) in output


def test_a_missing_asdl_is_refused(tmp_path):
    (tmp_path / "asdl.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'asdl'\", name='asdl')\n"
    )
    output = run("import asdl_ws_plugin", tmp_path, expect=1)
    assert "ImportError" in output and "not installed: pip install asdfghjkl" in output


def test_an_asdl_that_fails_to_import_says_why(tmp_path):
    """A broken installation is not a missing one."""
    (tmp_path / "asdl.py").write_text("import a_module_that_does_not_exist\n")
    output = run("import asdl_ws_plugin", tmp_path, expect=1)
    assert "a_module_that_does_not_exist" in output


@pytest.mark.parametrize("version", ["0.1a6"])
def test_an_unknown_version_is_refused(tmp_path, version):
    info = tmp_path / f"asdfghjkl-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: asdfghjkl\nVersion: {version}\n")
    if NATIVE:  # it carries what the package needs to know
        run("import asdl_ws_plugin", tmp_path)
        return
    output = run("import asdl_ws_plugin", tmp_path, expect=1)
    assert "ImportError" in output and f"found {version}" in output and "0.1a5" in output
    assert "shared_dim" not in run(
        """
        try:
            import asdl_ws_plugin
        except ImportError:
            import asdl, inspect
            print(inspect.signature(asdl.FisherConfig))
        """,
        tmp_path,
    ), "a refused import left something behind"


# ---------------------------------------------------------------------- FisherConfig is a dataclass


def test_the_configuration_is_still_a_dataclass():
    config: Any = FisherConfig("fisher_emp", ["kron"], shared_dim="reduce")
    assert dataclasses.is_dataclass(FisherConfig)
    assert [field.name for field in dataclasses.fields(config)][-1] == "shared_dim"
    assert repr(config).startswith(
        "FisherConfig(fisher_type='fisher_emp'"
    ) and "shared_dim='reduce'" in repr(config)
    assert dataclasses.asdict(config)["shared_dim"] == "reduce"
    assert dataclasses.replace(config, shared_dim="expand").shared_dim == "expand"
    assert dataclasses.replace(config, data_size=3) == FisherConfig(
        "fisher_emp", ["kron"], shared_dim="reduce", data_size=3
    )
    assert config == FisherConfig("fisher_emp", ["kron"], shared_dim="reduce")
    assert (
        config
        != FisherConfig("fisher_emp", ["kron"])
        != FisherConfig("fisher_emp", ["kron"], shared_dim="expand")
    )
    assert FisherConfig("fisher_emp", ["kron"]) == FisherConfig("fisher_emp", ["kron"])
    assert FisherConfig.__match_args__[-1] == "shared_dim"
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert list(inspect.signature(FisherConfig).parameters)[-1] == "shared_dim"
    with pytest.raises(TypeError):
        FisherConfig("fisher_emp", ["kron"], shard_dim="reduce")
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_positional_arguments_mean_what_they_meant():
    config = FisherConfig("fisher_mc", ["kron"], "mse", 3, 2.0, 7)
    assert (config.loss_type, config.n_mc_samples, config.var, config.seed) == ("mse", 3, 2.0, 7)
    assert config.shared_dim is None


def test_signatures_tell_of_the_option():
    for cls in (asdl.KfacGradientMaker, asdl.precondition.NaturalGradientMaker):
        parameter = inspect.signature(cls).parameters["shared_dim"]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is None
    assert "swift" in inspect.signature(asdl.KfacGradientMaker).parameters


def test_one_makers_option_does_not_reach_another():
    """The option travels to the configuration that the maker creates, and no further, not even
    after an error.
    """
    with pytest.raises(ValueError, match="redcue"):
        train_once(shared_dim="redcue")
    assert FisherConfig("fisher_emp", ["kron"]).shared_dim is None
    assert type(train_once().fisher_maker).__name__ == "FisherMCCrossEntropy"
    maker = train_once(shared_dim="expand")
    assert maker.fisher_maker.config.shared_dim == "expand"
    assert type(train_once()) is asdl.KfacGradientMaker


# --------------------------------------------------------------- the new values need the new option


@pytest.mark.parametrize(
    "option",
    [
        {"fisher_type": asdl_ws_plugin.FISHER_FORWARD_ONLY},
        {"loss_type": asdl_ws_plugin.LOSS_BINARY_CROSS_ENTROPY},
    ],
)
def test_the_new_types_without_shared_dim_are_refused(option):
    with pytest.raises(ValueError, match=f"'{next(iter(option.values()))}' needs shared_dim"):
        train_once(**option)
    with pytest.raises(ValueError, match="needs shared_dim"):
        get_fisher_maker(
            nn.Sequential(nn.Linear(2, 2)),
            FisherConfig(**{"fisher_type": "fisher_mc", **option}, fisher_shapes=["kron"]),
        )
    assert asdl_ws_plugin.FISHER_FORWARD_ONLY == "fisher_forward_only"
    assert asdl_ws_plugin.LOSS_BINARY_CROSS_ENTROPY == "binary_cross_entropy"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fisher_type": "fisher_mcmc"}, "fisher_type has to be one of.*'fisher_mcmc'"),
        ({"loss_type": "hinge"}, "loss_type has to be one of.*'hinge'"),
        ({"n_mc_samples": 0}, "n_mc_samples"),
    ],
)
def test_unknown_values_with_shared_dim_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        train_once(shared_dim="reduce", **option)
