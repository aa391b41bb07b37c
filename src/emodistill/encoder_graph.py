"""BERT-family encoders as functional tf_keras models: token ids in, one logit per label out.

All tokens of a batch lie in one matrix (batch * length, width), so every linear layer is one plain matrix product;
only attention sees batch and length apart. Post-norm layers and exact gelu as in BERT (Devlin et al., 2018,
arXiv:1810.04805); relative position buckets as in MPNet (Song et al., 2020, arXiv:2004.09297). The residual stream is
float32 in every precision; with "bfloat16" the matrix products and what lies between them are bfloat16.
"""

import math
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from emodistill.checkpoints import POOLINGS, Weights, encoder_weight_shapes
from emodistill.encoder_config import EncoderConfig
from emodistill.errors import ConfigError, EncoderError
from emodistill.training_config import PRECISIONS

__all__ = ["build_classifier", "get_weights", "hidden_state_names", "set_dropout_state", "set_weights"]

_LAYERS_PER_PART = 100_003  # numbers of the layers with dropout in the next part of a batch begin here


def build_classifier(
    config: EncoderConfig,
    n_labels: int,
    *,
    pooling: str = "mean",
    dropout_rate: float = 0.1,
    attention_dropout_rate: float = 0.1,
    classifier_dropout_rate: float = 0.1,
    precision: str = "float32",
) -> keras.Model:
    """Build an encoder with a linear classifier; its weights are random until `set_weights`.

    Parameters
    ----------
    config
        Shape of the encoder.
    n_labels
        Rows of the classifier.
    pooling
        "mean" over all real tokens, or "cls": the first token's state.
    dropout_rate, attention_dropout_rate, classifier_dropout_rate
        Dropout on embeddings and sublayer outputs, on attention probabilities, and on the pooled state; in [0, 1).
    precision
        "float32", or "bfloat16" for the matrix products.

    Returns
    -------
    tf_keras.Model
        Inputs "input_ids" and "attention_mask", int32 (batch, length), the mask 1 on real tokens; output "logits",
        float32 (batch, n_labels). Works for any batch and length up to `config.max_length_tokens`.

    Raises
    ------
    ConfigError
        If pooling or precision is unknown.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling '{pooling}' is unknown: choose from {', '.join(POOLINGS)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}' is unknown: choose from {', '.join(PRECISIONS)}")
    policy = keras.mixed_precision.Policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    d = config.hidden_size

    def dense(units: int, name: str) -> keras.layers.Dense:
        return keras.layers.Dense(units, name=name, dtype=policy)

    input_ids = keras.Input((None,), dtype="int32", name="input_ids")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    hidden = WordEmbeddings(config, name="embeddings")(input_ids)  # (n, e): n = batch * length
    if config.embedding_size != d:
        hidden = dense(d, "embeddings_projection")(hidden)
    hidden = PositionEmbeddings(config, name="positions")([hidden, input_ids])  # (n, d)
    hidden = LayerNorm(config.layer_norm_eps, name="embeddings_norm")(hidden)
    hidden = SeededDropout(dropout_rate, name="embeddings_dropout")(hidden)
    bias = AttentionBias(config, name="attention_bias")([input_ids, attention_mask])  # (b or 1, 1 or h, 1 or t, t)
    for i in range(config.n_layers):
        qkv = dense(3 * d, f"layer_{i}_qkv")(hidden)  # (n, 3d)
        context = Attention(config.n_heads, attention_dropout_rate, name=f"layer_{i}_attention", dtype=policy)(
            [qkv, bias]
        )
        context = dense(d, f"layer_{i}_attention_output")(context)
        context = SeededDropout(dropout_rate, name=f"layer_{i}_attention_dropout")(context)
        hidden = Residual(name=f"layer_{i}_attention_residual")([hidden, context])
        hidden = LayerNorm(config.layer_norm_eps, name=f"layer_{i}_attention_norm")(hidden)
        wide = dense(config.intermediate_size, f"layer_{i}_intermediate")(hidden)  # (n, i)
        wide = Gelu(name=f"layer_{i}_gelu", dtype=policy)(wide)
        wide = dense(d, f"layer_{i}_output")(wide)
        wide = SeededDropout(dropout_rate, name=f"layer_{i}_output_dropout")(wide)
        hidden = Residual(name=f"layer_{i}_output_residual")([hidden, wide])
        hidden = LayerNorm(config.layer_norm_eps, name=f"layer_{i}_output_norm")(hidden)
    pooled = Pooling(pooling, name="pooling")([hidden, attention_mask])  # (b, d)
    pooled = SeededDropout(classifier_dropout_rate, name="classifier_dropout")(pooled)
    logits = keras.layers.Dense(n_labels, name="classifier", dtype="float32")(pooled)
    return keras.Model([input_ids, attention_mask], logits, name=f"{config.family}_classifier")


def hidden_state_names(config: EncoderConfig) -> list[str]:
    """Name the layers whose outputs (batch * length, d) are the states after the embeddings and after each layer."""
    return ["embeddings_norm", *(f"layer_{i}_output_norm" for i in range(config.n_layers))]


def set_dropout_state(model: keras.Model, seed: int | tf.Tensor, step: int | tf.Tensor, part: int = 0) -> None:
    """Make the next masks a function of (seed, step, part, layer) alone, so that a resumed run draws the same ones."""
    for index, layer in enumerate(_dropout_layers(model), start=part * _LAYERS_PER_PART):
        layer.state.assign(tf.stack([tf.cast(seed, tf.int32) * 1009 + index, tf.cast(step, tf.int32)]))


def set_weights(model: keras.Model, config: EncoderConfig, weights: Weights) -> None:
    """Load canonical weights (see `emodistill.checkpoints`) into a model of `build_classifier`.

    Raises
    ------
    EncoderError
        If a weight of the encoder is missing or has another shape. A missing classifier keeps its random start.
    """
    for name, shape in encoder_weight_shapes(config).items():
        if name not in weights:
            raise EncoderError(f"weight '{name}' is missing: the encoder would start from random numbers")
        if weights[name].shape != shape:
            raise EncoderError(f"weight '{name}' has shape {weights[name].shape}, expected {shape}")
    for variable, names in _variables(model, config):
        if names[0].startswith("classifier") and names[0] not in weights:
            continue
        parts = [weights[name] for name in names]
        if names[0].endswith(".weight") and parts[0].ndim == 2 and "kernel" in variable.name:
            parts = [part.T for part in parts]
        variable.assign(np.concatenate(parts, axis=-1))


def get_weights(model: keras.Model, config: EncoderConfig) -> Weights:
    """Return the model's weights, classifier included, under canonical names as float32."""
    weights: Weights = {}
    for variable, names in _variables(model, config):
        value = np.asarray(variable.numpy(), dtype=np.float32)
        for name, part in zip(names, np.split(value, len(names), axis=-1), strict=True):
            weights[name] = np.ascontiguousarray(part.T if "kernel" in variable.name else part)
    return weights


