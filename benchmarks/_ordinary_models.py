"""A dozen ordinary models, each with a small task that it can learn, of its library's modules.

A task is made of a seed. Its batches depend on the seed and the step alone, so that all contenders
see the same. Labels follow from the inputs by a rule; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin

__all__ = ["TASKS", "Task"]

asdl_ws_plugin.mend_torchvision()  # which transformers needs, too

# The model's arguments, its keywords, and a loss of its output.
Example = tuple[tuple[Any, ...], dict[str, Any], Callable[[Tensor], Tensor]]


@dataclass
class Task:
    """A model and its batches.

    Attributes:
        model: as its library makes it.
        batch: step -> the model's arguments and keywords, and the loss of its logits.
        logits: the model's output -> the logits.
        steps: how many a run has.
    """

    model: nn.Module
    batch: Callable[[torch.Generator], Example]
    logits: Callable[[Any], Tensor] = lambda output: output
    steps: int = 150


def _tokens(generator: torch.Generator, *sizes: int, low: int = 0, high: int) -> Tensor:
    return torch.randint(low, high, sizes, generator=generator)


def _cross_entropy(targets: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# ------------------------------------------------------------------------------------------- text


def bert() -> Task:
    """Sentences of 4 to 16 words, padded: which of four words is among them?"""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    asdl_ws_plugin.attach_padding(model, "attention_mask")

    def batch(generator: torch.Generator) -> Example:
        words = _tokens(generator, 32, 16, low=8, high=64)
        lengths = _tokens(generator, 32, low=4, high=17)
        labels = _tokens(generator, 32, high=4)
        place = (torch.rand(32, generator=generator) * lengths).long()
        words[torch.arange(32), place] = labels + 1
        mask = torch.arange(16) < lengths.unsqueeze(1)
        keywords = {"input_ids": words * mask, "attention_mask": mask.long()}
        return (), keywords, _cross_entropy(labels)

    return Task(model, batch, lambda output: output.logits)


def _periodic(generator: torch.Generator, length: int) -> Tensor:
    """Sequences that repeat their first 2 to 6 words: the next word has to be looked up."""
    words = _tokens(generator, 16, length + 1, high=24)
    period = _tokens(generator, 16, 1, low=2, high=7)
    return words.gather(1, torch.arange(length + 1) % period)


def gpt2() -> Task:
    """The next word of sequences that repeat themselves."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=24, n_positions=24, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = asdl_ws_plugin.convert(GPT2LMHeadModel(config))

    def batch(generator: torch.Generator) -> Example:
        words = _periodic(generator, 24)
        return (), {"input_ids": words[:, :-1]}, _cross_entropy(words[:, 1:])

    return Task(model, batch, lambda output: output.logits)


class _TiedLanguageModel(nn.Module):
    """A Transformer whose last layer has the embedding's weight."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words) + self.positions[: words.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.norm(self.encoder(x, mask=mask, is_causal=True)))


def tied() -> Task:
    """The same as GPT-2's, by PyTorch's own layers."""
    model = asdl_ws_plugin.convert(_TiedLanguageModel(24, 48, 24))

    def batch(generator: torch.Generator) -> Example:
        words = _periodic(generator, 24)
        return (words[:, :-1],), {}, _cross_entropy(words[:, 1:])

    return Task(model, batch)


class _Seq2Seq(nn.Module):
    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        self.transformer = nn.Transformer(width, 4, 1, 1, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = (
            self.embedding(words) + self.positions[: words.shape[1]] for words in (source, target)
        )
        return self.head(self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True))


def seq2seq() -> Task:
    """Eight words backwards."""
    model = asdl_ws_plugin.convert(_Seq2Seq(20, 48, 9))

    def batch(generator: torch.Generator) -> Example:
        source = _tokens(generator, 32, 8, low=1, high=20)
        target = source.flip(1)
        shifted = F.pad(target[:, :-1], (1, 0))
        return (source, shifted), {}, _cross_entropy(target)

    return Task(model, batch)


class _LSTM(nn.Module):
    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(words))[0][:, -1])


def lstm() -> Task:
    """Which of four words is among twelve?"""
    model = _LSTM(40, 48, 4)

    def batch(generator: torch.Generator) -> Example:
        words = _tokens(generator, 32, 12, low=8, high=40)
        labels = _tokens(generator, 32, high=4)
        words[torch.arange(32), _tokens(generator, 32, high=12)] = labels + 1
        return (words,), {}, _cross_entropy(labels)

    return Task(model, batch)


# ----------------------------------------------------------------------------------------- images


def _images(
    generator: torch.Generator, batch: int, size: int, classes: int
) -> tuple[Tensor, Tensor]:
    """Noise with one of ``classes`` patterns of 6 x 6 somewhere in it."""
    patterns = torch.randn(classes, 3, 6, 6, generator=torch.Generator().manual_seed(7))
    labels = _tokens(generator, batch, high=classes)
    images = 0.5 * torch.randn(batch, 3, size, size, generator=generator)
    corners = _tokens(generator, batch, 2, high=size - 5).tolist()
    for image, (row, column), label in zip(images, corners, labels.tolist(), strict=True):
        image[:, row : row + 6, column : column + 6] += patterns[label]
    return images, labels


def _image_batch(size: int, batch: int, classes: int) -> Callable[[torch.Generator], Example]:
    def make(generator: torch.Generator) -> Example:
        images, labels = _images(generator, batch, size, classes)
        return (images,), {}, _cross_entropy(labels)

    return make


def vit() -> Task:
    """torchvision's Vision Transformer finds a pattern."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96,
        num_classes=6,
    )  # fmt: skip
    # torchvision starts with a head of zeros, fine-tuning in mind
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return Task(asdl_ws_plugin.convert(model), _image_batch(16, 32, 6))


