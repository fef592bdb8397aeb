"""Stand-ins for the benchmark's workloads: its interface, the shape of each task, and random data
that can be learned.

``model_fn`` and ``loss_fn`` are a submission's only ways to the model and to the loss. Every batch
has ``inputs``, ``targets`` and, where something is left out, ``weights``; ``example(batch, n)`` is
the n-th example alone, cut to what is not padding, which is all that the ground truth needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algoperf import models
from algoperf.models import GraphsTuple
from algoperf.spec import ForwardPassMode

Batch = dict[str, Any]


class Workload:
    """What all have in common.

    Attributes:
        step_hint: how many steps a training is planned for.
        setting: ``'expand'`` or ``'reduce'``, what the loss has a term for.
        num_examples: N of a batch, without padding.
    """

    step_hint = 30
    setting = "reduce"
    num_examples = 4
    model: Callable[[], nn.Module]

    def init_model_fn(self, rng: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(rng)
        return type(self).model(), None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.0,
    ) -> tuple[Any, Any]:
        """Logits, in whatever form the workload's loss wants them, and the model's state."""
        del rng
        params.train(mode is ForwardPassMode.TRAIN)
        for module in params.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout_rate
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1 if update_batch_norm else 0.0
        context = torch.no_grad() if mode is ForwardPassMode.EVAL else contextlib.nullcontext()
        with context:
            return self.call(params, augmented_and_preprocessed_input_batch), model_state

    def call(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["inputs"])

    def loss_fn(
        self,
        label_batch: Any,
        logits_batch: Any,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """The sum of the examples' losses, how many there are, and each of them."""
        per_example = self.losses(label_batch, logits_batch, label_smoothing)
        if mask_batch is not None:
            per_example = torch.where(mask_batch.bool(), per_example * mask_batch, 0.0)
            count = mask_batch.sum()
        else:
            count = torch.tensor(float(len(per_example)))
        return {"summed": per_example.sum(), "n_valid_examples": count, "per_example": per_example}

    def losses(self, labels: Any, logits: Any, label_smoothing: float) -> Tensor:
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        """Seeded by the step."""
        raise NotImplementedError

    def example(self, batch: Batch, n: int) -> Batch:
        return {name: value[n : n + 1] for name, value in batch.items()}


