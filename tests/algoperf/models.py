"""The benchmark's kinds of models, a few thousand parameters each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, VOCABULARY, HIDDEN = 5, 12, 8


class Attention(nn.Module):
    """Separate projections of queries, keys and values: ``(N, R, P)``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.linear1, self.linear2 = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.linear2(self.dropout(F.gelu(self.linear1(self.norm2(x)))))


class Vit(nn.Module):
    """A convolution cuts patches; mean pooling; the head is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, HIDDEN))
        self.blocks = nn.Sequential(VitBlock(), VitBlock())
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HIDDEN, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(HIDDEN), nn.BatchNorm2d(HIDDEN)
        self.conv = nn.Conv2d(HIDDEN, HIDDEN, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(HIDDEN, HIDDEN, 1, stride=2, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn2(self.conv(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class FusedAttention(nn.Module):
    """One layer for queries, keys and values without biases, called or multiplied in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """``allowed (N, R, R)``: which position may look at which."""
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, allowed))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.kv_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        k, v = self.kv_proj(memory).chunk(2, dim=-1)
        return self.out_proj(attend(self.q_proj(x), k, v, allowed))


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Two heads; where nothing is allowed, as for padding, all positions are."""
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed.unsqueeze(1), -1e10)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.linear1, self.linear2 = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(self.dropout(F.relu(self.linear1(self.norm(x)))))


class Translator(nn.Module):
    """Packed sentences see only themselves; the logits are a matmul with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.register_buffer("places", torch.randn(32, HIDDEN))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(4))
        self.encoder, self.decoder, self.cross = (
            FusedAttention(),
            FusedAttention(),
            CrossAttention(),
        )
        self.encoder_mlp, self.decoder_mlp = FeedForward(), FeedForward()

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        inputs_positions: Tensor,
        targets_positions: Tensor,
        inputs_segmentation: Tensor,
        targets_segmentation: Tensor,
    ) -> Tensor:
        """Ids, places in the sentence and numbers of the sentence, each ``(N, R)``; 0: padding."""
        x = self.embedding(src) + self.places[inputs_positions]
        allowed = same(inputs_segmentation, inputs_segmentation)
        x = self.norms[0](self.encoder_mlp(x + self.encoder(self.norms[1](x), allowed)))
        shifted = F.pad(tgt, (1, 0))[:, :-1].masked_fill(targets_positions == 0, 0)
        y = self.embedding(shifted) + self.places[targets_positions]
        own = same(targets_segmentation, targets_segmentation)
        y = y + self.decoder(self.norms[2](y), own.tril())
        across = same(targets_segmentation, inputs_segmentation)
        y = y + self.cross(y, x, across)
        return self.norms[3](self.decoder_mlp(y)) @ self.embedding.weight.mT


def same(one: Tensor, other: Tensor) -> Tensor:
    """Which position is in the sentence of which: ``(N, R)`` and ``(N, R') -> (N, R, R')``."""
    return (one.unsqueeze(2) == other.unsqueeze(1)) & (one > 0).unsqueeze(2)


class GraphsTuple(NamedTuple):
    """jraph's, of tensors."""

    nodes: Tensor
    edges: Tensor
    receivers: Tensor
    senders: Tensor
    globals: Tensor
    n_node: Tensor
    n_edge: Tensor


def mlp(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.LayerNorm(HIDDEN), nn.Tanh(), nn.Dropout(0.0)
    )


class GraphNetwork(nn.Module):
    """Updates edges, nodes and whole graphs in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_nodes, self.embed_edges = nn.Linear(3, HIDDEN), nn.Linear(2, HIDDEN)
        self.update_edges = nn.ModuleList(mlp(4 * HIDDEN) for _ in range(2))
        self.update_nodes = nn.ModuleList(mlp(3 * HIDDEN) for _ in range(2))
        self.update_globals = nn.ModuleList(mlp(3 * HIDDEN) for _ in range(2))
        self.decoder = nn.Linear(HIDDEN, 2)

    def forward(self, graph: GraphsTuple) -> Tensor:
        """Logits ``(graphs with padding, tasks)``."""
        ids = torch.arange(len(graph.n_node))
        of_node, of_edge = ids.repeat_interleave(graph.n_node), ids.repeat_interleave(graph.n_edge)
        nodes, edges = self.embed_nodes(graph.nodes), self.embed_edges(graph.edges)
        wholes = graph.globals
        for update_edges, update_nodes, update_globals in zip(
            self.update_edges, self.update_nodes, self.update_globals, strict=True
        ):
            ends = nodes[graph.senders], nodes[graph.receivers]
            edges = update_edges(torch.cat([edges, *ends, wholes[of_edge]], 1))
            received = torch.zeros_like(nodes).index_add(0, graph.receivers, edges)
            nodes = update_nodes(torch.cat([nodes, received, wholes[of_node]], 1))
            sums = (
                torch.zeros_like(wholes).index_add(0, index, x)
                for index, x in ((of_node, nodes), (of_edge, edges))
            )
            wholes = update_globals(torch.cat([wholes, *sums], 1))
        return self.decoder(wholes)


class Dlrm(nn.Module):
    """Products of embedded categories and of dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, HIDDEN), nn.ReLU())
        self.table = nn.Embedding(15, HIDDEN)
        self.top = nn.Sequential(nn.Linear(HIDDEN + 16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        dense, categories = self.bottom(x[:, :4]), x[:, 4:].long()
        offsets = 5 * torch.arange(categories.shape[1])
        features = torch.cat([dense.unsqueeze(1), self.table(categories + offsets)], dim=1)
        return self.top(torch.cat([dense, (features @ features.mT).flatten(1)], dim=1))


class DeepSpeech(nn.Module):
    """Frames through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.hidden, self.outputs = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor, paddings: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, T, 4)`` and 1 for padding ``(N, T)``; logits ``(N, T, C)`` and their paddings."""
        x = torch.tanh(self.inputs(features)) * (1 - paddings).unsqueeze(-1)
        x = torch.tanh(self.hidden(self.lstm(x)[0]))
        return self.outputs(x), paddings
