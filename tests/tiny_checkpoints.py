"""Two-layer checkpoints with weights of real scale, and what they give, worked out in float64 from the definitions.

Weights have a standard deviation of 0.3, layer-norm gains lie away from 1 and biases away from 0: a graph that swaps
queries and keys, or forgets a gain, gives other logits (near-zero weights would hide it).
"""

import json
import math
from pathlib import Path

import numpy as np

from emodistill.checkpoints import ModelCheckpoint, Weights, encoder_weight_shapes, save_checkpoint
from emodistill.encoder_config import EncoderConfig
from emodistill.tokenization import load_tokenizer

CASES = Path(__file__).parent / "cases"
LABEL_NAMES = ("admiration", "amusement", "gratitude", "love", "pride", "relief", "remorse")
VOCABULARY = (CASES / "D18_vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
EPSILON = 1e-5


def make_config(family: str = "bert", *, embedding_size: int = 0) -> EncoderConfig:
    """Return a small shape of a family."""
    offset = family in ("roberta", "mpnet")
    return EncoderConfig(
        family=family,
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        n_layers=2,
        n_heads=4,
        intermediate_size=64,
        max_positions=66 if offset else 64,
        type_vocab_size=2 if family in ("bert", "roberta") else 0,
        layer_norm_eps=EPSILON,
        pad_token_id=1 if offset else 0,
        relative_attention_buckets=32 if family == "mpnet" else 0,
        embedding_size=embedding_size,
    )


def make_weights(config: EncoderConfig, n_labels: int = len(LABEL_NAMES), *, seed: int = 5) -> Weights:
    """Draw weights of real scale."""
    rng = np.random.default_rng(seed)
    shapes = encoder_weight_shapes(config) | {
        "classifier.weight": (n_labels, config.hidden_size),
        "classifier.bias": (n_labels,),
    }
    weights = {}
    for name, shape in shapes.items():
        is_gain = name.endswith("LayerNorm.weight")
        values = rng.uniform(0.5, 1.8, shape) if is_gain else rng.normal(0, 0.3, shape)
        weights[name] = values.astype(np.float32)
    return weights


def make_checkpoint(family: str = "bert", *, pooling: str = "mean", embedding_size: int = 0) -> ModelCheckpoint:
    """Return a classifier over the small vocabulary."""
    config = make_config(family, embedding_size=embedding_size)
    return ModelCheckpoint(
        config=config,
        pooling=pooling,
        label_names=LABEL_NAMES,
        max_length_tokens=48,
        weights=make_weights(config),
        tokenizer_json=_tokenizer_json(),
    )


def write_checkpoint(folder: Path, checkpoint: ModelCheckpoint) -> Path:
    """Write a checkpoint folder."""
    save_checkpoint(folder, checkpoint)
    return folder


def make_rows(*lengths: int, seed: int = 3) -> list[np.ndarray]:
    """Draw token ids of texts of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, len(VOCABULARY), n).astype(np.int32) for n in lengths]


def reference_states(checkpoint: ModelCheckpoint, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Work out one text alone, in float64: every state by name, and "logits"."""
    config, pooling = checkpoint.config, checkpoint.pooling
    w = {name: array.astype(np.float64) for name, array in checkpoint.weights.items()}
    t, h, size = len(ids), config.n_heads, config.head_size
    states: dict[str, np.ndarray] = {}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        states[name] = centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]
        return states[name]

    x = w["embeddings.word_embeddings.weight"][ids]
    if config.embedding_size != config.hidden_size:
        x = linear(x, "embeddings.projection")
    x = x + w["embeddings.position_embeddings.weight"][config.position_offset + np.arange(t)]
    if config.type_vocab_size:
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(config.n_layers):
        name = f"layer.{i}.attention"
        q, k, v = (linear(x, f"{name}.{part}").reshape(t, h, size) for part in ("query", "key", "value"))
        scores = np.einsum("qhs,khs->hqk", q, k) / math.sqrt(size)
        if config.relative_attention_buckets:
            scores += w["relative_attention_bias.weight"][_buckets(t)].transpose(2, 0, 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        states[f"{name}.context"] = np.einsum("hqk,khs->qhs", shares, v).reshape(t, -1)
        x = norm(x + linear(states[f"{name}.context"], f"{name}.output"), f"{name}.LayerNorm")
        wide = linear(x, f"layer.{i}.intermediate")
        states[f"layer.{i}.gelu"] = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + linear(states[f"layer.{i}.gelu"], f"layer.{i}.output"), f"layer.{i}.output.LayerNorm")
    pooled = x[0] if pooling == "cls" else x.mean(0)
    states["logits"] = linear(pooled, "classifier")
    return states


def reference_logits(checkpoint: ModelCheckpoint, rows: list[np.ndarray]) -> np.ndarray:
    """Work out the logits of texts, each alone."""
    return np.stack([reference_states(checkpoint, row)["logits"] for row in rows])


def _buckets(t: int) -> np.ndarray:
    """32 buckets: 0..7 tokens back one each, then 8 on a log scale to 128; the same again, plus 16, forwards."""
    buckets = np.zeros((t, t), np.int64)
    for query in range(t):
        for key in range(t):
            distance = abs(query - key)
            far = 8 + int(math.log(max(distance, 1) / 8) / math.log(128 / 8) * 8)
            buckets[query, key] = (16 if key > query else 0) + (distance if distance < 8 else min(far, 15))
    return buckets


def _tokenizer_json() -> str:
    """Build tokenizer.json from the small vocabulary."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        return json.dumps(json.loads(load_tokenizer(folder).to_str()), ensure_ascii=False)
