"""What conversion costs a model that is not preconditioned: training steps before and after.

    python benchmarks/attention.py            # some minutes on two cores
    python benchmarks/attention.py --quick    # smaller models, to see whether it runs

A step is forward, backward and NAdam. Original and converted model take turns in one process, the
order reversed from round to round, so a slow spell of the machine meets both; the numbers are
medians of the steps, and the ratio is the median of the rounds' ratios. The targets: 1.1 for the
attention drop-in by itself, 1.05 for a converted model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import alternate

from asdl_ws_plugin import convert
from asdl_ws_plugin._torchvision import make_importable

ATTENTION_TARGET, MODEL_TARGET = 1.1, 1.05


class SelfAttention(nn.Module):
    """One ``nn.MultiheadAttention`` on its own."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


def attention(quick: bool, **options: Any) -> tuple[nn.Module, Tensor]:
    width, batch = (48, 8) if quick else (192, 64)
    return SelfAttention(width, **options), torch.randn(batch, 64, width)


def encoder(quick: bool) -> tuple[nn.Module, Tensor]:
    width, batch = (48, 8) if quick else (192, 32)
    layer = nn.TransformerEncoderLayer(width, 3, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(
        batch, 64, width
    )


def torchvision_vit(quick: bool) -> tuple[nn.Module, Tensor]:
    from torchvision.models import VisionTransformer

    width, batch = (48, 4) if quick else (192, 32)
    model = VisionTransformer(
        64, 8, num_layers=2, num_heads=3, hidden_dim=width, mlp_dim=4 * width, num_classes=100
    )
    return model, torch.randn(batch, 3, 64, 64)


def torchvision_swin(quick: bool) -> tuple[nn.Module, Tensor]:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    width, batch = (24, 2) if quick else (96, 8)
    model = SwinTransformer(
        [4, 4],
        width,
        depths=[2],
        num_heads=[3],
        window_size=[8, 8],
        num_classes=100,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
        stochastic_depth_prob=0.0,
    )
    return model, torch.randn(batch, 3, 64, 64)


def timm_vit(quick: bool) -> tuple[nn.Module, Tensor]:
    import timm

    width, batch = (48, 4) if quick else (192, 32)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=width,
        depth=2,
        num_heads=3,
        num_classes=100,
    )
    return model, torch.randn(batch, 3, 64, 64)


def gpt2(quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2Model

    width, batch = (48, 4) if quick else (192, 32)
    config = GPT2Config(
        vocab_size=100,
        n_embd=width,
        n_layer=2,
        n_head=3,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return GPT2Model(config), torch.randint(0, 100, (batch, 64))


Maker = Callable[[bool], tuple[nn.Module, Tensor]]
CASES: dict[str, tuple[Maker, dict[str, Any], float]] = {
    "nn.MultiheadAttention": (
        lambda quick: attention(quick, need_weights=False),
        {},
        ATTENTION_TARGET,
    ),
    "  with attention weights": (attention, {}, ATTENTION_TARGET),
    "nn.TransformerEncoder": (encoder, {}, MODEL_TARGET),
    "torchvision ViT": (torchvision_vit, {}, MODEL_TARGET),
    "torchvision Swin V2": (torchvision_swin, {}, MODEL_TARGET),
    "GPT-2": (gpt2, {}, MODEL_TARGET),
    "GPT-2, split_qkv": (gpt2, {"split_qkv": True}, MODEL_TARGET),
    "timm ViT, split_qkv": (timm_vit, {"split_qkv": True}, MODEL_TARGET),
}


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        out = model(x)
        out = getattr(out, "last_hidden_state", out)
        out.square().mean().backward()
        optimizer.step()

    return step


def measure(
    name: str, quick: bool, rounds: int, on_step: Callable[[str], None]
) -> tuple[float, float, float]:
    """Seconds of the original's step and of the converted model's, and the median ratio."""
    make, options, _ = CASES[name]
    torch.manual_seed(0)
    original, x = make(quick)
    converted = convert(copy.deepcopy(original), **options)
    contenders = {
        "original": {"step": training_step(original, x)},
        "converted": {"step": training_step(converted, x)},
    }
    alternate(contenders, 2)  # warm up
    times = alternate(contenders, rounds, on_step)
    before, after = times["original"]["step"], times["converted"]["step"]
    ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
    return statistics.median(before), statistics.median(after), ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller models and few rounds")
    parser.add_argument("--rounds", type=int, help="steps of each model (default: 40)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(CASES), nargs="*", default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (3 if args.quick else 40)
    console = Console()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_importable()
    table = Table(
        title=f"A training step, {args.threads} threads, medians of {rounds} alternating steps"
    )
    for column in ("", "original ms", "converted ms", "ratio", "target"):
        table.add_column(column, justify="right" if column else "left")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=2 * rounds * len(args.only))
        for name in args.only:
            before, after, ratio = measure(
                name, args.quick, rounds, lambda _: progress.advance(task)
            )
            target = CASES[name][2]
            color = "green" if ratio <= target else "red"
            table.add_row(
                name,
                f"{before * 1e3:.1f}",
                f"{after * 1e3:.1f}",
                f"[{color}]{ratio:.3f}[/]",
                f"{target:.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
