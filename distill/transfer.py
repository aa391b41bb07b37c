"""A student's states and attention relations drawn towards those of the pretrained encoder that it was cut from.

Hidden states: the student's k-th of m layers is matched with the teacher's layer k * n / m, and the embeddings with the
embeddings (Jiao et al., 2020, arXiv:1909.10351), after each token's state is normalized without gain, so that the few
large dimensions of these encoders do not decide alone. Relations: the softmax of query-query, key-key and value-value
products of the last layers (Wang et al., 2021, arXiv:2012.15828), in as many relation heads as fit both widths.

The teacher is run in the same step, without a gradient. Its states would take gigabytes if saved (43,000 texts of 20
tokens in 4 layers of width 384 in float16: 2.6 GB, the relations once more), its run takes a forward pass and no memory
beyond its weights. It reads the student's tokens: pieces that the student's vocabulary lacks are spelt for both alike.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from numpy.typing import NDArray

from emodistill.checkpoints import ModelCheckpoint, Weights, load_encoder_weights
from emodistill.classifier_training import Arrange, Trainee
from emodistill.encoder_config import EncoderConfig
from emodistill.encoder_graph import build_classifier, hidden_state_names, set_weights
from emodistill.training import Loss

__all__ = ["TransferLoss", "arrange_transfer", "matched_layers", "with_transfer"]

_WORD_TABLE = "embeddings.word_embeddings.weight"
_PADDING = -30000.0


def matched_layers(n_student: int, n_teacher: int) -> list[int]:
    """Return which teacher states (0 is the embeddings) the student's embeddings and layers are matched with.

    Examples
    --------
    >>> matched_layers(3, 6)
    [0, 2, 4, 6]
    """
    return [round(k * n_teacher / n_student) for k in range(n_student + 1)]


def with_transfer(loss: Loss) -> Loss:
    """Let a loss of logits take the outputs of `arrange_transfer`'s model: logits and the transfer loss of each row."""

    def total(outputs: Sequence[tf.Tensor], *targets: tf.Tensor) -> tf.Tensor:
        logits, transfer = outputs
        return loss(logits, *targets) + tf.reduce_mean(transfer)

    return total


def arrange_transfer(
    start: ModelCheckpoint, encoder_dir: Path, *, hidden_weight: float, relation_weight: float, precision: str
) -> Arrange:
    """Make the arrangement in which a student is trained beside its pretrained encoder.

    Parameters
    ----------
    start
        The student before training.
    encoder_dir
        Hugging Face folder of the encoder that it was cut from.
    hidden_weight, relation_weight
        Of the two losses; a loss of weight 0 is not computed.
    precision
        See `emodistill.encoder_graph.build_classifier`.

    Returns
    -------
    callable
        For `emodistill.classifier_training.train_classifier`; use it with a loss of `with_transfer`.
    """
    config, weights = _teacher_on_student_tokens(start, encoder_dir)

    def arrange(
        classifier: keras.Model, used_pieces: NDArray[np.int32], _token_ids: Sequence[NDArray[np.int32]]
    ) -> Trainee:
        teacher = _states_model(config, weights, used_pieces, precision)
        states, qkv = teacher(classifier.inputs)
        inputs: dict[str, Any] = {"mask": classifier.inputs[1]}
        if hidden_weight:
            own = [classifier.get_layer(name).output for name in hidden_state_names(start.config)]
            matched = [states[k] for k in matched_layers(start.config.n_layers, config.n_layers)]
            if start.config.hidden_size != config.hidden_size:
                kernel = _projection_start(start, weights)
                own = [_projection(kernel, f"transfer_projection_{k}")(state) for k, state in enumerate(own)]
            inputs |= {"student_states": own, "teacher_states": matched}
        if relation_weight:
            last = classifier.get_layer(f"layer_{start.config.n_layers - 1}_qkv").output
            inputs |= {"student_qkv": last, "teacher_qkv": qkv}
        n_heads = math.gcd(math.gcd(start.config.hidden_size, config.hidden_size), config.n_heads)
        loss = TransferLoss(hidden_weight, relation_weight, n_heads, name="transfer")(inputs)
        return Trainee(model=keras.Model(classifier.inputs, [classifier.output, loss], name="student_with_encoder"))

    return arrange


def _teacher_on_student_tokens(start: ModelCheckpoint, encoder_dir: Path) -> tuple[EncoderConfig, Weights]:
    """Return the whole encoder, its word table in the order of the student's vocabulary."""
    from tokenizers import Tokenizer

    from emodistill.tokenization import load_tokenizer

    config, weights = load_encoder_weights(encoder_dir)
    if start.config.vocab_size == config.vocab_size:
        return config, weights
    own = Tokenizer.from_str(start.tokenizer_json).get_vocab()
    pieces = load_tokenizer(encoder_dir).get_vocab()
    old_ids = np.zeros(start.config.vocab_size, np.int64)
    for piece, new_id in own.items():
        old_ids[new_id] = pieces[piece]
    config = replace(config, vocab_size=len(old_ids), pad_token_id=start.config.pad_token_id)
    return config, weights | {_WORD_TABLE: weights[_WORD_TABLE][old_ids]}


