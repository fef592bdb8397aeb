"""Small configurations of the models that people use, from torchvision, timm, Hugging Face and
PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asdl_ws_plugin._torchvision import make_importable

make_importable()

N, CLASSES, VOCABULARY, TOKENS = 3, 5, 30, 7


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Attributes:
        make: the model, with random parameters.
        inputs: its arguments: ``'ids'``, ``'image'`` or ``'states'`` by name; none: an image by
            position.
        linears: how many ``nn.Linear`` a converted model calls; ``split``: with ``split_qkv=True``.
        tied: the layers whose weight is also an embedding's.
        without_batch: parts of the names of layers whose input is the same for every example.
    """

    make: Callable[[], nn.Module]
    inputs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    linears: int = 0
    split: int = 0
    tied: tuple[str, ...] = ()
    without_batch: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Tensor]:
        """Seeded inputs by name."""
        generator = torch.Generator().manual_seed(11)
        if self.inputs:
            return {name: self._tensor(kind, generator) for name, kind in self.inputs.items()}
        return {"x": self._tensor("image", generator)}

    def _tensor(self, kind: str, generator: torch.Generator) -> Tensor:
        if kind == "ids":
            return torch.randint(2, VOCABULARY, (N, TOKENS), generator=generator)
        sizes = (N, TOKENS - 1, 24) if kind == "states" else (N, 3, self.size, self.size)
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)


class Positional(nn.Module):
    """A Transformer over random tokens: ``(N, 3, H, W)`` is cut into two sequences."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.transformer = nn.Transformer(24, 2, 1, 1, 48, batch_first=True)
        self.embed = nn.Linear(64, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.embed(x.flatten(2).unflatten(2, (-1, 64)).flatten(1, 2)).tensor_split(
            (20,), dim=1
        )
        return self.head(self.transformer(source, target).mean(1))


def _torchvision(kind: str) -> nn.Module:
    from torchvision.models import VisionTransformer
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    if kind == "vit":
        return VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=2,
            num_heads=2,
            hidden_dim=24,
            mlp_dim=48,
            num_classes=CLASSES,
        )
    v2 = (
        {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
        if kind == "swin_v2"
        else {}
    )
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=CLASSES,
        **v2,
    )


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 4),
}


def _maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(1, 1),
        block_type=("M",) * 2,
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=8, window_size=(4, 4), grid_size=(4, 4), rel_pos_type="mlp", rel_pos_dim=16
        ),
    )
    return MaxxVit(config, img_size=64, num_classes=CLASSES)


def _hugging_face(name: str, **options: Any) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


_BERT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}

ZOO: dict[str, Case] = {
    "torchvision vit": Case(lambda: _torchvision("vit"), linears=13, split=13),
    "torchvision swin": Case(lambda: _torchvision("swin"), linears=18, split=26),
    "torchvision swin_v2": Case(
        lambda: _torchvision("swin_v2"), linears=26, split=34, without_batch=("cpb_mlp",)
    ),
    "timm vit": Case(lambda: _timm("vit_tiny_patch16_224", **PLAIN), linears=9, split=13),
    "timm deit": Case(
        lambda: _timm("deit_tiny_distilled_patch16_224", **PLAIN), linears=10, split=14
    ),
    "timm swin": Case(
        lambda: _timm("swin_tiny_patch4_window7_224", **WINDOWS), linears=18, split=26
    ),
    "timm swin_v2": Case(
        lambda: _timm("swinv2_tiny_window8_256", **WINDOWS),
        linears=26,
        split=34,
        without_batch=("cpb_mlp",),
    ),
    "timm cait": Case(lambda: _timm("cait_xxs24_224", **PLAIN), linears=25, split=29),
    "timm maxvit": Case(_maxvit, size=64, linears=25, split=25, without_batch=("rel_pos",)),
    "timm convnext": Case(
        lambda: _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), linears=1, split=1
    ),
    "timm eva": Case(lambda: _timm("eva02_tiny_patch14_224", **PLAIN), linears=9, split=13),
    "timm beit": Case(lambda: _timm("beit_base_patch16_224", **PLAIN), linears=9, split=13),
    "nn.Transformer": Case(Positional, linears=18, split=18),
    "bert": Case(
        lambda: _hugging_face(
            "BertForSequenceClassification", vocab_size=VOCABULARY, num_labels=CLASSES, **_BERT
        ),
        {"input_ids": "ids"},
        linears=14,
        split=14,
    ),
    "gpt2": Case(
        lambda: _hugging_face(
            "GPT2LMHeadModel",
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=1,
        ),
        {"input_ids": "ids"},
        linears=9,
        split=13,
        tied=("lm_head",),
    ),
    "gpt2 with cross-attention": Case(
        lambda: _hugging_face(
            "GPT2LMHeadModel",
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=1,
            add_cross_attention=True,
        ),
        {"input_ids": "ids", "encoder_hidden_states": "states"},
        linears=8,
        split=11,
        tied=("lm_head",),
    ),
    "hugging face vit": Case(
        lambda: _hugging_face(
            "ViTForImageClassification", image_size=32, patch_size=8, num_labels=CLASSES, **_BERT
        ),
        {"pixel_values": "image"},
        linears=13,
        split=13,
    ),
    "t5": Case(
        lambda: _hugging_face(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        {"input_ids": "ids", "labels": "ids"},
        linears=33,
        split=33,
        tied=("lm_head",),
    ),
}


def make(name: str) -> nn.Module:
    """A model of the zoo in double precision, with no parameter exactly zero."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ZOO[name].make().double()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def logits(name: str, model: nn.Module, seed: int = 3) -> Tensor:
    """The model's logits, ``(N, 5)`` or ``(N, 7, 30)``; the same random numbers for the same
    seed.
    """
    torch.manual_seed(seed)
    arguments = ZOO[name].arguments()
    output: Any = model(**arguments) if ZOO[name].inputs else model(arguments["x"])
    output = getattr(output, "logits", output)
    return torch.stack(output).sum(0) if isinstance(output, tuple) else output