def resnet18() -> Task:
    """torchvision's ResNet-18 finds a pattern."""
    from torchvision.models import resnet18

    return Task(resnet18(num_classes=6), _image_batch(24, 16, 6), steps=50)


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix_tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.mix_channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norms[0](x).mT).mT
        return x + self.mix_channels(self.norms[1](x))


class _Mixer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch)
        tokens = (size // patch) ** 2
        self.blocks = nn.Sequential(*(_MixerBlock(tokens, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        return self.head(self.norm(self.blocks(x)).mean(1))


def mixer() -> Task:
    """An MLP-Mixer finds a pattern."""
    return Task(_Mixer(16, 4, 48, 3, 6), _image_batch(16, 32, 6))


# ----------------------------------------------------------------------------------------- graphs


def _communities(generator: torch.Generator, nodes: int = 240, classes: int = 4) -> Any:
    """A graph whose nodes mostly know nodes of their class, with features that say little of it."""
    labels = _tokens(generator, nodes, high=classes)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    chance = torch.where(same, 0.06, 0.006)
    linked = (torch.rand(nodes, nodes, generator=generator) < chance).triu(1)
    edges = linked.nonzero().T
    means = torch.randn(classes, 24, generator=generator)
    features = 0.5 * means[labels] + torch.randn(nodes, 24, generator=generator)
    return features, torch.cat([edges, edges.flip(0)], dim=1), labels


class _NodeNetwork(nn.Module):
    def __init__(self, make: Callable[[int, int], nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([make(24, width), make(width, width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x, edge_index).relu()
        return self.head(x)


def _node_task(make: Callable[[int, int], nn.Module]) -> Task:
    features, edges, labels = _communities(torch.Generator().manual_seed(3))
    model = asdl_ws_plugin.convert(_NodeNetwork(make, 32, 4))
    asdl_ws_plugin.attach_segments(model, "pyg")
    return Task(model, lambda _: ((features, edges), {}, _cross_entropy(labels)))


def gcn() -> Task:
    """Communities of a graph by PyG's GCNConv, full batch."""
    from torch_geometric.nn import GCNConv

    return _node_task(GCNConv)


def sage() -> Task:
    """The same by SAGEConv."""
    from torch_geometric.nn import SAGEConv

    return _node_task(SAGEConv)


def gat() -> Task:
    """The same by GATConv, four heads."""
    from torch_geometric.nn import GATConv

    return _node_task(lambda i, o: GATConv(i, o // 4, heads=4))


class _GIN(nn.Module):
    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import MLP, GINConv

        self.convs = nn.ModuleList(
            GINConv(MLP([size, width, width], norm="batch_norm")) for size in (features, width)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, data: Any) -> Tensor:
        from torch_geometric.nn import global_add_pool

        x = data.x
        for conv in self.convs:
            x = conv(x, data.edge_index).relu()
        return self.head(global_add_pool(x, data.batch, data.num_graphs))


def gin() -> Task:
    """Graphs of 8 to 14 nodes: how many triangles, by GINConv?"""
    from torch_geometric.data import Batch, Data

    def graph(generator: torch.Generator) -> tuple[Any, int]:
        nodes = int(_tokens(generator, 1, low=8, high=15))
        linked = (torch.rand(nodes, nodes, generator=generator) < 0.3).triu(1)
        both = (linked | linked.T).float()
        triangles = round(float(torch.linalg.matrix_power(both, 3).trace()) / 6)
        x = torch.stack([torch.ones(nodes), both.sum(1), (both @ both).sum(1)], dim=1)
        data = Data(x=torch.log1p(x), edge_index=both.nonzero().T)
        return data, min(triangles // 2, 3)

    graphs = [graph(torch.Generator().manual_seed(i)) for i in range(256)]
    model = asdl_ws_plugin.convert(_GIN(3, 32, 4))
    asdl_ws_plugin.attach_segments(model, "pyg")

    def batch(generator: torch.Generator) -> Example:
        chosen = [graphs[i] for i in torch.randperm(256, generator=generator)[:32].tolist()]
        labels = torch.tensor([label for _, label in chosen])
        return (Batch.from_data_list([data for data, _ in chosen]),), {}, _cross_entropy(labels)

    return Task(model, batch)


TASKS: dict[str, Callable[[], Task]] = {
    "BERT": bert,
    "GPT-2": gpt2,
    "ViT": vit,
    "ResNet-18": resnet18,
    "GAT": gat,
    "SAGE": sage,
    "GIN": gin,
    "GCN": gcn,
    "seq2seq": seq2seq,
    "LSTM": lstm,
    "MLP-Mixer": mixer,
    "tied embeddings": tied,
}