def _states_model(
    config: EncoderConfig, weights: Weights, used_pieces: NDArray[np.int32], precision: str
) -> keras.Model:
    """Build the frozen encoder up to its states (embeddings first) and the packed query, key and value of its top."""
    config = replace(config, vocab_size=len(used_pieces))
    model = build_classifier(
        config, 1, dropout_rate=0, attention_dropout_rate=0, classifier_dropout_rate=0, precision=precision
    )
    set_weights(model, config, weights | {_WORD_TABLE: weights[_WORD_TABLE][used_pieces]})
    states = [model.get_layer(name).output for name in hidden_state_names(config)]
    qkv = model.get_layer(f"layer_{config.n_layers - 1}_qkv").output
    teacher = keras.Model(model.inputs, [states, qkv], name="pretrained_encoder")
    teacher.trainable = False
    return teacher


def _projection_start(start: ModelCheckpoint, teacher: Weights) -> NDArray[np.float32]:
    """Return the linear map (k, d) from the student's word rows to the encoder's that has the least squared error."""
    own = start.weights[_WORD_TABLE]
    if "embeddings.projection.weight" in start.weights:
        own = own @ start.weights["embeddings.projection.weight"].T
    kernel, *_ = np.linalg.lstsq(own, teacher[_WORD_TABLE], rcond=None)
    return np.asarray(kernel, np.float32)


def _projection(kernel: NDArray[np.float32], name: str) -> keras.layers.Layer:
    return keras.layers.Dense(
        kernel.shape[1], use_bias=False, kernel_initializer=keras.initializers.Constant(kernel), name=name
    )


class TransferLoss(keras.layers.Layer):
    """Weighted loss of each row, float32 (batch,): mean over its real tokens, and over layers or relations and heads.

    Parameters
    ----------
    hidden_weight, relation_weight
        Of squared differences of normalized states, and of the divergence of relations, teacher from student.
    n_relation_heads
        Divides both widths.
    """

    def __init__(self, hidden_weight: float, relation_weight: float, n_relation_heads: int, **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.hidden_weight = hidden_weight
        self.relation_weight = relation_weight
        self.n_relation_heads = n_relation_heads

    def call(self, inputs: dict[str, Any]) -> tf.Tensor:
        mask = tf.cast(inputs["mask"], tf.float32)  # (b, t)
        tokens = tf.zeros_like(mask)  # (b, t)
        if self.hidden_weight:
            pairs = list(zip(inputs["student_states"], inputs["teacher_states"], strict=True))
            errors = [tf.reduce_mean(tf.square(_normed(own) - _normed(other)), -1) for own, other in pairs]  # (n,)
            tokens += self.hidden_weight / len(pairs) * tf.reshape(tf.add_n(errors), tf.shape(mask))
        if self.relation_weight:
            own = self._log_relations(inputs["student_qkv"], mask)  # (3, b, h, t, t)
            other = self._log_relations(inputs["teacher_qkv"], mask)
            divergence = tf.reduce_sum(tf.exp(other) * (other - own), -1)  # (3, b, h, t)
            tokens += self.relation_weight * tf.reduce_mean(divergence, [0, 2])
        return tf.reduce_sum(tokens * mask, 1) / tf.reduce_sum(mask, 1)

    def _log_relations(self, qkv: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Return log softmax over the real tokens of a text of its states' products: (3, b, h, t, t)."""
        head_size = qkv.shape[-1] // 3 // self.n_relation_heads
        shape = tf.concat([tf.shape(mask), [3, self.n_relation_heads, head_size]], 0)
        parts = tf.transpose(tf.reshape(tf.cast(qkv, tf.float32), shape), [2, 0, 3, 1, 4])  # (3, b, h, t, head)
        scores = tf.matmul(parts, parts, transpose_b=True) / math.sqrt(head_size)
        return tf.nn.log_softmax(scores + (1.0 - mask[None, :, None, None, :]) * _PADDING)

    def get_config(self) -> dict[str, Any]:
        weights = {"hidden_weight": self.hidden_weight, "relation_weight": self.relation_weight}
        return {**super().get_config(), **weights, "n_relation_heads": self.n_relation_heads}


def _normed(states: tf.Tensor) -> tf.Tensor:
    """Give each token's state mean 0 and variance 1."""
    centred = tf.cast(states, tf.float32)
    centred -= tf.reduce_mean(centred, -1, keepdims=True)
    return centred * tf.math.rsqrt(tf.reduce_mean(tf.square(centred), -1, keepdims=True) + 1e-6)
