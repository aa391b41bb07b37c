"""Hugging Face's PyTorch encoder, trained on batches that our side wrote: the peer in training speed.

A worker of `benchmarks/training_speed.py`:  python torch_training.py SPEC.json
The same encoder, mean pooling and a linear classifier; AdamW without decay on biases and norms, gradients clipped;
bf16 by autocast or fp32; each batch padded to the length that our side pads it to, or everything padded to 64 tokens,
the common recipe.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

sys.path.append(str(Path(__file__).resolve().parents[1]))
from worker import serve

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Classifier(nn.Module):
    """Encoder, mean over real tokens, dropout, linear."""

    def __init__(self, folder: str, n_labels: int) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, n_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier(self.dropout((hidden * mask).sum(1) / mask.sum(1)))


def read_batches(path: Path, pad_token_id: int, padded_length: int | None) -> list[Batch]:
    """Read ids, mask and targets of every batch; see `emodistill.benchmarks.training_speed.write_batches`."""
    with np.load(path) as arrays:
        ids, lengths, labels = arrays["ids"], arrays["lengths"], arrays["labels"]
        batch_sizes, batch_lengths = arrays["batch_sizes"], arrays["batch_lengths"]
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    batches, first = [], 0
    for size, batch_length in zip(batch_sizes.tolist(), batch_lengths.tolist(), strict=True):
        width = padded_length or batch_length
        padded = np.full((size, width), pad_token_id, np.int64)
        mask = np.zeros((size, width), np.int64)
        for row in range(size):
            cut = rows[first + row][:width]
            padded[row, : len(cut)], mask[row, : len(cut)] = cut, 1
        targets = torch.from_numpy(labels[first : first + size].astype(np.float32))
        batches.append((torch.from_numpy(padded), torch.from_numpy(mask), targets))
        first += size
    return batches


class Trainer:
    """Steps of one model under one precision."""

    def __init__(self, spec: dict[str, Any], batches: list[Batch], *, bf16: bool) -> None:
        torch.manual_seed(spec["seed"])
        self.model = Classifier(spec["encoder"], batches[0][2].shape[1]).train()
        # The classifier starts from the same numbers as ours.
        start = np.random.default_rng(spec["seed"]).normal(0, 0.02, tuple(self.model.classifier.weight.shape))
        with torch.no_grad():
            self.model.classifier.weight.copy_(torch.from_numpy(start))
            self.model.classifier.bias.zero_()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": spec["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=spec["learning_rates"][0], fused=True)
        self.loss = nn.BCEWithLogitsLoss()
        self.batches, self.bf16 = batches, bf16
        self.rates: list[float] = spec["learning_rates"]
        self.clip_norm: float = spec["clip_norm"]

    def steps(self, first: int, last: int) -> Iterator[tuple[float, float]]:
        """Train on batches first to last - 1; yield seconds and loss of each."""
        for step in range(first, last):
            start = perf_counter()
            ids, mask, targets = self.batches[step]
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[step]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                logits = self.model(ids, mask)
            loss = self.loss(logits.float(), targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            yield perf_counter() - start, float(loss.detach())


def main() -> None:
    """Serve training requests."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    path = Path(spec["batches"])
    pad_token_id = AutoConfig.from_pretrained(spec["encoder"]).pad_token_id
    bucketed = read_batches(path, pad_token_id, None)
    padded = read_batches(path, pad_token_id, 64)
    recipes = {
        "torch bf16": (bucketed, True),
        "torch fp32": (bucketed, False),
        "torch fp32 padded to 64": (padded, False),
    }
    trainers: dict[str, Trainer] = {}

    def train(name: str, first: int, last: int) -> dict[str, list[float]]:
        if name not in trainers:
            batches, bf16 = recipes[name]
            trainers[name] = Trainer(spec, batches, bf16=bf16)
        seconds, losses = zip(*trainers[name].steps(first, last), strict=True)
        return {"seconds": list(seconds), "losses": list(losses)}

    versions = {"torch": torch.__version__}
    serve({"names": lambda: list(recipes), "train": train, "versions": lambda: versions})


if __name__ == "__main__":
    main()