class ImagenetVit(Workload):
    """Soft labels, as mixup makes them; a head that starts at zero."""

    model = models.Vit
    num_examples = 6

    def losses(self, labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(models.CLASSES, (self.num_examples,), generator=generator)
        images = torch.randn(self.num_examples, 3, 8, 8, generator=generator)
        images += _patterns(models.CLASSES, 3, 8, 8)[labels]
        share = torch.rand(self.num_examples, 1, generator=generator)
        hard = F.one_hot(labels, models.CLASSES).float()
        image_share = share.view(-1, 1, 1, 1)
        return {
            "inputs": image_share * images + (1 - image_share) * images.roll(1, 0),
            "targets": share * hard + (1 - share) * hard.roll(1, 0),
        }


class ImagenetResnet(Workload):
    """Convolutions with BatchNorm, in training mode: the examples of a batch depend on each
    other.
    """

    model = models.ResNet

    def losses(self, labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(models.CLASSES, (self.num_examples,), generator=generator)
        images = torch.randn(self.num_examples, 3, 8, 8, generator=generator)
        return {"inputs": images + _patterns(models.CLASSES, 3, 8, 8)[labels], "targets": labels}


class Wmt(Workload):
    """Several sentences packed in a row, and padding; source and target are of one length."""

    model = models.Translator
    setting = "expand"
    # Lengths of the sentences in each row, of the source and of the target.
    packed = (((4, 3), (3, 4)), ((5,), (2,)), ((2, 2, 2), (3, 2, 3)), ((8,), (6,)))
    length = 8

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(
            batch["inputs"],
            batch["targets"],
            inputs_positions=batch["inputs_position"],
            targets_positions=batch["targets_position"],
            inputs_segmentation=batch["inputs_segmentation"],
            targets_segmentation=batch["targets_segmentation"],
        )

    def losses(self, labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(
            logits.transpose(-2, -1), labels, reduction="none", label_smoothing=label_smoothing
        )

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        sides: list[tuple[Tensor, ...]] = []
        for side in range(2):
            ids = torch.zeros(self.num_examples, self.length, dtype=torch.long)
            position, segmentation = torch.zeros_like(ids), torch.zeros_like(ids)
            for n, lengths in enumerate(self.packed):
                start = 0
                for number, length in enumerate(lengths[side], start=1):
                    part = slice(start, start + length)
                    if side == 0:
                        words = torch.randint(2, models.VOCABULARY, (length,), generator=generator)
                    else:  # as if every word had one translation
                        source = sides[0][0][n][sides[0][2][n] == number]
                        words = source.roll(1).repeat(3)[:length]
                    ids[n, part], segmentation[n, part] = words, number
                    position[n, part] = torch.arange(length)
                    start += length
            sides.append((ids, position, segmentation))
        (inputs, *source), (targets, *target) = sides
        return {
            "inputs": inputs,
            "targets": targets,
            "inputs_position": source[0],
            "inputs_segmentation": source[1],
            "targets_position": target[0],
            "targets_segmentation": target[1],
            "weights": (targets > 0).float(),
        }

    def example(self, batch: Batch, n: int) -> Batch:
        """Cut to the tokens of each side."""
        real = {side: int((batch[side][n] > 0).sum()) for side in ("inputs", "targets")}
        real["weights"] = real["targets"]
        return {
            name: value[n : n + 1, : real[name.partition("_")[0]]] for name, value in batch.items()
        }


class Ogbg(Workload):
    """Graphs batched with padding as jraph does it; several binary tasks, labels missing."""

    model = models.GraphNetwork
    sizes = ((3, 4), (1, 0), (4, 6), (2, 3))
    total = (14, 17)  # nodes and edges with padding
    num_graphs = 6  # of which two are padding, the last one empty

    def losses(self, labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
        labels = labels.nan_to_num(0.0) * (1 - label_smoothing) + label_smoothing / 2
        return logits.relu() - logits * labels + torch.log(1 + torch.exp(-logits.abs()))

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        n_node, n_edge = (torch.tensor([size[k] for size in self.sizes] + [0, 0]) for k in range(2))
        n_node[-2], n_edge[-2] = self.total[0] - n_node.sum(), self.total[1] - n_edge.sum()
        first = n_node.cumsum(0) - n_node
        ends = [
            first[graph] + torch.randint(int(n_node[graph]), (2, int(edges)), generator=generator)
            for graph, edges in enumerate(n_edge)
            if edges
        ]
        senders, receivers = torch.cat(ends, dim=1)
        nodes = torch.randn(self.total[0], 3, generator=generator)
        sums = nodes.new_zeros(self.num_graphs, 3).index_add(
            0, torch.arange(self.num_graphs).repeat_interleave(n_node), nodes
        )
        labels = (sums[:, :2] > 0).float()
        labels[1, 0] = torch.nan
        labels[len(self.sizes) :] = torch.nan
        graph = GraphsTuple(
            nodes=nodes,
            edges=torch.randn(self.total[1], 2, generator=generator),
            receivers=receivers,
            senders=senders,
            globals=torch.zeros(self.num_graphs, models.HIDDEN),
            n_node=n_node,
            n_edge=n_edge,
        )
        return {"inputs": graph, "targets": labels, "weights": (~labels.isnan()).float()}

    def example(self, batch: Batch, n: int) -> Batch:
        graph = batch["inputs"]
        first_node, first_edge = (int(sizes[:n].sum()) for sizes in (graph.n_node, graph.n_edge))
        nodes = slice(first_node, first_node + int(graph.n_node[n]))
        edges = slice(first_edge, first_edge + int(graph.n_edge[n]))
        alone = GraphsTuple(
            nodes=graph.nodes[nodes],
            edges=graph.edges[edges],
            receivers=graph.receivers[edges] - first_node,
            senders=graph.senders[edges] - first_node,
            globals=graph.globals[n : n + 1],
            n_node=graph.n_node[n : n + 1],
            n_edge=graph.n_edge[n : n + 1],
        )
        rest = {name: batch[name][n : n + 1] for name in ("targets", "weights")}
        return {"inputs": alone, **rest}


class Criteo(Workload):
    """Tabular data with categories: one logit for each row; the last rows of an epoch are
    padding.
    """

    model = models.Dlrm
    num_examples = 6

    def losses(self, labels: Tensor, logits: Tensor, label_smoothing: float) -> Tensor:
        del label_smoothing
        return F.binary_cross_entropy_with_logits(
            logits.squeeze(-1), labels.squeeze(-1), reduction="none"
        )

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        dense = torch.randn(self.num_examples, 4, generator=generator)
        categories = torch.randint(5, (self.num_examples, 3), generator=generator)
        labels = (dense[:, :1] + categories[:, :1] > 2).float()
        return {
            "inputs": torch.cat([dense, categories.float()], dim=1),
            "targets": labels,
            "weights": torch.ones(self.num_examples),
        }


class Librispeech(Workload):
    """Frames and their paddings in, logits and their paddings out; CTC."""

    model = models.DeepSpeech
    setting = "expand"
    frames, labels = (9, 6, 8, 7), (3, 2, 3, 1)

    def call(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(*batch["inputs"])

    def loss_fn(
        self,
        label_batch: tuple[Tensor, Tensor],
        logits_batch: tuple[Tensor, Tensor],
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        del mask_batch, label_smoothing
        (targets, target_paddings), (logits, paddings) = label_batch, logits_batch
        lengths = (1 - target_paddings).sum(1).long()
        per_example = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            targets,
            (1 - paddings).sum(1).long(),
            lengths,
            reduction="none",
        )
        return {
            "summed": per_example.sum(),
            "n_valid_examples": lengths.sum(),
            "per_example": per_example / lengths,
        }

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        longest, most = max(self.frames), max(self.labels)
        targets = torch.randint(1, models.CLASSES, (self.num_examples, most), generator=generator)
        features = torch.randn(self.num_examples, longest, 4, generator=generator) * 0.3
        for n, (frames, labels) in enumerate(zip(self.frames, self.labels, strict=True)):
            spoken = _patterns(models.CLASSES, 4)[targets[n, :labels]]
            features[n, :frames] += spoken.repeat_interleave(frames // labels + 1, 0)[:frames]
        return {
            "inputs": (features, _paddings(self.frames, longest)),
            "targets": (targets, _paddings(self.labels, most)),
        }

    def example(self, batch: Batch, n: int) -> Batch:
        cut = {"inputs": self.frames[n], "targets": self.labels[n]}
        return {
            name: tuple(part[n : n + 1, : cut[name]] for part in pair)
            for name, pair in batch.items()
        }


WORKLOADS: dict[str, type[Workload]] = {
    workload.__name__: workload
    for workload in (ImagenetVit, ImagenetResnet, Wmt, Ogbg, Criteo, Librispeech)
}


def _patterns(*sizes: int) -> Tensor:
    """What tells the classes apart: the same in every batch."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(99))


def _paddings(lengths: tuple[int, ...], longest: int) -> Tensor:
    """1 for padding, as the benchmark has it."""
    return (torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)).float()
