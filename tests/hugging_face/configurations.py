"""Small random configurations of Hugging Face's models: nothing is downloaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asdl_ws_plugin._torchvision import make_importable

make_importable()

N, CLASSES, VOCABULARY, TOKENS, PIXELS = 3, 5, 30, 7, 32

TEXT, IMAGE, AUDIO = "text", "image", "audio"


class InDouble(TorchFunctionMode):
    """Normalizations and rotary embeddings that go by way of float32 stay in double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Configuration:
    """A model and what it is called with.

    Attributes:
        model: the class in ``transformers``.
        options: of its configuration.
        kind: ``text`` (ids), ``image`` (pixels) or ``audio`` (a spectrogram).
        per_token: whether the loss has a term for every token (a language model), or one for every
            example.
        sizes: of an example.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = TEXT
    per_token: bool = False
    sizes: tuple[int, ...] = ()

    def make(self) -> nn.Module:
        """The model in double precision without dropout, with gradients of every layer: no zeros,
        and weights that keep the size of what goes through.
        """
        import transformers

        model_class = getattr(transformers, self.model)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = model_class.config_class(**self.options)
            model = model_class(config).double().eval()
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif not p.any():
                nn.init.normal_(p, std=0.1)
        return model

    def logits(self, model: nn.Module, **inputs: Tensor) -> Tensor:
        """``(N, C)`` or ``(N, R, C)``, nothing rounded to float32."""
        with InDouble():
            return model(**inputs).logits

    def inputs(self) -> dict[str, Tensor]:
        """Seeded arguments by name."""
        generator = torch.Generator().manual_seed(11)
        if self.kind == TEXT:
            ids = torch.randint(2, VOCABULARY, (N, TOKENS), generator=generator)
            ids[:, -1] = self.options.get("eos_token_id", 1)  # where BART takes its features
            return {"input_ids": ids}
        name = "pixel_values" if self.kind == IMAGE else "input_values"
        sizes = self.sizes or (3, PIXELS, PIXELS)
        return {name: torch.randn(N, *sizes, generator=generator, dtype=torch.float64)}

    def labels(self) -> Tensor:
        """``(N,)``, or ``(N, R)`` for a language model."""
        generator = torch.Generator().manual_seed(12)
        if self.per_token:
            return torch.randint(VOCABULARY, (N, TOKENS), generator=generator)
        return torch.randint(CLASSES, (N,), generator=generator)


# The names that most configurations have in common.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_GROUPED = {**_LLAMA, "num_key_value_heads": 1}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": PIXELS,
    "patch_size": 8,
    "num_labels": CLASSES,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_SWIN = {
    "image_size": PIXELS,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_labels": CLASSES,
}


def _causal(model: str, options: dict[str, Any], **more: Any) -> Configuration:
    return Configuration(f"{model}ForCausalLM", options, per_token=True, **more)


def _vision(model: str, options: dict[str, Any], **more: Any) -> Configuration:
    return Configuration(f"{model}ForImageClassification", options, kind=IMAGE, **more)


def _text(model: str, options: dict[str, Any], **more: Any) -> Configuration:
    return Configuration(f"{model}ForSequenceClassification", options, **more)


CONFIGURATIONS: dict[str, Configuration] = {
    # classifiers of text
    "bert": _text("Bert", _COMMON),
    "roberta": _text("Roberta", _COMMON),
    "distilbert": _text(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "num_labels": CLASSES,
            "pad_token_id": 0,
        },
    ),
    "albert, whose layers share their weights": _text("Albert", {**_COMMON, "embedding_size": 8}),
    "electra": _text("Electra", {**_COMMON, "embedding_size": 8}),
    "deberta-v2": _text(
        "DebertaV2",
        {
            **_COMMON,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "max_relative_positions": 8,
        },
    ),
    "deberta-v2 that shares its keys": _text(
        "DebertaV2",
        {
            **_COMMON,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "max_relative_positions": 8,
            "share_att_key": True,
        },
    ),
    "mpnet": _text("MPNet", _COMMON),
    "xlnet, sequence first": _text(
        "XLNet",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_layer": 2,
            "n_head": 2,
            "d_inner": 24,
            "num_labels": CLASSES,
            "pad_token_id": 0,
        },
    ),
    "squeezebert": _text(
        "SqueezeBert",
        {**_COMMON, "embedding_size": 16}
        | {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention")}
        | {"intermediate_groups": 1, "output_groups": 1},
    ),
    "fnet": _text("FNet", _COMMON),
    "mobilebert": _text(
        "MobileBert",
        {**_COMMON, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    ),
    "roformer": _text("RoFormer", _COMMON),
    "esm": _text("Esm", {**_COMMON, "mask_token_id": 2}),
    "gpt2 with a classifier": Configuration("GPT2ForSequenceClassification", _GPT2),
    "bart with a classifier": _text("Bart", _BART),
    # causal language models
    "gpt2": Configuration("GPT2LMHeadModel", _GPT2, per_token=True),
    "gpt-neo": _causal(
        "GPTNeo",
        {
            **_COMMON,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gpt-neox": _causal("GPTNeoX", _COMMON),
    "gpt-j": _causal("GPTJ", {**_GPT2, "rotary_dim": 4}),
    "opt": _causal("OPT", {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "bloom": _causal("Bloom", {**_COMMON, "n_layer": 2, "n_head": 2}),
    "falcon": _causal("Falcon", {**_COMMON, "multi_query": True, "alibi": False}),
    "llama": _causal("Llama", _LLAMA),
    "mistral": _causal("Mistral", _GROUPED),
    "qwen2": _causal("Qwen2", _GROUPED),
    "gemma": _causal("Gemma", _GROUPED),
    "phi": _causal("Phi", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "mamba": _causal(
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "state_size": 4,
            "time_step_rank": 4,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "mixtral": _causal(
        "Mixtral",
        {
            **_GROUPED,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    # images and spectrograms
    "vit": _vision("ViT", _VIT),
    "deit": _vision("DeiT", _VIT),
    "beit": _vision("Beit", {**_VIT, "use_relative_position_bias": True}),
    "dinov2": _vision("Dinov2", {**_VIT, "mlp_ratio": 2}),
    "swin": _vision("Swin", _SWIN),
    "swin-v2": _vision("Swinv2", _SWIN),
    "convnext": _vision(
        "ConvNext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
        | {"num_labels": CLASSES, "image_size": PIXELS},
    ),
    "resnet": _vision(
        "ResNet",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": CLASSES,
        },
    ),
    "poolformer": _vision(
        "PoolFormer",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
            "num_labels": CLASSES,
        },
    ),
    "segformer": _vision(
        "Segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "num_labels": CLASSES,
        },
    ),
    "mobilevit, patches merged into the batch": _vision(
        "MobileViT",
        {
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16],
            "num_attention_heads": 2,
            "image_size": 128,
            "num_labels": CLASSES,
            "initializer_range": 0.3,  # or nothing is left of an image in the last stage
        },
        sizes=(3, 128, 128),
    ),
    "audio spectrogram transformer": Configuration(
        "ASTForAudioClassification",
        {**_VIT, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        kind=AUDIO,
        sizes=(32, 16),
    ),
}
