"""A narrower encoder from a wide one: its residual stream, heads and feed-forward units projected or chosen.

The stream of a post-norm encoder is projected on the principal directions of its own states over texts at hand, not of
its weights: what matters is what the states use. Every matrix that reads the stream is multiplied by the basis, every
one that writes it by its transpose (as Ashkboos et al., 2024, arXiv:2401.15024, rotate and slice a pre-norm decoder).
A norm does not commute with a projection, so its gain and bias are fitted anew, dimension by dimension, to what the
wide one gave. Whole heads and feed-forward units are kept or dropped by how much they write; the mean of what is
dropped goes into the biases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import tf_keras as keras
from numpy.typing import NDArray

from emodistill.checkpoints import Weights
from emodistill.distill.observation import evenly_spaced, states_by_batch
from emodistill.encoder_config import EncoderConfig
from emodistill.encoder_graph import build_classifier, set_weights
from emodistill.errors import ConfigError

__all__ = ["narrow_encoder"]

Matrix = NDArray[np.float64]

_SAMPLE_TEXTS = 256


def narrow_encoder(
    config: EncoderConfig, weights: Weights, token_ids: Sequence[NDArray[np.int32]], hidden_size: int
) -> tuple[EncoderConfig, Weights]:
    """Return the encoder in another width, heads of the same size and feed-forward layers of the same proportion.

    Parameters
    ----------
    config, weights
        The wide encoder, under canonical names.
    token_ids
        Texts whose states decide what is kept; 256 of them, evenly spaced, are looked at.
    hidden_size
        New width, a multiple of the size of a head; at the encoder's own width nothing changes but for rounding.

    Raises
    ------
    ConfigError
        If the width is larger than the encoder's or no multiple of the size of its heads.
    """
    head_size = config.head_size
    if hidden_size > config.hidden_size or hidden_size % head_size:
        raise ConfigError(
            f"hidden_size = {hidden_size}: expected a multiple of {head_size} (the size of a head) up to "
            f"{config.hidden_size}, the width of the encoder"
        )
    n_heads = hidden_size // head_size
    narrow = replace(
        config,
        hidden_size=hidden_size,
        n_heads=n_heads,
        intermediate_size=round(config.intermediate_size * hidden_size / config.hidden_size),
        embedding_size=config.embedding_size if config.embedding_size != config.hidden_size else hidden_size,
    )
    states = _observe(config, weights, evenly_spaced(token_ids, _SAMPLE_TEXTS))
    norms = ["embeddings_norm"]
    norms += [f"layer_{i}_{part}_norm" for i in range(config.n_layers) for part in ("attention", "output")]
    basis = _basis([states[name] for name in norms], hidden_size)
    return narrow, _project(config, narrow, {n: w.astype(np.float64) for n, w in weights.items()}, states, basis)


def _project(
    config: EncoderConfig, narrow: EncoderConfig, weights: Mapping[str, Matrix], states: Mapping[str, Matrix], p: Matrix
) -> Weights:
    """Write every weight of the narrow encoder; `p` (d, k) has orthonormal columns."""
    made: dict[str, Matrix] = {}
    word = "embeddings.word_embeddings.weight"
    made[word] = weights[word] if config.embedding_size != config.hidden_size else weights[word] @ p
    for table in ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"):
        if table in weights:
            made[table] = weights[table] @ p
    if "embeddings.projection.weight" in weights:
        made["embeddings.projection.weight"] = p.T @ weights["embeddings.projection.weight"]
        made["embeddings.projection.bias"] = weights["embeddings.projection.bias"] @ p

    def norm(name: str, before: str, after: str) -> None:
        gain, bias = _fitted_norm(states[before] @ p, states[after] @ p, config.layer_norm_eps)
        made[f"{name}.weight"], made[f"{name}.bias"] = gain, bias

    def reader(name: str, stream: str, rows: NDArray[np.int64]) -> None:
        weight, mean = weights[f"{name}.weight"][rows], states[stream].mean(0)
        made[f"{name}.weight"] = weight @ p
        made[f"{name}.bias"] = weights[f"{name}.bias"][rows] + weight @ (mean - p @ (p.T @ mean))

    def writer(name: str, source: str, kept: NDArray[np.int64]) -> None:
        weight = weights[f"{name}.weight"]
        dropped = np.setdiff1d(np.arange(weight.shape[1]), kept)
        bias = weights[f"{name}.bias"] + weight[:, dropped] @ states[source].mean(0)[dropped]
        made[f"{name}.weight"], made[f"{name}.bias"] = p.T @ weight[:, kept], bias @ p

    norm("embeddings.LayerNorm", "positions", "embeddings_norm")
    heads = _chosen_heads(config, narrow.n_heads, weights, states)
    stream = "embeddings_norm"
    for i in range(config.n_layers):
        units = (heads[i][:, None] * config.head_size + np.arange(config.head_size)).ravel()
        for part in ("query", "key", "value"):
            reader(f"layer.{i}.attention.{part}", stream, units)
        writer(f"layer.{i}.attention.output", f"layer_{i}_attention", units)
        norm(f"layer.{i}.attention.LayerNorm", f"layer_{i}_attention_residual", f"layer_{i}_attention_norm")
        stream = f"layer_{i}_attention_norm"
        written = (states[f"layer_{i}_gelu"] ** 2).mean(0) * (weights[f"layer.{i}.output.weight"] ** 2).sum(0)
        units = np.sort(np.argsort(-written, kind="stable")[: narrow.intermediate_size])
        reader(f"layer.{i}.intermediate", stream, units)
        writer(f"layer.{i}.output", f"layer_{i}_gelu", units)
        norm(f"layer.{i}.output.LayerNorm", f"layer_{i}_output_residual", f"layer_{i}_output_norm")
        stream = f"layer_{i}_output_norm"
    if config.relative_attention_buckets:
        made["relative_attention_bias.weight"] = weights["relative_attention_bias.weight"][:, heads[0]]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in made.items()}


def _chosen_heads(
    config: EncoderConfig, n_heads: int, weights: Mapping[str, Matrix], states: Mapping[str, Matrix]
) -> list[NDArray[np.int64]]:
    """Return the heads of each layer that write most; the same ones in all layers where these share a table of them."""
    written = np.empty((config.n_layers, config.n_heads))
    for i in range(config.n_layers):
        context = states[f"layer_{i}_attention"].reshape(-1, config.n_heads, config.head_size)
        output = weights[f"layer.{i}.attention.output.weight"].reshape(-1, config.n_heads, config.head_size)
        written[i] = [((context[:, h] @ output[:, h].T) ** 2).sum() for h in range(config.n_heads)]
    if config.relative_attention_buckets:
        written[:] = written.sum(0)
    return [np.sort(np.argsort(-row, kind="stable")[:n_heads]) for row in written]


def _basis(streams: Sequence[Matrix], hidden_size: int) -> Matrix:
    """Return orthonormal columns (d, k) that hold most of the states, around 0, each stream of equal weight.

    A norm takes the mean over dimensions away: the columns are turned so that their sum, which it therefore loses, is
    the direction that holds least of those kept.
    """
    d = streams[0].shape[1]
    if hidden_size == d:
        return np.eye(d)
    moment = sum(s.T @ s / (s**2).sum() for s in streams)
    _, vectors = np.linalg.eigh(moment)
    kept = vectors[:, ::-1][:, :hidden_size]
    mirror = np.full(hidden_size, hidden_size**-0.5)
    mirror[-1] -= 1.0  # Householder's reflection between the mean direction and the last axis
    length = float(mirror @ mirror)
    return kept if length < 1e-12 else kept - 2.0 / length * np.outer(kept @ mirror, mirror)


def _fitted_norm(before: Matrix, after: Matrix, epsilon: float) -> tuple[Matrix, Matrix]:
    """Fit gain and bias (k,) so that the norm of `before` (n, k) comes closest to `after`, by least squares."""
    centred = before - before.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + epsilon)
    deviation = normed - normed.mean(0)
    gain = (deviation * after).mean(0) / np.maximum((deviation**2).mean(0), 1e-12)
    return gain, after.mean(0) - gain * normed.mean(0)


def _observe(config: EncoderConfig, weights: Weights, token_ids: Sequence[NDArray[np.int32]]) -> dict[str, Matrix]:
    """Return what the layers give on all real tokens of the texts: (n_tokens, width) by layer name."""
    model = build_classifier(config, 1, dropout_rate=0, attention_dropout_rate=0, classifier_dropout_rate=0)
    set_weights(model, config, {n: w for n, w in weights.items() if not n.startswith("classifier")})
    names = ["positions", "embeddings_norm"]
    for i in range(config.n_layers):
        names += [f"layer_{i}_{part}" for part in ("attention", "attention_residual", "attention_norm", "gelu")]
        names += [f"layer_{i}_{part}" for part in ("output_residual", "output_norm")]
    observer = keras.Model(model.inputs, {name: model.get_layer(name).output for name in names})
    batches = list(states_by_batch(observer, sorted(token_ids, key=len), config.pad_token_id))
    return {name: np.concatenate([states[name] for states in batches]).astype(np.float64) for name in names}