def _variables(model: keras.Model, config: EncoderConfig) -> list[tuple[tf.Variable, list[str]]]:
    """Pair each variable with the canonical weights that it holds side by side (query, key, value in one)."""
    layer = model.get_layer
    pairs = [(layer("embeddings").table, ["embeddings.word_embeddings.weight"])]
    positions = layer("positions")
    pairs.append((positions.table, ["embeddings.position_embeddings.weight"]))
    if config.type_vocab_size:
        pairs.append((positions.type_table, ["embeddings.token_type_embeddings.weight"]))
    if config.relative_attention_buckets:
        pairs.append((layer("attention_bias").table, ["relative_attention_bias.weight"]))

    def linear(keras_name: str, *names: str) -> None:
        pairs.append((layer(keras_name).kernel, [f"{name}.weight" for name in names]))
        pairs.append((layer(keras_name).bias, [f"{name}.bias" for name in names]))

    def norm(keras_name: str, name: str) -> None:
        pairs.append((layer(keras_name).gamma, [f"{name}.weight"]))
        pairs.append((layer(keras_name).beta, [f"{name}.bias"]))

    if config.embedding_size != config.hidden_size:
        linear("embeddings_projection", "embeddings.projection")
    norm("embeddings_norm", "embeddings.LayerNorm")
    for i in range(config.n_layers):
        linear(f"layer_{i}_qkv", *(f"layer.{i}.attention.{part}" for part in ("query", "key", "value")))
        linear(f"layer_{i}_attention_output", f"layer.{i}.attention.output")
        norm(f"layer_{i}_attention_norm", f"layer.{i}.attention.LayerNorm")
        linear(f"layer_{i}_intermediate", f"layer.{i}.intermediate")
        linear(f"layer_{i}_output", f"layer.{i}.output")
        norm(f"layer_{i}_output_norm", f"layer.{i}.output.LayerNorm")
    linear("classifier", "classifier")
    return pairs


