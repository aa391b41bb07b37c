"""PyTorch in inference mode, one unpadded text per call: our student, and an encoder of DistilRoBERTa's size.

A worker of `benchmarks/export_bench.py`:  python torch_inference.py SPEC.json
The DistilRoBERTa-size encoder (6 layers x 768, RoBERTa's vocabulary) has random weights, which take as long as trained
ones, and reads the student's token ids, so that both see the same lengths.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from student_torch import load_student
from tokenizers import Tokenizer
from torch import nn
from transformers import RobertaConfig, RobertaModel

sys.path.append(str(Path(__file__).resolve().parents[1]))
from worker import serve, text_handlers


class TorchText:
    """A PyTorch classifier behind a tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        self.model = model.to(dtype).eval()
        self.tokenizer = tokenizer

    def encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, int64 (1, length)."""
        ids = torch.tensor([self.tokenizer.encode(text).ids])
        return ids, torch.ones_like(ids)

    def run(self, encoded: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Return logits, float32 (1, n_labels)."""
        with torch.inference_mode():
            return self.model(*encoded).float().numpy()

    def __call__(self, text: str) -> np.ndarray:
        """Answer a text."""
        return self.run(self.encode(text))


class DistilRobertaSize(nn.Module):
    """RoBERTa's encoder, 6 x 768, first token's state, classifier."""

    def __init__(self, n_labels: int, attention: str) -> None:
        super().__init__()
        config = RobertaConfig(
            vocab_size=50265, num_hidden_layers=6, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
        )
        config._attn_implementation = attention
        self.encoder = RobertaModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, n_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(hidden[:, 0])


def main() -> None:
    """Serve timing requests."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    torch.set_num_interop_threads(1)
    torch.manual_seed(0)
    folder = Path(spec["checkpoint"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(spec["max_length_tokens"])
    models = {}
    for attention in ("sdpa", "eager"):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            student, config = load_student(folder, attention=attention)
            models[f"torch {short} {attention}"] = TorchText(student, tokenizer, dtype)
            large = DistilRobertaSize(len(config["id2label"]), attention)
            models[f"torch distilroberta-size {short} {attention}"] = TorchText(large, tokenizer, dtype)
    versions = {"torch": torch.__version__}
    serve({**text_handlers(models, spec["texts"]), "versions": lambda: versions})


if __name__ == "__main__":
    main()
