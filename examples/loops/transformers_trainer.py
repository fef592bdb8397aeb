"""Hugging Face's ``Trainer``, a small BERT with padding and a small GPT-2, and K-FAC in it.

    python examples/loops/transformers_trainer.py

Four lines are more than without: the models are converted, the optimizer is created here, and the
preconditioner is told of the padding and steps before that optimizer.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import asdl_ws_plugin

# transformers imports torchvision, which may lack operators beside a CPU build of torch
asdl_ws_plugin.mend_torchvision()

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

VOCABULARY, LENGTH = 60, 16


class Sentences(torch.utils.data.Dataset):
    """Random sentences of different lengths. Is there a word below 5 in it? Or: what comes next?"""

    def __init__(self, size: int, causal: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size,), generator=generator)
        start = torch.randint(2, VOCABULARY, (size, 1), generator=generator)
        steps = torch.randint(1, 4, (size, 1), generator=generator) * torch.arange(LENGTH)
        self.ids = (start + steps) % (VOCABULARY - 2) + 2
        self.mask = torch.arange(LENGTH) < lengths[:, None]
        self.ids[~self.mask] = 0
        self.causal = causal

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids, mask = self.ids[i], self.mask[i]
        label = ids.masked_fill(~mask, -100) if self.causal else (ids < 7).any().long()
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": label}


def bert() -> nn.Module:
    """A BERT classifier with two layers."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2() -> nn.Module:
    """A GPT-2 with two layers."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=LENGTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def main(steps: int = 60, causal: bool = False, seed: int = 0) -> list[float]:
    """Train one of them; returns the loss of every step."""
    torch.manual_seed(seed)
    model = gpt2() if causal else bert()
    asdl_ws_plugin.convert(model)  # +1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prec = asdl_ws_plugin.Preconditioner(model)  # +2
    prec.step_before(optimizer)  # +3
    asdl_ws_plugin.attach_padding(model, "attention_mask")  # +4

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": 32,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": seed,
        }
        trainer = Trainer(
            model,
            TrainingArguments(**arguments),
            train_dataset=Sentences(512, causal),
            optimizers=(optimizer, None),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    for causal, name in ((False, "BERT"), (True, "GPT-2")):
        losses = main(causal=causal)
        print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
