"""A student's checkpoint as a PyTorch model made of Hugging Face's BertModel, to compare speed and answers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

__all__ = ["StudentModel", "load_student"]

# Our names -> those of BertModel; longer names first, because "attention.output" holds "output".
RENAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
    "output.LayerNorm": "output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


class StudentModel(nn.Module):
    """BertModel, pooling, classifier: ids and mask to logits (batch, n_labels)."""

    def __init__(self, encoder: BertModel, projection: nn.Module | None, pooling: str, classifier: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection  # word vectors (narrow) to hidden states (wide), where the table is factorized
        self.pooling = pooling
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        if self.projection is None:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        else:
            vectors = self.projection(input_ids)
            hidden = self.encoder(inputs_embeds=vectors, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return self.classifier(pooled)


def load_student(folder: Path, *, attention: str = "sdpa") -> tuple[StudentModel, dict]:
    """Load a checkpoint folder of a BERT-like student.

    Parameters
    ----------
    folder : Path
        With weights.safetensors (our names), config.json.
    attention : str
        "sdpa" or "eager"; the exporter's fusions know the second better.

    Returns
    -------
    tuple
        The model in evaluation mode, and the content of config.json.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "bert":
        raise SystemExit(f"{folder} holds a {config['model_type']}: the comparison knows students of the family bert")
    weights = {name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()}
    table = weights["embeddings.word_embeddings.weight"]
    positions = weights["embeddings.position_embeddings.weight"]
    shape = BertConfig(
        vocab_size=len(table),
        hidden_size=positions.shape[1],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=len(positions),
        type_vocab_size=len(weights["embeddings.token_type_embeddings.weight"]),
        layer_norm_eps=config["layer_norm_eps"],
    )
    shape._attn_implementation = attention
    encoder = BertModel(shape, add_pooling_layer=False)
    projection = None
    if "embeddings.projection.weight" in weights:
        words = nn.Embedding.from_pretrained(table)
        linear = nn.Linear(table.shape[1], positions.shape[1])
        linear.load_state_dict(
            {"weight": weights.pop("embeddings.projection.weight"), "bias": weights.pop("embeddings.projection.bias")}
        )
        projection = nn.Sequential(words, linear)
        del weights["embeddings.word_embeddings.weight"]
    classifier = nn.Linear(positions.shape[1], len(weights["classifier.bias"]))
    classifier.load_state_dict({"weight": weights.pop("classifier.weight"), "bias": weights.pop("classifier.bias")})
    state = {_their_name(name): tensor for name, tensor in weights.items()}
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    missing = [name for name in missing if projection is None or "word_embeddings" not in name]
    if missing or unexpected:
        raise SystemExit(f"{folder} does not fit BertModel: missing {missing}, unexpected {unexpected}")
    return StudentModel(encoder, projection, config["pooling"], classifier).eval(), config


def _their_name(name: str) -> str:
    if not name.startswith("layer."):
        return name
    _, index, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"encoder.layer.{index}.{RENAMES[part]}.{kind}"
