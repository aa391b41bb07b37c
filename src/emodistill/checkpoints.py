"""Encoder weights under one set of names, whatever the family called them; checkpoint folders of our own models.

A checkpoint folder (a member, a student) holds weights.safetensors, config.json and tokenizer.json. Weight names:

    embeddings.{word,position,token_type}_embeddings.weight, embeddings.projection.{weight,bias} (factorized only),
    embeddings.LayerNorm.{weight,bias}, relative_attention_bias.weight (mpnet),
    layer.I.attention.{query,key,value,output}.{weight,bias}, layer.I.attention.LayerNorm.{weight,bias},
    layer.I.{intermediate,output}.{weight,bias}, layer.I.output.LayerNorm.{weight,bias}, classifier.{weight,bias}

Matrices of linear layers are stored (out, in), as PyTorch does.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emodistill.encoder_config import EncoderConfig
from emodistill.errors import ArtifactError, EncoderError, MissingExtraError

__all__ = [
    "POOLINGS",
    "ModelCheckpoint",
    "Weights",
    "encoder_weight_shapes",
    "load_checkpoint",
    "load_encoder_weights",
    "save_checkpoint",
]

Weights = dict[str, NDArray[np.float32]]

POOLINGS = ("cls", "mean")

# (pattern, replacement) from a family's own names to ours, tried in order.
_RENAMES: dict[str, list[tuple[str, str]]] = {
    "bert": [
        (r"^encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layer.\1.attention.\2."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layer.\1.attention.output."),
        (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layer.\1.attention.LayerNorm."),
        (r"^encoder\.layer\.(\d+)\.(intermediate|output)\.dense\.", r"layer.\1.\2."),
        (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layer.\1.output.LayerNorm."),
    ],
    "distilbert": [
        (r"^transformer\.layer\.(\d+)\.attention\.q_lin\.", r"layer.\1.attention.query."),
        (r"^transformer\.layer\.(\d+)\.attention\.k_lin\.", r"layer.\1.attention.key."),
        (r"^transformer\.layer\.(\d+)\.attention\.v_lin\.", r"layer.\1.attention.value."),
        (r"^transformer\.layer\.(\d+)\.attention\.out_lin\.", r"layer.\1.attention.output."),
        (r"^transformer\.layer\.(\d+)\.sa_layer_norm\.", r"layer.\1.attention.LayerNorm."),
        (r"^transformer\.layer\.(\d+)\.ffn\.lin1\.", r"layer.\1.intermediate."),
        (r"^transformer\.layer\.(\d+)\.ffn\.lin2\.", r"layer.\1.output."),
        (r"^transformer\.layer\.(\d+)\.output_layer_norm\.", r"layer.\1.output.LayerNorm."),
    ],
    "mpnet": [
        (r"^encoder\.relative_attention_bias\.", "relative_attention_bias."),
        (r"^encoder\.layer\.(\d+)\.attention\.attn\.q\.", r"layer.\1.attention.query."),
        (r"^encoder\.layer\.(\d+)\.attention\.attn\.k\.", r"layer.\1.attention.key."),
        (r"^encoder\.layer\.(\d+)\.attention\.attn\.v\.", r"layer.\1.attention.value."),
        (r"^encoder\.layer\.(\d+)\.attention\.attn\.o\.", r"layer.\1.attention.output."),
        (r"^encoder\.layer\.(\d+)\.attention\.LayerNorm\.", r"layer.\1.attention.LayerNorm."),
        (r"^encoder\.layer\.(\d+)\.(intermediate|output)\.dense\.", r"layer.\1.\2."),
        (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layer.\1.output.LayerNorm."),
    ],
}
_RENAMES["roberta"] = _RENAMES["bert"]

# Parts of published checkpoints that an encoder with our own classifier does not use.
_IGNORED = re.compile(
    r"^(pooler\.|lm_head\.|cls\.|vocab_(transform|layer_norm|projector)\.|classifier\.|pre_classifier\.)"
)
_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint:
    """A classifier at rest: encoder shape, head, labels, weights and tokenizer.

    Parameters
    ----------
    config
        Shape of the encoder.
    pooling
        "mean" over all real tokens, or "cls": the first token's state.
    label_names
        In the order of the training file's header; row i of classifier.weight belongs to label i.
    max_length_tokens
        Longer texts are cut to this many ids, the closing token kept.
    weights
        float32 arrays under the names of this module's docstring, classifier included.
    tokenizer_json
        Content of tokenizer.json.
    """

    config: EncoderConfig
    pooling: str
    label_names: tuple[str, ...]
    max_length_tokens: int
    weights: Weights
    tokenizer_json: str


def encoder_weight_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight that an encoder of this shape has (without classifier)."""
    d, e, i = config.hidden_size, config.embedding_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, e),
        "embeddings.position_embeddings.weight": (config.max_positions, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    if config.type_vocab_size:
        shapes["embeddings.token_type_embeddings.weight"] = (config.type_vocab_size, d)
    if e != d:
        shapes["embeddings.projection.weight"] = (d, e)
        shapes["embeddings.projection.bias"] = (d,)
    if config.relative_attention_buckets:
        shapes["relative_attention_bias.weight"] = (config.relative_attention_buckets, config.n_heads)
    linear = {"attention.query": (d, d), "attention.key": (d, d), "attention.value": (d, d), "attention.output": (d, d)}
    linear |= {"intermediate": (i, d), "output": (d, i)}
    for layer in range(config.n_layers):
        for name, (rows, columns) in linear.items():
            shapes[f"layer.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"layer.{layer}.{name}.bias"] = (rows,)
        for norm in ("attention.LayerNorm", "output.LayerNorm"):
            shapes[f"layer.{layer}.{norm}.weight"] = (d,)
            shapes[f"layer.{layer}.{norm}.bias"] = (d,)
    return shapes


def load_encoder_weights(folder: Path | str) -> tuple[EncoderConfig, Weights]:
    """Load a Hugging Face encoder folder (config.json, model.safetensors) under our weight names.

    Returns
    -------
    tuple
        The encoder's shape and its float32 weights, exactly those of `encoder_weight_shapes`.

    Raises
    ------
    EncoderError
        If a file is missing, the family is unknown, or a weight is missing, unexpected or of another shape: an
        encoder is never started from random numbers in silence.
    """
    folder = Path(folder)
    config = EncoderConfig.from_hf(_read_json(folder / "config.json"))
    raw = _read_safetensors(folder / "model.safetensors")
    weights = {}
    unexpected = []
    expected = encoder_weight_shapes(config)
    for name, array in raw.items():
        short = re.sub(rf"^{config.family}\.", "", name)
        # The first published BERTs call the gain and bias of a norm gamma and beta.
        short = short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if _BUFFERS.search(short) or _IGNORED.match(short):
            continue
        ours = _our_name(short, config.family)
        if ours not in expected:
            unexpected.append(name)
            continue
        weights[ours] = np.ascontiguousarray(array, dtype=np.float32)
    _refuse_misfits(folder / "model.safetensors", expected, weights, unexpected)
    return config, weights


def save_checkpoint(
    folder: Path | str, checkpoint: ModelCheckpoint, *, dtype: str = "float32", max_file_bytes: int | None = None
) -> None:
    """Write weights.safetensors, config.json and tokenizer.json into `folder` (made if absent).

    Parameters
    ----------
    folder
        Where to; the caller publishes it (written beside, renamed) as one piece.
    checkpoint
        What to write.
    dtype
        "float32", or "float16" to halve the file.
    max_file_bytes
        Weights that take more become several files, weights-00001-of-00002.safetensors and so on; a single matrix is
        never split.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("weights*.safetensors"):
        old.unlink()
    files = _files_of_weights({name: array.astype(dtype) for name, array in checkpoint.weights.items()}, max_file_bytes)
    for number, weights in enumerate(files, 1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        save_file(weights, folder / f"weights{part}.safetensors")
    labels = checkpoint.label_names
    config = checkpoint.config.to_hf() | {
        "problem_type": "multi_label_classification",
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "pooling": checkpoint.pooling,
        "max_length_tokens": checkpoint.max_length_tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")


def load_checkpoint(folder: Path | str) -> ModelCheckpoint:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    ArtifactError
        If the folder is not a checkpoint of ours.
    EncoderError
        If weights are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    raw = _read_json(folder / "config.json")
    if "pooling" not in raw or "id2label" not in raw:
        raise ArtifactError(f"{folder / 'config.json'} is not a classifier of emodistill: it lacks pooling or id2label")
    config = EncoderConfig.from_hf(raw)
    label_names = tuple(raw["id2label"][str(i)] for i in range(len(raw["id2label"])))
    weights = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in _read_weights(folder).items()}
    expected = encoder_weight_shapes(config)
    expected["classifier.weight"] = (len(label_names), config.hidden_size)
    expected["classifier.bias"] = (len(label_names),)
    _refuse_misfits(folder / "weights.safetensors", expected, weights, [n for n in weights if n not in expected])
    return ModelCheckpoint(
        config=config,
        pooling=str(raw["pooling"]),
        label_names=label_names,
        max_length_tokens=int(raw["max_length_tokens"]),
        weights=weights,
        tokenizer_json=_read_text(folder / "tokenizer.json"),
    )


def _our_name(name: str, family: str) -> str:
    for pattern, replacement in _RENAMES[family]:
        renamed, n = re.subn(pattern, replacement, name)
        if n:
            return renamed
    return name


def _refuse_misfits(
    path: Path, expected: Mapping[str, tuple[int, ...]], weights: Weights, unexpected: list[str]
) -> None:
    missing = [name for name in expected if name not in weights]
    misshapen = [
        f"{n} {w.shape} for {expected[n]}" for n, w in weights.items() if n in expected and w.shape != expected[n]
    ]
    for what, names in (("lacks", missing), ("has unexpected", unexpected), ("has misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise EncoderError(
                f"{path} {what} weights: {', '.join(names[:3])}{more}; config.json beside it describes another model"
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is missing: the folder is no encoder or checkpoint, or it was not written to its end"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not JSON (line {error.lineno}): fetch or write it again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds no JSON object: fetch or write it again")
    return content


def _files_of_weights(weights: Weights, max_file_bytes: int | None) -> list[Weights]:
    files: list[Weights] = [{}]
    for name, array in weights.items():
        taken = sum(other.nbytes for other in files[-1].values())
        if max_file_bytes is not None and files[-1] and taken + array.nbytes > max_file_bytes:
            files.append({})
        files[-1][name] = array
    return files


def _read_weights(folder: Path) -> dict[str, NDArray[Any]]:
    paths = sorted(folder.glob("weights-*-of-*.safetensors"))
    if not paths or (folder / "weights.safetensors").is_file():
        return _read_safetensors(folder / "weights.safetensors")
    n_files = int(paths[0].stem.rpartition("-")[2])
    whole = [folder / f"weights-{number:05d}-of-{n_files:05d}.safetensors" for number in range(1, n_files + 1)]
    return {name: array for path in whole for name, array in _read_safetensors(path).items()}


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise MissingExtraError.for_extra("safetensors", "train") from error
    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
        return arrays
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} is missing: the folder is no encoder or checkpoint, or it was not written to its end"
        ) from error
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged ({error}): fetch or write it again") from error
