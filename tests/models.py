"""Models two layers wide, with weights at real scale, for the tests."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from emodistill.checkpoints import ModelCheckpoint, Weights, encoder_weight_shapes
from emodistill.encoder_config import EncoderConfig

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "thank",
    "you",
    "sorry",
    "love",
    "great",
    "lol",
    ".",
    "a",
    "##s",
]


def tiny_config(**changes: object) -> EncoderConfig:
    """Return a BERT of two layers."""
    sizes = dict(
        family="bert",
        vocab_size=len(PIECES),
        hidden_size=16,
        n_layers=2,
        n_heads=4,
        intermediate_size=32,
        max_positions=24,
        type_vocab_size=2,
    )
    return EncoderConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def random_weights(config: EncoderConfig, n_labels: int, seed: int = 0, scale: float = 0.3) -> Weights:
    """Return weights whose gains are away from 1 and whose biases are away from 0."""
    generator = np.random.default_rng(seed)
    shapes = encoder_weight_shapes(config)
    shapes |= {"classifier.weight": (n_labels, config.hidden_size), "classifier.bias": (n_labels,)}
    weights = {}
    for name, shape in shapes.items():
        around = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        weights[name] = (around + scale * generator.standard_normal(shape)).astype(np.float32)
    return weights


def tiny_tokenizer_json() -> str:
    """Return a lower-casing WordPiece tokenizer over PIECES."""
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": PIECES[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in range(5)
            ],
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": True,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    name: {"id": name, "ids": [PIECES.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")
                },
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {piece: i for i, piece in enumerate(PIECES)},
            },
        }
    )


def tiny_checkpoint(label_names: tuple[str, ...] = ("gratitude", "remorse"), **changes: object) -> ModelCheckpoint:
    """Return a whole checkpoint with random weights."""
    config = tiny_config(**changes)
    return ModelCheckpoint(
        config=config,
        pooling="mean",
        label_names=label_names,
        max_length_tokens=16,
        weights=random_weights(config, len(label_names), scale=0.1),
        tokenizer_json=tiny_tokenizer_json(),
    )


def write_encoder_folder(folder: Path, **changes: object) -> Path:
    """Write a tiny pretrained BERT as Hugging Face would: config.json, model.safetensors, tokenizer.json."""
    config = tiny_config(**changes)
    renames = {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "attention.LayerNorm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output.LayerNorm": "output.LayerNorm",
    }
    arrays = {}
    for name, value in random_weights(config, 1, scale=0.1).items():
        if name.startswith("layer."):
            _, layer, *middle, kind = name.split(".")
            name = f"encoder.layer.{layer}.{renames['.'.join(middle)]}.{kind}"
        if not name.startswith("classifier"):
            arrays[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    return folder
