"""``python -m asdl_ws_plugin inspect``: a model is found, its inputs are made, and the report comes
out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asdl_ws_plugin.__main__ import load_model, main, make_input, shared_dim_of
from asdl_ws_plugin._torchvision import make_importable

pytestmark = pytest.mark.slow

MODELS = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids, mask=None):
        return self.head(
            self.layer(self.embedding(ids), src_key_padding_mask=None if mask is None else ~mask)
        )


class Holder:
    model = nn.Linear(3, 2)


tokens = Tokens()
number = 3


def factory():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


def needs_argument(x):
    return x
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of models, which is the current one."""
    (tmp_path / "cli_test_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_test_models", raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON that the command prints."""
    assert main(["inspect", *arguments, "--json"]) == 0
    out = capsys.readouterr()
    assert not out.err
    return json.loads(out.out)


def rows(report: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in report["rows"]}


def test_models_of_timm_are_inspected(capsys: pytest.CaptureFixture[str]):
    report = run(capsys, "timm:vit_tiny_patch16_224", "--input", "2,3,224,224")
    assert report["model"] == "VisionTransformer" and report["num_examples"] == 2
    assert report["matrix_coverage"] == 1.0 and 0.99 < report["coverage"] < 1
    assert rows(report)["blocks.3.mlp.fc1"]["factor_sizes"] == {"A": [192, 192], "B": [768, 768]}
    assert rows(report)["blocks.3.mlp.fc1"]["R"] == 197


def test_models_of_torchvision_are_inspected_converted_or_not(capsys: pytest.CaptureFixture[str]):
    before = run(capsys, "torchvision:swin_v2_t", "--input", "1,3,64,64")
    after = run(capsys, "torchvision:swin_v2_t", "--input", "1,3,64,64", "--convert")
    assert before["matrix_coverage"] < 0.8
    assert (
        not rows(before)["features.1.0.attn.qkv"]["seen"]
        and rows(after)["features.1.0.attn.qkv"]["seen"]
    )
    assert "convert" in rows(before)["features.1.0.attn.qkv"]["remedy"]
    assert before["num_parameters"] == after["num_parameters"]
    assert (
        after["matrix_coverage"] > 0.99
    )  # all but the position biases' network, which has no examples


def test_models_of_the_users(here: Path, capsys: pytest.CaptureFixture[str]):
    ids = "2,7:int64:100"
    report = run(capsys, "cli_test_models:Tokens", "--input", ids, "--convert")
    assert (report["model"], report["setting"]) == ("Tokens", "expand")
    assert rows(report)["layer.self_attn.q_proj"]["strategy"] == "expand"
    assert rows(report)["layer.linear1"]["R"] == 7
    keywords = run(
        capsys,
        "cli_test_models:tokens",
        "--input",
        f"ids={ids}",
        "--input",
        "mask=2,7:bool",
        "--shared-dim",
        "reduce",
        "--shared-dim",
        "head=expand",
        "--shared-dim",
        "linear1=reduce,sequence_first",
    )
    assert (
        rows(keywords)["head"]["strategy"] == "expand"
        and rows(keywords)["layer.linear2"]["strategy"] == "reduce"
    )
    assert (
        rows(keywords)["layer.linear1"]["layout"] == "sequence_first"
        and keywords["num_examples"] == 7
    )
    report = run(capsys, "cli_test_models:Holder.model", "--input", "4,3", "--shared-dim", "reduce")
    assert report["rows"][0]["name"] == "" and report["coverage"] == 1.0
    assert (
        main(["inspect", "cli_test_models:factory", "--input", "1,3"]) == 2
    )  # batch normalization of one example
    assert "Expected more than 1 value" in capsys.readouterr().err
    assert run(capsys, "cli_test_models:factory", "--input", "1,3", "--eval")["coverage"] == 1.0


def test_inputs_are_made_as_the_arguments_say():
    torch.manual_seed(0)
    keyword, x = make_input("2,3,4")
    assert keyword is None and x.shape == (2, 3, 4) and x.dtype == torch.float32 and x.std() > 0.3
    keyword, ids = make_input("input_ids=50,16:int64:100")
    assert keyword == "input_ids" and ids.shape == (50, 16) and ids.dtype == torch.int64
    assert ids.min() == 0 and ids.max() == 99
    assert set(make_input("50:int32")[1].tolist()) == {0, 1}
    assert (
        make_input("3:float64")[1].dtype == torch.float64
        and make_input("3:bfloat16")[1].dtype == torch.bfloat16
    )
    assert make_input("mask=3:bool")[1].tolist() == [True] * 3


def test_shared_dim_is_read_from_the_arguments():
    assert shared_dim_of(["auto"]) == "auto"
    assert shared_dim_of(["reduce", "head=expand"]) == ["reduce", ("head", "expand")]
    assert shared_dim_of(["decoder=reduce,sequence_first"]) == [
        "auto",
        ("decoder", "reduce", "sequence_first"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["timm:vit_tny_patch16_224", "--input", "2,3"],
            "no model .vit_tny_patch16_224.. Did you mean vit_tiny_",
        ),
        (
            ["torchvision:resnet19", "--input", "2,3"],
            "torchvision has no model 'resnet19'. Did you mean .*resnet18",
        ),
        (
            ["torchvision:vitb16", "--input", "2,3"],
            r"torchvision has no model 'vitb16'. Did you mean vit_b_16.*\?$",
        ),
        (["torchvision:xyz", "--input", "2,3"], r"torchvision has no model 'xyz'\.$"),
        (["tim:vit_tiny", "--input", "2,3"], r"No module named 'tim'. Did you mean timm\?$"),
        (
            ["cli_test_models:Holdr.model", "--input", "2,3"],
            r"no 'Holdr.model'.* Did you mean Holder\?$",
        ),
        (
            ["cli_test_models:Holder.modle", "--input", "2,3"],
            r"no 'Holder.modle'.* Did you mean model\?$",
        ),
        (["vit_tiny", "--input", "2,3"], "has to be timm:NAME"),
        (["no_such_module:model", "--input", "2,3"], "no 'model' in 'no_such_module'"),
        (["cli_test_models:missing", "--input", "2,3"], "no 'missing' in 'cli_test_models'"),
        (["cli_test_models:number", "--input", "2,3"], "is int, not"),
        (["cli_test_models:needs_argument", "--input", "2,3"], "TypeError: .*argument"),
        (["cli_test_models:Holder.model", "--input", "2,x"], "--input has to be like .*got '2,x'"),
        (["cli_test_models:Holder.model", "--input", "2,0"], "--input has to be like"),
        (["cli_test_models:Holder.model", "--input", "2,3:int64:5:6"], "--input has to be like"),
        (["cli_test_models:Holder.model", "--input", "2,3:int64:0"], "--input has to be like"),
        (["cli_test_models:Holder.model", "--input", "a-b=2,3"], "--input has to be like"),
        (["cli_test_models:Holder.model", "--input", "2,3:nn"], "'nn' is no dtype"),
        (["cli_test_models:Holder.model", "--input", "2,3:complex64"], "'complex64' is no dtype"),
        (["cli_test_models:Holder.model", "--input", "2,4"], "RuntimeError: .*shapes"),
        (
            ["cli_test_models:Holder.model", "--input", "2,3", "--shared-dim", "both"],
            "unknown value 'both'",
        ),
        (
            ["cli_test_models:Holder.model", "--input", "2,3", "--shared-dim", "tail=reduce"],
            "'tail' matches no",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert main(["inspect", *arguments]) == 2
    out = capsys.readouterr()
    assert not out.out and len(out.err.splitlines()) == 1
    assert re.search(f"^error: .*{message}", out.err), out.err


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make_importable()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["inspect", "timm:vit_tiny_patch16_224", "--input", "2,3"]) == 2
    assert "pip install timm" in capsys.readouterr().err


def test_wrong_usage_shows_the_usage(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["inspect"], ["inspect", "timm:x"], ["train"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert "usage: python -m asdl_ws_plugin" in capsys.readouterr().err


def test_no_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert isinstance(load_model("timm:resnet10t"), nn.Module)
    assert isinstance(load_model("torchvision:resnet18"), nn.Module)


def test_it_runs_as_a_program(here: Path):
    """The table goes to stdout, and the directory of the user's module need not be installed."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "asdl_ws_plugin",
            "inspect",
            "cli_test_models:factory",
            "--input",
            "5,3",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "150"},
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Seen by K-FAC" in done.stdout
        and "BatchNorm1d" in done.stdout
        and "A 3x3  B 2x2" in done.stdout
    )
    assert "Coverage: 100.0%" in done.stdout and "5 examples, the reduce setting" in done.stdout
