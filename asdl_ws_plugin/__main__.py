"""``python -m asdl_ws_plugin inspect``: what K-FAC sees of a model, from the command line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._torchvision import make_importable
from .conversion.convert import convert
from .diagnostics.report import inspect
from .weight_sharing.rules import AUTO, BATCH_FIRST, SEQUENCE_FIRST

_EPILOG = """\
examples:
  python -m asdl_ws_plugin inspect timm:vit_tiny_patch16_224 --input 2,3,224,224
  python -m asdl_ws_plugin inspect torchvision:vit_b_16 --input 2,3,224,224 --convert --json
  python -m asdl_ws_plugin inspect mymodels.bert:tiny --input input_ids=2,16:int64:100 \\
      --shared-dim expand
"""


class _Invalid(Exception):
    """Something on the command line is wrong; the message says what."""


def load_model(spec: str) -> nn.Module:
    """The model of ``timm:NAME``, ``torchvision:NAME`` (both without pretrained weights) or
    ``module:attribute``.

    The attribute is a module, or a function or class that makes one when it is called without
    arguments. Raises what :func:`main` prints.
    """
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise _Invalid(
            f"The model has to be timm:NAME, torchvision:NAME or module:attribute, got '{spec}'."
        )
    if source in ("timm", "torchvision"):
        return _from_library(source, name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = None
    try:
        found = importlib.import_module(source)
        for part in name.split("."):
            found = getattr(found, part)
    except ImportError as error:
        close = _close(source, ["timm", "torchvision"])
        raise _Invalid(f"There is no '{name}' in '{source}': {error}.{close}") from error
    except AttributeError as error:
        close = _close(part, (known for known in dir(found) if not known.startswith("_")))
        raise _Invalid(f"There is no '{name}' in '{source}': {error}.{close}") from error
    model = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(model, nn.Module):
        raise _Invalid(
            f"'{spec}' is {type(model).__name__}, not a torch.nn.Module or a function that makes "
            "one."
        )
    return model


def _from_library(library: str, name: str) -> nn.Module:
    try:
        make_importable()
        package = importlib.import_module(library)
    except ImportError as error:
        raise _Invalid(f"{library} is not installed: pip install {library} ({error})") from error
    if library == "timm":
        if not package.is_model(name):
            raise _Invalid(f"timm has no model '{name}'.{_close(name, package.list_models())}")
        return package.create_model(name, pretrained=False)
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise _Invalid(f"torchvision has no model '{name}'.{_close(name, models.list_models())}")
    return models.get_model(name, weights=None)


def _close(name: str, known: Iterable[str]) -> str:
    """`` Did you mean a, b or c?``, of the known names that are like this one; empty if there are
    none.
    """
    close = difflib.get_close_matches(name, list(known), n=5)
    listed = " or ".join([", ".join(close[:-1]), close[-1]] if len(close) > 1 else close)
    return f" Did you mean {listed}?" if close else ""


def make_input(spec: str) -> tuple[str | None, Tensor]:
    """The keyword, or ``None``, and the random tensor of ``[KEYWORD=]SIZES[:DTYPE[:HIGH]]``.

    ``2,3,224,224`` is standard normal; integers are drawn from 0 to HIGH - 1 (2 by default),
    ``bool`` is True.
    """
    keyword, equals, rest = spec.rpartition("=")
    sizes_text, *options = rest.split(":")
    dtype_name = options[0] if options else "float32"
    dtype = getattr(torch, dtype_name, None)
    try:
        sizes = [int(size) for size in sizes_text.split(",")]
        high = int(options[1]) if len(options) > 1 else 2
    except ValueError:
        sizes, high = [], 0
    if (
        not sizes
        or min(sizes) < 1
        or high < 1
        or len(options) > 2
        or (equals and not keyword.isidentifier())
    ):
        raise _Invalid(
            f"--input has to be like 2,3,224,224 or input_ids=2,16:int64:100, got '{spec}'."
        )
    if not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise _Invalid(
            f"--input: '{dtype_name}' is no dtype of real numbers, as float32, int64 or bool are."
        )
    if dtype is torch.bool:
        tensor = torch.ones(sizes, dtype=dtype)
    elif dtype.is_floating_point:
        tensor = torch.randn(sizes).to(dtype)
    else:
        tensor = torch.randint(high, sizes, dtype=dtype)
    return keyword or None, tensor


def shared_dim_of(values: Sequence[str]) -> str | list[Any]:
    """``['reduce', 'head=expand']`` to rules: ``['reduce', ('head', 'expand')]``."""
    rules: list[Any] = []
    for value in values:
        name, equals, rest = value.rpartition("=")
        rules.append((name, *rest.split(",")) if equals else value)
    if len(rules) == 1 and isinstance(rules[0], str):
        return rules[0]
    return rules if any(isinstance(rule, str) for rule in rules) else [AUTO, *rules]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asdl_ws_plugin",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "inspect",
        help="say what K-FAC sees of a model",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run one forward pass and list every module with parameters: layout, "
        "approximation, memory; what is not seen, and why.",
    )
    command.add_argument(
        "model", help="timm:NAME, torchvision:NAME, or module:attribute (a model or its factory)"
    )
    command.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[KEYWORD=]SIZES[:DTYPE[:HIGH]]",
        help="an argument of the model, filled with random numbers: 2,3,224,224 or "
        "2,16:int64:100; may be repeated",
    )
    command.add_argument(
        "--shared-dim",
        action="append",
        metavar="[NAME=]VALUE[,LAYOUT]",
        help=f"as the gradient maker's shared_dim (default: {AUTO}); head=expand or decoder=reduce,"
        f"{SEQUENCE_FIRST} (or {BATCH_FIRST}) is a rule for layers; may be repeated",
    )
    command.add_argument(
        "--convert", action="store_true", help="call asdl_ws_plugin.convert on the model before"
    )
    command.add_argument("--eval", action="store_true", help="look at it in evaluation mode")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 for what cannot be done, with the reason on
    stderr.
    """
    options = _parser().parse_args(arguments)
    torch.manual_seed(0)
    try:
        inputs = [make_input(spec) for spec in options.input]
        model = load_model(options.model)
        if options.convert:
            convert(model)
        if options.eval:
            model.eval()
        args = [tensor for keyword, tensor in inputs if keyword is None]
        kwargs = {keyword: tensor for keyword, tensor in inputs if keyword is not None}
        report = inspect(
            model, *args, shared_dim=shared_dim_of(options.shared_dim or [AUTO]), **kwargs
        )
    except _Invalid as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        Exception
    ) as error:  # the user's model may raise anything; a traceback into it tells less than this
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report.to_json() if options.json else report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