def _dropout_layers(model: keras.Model) -> list[Any]:
    return [layer for layer in model.layers if getattr(layer, "state", None) is not None]


def _dropout(x: tf.Tensor, rate: float, state: tf.Tensor) -> tf.Tensor:
    """Drop with 8-bit random numbers: the rate is rounded to a multiple of 1/256, and the scale fits what is drawn."""
    level = max(1, round(rate * 256))
    n = tf.size(x)
    words = tf.random.stateless_uniform([(n + 3) // 4], state, minval=None, maxval=None, dtype=tf.uint32)
    bytes_ = tf.reshape(tf.bitcast(words, tf.uint8), [-1])[:n]
    keep = tf.reshape(bytes_ >= level, tf.shape(x))
    return x * (tf.cast(keep, x.dtype) * tf.cast(256.0 / (256.0 - level), x.dtype))


class SeededDropout(keras.layers.Layer):
    """Dropout whose mask depends on `state` (set by `set_dropout_state`) alone; off outside training."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        if not 0 <= rate < 1:
            raise ConfigError(f"dropout rate {rate} is not in [0, 1)")
        self.rate = rate
        self.state = (
            self.add_weight(name="state", shape=(2,), dtype="int32", initializer="zeros", trainable=False)
            if rate
            else None
        )

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return _dropout(x, self.rate, self.state) if training and self.rate else x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


class WordEmbeddings(keras.layers.Layer):
    """Look words up: (b, t) ids to (b * t, e) float32 rows."""

    def __init__(self, config: EncoderConfig, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.config = config
        self.table = self.add_weight(
            name="word_embeddings", shape=(config.vocab_size, config.embedding_size), initializer=_normal()
        )

    def call(self, input_ids: tf.Tensor) -> tf.Tensor:
        return tf.gather(self.table, tf.reshape(input_ids, [-1]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config}


class PositionEmbeddings(keras.layers.Layer):
    """Add position (and segment 0) rows to word rows."""

    def __init__(self, config: EncoderConfig, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.config = config
        self.table = self.add_weight(
            name="position_embeddings", shape=(config.max_positions, config.hidden_size), initializer=_normal()
        )
        if config.type_vocab_size:
            self.type_table = self.add_weight(
                name="token_type_embeddings",
                shape=(config.type_vocab_size, config.hidden_size),
                initializer=_normal(),
            )

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        words, input_ids = inputs
        length = tf.shape(input_ids)[1]
        offset = self.config.position_offset
        positions = self.table[offset : offset + length]  # (t, d): rows of a batch are filled up at their ends
        if self.config.type_vocab_size:
            positions += self.type_table[0]
        d = self.config.hidden_size
        rows = tf.reshape(words, tf.concat([tf.shape(input_ids), [d]], 0)) + positions
        return tf.reshape(rows, [-1, d])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config}


class LayerNorm(keras.layers.Layer):
    """Layer normalization of rows in float32 (Ba et al., 2016, arXiv:1607.06450)."""

    def __init__(self, epsilon: float, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.epsilon = epsilon

    def build(self, shape: tf.TensorShape) -> None:
        self.gamma = self.add_weight(name="gamma", shape=(shape[-1],), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(shape[-1],), initializer="zeros")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        return centred * tf.math.rsqrt(variance + self.epsilon) * self.gamma + self.beta

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


class Residual(keras.layers.Layer):
    """Add a sublayer's output to the float32 residual stream."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        stream, update = inputs
        return tf.cast(stream, tf.float32) + tf.cast(update, tf.float32)


class Gelu(keras.layers.Layer):
    """Exact gelu (Hendrycks and Gimpel, 2016, arXiv:1606.08415), written with erf: tf2onnx knows no erfc."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        wide = tf.cast(x, tf.float32)
        return tf.cast(0.5 * wide * (1.0 + tf.math.erf(wide * math.sqrt(0.5))), x.dtype)


class AttentionBias(keras.layers.Layer):
    """What is added to attention scores: a large negative number on padding, and mpnet's relative positions."""

    def __init__(self, config: EncoderConfig, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.config = config
        if config.relative_attention_buckets:
            self.table = self.add_weight(
                name="relative_attention_bias",
                shape=(config.relative_attention_buckets, config.n_heads),
                initializer=_normal(),
            )

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        input_ids, mask = inputs
        bias = (1.0 - tf.cast(mask[:, None, None, :], tf.float32)) * -30000.0  # finite in every precision (D11)
        if self.config.relative_attention_buckets:
            buckets = _relative_buckets(tf.shape(input_ids)[1], self.config.relative_attention_buckets)  # (t, t)
            bias += tf.transpose(tf.gather(self.table, buckets), [2, 0, 1])[None]  # (1, h, t, t)
        return bias

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config}


def _relative_buckets(length: tf.Tensor, n_buckets: int, max_distance: int = 128) -> tf.Tensor:
    """Bucket of every (query, key) distance: near ones exact, far ones on a log scale (T5's rule, arXiv:1910.10683)."""
    positions = tf.range(length)
    distance = positions[:, None] - positions[None, :]  # query minus key
    half = n_buckets // 2
    exact = half // 2
    side = tf.where(distance < 0, half, 0)
    distance = tf.abs(distance)
    scale = (half - exact) / math.log(max_distance / exact)
    logarithm = tf.math.log(tf.cast(tf.maximum(distance, 1), tf.float32) / exact)
    far = tf.minimum(exact + tf.cast(logarithm * scale, tf.int32), half - 1)
    return side + tf.where(distance < exact, distance, far)


class Attention(keras.layers.Layer):
    """Scaled dot-product attention over packed queries, keys and values: (n, 3d) and a bias to (n, d)."""

    def __init__(self, n_heads: int, dropout_rate: float, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.n_heads = n_heads
        self.rate = dropout_rate
        self.state = (
            self.add_weight(name="state", shape=(2,), dtype="int32", initializer="zeros", trainable=False)
            if dropout_rate
            else None
        )

    def call(self, inputs: list[tf.Tensor], training: bool | None = None) -> tf.Tensor:
        qkv, bias = inputs
        d = qkv.shape[-1] // 3
        head_size = d // self.n_heads
        length = tf.shape(bias)[-1]
        packed = tf.reshape(qkv, tf.stack([-1, length, 3, self.n_heads, head_size]))
        packed = tf.transpose(packed, [2, 0, 3, 1, 4])  # (3, b, h, t, head)
        query, key, value = tf.unstack(packed)  # its gradient stacks; that of three slices fills zeros and adds
        query *= tf.cast(1.0 / math.sqrt(head_size), query.dtype)
        scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32) + bias
        probabilities = tf.nn.softmax(scores)
        if training and self.rate:
            probabilities = _dropout(probabilities, self.rate, self.state)
        context = tf.matmul(tf.cast(probabilities, value.dtype), value)  # (b, h, t, head)
        return tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [-1, d])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "n_heads": self.n_heads, "dropout_rate": self.rate}


class Pooling(keras.layers.Layer):
    """One state per text: the mean over its real tokens, or its first token's."""

    def __init__(self, pooling: str, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.pooling = pooling

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        hidden, mask = inputs
        rows = tf.reshape(hidden, tf.concat([tf.shape(mask), [hidden.shape[-1]]], 0))  # (b, t, d)
        if self.pooling == "cls":
            return rows[:, 0]
        weights = tf.cast(mask, tf.float32)[:, :, None]
        return tf.reduce_sum(rows * weights, 1) / tf.reduce_sum(weights, 1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pooling": self.pooling}


def _normal() -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=0.02, seed=0)
